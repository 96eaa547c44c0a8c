"""The rules of the tokeniser. The expected tokens are those of Stanford's PTBTokenizer (see also tests/real)."""

import time

import pytest

from imgcap_jax.text import PUNCTUATION, tokenize

CASES = {
    "A man, riding a wave.": "a man riding a wave",
    "The man's dogs' toys aren't John's; it's Mary's.": "the man 's dogs toys are n't john 's it 's mary 's",
    "He can't, won't, cannot; they're gonna. I'm sure she'd've": (
        "he ca n't wo n't can not they 're gon na i 'm sure she 'd 've"
    ),
    "a man’s “big” ‘red’ hat": "a man 's big red hat",
    "'Tis rock 'n' roll from the '90s, ma'am. O'Neil y'all": ("'t is rock 'n' roll from the '90s ma'am o'neil y' all"),
    "a well-known t-shirt -- black-and-white - and a 5-year-old": (
        "a well-known t-shirt black-and-white and a 5-year-old"
    ),
    "Mr. Smith at St. Louis Ave. in the U.S. at 5 a.m., etc.": (
        "mr. smith at st. louis ave. in the u.s. at 5 a.m. etc."
    ),
    "No. 5 but no.": "no. 5 but no",
    "The exit K. The exit k. there": "the exit k the exit k. there",
    "1,000 3.5 1/2 1 1/2 $5 #1 50% 10:30 10:30am 5'10\" 1st": (
        "1,000 3.5 1/2 1 1/2 $ 5 # 1 50 % 10:30 10:30 am 5 10 1st"
    ),
    "½ cup, 1¼, €5 £5 5¢": "1/2 cup 1 1/4 $ 5 # 5 5 cents",
    "wait... what . . . what…": "wait what what",
    "''quoted'' ``latex'' \"double\" `single'": "quoted latex double single",
    "wow! wow!! what?!": "wow wow !! what ?!",
    "see http://foo.com/a?b=1, www.foo.com or a@c.org.": "see http://foo.com/a?b=1 www.foo.com or a@c.org",
    "@user #hashtag": "@user #hashtag",
    "dogs 😀 run😀fast ❤": "dogs run fast ❤",
    "AT&amp;T &lt; fish & chips R&B": "at&t < fish & chips r&b",
    "naïve Café, ПРИВЕТ 日本語": "naïve café привет 日本語",
    "a — b – c—d": "a b c d",
    "(left) [right] -LRB- x -RRB-": "-lrb- left -rrb- -lsb- right -rsb- -lrb- x -rrb-",
    "and/or w/o <b>bold</b> c++ :) <unk>": "and/or w/o <b> bold </b> c++ :-rrb- <unk>",
    "(555) 123-4567": "-lrb-555-rrb- 123-4567",
    "two\nlines\r\nof text": "two lines of text",
    "  \t ": "",
    "": "",
}


@pytest.mark.parametrize("caption", CASES)
def test_rules(caption: str) -> None:
    assert tokenize(caption) == CASES[caption].split()


@pytest.mark.parametrize(
    "caption",
    [
        "The man's dogs' toys aren't John's; they're Mary's, who can't, cannot.",
        "Mr. Smith (left) at St. Louis Ave. in the U.S., with 1,000 t-shirts and/or $5 at 10:30.",
        "a naïve man’s “big” ½ <unk> [sic] &amp; chips in the '90s!!",
    ],
)
def test_tokenising_tokens_again_does_not_change_them(caption: str) -> None:
    """Generated captions are tokens joined by blanks. Scoring must read the same tokens."""
    tokens = tokenize(caption)
    assert tokenize(" ".join(tokens)) == tokens


def test_no_token_is_empty_or_punctuation_or_contains_blanks() -> None:
    for caption in CASES:
        for token in tokenize(caption):
            assert token not in PUNCTUATION
            assert token.split() == [token]


def test_long_repetitive_text_is_tokenised_in_seconds() -> None:
    """A rule with catastrophic backtracking would take minutes."""
    start = time.thread_time()
    for piece in ("a", "a,", "a.", "a-", "a'", "<a ", "a@", "1.", "(", "www.", "=", "-", "É", "😀", '"'):
        tokenize(piece * 2000)
    assert time.thread_time() - start < 5
