"""The ids of images, as every file of captions writes them: integers from 0 to 2^63 - 1."""

import hashlib
import math
import numbers
import re
from pathlib import PurePosixPath
from typing import Any

LIMIT = 2**63  # ids are stored as int64

_TEXT = re.compile(r"(?:[A-Za-z][A-Za-z0-9]*_)*0*(?P<number>[0-9]{1,19})(?:\.0+|\.[A-Za-z]{3,4})?", re.ASCII)
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+[0-9]{4}_)?(?P<number>[0-9]{12})", re.ASCII)


def parse_image_id(value: Any) -> int:
    """The image id that a file gives.

    Files write the same id in several ways: 7, 7.0 (pandas), "7", "000007", "coco_7" (BLIP) and
    "COCO_val2014_000000000007.jpg" are all 7.

    Raises:
        ValueError: the value is not an id. The message completes the sentence "image_id ...".
    """
    number = value
    if isinstance(value, str) and (found := _TEXT.fullmatch(value.strip())):
        number = int(found["number"])
    elif isinstance(value, float) and math.isfinite(value) and value.is_integer():
        if abs(value) >= 2**53:
            raise ValueError(f"{value!r} has lost digits as a floating-point number; write it as an integer")
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):  # Integral includes NumPy's integers
        raise ValueError(f"{_short(value)} is not an integer")
    number = int(number)
    if not 0 <= number < LIMIT:
        raise ValueError(f"{_short(value)} is not between 0 and 2^63 - 1")
    return number


def _short(value: Any) -> str:
    # The repr of an integer with more than 4,300 digits raises ValueError.
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def id_of_file_name(name: str) -> int:
    """The id of an image for which no id is given. It depends only on the file name, so that it never changes.

    It is the number of a file name of COCO (12 digits, with or without COCO_val2014_ before them). For all other names
    it is 2^52 plus the first 52 bits of the SHA-256 digest of the name. Such an id is larger than every COCO id, and
    below 2^53, so that it stays exact in programs that store numbers as float64. Among a million images, the
    probability that two have the same id is 1e-4.

    Args:
        name: the path as listed, with "/".
    """
    number = coco_number(name)
    return hashed_id(name) if number is None else number


def coco_number(name: str) -> int | None:
    """The number of a file name of COCO, in any folder; None if the name has another form."""
    found = _COCO_NAME.fullmatch(PurePosixPath(name).stem)
    return int(found["number"]) if found else None


def hashed_id(name: str) -> int:
    """2^52 plus the first 52 bits of the SHA-256 digest of a name. Even the ids of similar names are unrelated."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return 2**52 + (int.from_bytes(digest[:8], "big") >> 12)
