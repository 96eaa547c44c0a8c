"""BLEU, ROUGE-L and CIDEr-D, compared with values by hand and with plain versions of the definitions."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu

from imgcap_jax.errors import UserError
from imgcap_jax.metrics.corpus import Candidates, MetricScores, References, mean_score
from imgcap_jax.metrics.scoring import CaptionScorer, available_metrics
from imgcap_jax.text import tokenize
from imgcap_jax.tokenizers import Characters

OTHERS = {2: ["two cats sleep on red chairs"], 3: ["some people ski down hills"]}


def score(candidate: str, references: list[str], metric: str) -> float:
    """The score of the first of three images. The other two images have none of its words."""
    scorer = CaptionScorer({1: references, **OTHERS})
    return scorer.score({1: candidate, 2: "two cats", 3: "some people"}).per_image[metric][1]


def test_identical_to_all_references() -> None:
    caption = "a dog runs fast"
    for metric in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert score(caption, [caption] * 5, metric) == pytest.approx(1, abs=1e-8)
    assert score(caption, [caption] * 5, "CIDEr-D") == pytest.approx(10)


def test_three_words_have_no_4_gram() -> None:
    assert score("a dog runs", ["a dog runs"], "CIDEr-D") == pytest.approx(7.5)
    # COCO's constants replace 0/0, so the score is small but not 0.
    assert score("a dog runs", ["a dog runs"], "BLEU-4") == pytest.approx((1e-15 / 1e-9) ** (1 / 4))


def test_identical_to_one_of_two_references() -> None:
    references = ["a dog runs fast", "the brown puppy sprints"]
    assert score(references[0], references, "CIDEr-D") == pytest.approx(5)
    assert score(references[0], references, "ROUGE-L") == pytest.approx(1)
    assert score(references[0], references, "BLEU-4") == pytest.approx(1, abs=1e-8)


def test_permuted_words() -> None:
    # All unigrams match and no bigram does; the longest common subsequence is one word of four.
    assert score("fast runs dog a", ["a dog runs fast"], "BLEU-1") == pytest.approx(1, abs=1e-8)
    assert score("fast runs dog a", ["a dog runs fast"], "BLEU-2") < 1e-6
    assert score("fast runs dog a", ["a dog runs fast"], "CIDEr-D") == pytest.approx(2.5)
    assert score("fast runs dog a", ["a dog runs fast"], "ROUGE-L") == pytest.approx(0.25)


def test_repeated_words_are_clipped() -> None:
    # "the" occurs twice in a reference, so two of the seven words count (Papineni et al., 2002, example 2).
    references = ["the cat is on the mat", "there is a cat on the mat"]
    assert score("the the the the the the the", references, "BLEU-1") == pytest.approx(2 / 7, abs=1e-8)


def test_brevity_penalty_uses_the_closest_length_and_the_shorter_on_a_tie() -> None:
    one, two = "a dog", "a dog runs fast over green fields"
    # 4 words; references of 2 and 7 words: 2 is closer, so there is no penalty.
    assert score("a dog barks loudly", [one, two], "BLEU-1") == pytest.approx(0.5, abs=1e-8)
    # 2 words; the only reference has 7 words: the penalty is exp(1 - 7/2).
    assert score("a dog", [two], "BLEU-1") == pytest.approx(np.exp(1 - 7 / 2), abs=1e-8)
    # 3 words; references of 2 and 4 words are equally close: the shorter one counts.
    assert score("a dog runs", ["a dog", "a dog runs fast"], "BLEU-1") == pytest.approx(1, abs=1e-8)


def test_cider_penalises_different_lengths() -> None:
    # A candidate of two words has one word in common with a reference of eight. All words have the same idf.
    reference = "dog b c d e f g h"
    expected = 10 / 4 * (1 / np.sqrt(2 * 8)) * np.exp(-(6**2) / (2 * 6**2))
    assert score("dog x", [reference], "CIDEr-D") == pytest.approx(expected)


def test_words_that_occur_in_every_image_do_not_count_for_cider() -> None:
    scorer = CaptionScorer({1: ["red a"], 2: ["a blue"]})
    assert scorer.score({1: "a", 2: "a"}).values["CIDEr-D"] == 0


def test_rouge_combines_the_best_precision_with_the_best_recall() -> None:
    # The long reference gives precision 1 and the short one recall 1; neither gives both.
    value = score("a dog runs", ["dog", "a dog runs fast over there"], "ROUGE-L")
    assert value == pytest.approx(1)
    # The LCS "a runs" has 2 of 3 words of the candidate and 2 of 4 words of the reference; beta is 1.2.
    expected = (1 + 1.44) * (2 / 3) * (2 / 4) / (2 / 4 + 1.44 * 2 / 3)
    assert score("a cat runs", ["a dog runs fast"], "ROUGE-L") == pytest.approx(expected)


def test_empty_candidate() -> None:
    scores = CaptionScorer({1: ["a dog runs fast"], **OTHERS}).score({1: "", 2: ".", 3: "some people"})
    assert all(scores.per_image[metric][1] < 1e-6 for metric in scores.values)
    assert all(np.isfinite(value) for value in scores.values.values())
    assert scores.warnings == ("2 of 3 candidates have no words; they score 0",)


def random_corpus(images: int, shortest: int = 1) -> tuple[dict[int, list[str]], dict[int, str]]:
    rng = random.Random(0)
    words = ["a", "the", "dog", "cat", "red", "runs"]

    def sentence() -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(shortest, 14)))

    references = {7 * i: [sentence() for _ in range(rng.randint(1, 6))] for i in range(images)}
    return references, {image: sentence() + rng.choice(["", " zebra zebra"]) for image in references}


def test_bleu_equals_nltk() -> None:
    # For sentences of fewer than four words nltk counts one n-gram although there is none.
    references, candidates = random_corpus(200, shortest=4)
    scores = CaptionScorer(references).score(candidates)
    split = [[tokenize(text) for text in texts] for texts in references.values()]
    hypotheses = [tokenize(candidates[image]) for image in references]
    for n in range(1, 5):
        expected = corpus_bleu(split, hypotheses, weights=[1 / n] * n)
        assert scores.values[f"BLEU-{n}"] == pytest.approx(expected, abs=1e-8)


def test_metrics_equal_plain_versions() -> None:
    """CIDEr-D and ROUGE-L with words that occur in no reference, repeated n-grams, and 1 to 6 references per image."""
    references, candidates = random_corpus(40)
    scores = CaptionScorer(references).score(candidates)
    tokens = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
    for image, candidate in candidates.items():
        words = tokenize(candidate)
        assert scores.per_image["CIDEr-D"][image] == pytest.approx(plain_cider(words, image, tokens), abs=1e-9)
        assert scores.per_image["ROUGE-L"][image] == pytest.approx(plain_rouge(words, tokens[image]))
    assert scores.values["CIDEr-D"] == pytest.approx(np.mean(list(scores.per_image["CIDEr-D"].values())))


def plain_cider(
    candidate: list[str],
    image: int,
    references: dict[int, list[list[str]]],
    corpus: dict[int, list[list[str]]] | None = None,
    *,
    original: bool = False,
) -> float:
    corpus = references if corpus is None else corpus

    def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def vector(words: list[str], n: int) -> dict[tuple[str, ...], float]:
        found = grams(words, n)
        result = {}
        for gram in set(found):
            images = sum(any(gram in grams(text, n) for text in texts) for texts in corpus.values())
            result[gram] = found.count(gram) * np.log(len(corpus) / max(1, images))
        return result

    total = 0.0
    for n in range(1, 5):
        mine = vector(candidate, n)
        for reference in references[image]:
            theirs = vector(reference, n)
            norms = np.linalg.norm(list(mine.values())) * np.linalg.norm(list(theirs.values()))
            dot = sum(
                (weight if original else min(weight, theirs.get(gram, 0))) * theirs.get(gram, 0)
                for gram, weight in mine.items()
            )
            difference = 0 if original else len(candidate) - len(reference)
            if norms:
                total += dot / norms * np.exp(-(difference**2) / 72)
    return 10 * total / 4 / len(references[image])


def plain_rouge(candidate: list[str], references: list[list[str]]) -> float:
    def common(a: list[str], b: list[str]) -> int:
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return int(table[-1, -1])

    lengths = [common(candidate, reference) for reference in references]
    precision = max(lengths) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(lengths, references, strict=True))
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0


def test_order_of_candidates_does_not_matter() -> None:
    references, candidates = random_corpus(50)
    scorer = CaptionScorer(references)
    shuffled = dict(sorted(candidates.items(), key=lambda item: item[1]))
    assert scorer.score(shuffled) == scorer.score(candidates)


def test_scoring_twice_gives_the_same_scores() -> None:
    """New n-grams in candidates must not change the cached references."""
    references, candidates = random_corpus(50)
    scorer = CaptionScorer(references)
    first = scorer.score(candidates)
    scorer.score(dict.fromkeys(candidates, "entirely other words in this caption"))
    assert scorer.score(candidates) == first


def test_signature() -> None:
    scorer = CaptionScorer({1: ["a dog", "dog"], **OTHERS})
    assert scorer.signature.endswith("|tok:ptb-coco|refs:1-2|n:3|" + ",".join(available_metrics()))
    assert scorer.signature.startswith("imgcap-")
    scores = scorer.score({1: "a", 2: "b", 3: "c"})
    assert scores.signature == scorer.signature
    assert scores.signatures["BLEU-2"].endswith("|refs:1-2|n:3|BLEU:closest")
    assert scores.signatures["CIDEr-D"].endswith("|refs:1-2|n:3|CIDEr-D:s6:idf=references")


def test_original_cider_equals_a_plain_version() -> None:
    """The original CIDEr is a plain cosine, without clipping and length penalty."""
    references, candidates = random_corpus(40)
    scores = CaptionScorer(references, available_metrics(original_cider=True)).score(candidates)
    tokens = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
    for image, candidate in candidates.items():
        expected = plain_cider(tokenize(candidate), image, tokens, original=True)
        assert scores.per_image["CIDEr (original)"][image] == pytest.approx(expected, abs=1e-9)


def test_document_frequencies_of_another_corpus() -> None:
    references, candidates = random_corpus(40)
    # The corpus has words that neither references nor candidates have, and lacks some words that they have.
    corpus = {image: [text + " yak", "a yak"] for image, text in zip(range(15), candidates.values(), strict=False)}
    scorer = CaptionScorer(references, available_metrics(corpus))
    scores = scorer.score(candidates)
    assert ":idf=corpus-15-" in scores.signature
    tokens = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
    documents = {image: [tokenize(text) for text in texts] for image, texts in corpus.items()}
    for image, candidate in candidates.items():
        expected = plain_cider(tokenize(candidate), image, tokens, documents)
        assert scores.per_image["CIDEr-D"][image] == pytest.approx(expected, abs=1e-9)


def test_one_image_has_a_cider_with_document_frequencies_of_another_corpus() -> None:
    corpus = {1: ["a dog"], 2: ["a cat"], 3: ["some people ski"]}
    scores = CaptionScorer({7: ["some people ski"]}, available_metrics(corpus)).score({7: "some people ski"})
    assert scores.values["CIDEr-D"] == pytest.approx(7.5)
    assert scores.warnings == ()
    with pytest.raises(UserError, match="at least two images"):
        available_metrics({1: ["a dog"]})
    # A different corpus of the same name gives a different signature.
    other = CaptionScorer({7: ["some people ski"]}, available_metrics(corpus | {3: ["people"]}))
    assert other.signature != scores.signature


def test_special_tokens_and_equal_candidates_are_reported() -> None:
    scores = CaptionScorer({1: ["a dog"], **OTHERS}).score({1: "a <unk> dog", 2: "two cats <eos>", 3: "some people"})
    assert "2 of 3 candidates contain a special token such as <unk>" in scores.warnings[0]
    assert "all 2 images have the same caption" in CaptionScorer(OTHERS).score({2: "a dog", 3: "A dog."}).warnings


def test_a_single_image_and_newlines_give_warnings() -> None:
    scores = CaptionScorer({1: ["a dog runs"]}).score({1: "a dog\nruns"})
    assert scores.values["CIDEr-D"] == 0
    assert scores.values["BLEU-1"] == pytest.approx(1, abs=1e-8)
    assert "one image" in scores.warnings[0]
    assert "newlines" in scores.warnings[1]


def test_custom_metric() -> None:
    def words(references: References) -> Callable[[Candidates], MetricScores]:
        return lambda candidates: {"words": mean_score(candidates.lengths)}

    scores = CaptionScorer({1: ["a dog"], **OTHERS}, {"words": words}).score({1: "a", 2: "b b", 3: "c"})
    assert scores.values == {"words": pytest.approx(4 / 3)}
    assert scores.per_image == {"words": {1: 1, 2: 2, 3: 1}}


def test_candidates_and_references_must_have_the_same_images() -> None:
    scorer = CaptionScorer({11: ["a dog"], 12: ["a cat"]})
    with pytest.raises(UserError, match="image 12 has no candidate"):
        scorer.score({11: "a dog"})
    with pytest.raises(UserError, match="candidate for image 99 has no references"):
        scorer.score({11: "a dog", 12: "a cat", 99: "a cow"})
    with pytest.raises(UserError, match="image 12 has no reference"):
        CaptionScorer({11: ["a dog"], 12: []})
    with pytest.raises(UserError, match="no references"):
        CaptionScorer({})


@pytest.mark.parametrize(
    ("references", "reason"),
    [
        ({1: ["a red dog runs"]}, "there is one image"),
        ({1: ["a red dog"], 2: ["a red dog"]}, "each n-gram of the references occurs in all images"),
        ({image: ["a product on white"] for image in range(40)}, "each n-gram of the references occurs in all images"),
    ],
)
def test_references_that_make_cider_0_are_reported_with_the_reason(
    references: dict[int, list[str]], reason: str
) -> None:
    scorer = CaptionScorer(references)
    assert len(scorer.warnings) == 1
    assert scorer.warnings[0].startswith("CIDEr-D is 0 for every caption, because")
    assert reason in scorer.warnings[0]
    scores = scorer.score({image: texts[0] for image, texts in references.items()})
    assert scores.values["CIDEr-D"] == 0  # although the captions are perfect
    assert scores.warnings[0] == scorer.warnings[0]


def test_images_on_which_cider_is_0_are_counted() -> None:
    scorer = CaptionScorer({1: ["a red dog"], 2: ["a"], 3: ["a cat"]})
    (warning,) = scorer.warnings
    assert warning.startswith("CIDEr-D is 0 for every caption of 1 of 3 images (first: image 2), because")
    assert scorer.score({1: "a red dog", 2: "a", 3: "a cat"}).per_image["CIDEr-D"][2] == 0
    assert CaptionScorer(OTHERS).warnings == ()
    # Document frequencies of another corpus give even a single image a score.
    metrics = available_metrics({1: ["a cat"], 2: ["some people"]})
    assert CaptionScorer({1: ["a red dog"]}, metrics).warnings == ()


def test_references_without_words_are_reported() -> None:
    scorer = CaptionScorer({1: ["a dog runs", " "], 2: [".", ""], **{3: OTHERS[3]}})
    assert scorer.warnings == (
        "1 of 3 images have only references without words (first: image 2); every caption of them scores 0: add "
        "captions, or remove these images",
        "1 of 5 references have no words; they lower CIDEr-D: remove them",
    )
    scores = scorer.score({1: "a dog", 2: "a dog", 3: "people"})
    assert all(scores.per_image[name][2] < 1e-6 for name in scores.values)
    assert scores.warnings[:2] == scorer.warnings


def test_warnings_of_a_custom_metric() -> None:
    class Short:
        def __init__(self, warnings: object) -> None:
            self.warnings = warnings

        def __call__(self, candidates: Candidates) -> MetricScores:
            return {"short": mean_score(candidates.lengths)}

    for warnings in (("references are short",), "references are short"):  # several lines, or one
        scorer = CaptionScorer(OTHERS, {"short": lambda references, warnings=warnings: Short(warnings)})
        assert scorer.warnings == ("references are short",)


def test_scores_of_characters() -> None:
    """Unsegmented Chinese has one word per caption for the default tokeniser, so that no word matches."""
    references = {1: ["一只狗在草地上跑"], 2: ["两只猫在睡觉"]}
    candidates = {1: "一只狗在草地上奔跑", 2: "两只猫"}
    words = CaptionScorer(references).score(candidates)
    assert words.values["BLEU-1"] < 1e-6
    assert "the references do not seem to be separated into words" in words.warnings[0]
    characters = CaptionScorer(references, tokenizer=Characters()).score(candidates)
    # 9 + 3 characters, 8 + 3 of them in the references; the lengths are 12 and 14.
    assert characters.values["BLEU-1"] == pytest.approx(11 / 12 * np.exp(1 - 14 / 12), abs=1e-8)
    assert "METEOR" not in characters.values
    assert "the tokenizer characters" in characters.missing["METEOR"]
    assert "|tok:characters|refs:1|n:2|BLEU:closest," in characters.signature
    assert "METEOR" not in characters.signature
    assert "|tok:ptb-coco|refs:1|n:2|BLEU:closest," in words.signature


def test_meteor_of_other_languages_is_warned_about() -> None:
    texts = {i: ["ein mann in einem roten hemd steht auf einer leiter", f"zwei hunde {i}"] for i in range(12)}
    warned = "do not seem to be English; METEOR is for English: check that they are English"
    metrics = {"METEOR:1.5-en-norm": lambda references: lambda candidates: {}}
    assert warned in CaptionScorer(texts, metrics).warnings[0]
    english = {i: ["a man in a red shirt stands on a ladder", f"the two dogs {i}"] for i in range(12)}
    assert CaptionScorer(english, metrics).warnings == ()


def test_one_caption_for_most_images_is_noted() -> None:
    scorer = CaptionScorer({image: [f"a dog {image}"] for image in range(12)})
    most = {image: "A man." if image < 11 else "a dog" for image in range(12)}
    assert "11 of 12 images have the same caption" in scorer.score(most).warnings
    half = {image: "a man" if image < 6 else f"dog {image}" for image in range(12)}
    assert not any("same caption" in line for line in scorer.score(half).warnings)
