"""Annotation files in tables: Kaggle's captions.txt, Flickr30k's results.csv, Flickr8k.token.txt, metadata.csv."""

import ast
import csv
import io
import json
import posixpath
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from imgcap_jax.data.builders.json_lists import read_text
from imgcap_jax.data.builders.layout import Skipped
from imgcap_jax.data.builders.listed import Row, collect, split_name
from imgcap_jax.errors import UserError
from imgcap_jax.image_ids import hashed_id, parse_image_id

_COLUMNS = {
    "image": ("image", "image_name", "file_name", "filename"),
    "caption": ("caption", "comment", "text", "captions", "raw"),
    "split": ("split",),
    "image_id": ("image_id", "img_id"),
}
_IMAGE_ENDING = re.compile(r"\.(?:jpe?g|png|gif|bmp|webp|tiff?|avif)(?:#\d+)?$", re.IGNORECASE)
_TEXT = r"""(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
_TEXT_LIST = re.compile(rf"\[\s*{_TEXT}(?:\s*,\s*{_TEXT})*\s*\]")
_OFFICIAL_SPLITS = {"trainImages": "train", "devImages": "val", "testImages": "test"}
VAL_SHARE = TEST_SHARE = 0.05


def read_table(file: Path) -> tuple[list[Row], list[Skipped]]:
    """Reads one caption per line: image and caption, separated by ",", "|" or a tab, with or without a header.

    The header can also name the columns split and image_id. A caption that is a list of texts, as in Hugging Face's
    Flickr30k, is several captions. A line "name.jpg#0<tab>caption" is read as Flickr's token files. Lines that are not
    of this form are returned as skipped.

    Raises:
        UserError: the file cannot be read, its header has no column of images or captions, or an id is not valid.
    """
    text = read_text(file)
    first = text.split("\n", 1)[0]
    separator = min((one for one in ",|\t" if one in first), key=first.index, default=None)
    if separator is None:
        raise UserError(f'{file} line 1: no column of captions; expected lines such as "a.jpg,a dog runs"')
    lines = [(number, fields) for number, fields in _records(text, separator) if any(fields)]
    columns = _columns(first.rstrip("\r"), separator)
    if columns is None:
        if not _IMAGE_ENDING.search(first.split(separator)[0].strip().strip('"')):
            raise UserError(f'{file} line 1: neither a header such as "image,caption" nor the name of an image')
        # Two columns, or three with the number of the caption. A caption can contain separators.
        numbered = sum(len(fields) > 2 and fields[1].strip().isdecimal() for _, fields in lines)
        columns = {"image": 0, "caption": 2 if 2 * numbered > len(lines) else 1}
    elif missing := [name for name in ("image", "caption") if name not in columns]:
        known = ", ".join(_COLUMNS[missing[0]])
        raise UserError(f"{file} line 1: no column of {missing[0]}s; call it one of: {known}")
    else:
        del lines[0]
    readers, skipped = [], []
    for number, fields in lines:
        where = f"{file} line {number}"
        last = max(columns.values())
        if columns["caption"] == last and len(fields) > last + 1:  # a caption with unquoted commas
            fields = [*fields[:last], separator.join(fields[last:])]
        if len(fields) <= last:
            skipped.append(Skipped(where, f"has {len(fields)} columns; expected {last + 1}"))
            continue
        readers.append(partial(_row, {name: fields[column].strip() for name, column in columns.items()}, where))
    return collect(file, readers), skipped


def _columns(header: str, separator: str) -> dict[str, int] | None:
    """The number of each known column; None if the line is not a header."""
    names = [name.strip().strip('"').lower() for name in header.split(separator)]
    found = {
        column: next(i for i, name in enumerate(names) if name in known)
        for column, known in _COLUMNS.items()
        if any(name in known for name in names)
    }
    return found or None


def _row(fields: dict[str, str], where: str) -> Row:
    name = fields["image"].partition("#")[0] if re.search(r"#\d+$", fields["image"]) else fields["image"]
    # Flickr8k.token.txt has one name 2258277193_586949ec62.jpg.1, for a file without the ".1".
    name = re.sub(r"(\.jpe?g)\.\d+$", r"\1", name)
    image_id = None
    if fields.get("image_id"):
        try:
            image_id = parse_image_id(fields["image_id"])
        except ValueError as error:
            raise UserError(f"{where}: image_id {error}; write a number, or remove the column") from error
    split = split_name(fields["split"]) if fields.get("split") else None
    return Row(posixpath.normpath(name), _captions(fields["caption"]), where, split, image_id)


def _captions(cell: str) -> tuple[str, ...]:
    """The captions in a cell: the texts of a list in JSON, or as pandas writes it, or else the cell itself."""
    if not _TEXT_LIST.fullmatch(cell):
        return (cell,)
    try:
        return tuple(json.loads(cell))
    except ValueError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on escape sequences
            return tuple(ast.literal_eval(cell))
    except (SyntaxError, ValueError):
        return (cell,)


def _records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line and the fields of each record.

    A quoted field can contain separators and line breaks. In files that do not quote, a caption can begin with a
    quotation mark. Their lines are split at the separators only.
    """
    records, before = [], 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for fields in reader:
            records.append((before + 1, fields))
            before = reader.line_num
    except csv.Error:
        records = []
    swallowed = (
        line.split(separator)[0].strip() for _, fields in records for one in fields for line in one.split("\n")[1:]
    )
    if records and separator != "\t" and not any(map(_IMAGE_ENDING.search, swallowed)):
        yield from records
        return
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        try:
            (fields,) = csv.reader([line], delimiter=separator, strict=True) if separator != "\t" else ([],)
        except (csv.Error, ValueError):
            fields = []
        yield number, fields or line.split(separator)


def official_splits(folder: Path) -> dict[str, str]:
    """Image name -> split, from the files *.trainImages.txt, *.devImages.txt and *.testImages.txt of Flickr8k."""
    splits: dict[str, str] = {}
    for part, split in _OFFICIAL_SPLITS.items():
        for file in sorted(folder.glob(f"*.{part}.txt")):
            splits.update(dict.fromkeys(read_text(file).split(), split))
    return splits


def random_split(rows: list[Row]) -> Callable[[Row], str]:
    """A random split, which for each image depends only on its name: about 90 % train, 5 % val and 5 % test.

    An image therefore stays in its split if others are added. If no image falls into val or train, the one next to it
    does.
    """

    def position(name: str) -> float:
        return hashed_id(f"split of {name}") / 2**52 - 1  # uniform in [0, 1)

    positions = {row.image: position(row.image) for row in rows}
    splits = {
        name: "train" if at >= VAL_SHARE + TEST_SHARE else "val" if at < VAL_SHARE else "test"
        for name, at in positions.items()
    }
    ordered = sorted(positions, key=lambda name: positions[name])
    if len(ordered) > 1:
        if splits[ordered[-1]] != "train":
            splits[ordered[-1]] = "train"
        if splits[ordered[0]] != "val":
            splits[ordered[0]] = "val"
    return lambda row: splits[row.image]
