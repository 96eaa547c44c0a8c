"""The tokenisers: characters of several scripts, joining, names, and the test for English."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from imgcap_jax.data.caption_tokens import CaptionTokens
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.corpus import References
from imgcap_jax.metrics.diversity import diversity, set_diversity
from imgcap_jax.metrics.scoring import CaptionScorer
from imgcap_jax.tokenizers import (
    Characters,
    PennTreebank,
    check_tokenizer,
    find_tokenizer,
    looks_english,
    text_of,
    tokens_of,
    unspaced_length,
)

# Text -> tokens, separated by blanks, and the joined text.
CHARACTERS = {
    "一个穿着红色T恤的男人。": ("一 个 穿 着 红 色 t 恤 的 男 人", "一个穿着红色t恤的男人"),
    "赤いボール、ー々〇": ("赤 い ボ ー ル ー 々 〇", "赤いボールー々〇"),
    "ＡＢ ｱｶﾞ 3.5米 1,000": ("ab ア ガ 3.5 米 1,000", "abアガ3.5米1,000"),
    "สีแดง บนพื้น": ("สี แ ด ง บ น พื้ น", "สีแดงบนพื้น"),
    "မြန်မာ": ("မြ န် မ ာ", "မြန်မာ"),
    "A man's T-shirt, don't!": ("a man's t-shirt don't", "a man's t-shirt don't"),
    "مُشَكَّل می\u200cخواهم": ("مُشَكَّل می\u200cخواهم", "مُشَكَّل می\u200cخواهم"),
    "एक बड़ा नीली।": ("एक बड़ा नीली", "एक बड़ा नीली"),
    "한국어 빨간 공": ("한국어 빨간 공", "한국어 빨간 공"),
    "⬛ 😀🇩🇪👍🏽 👨‍👩‍👧": ("⬛ 😀 🇩🇪 👍🏽 👨‍👩‍👧", "⬛😀🇩🇪👍🏽👨‍👩‍👧"),
    "红<unk><unk> dog": ("红 <unk> <unk> dog", "红<unk> <unk> dog"),
    "e\u0301te\u0301 \ud800 co\u00adop": ("été coop", "été coop"),
    "。！": ("", ""),
}


@pytest.mark.parametrize("text", CHARACTERS)
def test_characters(text: str) -> None:
    tokens, joined = CHARACTERS[text]
    characters = Characters()
    assert characters(text) == tokens.split(" ") if tokens else characters(text) == []
    assert characters.join(characters(text)) == joined
    assert characters(joined) == characters(text)  # scores read the joined text


def test_words_of_the_default_are_joined_by_blanks() -> None:
    ptb = PennTreebank()
    assert ptb("A man's dog.") == ["a", "man", "'s", "dog"]
    assert ptb.join(["a", "man", "'s", "dog"]) == "a man 's dog"
    assert (ptb.label, Characters().label) == ("ptb-coco", "characters")


def test_length_in_a_script_without_blanks() -> None:
    assert [unspaced_length(word) for word in ("方块", "สี่เหลี่ยม", "dog", "方a", "。")] == [2, 6, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("a man in a red shirt stands on a ladder and cleans the window ", True),
        ("a red square there is a red square here ", True),
        ("ein mann in einem roten hemd steht auf einer leiter und putzt das fenster ", False),
        ("een man met een rood shirt is aan het fietsen in de stad of op de weg ", False),
        ("a férfi a piros ingben a létrán áll és a nő a kutya mellett ", False),
        ("a menina sobe a escada e a mulher corre para a casa ", False),
        ("un homme en chemise rouge est debout sur une échelle et nettoie la fenêtre ", False),
        ("seorang pria memakai baju merah berdiri di atas tangga dengan ember ", False),
        ("mężczyzna w czerwonej koszuli stoi na drabinie i myje okno ", False),
        ("一 个 男 人 站 在 梯 子 上 ", False),
        # English with few function words: fashion, keywords, reports, titles
        ("long sleeve cotton t-shirt black ribbed knit crewneck collar tonal stitching fading at front ", True),
        ("black dog running grass two men playing football white van parked street ", True),
        ("heart size normal lungs clear no pneumothorax or pleural effusion mild degenerative changes ", True),
        ("red car parked near house close-up photo brown bear vintage poster of a café sunset over mountains ", True),
    ],
)
def test_english(text: str, english: bool) -> None:
    assert looks_english(Counter(text.split() * 20)) is english
    assert looks_english(Counter(text.split()))  # too few words to decide


def test_names() -> None:
    assert find_tokenizer("characters") == Characters()
    assert find_tokenizer("imgcap_jax.tokenizers:PennTreebank") == PennTreebank()
    for name, message in {
        "words": "no tokenizer 'words'; use ptb or characters",
        "my_words:Words": "my_words is not imported; add --code my_words.py",
        "imgcap_jax.tokenizers:Nothing": "no settings class Nothing",
        "imgcap_jax.data.pipeline:CaptionData": "CaptionData has no 'label'",
    }.items():
        with pytest.raises(UserError, match=message):
            find_tokenizer(name)


class Labelled(PennTreebank):
    label = ""


@pytest.mark.parametrize("label", ["", "a|b", "a,b", "a b", 3])
def test_labels_that_signatures_cannot_hold_are_refused(label: object) -> None:
    tokenizer = Labelled()
    type(tokenizer).label = label  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"must be text without blanks, '\|' or ','"):
        check_tokenizer(tokenizer, "data.tokenizer")


def test_a_tokeniser_cannot_use_the_label_of_another_one() -> None:
    class Mine(Characters):
        label = "ptb-coco"

    with pytest.raises(UserError, match="belongs to a tokeniser of imgcap_jax"):
        check_tokenizer(Mine(), "data.tokenizer")
    with pytest.raises(UserError, match=r"give an instance, Characters\(\)"):
        check_tokenizer(Characters, "data.tokenizer")  # type: ignore[arg-type]


class Mine(PennTreebank):
    """A user's tokeniser that returns, joins or raises what a test sets."""

    tokens: object = ["dog"]
    text: object = "dog"

    def __call__(self, caption: str, /) -> list[str]:
        return given(self.tokens)

    def join(self, tokens: Sequence[str], /) -> str:
        return given(self.text)


def given(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mine]:
    def make(**values: object) -> Mine:
        for name, value in values.items():
            monkeypatch.setattr(Mine, name, value)
        return Mine()

    return make


WRONG = ["a dog", ("a", "dog"), ["a", ""], ["a", " "], ["\u3000"], [1], None]


@pytest.mark.parametrize("tokens", WRONG)
def test_a_tokeniser_must_return_words(tokens: object, mine: Callable[..., Mine]) -> None:
    with pytest.raises(UserError, match=r"tokenizer Mine: it returned .* must return a list of words.* empty or blank"):
        tokens_of("a dog", mine(tokens=tokens))


def test_exceptions_in_a_tokeniser_name_its_class(mine: Callable[..., Mine]) -> None:
    broken = mine(tokens=ZeroDivisionError("by\nzero"), text=KeyError("x"))
    with pytest.raises(
        UserError, match=r"^tokenizer Mine: the caption 'a\\ndog' raised ZeroDivisionError \(by zero\);"
    ):
        tokens_of("a\ndog", broken)
    with pytest.raises(
        UserError, match=r"^tokenizer Mine: join of the tokens \['a'\] raised KeyError \('x' is missing"
    ):
        text_of(["a"], broken)
    with pytest.raises(UserError, match="tokenizer Mine: join returned None; it must return text"):
        text_of(["a"], mine(text=None))
    with pytest.raises(UserError, match="my own advice"):
        tokens_of("a dog", mine(tokens=UserError("my own advice")))


@pytest.mark.parametrize(
    "use",
    [
        lambda broken: Vocabulary.build(["a dog"], 1, broken),
        lambda broken: Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>"), (0,) * 4, broken).encode("a dog", 5),
        lambda broken: References.from_captions({1: ["a dog"]}, broken),
        lambda broken: CaptionTokens.of_images([["a dog"]], broken),
        lambda broken: diversity(["a dog"], tokenizer=broken),
        lambda broken: set_diversity({1: ["a dog", "a cat"]}, {1: ["a dog"]}, broken),
    ],
)
def test_a_broken_tokeniser_is_one_line_wherever_it_is_used(
    use: Callable[[Mine], object], mine: Callable[..., Mine]
) -> None:
    with pytest.raises(UserError, match="must return a list of words"):
        use(mine(tokens=[" "]))


def test_candidates_are_checked_too(mine: Callable[..., Mine]) -> None:
    tokenizer = mine()
    scorer = CaptionScorer({1: ["a dog"]}, {}, tokenizer=tokenizer)
    mine(tokens="dog")
    with pytest.raises(UserError, match="must return a list of words"):
        scorer.score({1: "a dog"})


def test_text_of_ids_that_cannot_be_joined(mine: Callable[..., Mine]) -> None:
    vocabulary = Vocabulary(("<pad>", "<bos>", "<eos>", "<unk>", "dog"), (0,) * 5, mine(text=ValueError("no")))
    with pytest.raises(UserError, match=r"join of the tokens \['dog'\] raised ValueError \(no\)"):
        vocabulary.decode([4])
