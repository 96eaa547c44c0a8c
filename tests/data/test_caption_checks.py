"""Notes on captions that are not separated into words, or that a vocabulary does not cover."""

import random

import pytest

from imgcap_jax.data.caption_checks import CaptionCounts, vocabulary_notes
from imgcap_jax.data.caption_tokens import CaptionTokens
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.tokenizers import DEFAULT, Characters, Tokenizer

CHINESE = ["红色", "蓝色", "绿色", "大", "小", "方块", "圆", "背景", "上", "的", "一个"]
THAI = ["สีแดง", "สีน้ำเงิน", "สี่เหลี่ยม", "ใหญ่", "บน", "พื้น"]
GERMAN = ["Ein", "rotes", "großes", "Quadrat", "auf", "blauem", "Hintergrund", "mit", "Straßenbeleuchtung"]


def texts(words: list[str], separator: str, end: str = "") -> list[str]:
    rng = random.Random(0)
    return [separator.join(rng.choices(words, k=rng.randint(5, 9))) + end for _ in range(60)]


def tokens(captions: list[str], tokenizer: Tokenizer = DEFAULT) -> CaptionTokens:
    return CaptionTokens.of_images([captions], tokenizer)


def notes(captions: list[str], tokenizer: Tokenizer = DEFAULT, min_count: int = 5) -> list[str]:
    try:
        vocabulary = Vocabulary.build(captions, min_count, tokenizer)
    except UserError:
        vocabulary = None
    counts = CaptionCounts.of([tokens(captions, tokenizer)], vocabulary)
    return vocabulary_notes(counts, counts, vocabulary, min_count)


@pytest.mark.parametrize(
    "captions",
    [
        texts(CHINESE, "", "。"),
        texts(THAI, ""),
        texts(["red", "dog", "on", "grass"], "_") * 2,
        texts(["😀", "🔴"], " "),  # the default tokeniser drops emoji
    ],
)
def test_text_that_is_not_separated_into_words(captions: list[str]) -> None:
    note, *others = notes(captions)
    assert note.startswith("the captions do not seem to be separated into words")
    assert "use --data.tokenizer characters" in note
    assert others  # the words are rare, or there are none; this note does not hide it


@pytest.mark.parametrize("captions", [texts(CHINESE, "", "。"), texts(THAI, ""), texts(["😀", "🔴"], " ")])
def test_characters_fit_such_text(captions: list[str]) -> None:
    assert notes(captions, Characters()) == []


@pytest.mark.parametrize("captions", [texts(CHINESE, " ", "。"), texts(THAI, " "), texts(GERMAN, " ")])
def test_text_with_blanks_between_words_has_no_note(captions: list[str]) -> None:
    assert notes(captions) == []


@pytest.mark.parametrize("tokenizer", [DEFAULT, Characters()])
@pytest.mark.parametrize("words", [["dog", "cat", "airplane"], ["狗", "猫"], ["A dog.", "Cat!", "zebra"]])
def test_short_captions_are_words(words: list[str], tokenizer: Tokenizer) -> None:
    assert notes(words * 20, tokenizer) == []


def test_long_captions_of_a_single_character_token() -> None:
    (note,) = notes(["dog_on_green_grass_in_the_park"] * 30)
    assert "most of them have one word or none" in note
    assert notes(["dogongreengrassinthepark"] * 200, Characters()) == []


def test_low_coverage() -> None:
    rare = [f"a dog w{number} x{number} y{number}" for number in range(30)]
    (note,) = notes(rare)
    assert "words that occur at least 5 times are only 40 % of the training words and 40 % of the validation" in note
    assert "use a smaller --data.min-count" in note
    assert notes(rare, min_count=1) == []
    vocabulary = Vocabulary.build(["a dog runs"], 1)
    training = CaptionCounts.of([tokens(["a dog"])], vocabulary)
    few, validation = (CaptionCounts.of([tokens(["two dogs run"] * count)], vocabulary) for count in (19, 20))
    assert vocabulary_notes(training, few, vocabulary, 1) == []
    (note,) = vocabulary_notes(training, validation, vocabulary, 1)
    assert "the words of the training captions are only 0 % of the validation words" in note
    assert "use more training captions" in note  # min_count cannot be smaller
    (none,) = notes([f"w{number} x{number}" for number in range(30)])
    assert none == "no word occurs 5 times in the training captions; train with a smaller --data.min-count"


def test_captions_without_words() -> None:
    assert notes(["a dog runs", "the cat", "😀", "."], min_count=1) == [
        "2 of 4 training captions have no words, so the model learns only to stop; remove them, or use another "
        "--data.tokenizer if it drops their characters"
    ]


def test_counts() -> None:
    vocabulary = Vocabulary.build(["a dog"], 1)
    counts = CaptionCounts.of([tokens(["a dog runs", "红色"]), tokens(["a dog", ""])], vocabulary)
    assert (counts.captions, counts.lengths, counts.words, counts.known) == (4, (1, 1, 1, 1), 6, 4)
    assert (counts.unsegmented, counts.coverage, counts.share_longer(2)) == ("", pytest.approx(4 / 6), 0.25)
