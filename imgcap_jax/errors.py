"""The exceptions for mistakes of the user and for SIGTERM, and text for messages."""

import difflib
import math
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct. Its message is one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def raise_error(error: UserError) -> None:
    """Raises an error."""
    raise error


class Terminated(KeyboardInterrupt):
    """SIGTERM, which Slurm, Docker and Google Cloud send to stop a job."""


def printable(text: str) -> str:
    """A file name or other text as it can be printed in one line.

    Control characters, line separators and lone surrogates are escaped. Python represents a byte of a file name that
    is not UTF-8 by a lone surrogate; it becomes ``\\xe9``.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 photo", "1,200 photos"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of some names, as "; did you mean beam?"; "" if none is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def check_range(
    name: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raises UserError, with the range, unless a number is finite and in its range. ``name`` is that of a setting."""
    finite = not isinstance(value, float) or math.isfinite(value)  # math.isfinite fails on integers above 1e308
    if finite and at_least <= value <= at_most and above < value < below:
        return
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    rules = [f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit)]
    rules += [] if finite else ["finite"]
    raise UserError(f"{name} is {value}; it must be {' and '.join(rules)}")


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"):
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
