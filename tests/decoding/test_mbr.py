"""Minimum Bayes risk against brute force with the scorers of the host and NLTK."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from imgcap_jax.decoding.decoded import Decoded
from imgcap_jax.decoding.mbr import candidate_probabilities, joined, rerank
from imgcap_jax.decoding.rules import FORBIDDEN
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.metrics import cider
from imgcap_jax.metrics.agreement import Utility, expected_utility, most_agreed
from imgcap_jax.metrics.cider_device import document_frequencies
from imgcap_jax.metrics.corpus import References
from imgcap_jax.metrics.scoring import CaptionScorer
from imgcap_jax.special_tokens import EOS, PAD

CORPUS = [
    ["a dog runs on the grass", "a brown dog runs"],
    ["a man rides a bike", "the man is on a bike in the park"],
    ["two dogs play with a red ball", "a dog and a cat"],
    ["a man and a dog on the beach", "a man walks on the beach"],
]
CANDIDATES = [
    ["a dog runs on the grass", "a brown dog runs on grass", "two dogs play", "a man"],
    ["a man rides a bike on the beach", "a man is on a bike", "a man and a dog on the beach", "the man rides a bike"],
]
WEIGHTS = np.array([[0.5, 0.2, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2]], np.float32)


def gains(cider_weight: float, bleu_weight: float) -> np.ndarray:
    """The utility [B,K,K] of each candidate with each other one as its only reference, by the scorers of the host."""
    documents = References.from_captions(dict(enumerate(CORPUS))).tokens

    def prepare(given: References) -> Any:
        return cider.ClippedScorer(cider.Vectors(given, documents))

    found = np.zeros((2, 4, 4))
    for image, texts in enumerate(CANDIDATES):
        for k, ours in enumerate(texts):
            for r, theirs in enumerate(texts):
                score = CaptionScorer({0: [theirs]}, {"CIDEr-D": prepare}).score({0: ours}).values["CIDEr-D"]
                smooth = SmoothingFunction().method2
                bleu = sentence_bleu([theirs.split()], ours.split(), smoothing_function=smooth)
                found[image, k, r] = cider_weight * score + bleu_weight * bleu
    return found


def encoded() -> tuple[np.ndarray, Any]:
    """The candidates int32 [B,K,T], each with eos, and the document frequencies of the corpus."""
    ids: dict[str, int] = {}

    def of(text: str) -> list[int]:
        return [ids.setdefault(word, 4 + len(ids)) for word in text.split()]

    corpus = [[of(text) for text in texts] for texts in CORPUS]
    rows = [[[*of(text), EOS] for text in texts] for texts in CANDIDATES]
    tokens = np.array([[row + [PAD] * (10 - len(row)) for row in image] for image in rows], np.int32)
    return tokens, document_frequencies(corpus, 4 + len(ids))


@pytest.mark.parametrize(("cider_weight", "bleu_weight"), [(1.0, 0.0), (0.0, 2.0), (0.5, 3.0)])
def test_expected_utility_equals_that_of_the_scorers_on_the_host(cider_weight: float, bleu_weight: float) -> None:
    tokens, frequencies = encoded()
    found = jax.jit(lambda *given: expected_utility(*given, Utility(frequencies, cider_weight, bleu_weight)))(
        tokens, tokens, WEIGHTS
    )
    expected = (gains(cider_weight, bleu_weight) * WEIGHTS[:, None]).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_captions_are_ranked_by_expected_utility_and_repetitions_are_emptied() -> None:
    tokens, frequencies = encoded()
    # Caption 0 of each image a second time, as if two models had found it.
    tokens = np.concatenate([tokens, tokens[:, :1]], axis=1)
    weights = np.concatenate([WEIGHTS / 2, WEIGHTS[:, :1]], axis=1)
    weights /= weights.sum(1, keepdims=True)
    word_log_probs = np.where(tokens != PAD, -np.arange(1.0, 6)[None, :, None], 0).astype(np.float32)
    found = Decoded(
        *map(jnp.asarray, (tokens, word_log_probs, word_log_probs.sum(-1), -np.ones(tokens.shape[:2], np.float32))),
        jnp.int32(9),
    )
    ranked = rerank(found, found.tokens, jnp.asarray(weights), Utility(frequencies, 1.0, 0.0))
    merged = weights[:, :4].copy()
    merged[:, 0] += weights[:, 4]
    expected = (gains(1.0, 0.0) * merged[:, None]).sum(-1)
    for image in range(2):
        order = np.argsort(-expected[image])
        np.testing.assert_array_equal(ranked.tokens[image, :4], tokens[image, order])
        np.testing.assert_allclose(ranked.score[image, :4], expected[image, order], rtol=2e-4)
        np.testing.assert_array_equal(ranked.word_log_probs[image, :4], word_log_probs[image, order])
        assert not ranked.tokens[image, 4].any()
        assert ranked.score[image, 4] == FORBIDDEN


def test_probabilities_of_candidates() -> None:
    """Samples count alike, beams by the softmax of their scores, and empty beams not at all."""
    tokens = jnp.asarray([[[5, EOS], [6, EOS], [PAD, PAD]]])
    score = jnp.asarray([[-1.0, -2.0, FORBIDDEN]])
    found = Decoded(tokens, jnp.zeros((1, 3, 2)), score, score, jnp.int32(2))
    np.testing.assert_allclose(candidate_probabilities(found, drawn=True, temperature=1.0), [[0.5, 0.5, 0]])
    softmax = np.exp([-2.0, -4.0]) / np.exp([-2.0, -4.0]).sum()
    np.testing.assert_allclose(candidate_probabilities(found, drawn=False, temperature=0.5), [[*softmax, 0]], rtol=1e-6)
    both = joined([found, found])
    assert both.tokens.shape == (1, 6, 2)
    assert both.steps == 4


def test_the_caption_that_agrees_most_is_chosen_for_each_image() -> None:
    texts = {7: CANDIDATES[1], 3: CANDIDATES[1][::-1], 5: ["alone"]}
    equal = gains(1.0, 0.0)[1]
    best = {7: texts[7][equal.sum(1).argmax()], 3: texts[7][equal.sum(1).argmax()], 5: "alone"}
    assert best[3] != texts[3][0]
    assert most_agreed(texts, CORPUS) == best


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mbr_neighbours": 3}, "mbr_neighbours only affects rerank"),
        ({"rerank": "mbr", "beam": 1}, "of which there is one"),
        ({"rerank": "mbr", "mbr_neighbours_weight": 0.3}, "only affects mbr_neighbours"),
        ({"rerank": "mbr", "mbr_neighbours": 3, "mbr_neighbours_weight": 0.0}, "mbr_neighbours has no effect"),
        ({"rerank": "mbr", "samples": 4, "mbr_temperature": 2.0}, "mbr_temperature has no effect on samples"),
        ({"rerank": "mbr", "mbr_cider": 0.0}, "mbr_cider and mbr_bleu are both 0"),
        ({"rerank": "consensus"}, "mbr_neighbours is 0"),
        ({"rerank": "consensus", "mbr_neighbours": 3, "must": ("dog",)}, "must has no effect on consensus"),
        ({"rerank": "consensus", "mbr_neighbours": 3, "pool": True}, "pool has no effect on consensus"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Decoding(**settings)


def test_validation_during_training_searches_plainly() -> None:
    decoding = Decoding(beam=4, mirror=True, rerank="mbr", mbr_neighbours=3, forbid_repeated_words=True)
    assert decoding.plain(2) == Decoding(beam=2, forbid_repeated_words=True)
