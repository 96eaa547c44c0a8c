"""The rewards of self-critical training, CIDEr-D and BLEU-4 on the device, against the scorer on the host."""

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.metrics import bleu, cider
from imgcap_jax.metrics.bleu_device import bleu_4
from imgcap_jax.metrics.cider_device import (
    DocumentFrequencies,
    cider_d,
    document_frequencies,
    prepare_references,
    reference_norms,
)
from imgcap_jax.metrics.corpus import ORDERS, References
from imgcap_jax.metrics.scoring import CaptionScorer
from imgcap_jax.text import tokenize

FIRST = 4  # ids below are special


def padded(captions: list[list[int]], length: int) -> np.ndarray:
    return np.array([caption + [0] * (length - len(caption)) for caption in captions], np.int32)


def texts(captions: list[list[int]]) -> list[str]:
    """The same captions as text for the host; the tokeniser keeps words such as ``w5`` whole."""
    return [" ".join(f"w{word}" for word in caption) for caption in captions]


def both(
    references: list[list[list[int]]],
    candidates: list[list[list[int]]],
    corpus: list[list[list[int]]],
    words: int,
    metric: str = "CIDEr-D",
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [B,M] of the device and of the host. CIDEr-D uses document frequencies of ``corpus``."""
    frequencies = document_frequencies(corpus, words)
    most, longest = max(map(len, references)), 1 + max(len(c) for group in (*references, *candidates) for c in group)
    tokens = np.stack([padded(group + [[]] * (most - len(group)), longest) for group in references])
    count = jnp.array([len(group) for group in references])

    @jax.jit
    def score(given: Any, tokens: Any) -> Any:
        reward = bleu_4 if metric == "BLEU-4" else cider_d
        return reward(given, prepare_references(tokens, count, frequencies), frequencies)

    found = np.asarray(score(np.stack([padded(group, longest) for group in candidates]), tokens))
    documents = References.from_captions({i: texts(group) for i, group in enumerate(corpus)}).tokens

    def prepare(given: References) -> Any:
        return cider.ClippedScorer(cider.Vectors(given, documents))

    metrics: dict[str, Any] = {"CIDEr-D": prepare} if metric == "CIDEr-D" else {"BLEU": bleu.prepare}
    scorer = CaptionScorer({i: texts(group) for i, group in enumerate(references)}, metrics)
    expected = [
        list(scorer.score({i: texts(group)[m] for i, group in enumerate(candidates)}).per_image[metric].values())
        for m in range(len(candidates[0]))
    ]
    return found, np.array(expected).T


@pytest.mark.parametrize(("metric", "high"), [("CIDEr-D", 5), ("BLEU-4", 0.99)])
def test_device_and_host_scores_are_equal(metric: str, high: float) -> None:
    """Includes repeated n-grams, empty and identical captions, and words and n-grams that are not in the corpus."""
    rng = random.Random(0)

    def caption(words: int = 12, longest: int = 14) -> list[int]:
        return [rng.randrange(FIRST, FIRST + words) for _ in range(rng.randint(0, longest))]

    corpus = [[caption() for _ in range(rng.randint(1, 5))] for _ in range(60)]
    references = [*corpus[:30], *([caption(15) for _ in range(rng.randint(1, 4))] for _ in range(30))]
    candidates = [[caption(16), caption(5, 20), list(group[0]), [], [3, *group[0], 3], [4] * 9] for group in references]
    found, expected = both(references, candidates, corpus, FIRST + 14, metric)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.max() > high
    assert (expected < 1e-6).any()


def test_document_frequencies_equal_a_plain_count() -> None:
    rng = random.Random(1)
    corpus = [[[rng.randrange(4, 10) for _ in range(rng.randint(0, 8))] for _ in range(3)] for _ in range(20)]
    frequencies = document_frequencies(corpus, words=10)
    for order in range(1, ORDERS + 1):
        images: dict[tuple[int, ...], set[int]] = {}
        for image, captions in enumerate(corpus):
            for caption in captions:
                for i in range(len(caption) - order + 1):
                    images.setdefault(tuple(caption[i : i + order]), set()).add(image)
        expected = [np.log(20) - np.log(len(images[gram])) for gram in sorted(images)]
        held = np.asarray(frequencies.idf[order - 1])
        if order == 1:
            held = held[sorted(word for (word,) in images)]
        np.testing.assert_allclose(held, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at least two images"):
        document_frequencies(corpus[:1], 10)


def test_candidate_that_equals_a_reference() -> None:
    corpus = [[[4, 5, 6, 7]], [[8, 9]], [[10, 11, 12]]]
    references = [[[4, 5, 6, 7]], [[4, 5, 6, 7], [20, 21, 22, 23]], [[10, 11, 12]]]
    candidates = [[[4, 5, 6, 7]], [[4, 5, 6, 7]], [[10, 11, 12]]]
    found, _ = both(references, candidates, corpus, words=24)
    np.testing.assert_allclose(found[:, 0], [10, 5, 7.5], rtol=1e-6)


def test_eos_counts_as_a_word() -> None:
    """A candidate with eos matches the n-grams of the reference that contain eos; one without eos does not."""
    corpus = [[[4, 5, 6, 2]], [[7, 8, 2]], [[9, 10]]]
    found, expected = both([[[4, 5, 6, 2]]], [[[4, 5, 6, 2], [4, 5, 6]]], corpus, words=11)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0, 0] > found[0, 1]


def test_save_and_load_document_frequencies(tmp_path: Path) -> None:
    frequencies = document_frequencies([[[4, 5, 6, 7], [4, 5]], [[8, 9]]], 10)
    frequencies.save(tmp_path / "kept.npz", "these")
    kept = DocumentFrequencies.load(tmp_path / "kept.npz", "these")
    assert jax.tree.structure(kept) == jax.tree.structure(frequencies)
    for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(frequencies), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match="other captions"):
        DocumentFrequencies.load(tmp_path / "kept.npz", "others")
    whole = (tmp_path / "kept.npz").read_bytes()
    for damaged in (whole[:200], b"", b"text"):
        (tmp_path / "kept.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged \(.*\): delete it"):
            DocumentFrequencies.load(tmp_path / "kept.npz", "these")
    with np.load(io.BytesIO(whole)) as file:
        arrays = dict(file)
    changed = arrays["idf0"].copy()
    changed[-1] += 1
    np.savez(tmp_path / "kept.npz", **arrays | {"idf0": changed})
    with pytest.raises(UserError, match=r"damaged \(its digest differs\): delete it"):
        DocumentFrequencies.load(tmp_path / "kept.npz", "these")
    del arrays["digest"]  # as earlier versions wrote it
    np.savez(tmp_path / "kept.npz", **arrays)
    assert DocumentFrequencies.load(tmp_path / "kept.npz", "these").unseen == frequencies.unseen


def test_arrays_have_32_bits_and_there_is_no_callback() -> None:
    frequencies = document_frequencies([[[4, 5, 6, 7]], [[8, 9]]], 10)
    tokens = jnp.array([[[4, 5, 6, 7, 0]]])
    references = prepare_references(tokens, jnp.ones(1), frequencies)
    text = str(jax.make_jaxpr(lambda given: cider_d(given, references, frequencies))(tokens))
    assert not re.search("[iuf]64", text)
    assert "callback" not in text


def test_norms_of_a_dataset_equal_those_of_a_batch() -> None:
    """Captions of all lengths from 0 to 40, more than are computed together."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([np.arange(41), rng.integers(5, 12, 2100)])
    captions = [rng.integers(4, 12, length).tolist() for length in lengths]
    frequencies = document_frequencies([[caption] for caption in captions], 12)
    tokens = padded(captions, 40)
    found = reference_norms(tokens, frequencies)
    expected = prepare_references(jnp.asarray(tokens[:, None]), jnp.ones(len(tokens)), frequencies).norm[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.min() == 0 < found[40].min()


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_device_and_host_scores_of_real_captions_are_equal(count: int, shared: Path) -> None:
    """Up to 10,000 candidates: captions of the same or another photo, cut, repeated or with unknown words."""
    karpathy = json.loads((shared / "flickr8k" / "dataset_flickr8k.json").read_text())
    rng = random.Random(0)
    number: dict[str, int] = {}
    images = [[tokenize(text["raw"]) for text in image["sentences"]] for image in karpathy["images"]]
    for image in images:
        for caption in image:
            for word in caption:
                number.setdefault(word, FIRST + len(number))
    corpus = [[[number[word] for word in caption] for caption in image] for image in images[1000:]]
    references = [[[number[word] for word in caption] for caption in image] for image in images[:count]]
    candidates = []
    for group in references:
        own, other = rng.choice(group), rng.choice(rng.choice(references))
        cut = own[: len(own) // 2]
        candidates.append([own, other, cut + cut, [word if rng.random() < 0.8 else 3 for word in own], cut + other])
    for metric in ("CIDEr-D", "BLEU-4"):
        found, expected = both(references, candidates, corpus, FIRST + len(number), metric)
        assert found.size == 5 * count
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=metric)
