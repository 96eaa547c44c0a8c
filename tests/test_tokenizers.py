"""The tokenisers: characters of several scripts, joining, names, and the test for English."""

import pytest

from imgcap_jax.errors import UserError
from imgcap_jax.tokenizers import (
    Characters,
    PennTreebank,
    check_tokenizer,
    find_tokenizer,
    looks_english,
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
    ],
)
def test_english(text: str, english: bool) -> None:
    assert looks_english([text.split()] * 20) is english
    assert looks_english([text.split()])  # too few words to decide


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
    with pytest.raises(UserError, match="must be a text without blanks"):
        check_tokenizer(tokenizer, "data.tokenizer")


def test_a_tokeniser_cannot_use_the_label_of_another_one() -> None:
    class Mine(Characters):
        label = "ptb-coco"

    with pytest.raises(UserError, match="belongs to a tokeniser of imgcap_jax"):
        check_tokenizer(Mine(), "data.tokenizer")
    with pytest.raises(UserError, match=r"give an instance, Characters\(\)"):
        check_tokenizer(Characters, "data.tokenizer")  # type: ignore[arg-type]
