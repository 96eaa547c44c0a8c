"""Annotation files in JSON: Karpathy's, COCO's, JSONL, and lists of objects (BLIP, Hugging Face's metadata.jsonl)."""

import json
import math
import posixpath
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from imgcap_jax.data.builders.archives import ZipMember, read_annotation
from imgcap_jax.data.builders.listed import ListedImage, Row, collect, known_split, split_name
from imgcap_jax.errors import UserError
from imgcap_jax.files import explaining
from imgcap_jax.image_ids import id_of_file_name, parse_image_id

_IMAGE_KEYS = ("image", "file_name", "filename")
_CAPTION_KEYS = ("captions", "caption", "text")
_SPLIT_IN_NAME = re.compile(r"(?:^|[_.-])(train|val|validation|valid|dev|test|restval)(?:20\d\d)?(?=[_.-]|$)")


class _Entry:
    """A JSON object with its location for error messages. A missing key or a wrong type raises a UserError."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, found {type(value).__name__}")
        self.value = value
        self.where = where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        if key not in self.value:
            if default is None:
                raise UserError(f"{self.where}: key {key!r} is missing")
            return default
        value = self.value[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{self.where}: {key!r} must be {kind.__name__}, found {type(value).__name__}")
        return value

    def any_of(self, keys: tuple[str, ...]) -> str:
        """The first of the keys that has a value, or else the first that the object has."""
        present = [key for key in keys if key in self.value]
        if present:
            return next((key for key in present if not _is_missing(self.value[key])), present[0])
        others = " or ".join(map(repr, keys[1:]))
        raise UserError(f"{self.where}: key {keys[0]!r} (or {others}) is missing")

    def entries(self, key: str) -> "Iterator[_Entry]":
        for number, value in enumerate(self.get(key, list)):
            yield _Entry(value, f"{self.where}: {key}[{number}]")

    def id(self, key: str, advice: str = "") -> int:
        """An id. Raises a UserError if it is missing or not an id."""
        if key not in self.value:
            raise UserError(f"{self.where}: key {key!r} is missing")
        try:
            return parse_image_id(self.value[key])
        except ValueError as error:
            raise UserError(f"{self.where}: {key} {error}{advice}") from error

    def optional_id(self, *keys: str) -> int | None:
        """The id under the first of the keys that has a value; None if there is none."""
        key = next((key for key in keys if self.value.get(key) is not None), None)
        return None if key is None else self.id(key, "; write a number, or remove the key")

    def caption(self, key: str) -> str:
        """A caption. null and NaN, which pandas writes for a missing one, are an empty caption."""
        return "" if _is_missing(self.value.get(key, 0)) else self.get(key, str)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _parse(text: str, where: str) -> Any:
    """Parses JSON that other programs wrote.

    Unlike `files.parse_json`, it accepts what a caption can contain and is mended or skipped later: line breaks and
    other control characters, lone surrogates, and NaN, which pandas writes for a missing text.
    """
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text else f"line {error.lineno} column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg} at {place})") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON (a number has more than 4,300 digits)") from error


def read_text(file: Path | ZipMember) -> str:
    """The text of an annotation file. Raises a UserError if it cannot be read."""
    advice = "it must be a text file in UTF-8"
    content = read_annotation(file, advice)
    with explaining(Path(str(file)), advice):
        return content.decode("utf-8-sig")  # not read_text, which changes line breaks


def read_json(file: Path | ZipMember) -> list[ListedImage] | list[Row]:
    """Reads a JSON file: Karpathy's and COCO's give images, a list gives rows.

    Raises:
        UserError: invalid JSON, a missing key or a wrong type.
    """
    top = _parse(read_text(file), str(file))
    file = Path(str(file))
    if isinstance(top, list):
        return _rows(top, file)
    entry = _Entry(top, str(file))
    return list(_read_coco(entry, file) if "annotations" in entry.value else _read_karpathy(entry))


def read_json_lines(file: Path) -> list[Row]:
    """Reads one JSON object per line. Lines end at "\\n" only, because a text can contain U+2028 and the like.

    Raises:
        UserError: as `read_json`, with the number of the line.
    """
    text = read_text(file)
    if text.lstrip()[:1] == "[":  # a list in a file with the wrong ending
        return _rows(_parse(text, str(file)), file)

    def read(number: int, line: str) -> Row:
        where = f"{file} line {number}"
        return _row(_parse(line, where), where)

    lines = enumerate(text.split("\n"), start=1)
    return collect(file, [partial(read, number, line) for number, line in lines if line.strip()])


def _rows(values: list[Any], file: Path) -> list[Row]:
    return collect(file, [partial(_row, value, f"{file}: entry {number}") for number, value in enumerate(values)])


def split_in_file_name(file: Path) -> str | None:
    """The split that a file name contains, as in coco_karpathy_train.json and captions_val2014.json; None if none."""
    found = _SPLIT_IN_NAME.search(file.stem)
    return split_name(found[1]) if found else None


def _row(value: Any, where: str) -> Row:
    entry = _Entry(value, where)
    key = entry.any_of(_CAPTION_KEYS)
    captions = entry.value[key]
    one = isinstance(captions, str) or _is_missing(captions)
    if not one and not isinstance(captions, list):
        raise UserError(f"{where}: {key!r} must be a text or a list of texts, found {type(captions).__name__}")
    texts = ["" if _is_missing(text) else text for text in ([captions] if one else captions)]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {key!r} must be a list of strings")
    # With one caption per line, "id" is that of the caption.
    return Row(
        image=posixpath.normpath(entry.get(entry.any_of(_IMAGE_KEYS), str)),
        captions=tuple(texts),
        where=where,
        split=split_name(entry.get("split", str)) if entry.value.get("split") is not None else None,
        image_id=entry.optional_id("image_id") if one else entry.optional_id("image_id", "id"),
    )


def _read_karpathy(top: _Entry) -> Iterator[ListedImage]:
    number = 0
    for image in top.entries("images"):
        filename, subfolder = image.get("filename", str), image.get("filepath", str, "")
        image_id = image.optional_id("cocoid", "imgid")
        computed = id_of_file_name(posixpath.join(subfolder, filename))
        captions = []
        for sentence in image.entries("sentences"):
            given = sentence.optional_id("sentid")
            captions.append((number if given is None else given, sentence.caption("raw")))
            number += 1
        yield ListedImage(
            filename=filename,
            subfolder=subfolder,
            image_id=computed if image_id is None else image_id,
            split=split_name(image.get("split", str)),
            captions=tuple(captions),
            where=image.where,
            id_given=image_id is not None,
        )


def _read_coco(top: _Entry, file: Path) -> Iterator[ListedImage]:
    split = split_in_file_name(file)
    if split is None:  # a split of another name
        split = re.sub(r"\d+$", "", file.stem.removeprefix("captions_"))
    captions: dict[int, list[tuple[int, str]]] = {}
    first: dict[int, str] = {}
    for number, annotation in enumerate(top.entries("annotations")):
        given = annotation.optional_id("id")
        image_id = annotation.id("image_id")
        first.setdefault(image_id, annotation.where)
        captions.setdefault(image_id, []).append((number if given is None else given, annotation.caption("caption")))
    for image in top.entries("images"):
        image_id = image.id("id")
        yield ListedImage(
            filename=image.get("file_name", str),
            subfolder="",
            image_id=image_id,
            split=split,
            captions=tuple(captions.pop(image_id, ())),
            where=image.where,
        )
    if captions:
        image_id = next(iter(captions))
        raise UserError(f"{first[image_id]}: image id {image_id} is not in the list of images; add it there")


def split_in_path(name: str) -> str | None:
    """The split that the first folder of a path names, as in train/1.jpg; None if it names none."""
    first, _, rest = name.replace("\\", "/").partition("/")
    return known_split(first) if rest else None
