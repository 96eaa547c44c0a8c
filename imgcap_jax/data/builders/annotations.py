"""Reads annotation files: Karpathy JSON, COCO JSON and JSONL, distinguished by file name and keys.

Captions are always the raw sentences; Karpathy's `tokens` are never read.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError

SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
EXPECTED = "dataset_*.json (Karpathy), captions_*.json (COCO) or *.jsonl"


@dataclass(frozen=True)
class ListedImage:
    """One image of an annotation file. `captions` are (id, raw text) pairs, unchanged."""

    filename: str
    subfolder: str  # Karpathy's `filepath`; "" if there is none
    image_id: int
    split: str
    captions: tuple[tuple[int, str], ...]


def find_annotations(path: Path) -> tuple[Path, list[Path]]:
    """Finds the folder of images and its annotation files.

    Args:
        path: a folder of images, or an annotation file.

    Returns:
        The folder, and its annotation files.

    Raises:
        UserError: the path does not exist, there is no annotation file, or it is unclear which one to use.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder; pass a folder of images with {EXPECTED}")
    if path.is_file():
        if path.suffix not in (".json", ".jsonl"):
            raise UserError(f"{path}: not an annotation file; pass a folder of images with {EXPECTED}")
        folder = path.parent.parent if path.parent.name == "annotations" else path.parent
        return folder, [path]
    places = [path, path / "annotations"]
    karpathy = [file for place in places for file in sorted(place.glob("dataset*.json"))]
    coco = [file for place in places for file in sorted(place.glob("captions_*.json"))]
    lines = [file for place in places for file in sorted(place.glob("*.jsonl"))]
    found = [files for files in (karpathy, coco, lines) if files]
    if not found:
        raise UserError(f"{path}: no annotation file; the folder must contain {EXPECTED}")
    if len(found) > 1 or len(karpathy) > 1 or len(lines) > 1:
        names = ", ".join(str(file.relative_to(path)) for files in found for file in files)
        raise UserError(f"{path}: several annotation files ({names}); pass the one to use instead of the folder")
    return path, found[0]


def read_annotations(files: Sequence[Path]) -> list[ListedImage]:
    """Reads all images that the files list, in the order of the files.

    Raises:
        UserError: invalid JSON, a missing key, an invalid split name, an image listed twice, or a file without images.
    """
    images: list[ListedImage] = []
    read_from: dict[str, Path] = {}
    for file in files:
        listed = list(_read_lines(file) if file.suffix == ".jsonl" else _read_json(file))
        if not listed:
            raise UserError(f"{file}: lists no images; add some or remove the file")
        for split in {image.split for image in listed}:
            if split in read_from:
                raise UserError(
                    f"{file} and {read_from[split]} both contain the split {split!r}; "
                    "pass the one to use instead of the folder"
                )
            read_from[split] = file
        images += listed
    where = ", ".join(map(str, files))
    seen: set[tuple[str, int]] = set()
    for image in images:
        if not SPLIT_NAME.fullmatch(image.split) or image.split == "all":
            raise UserError(f"{where}: {image.filename} has the split {image.split!r}; use train, val or test")
        if (image.split, image.image_id) in seen:
            raise UserError(f"{where}: image id {image.image_id} ({image.filename}) is listed twice in {image.split!r}")
        seen.add((image.split, image.image_id))
    return images


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

    def entries(self, key: str) -> "Iterator[_Entry]":
        for number, value in enumerate(self.get(key, list)):
            yield _Entry(value, f"{self.where}: {key}[{number}]")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _split(name: str) -> str:
    return "val" if name == "validation" else name


def _read_json(file: Path) -> Iterator[ListedImage]:
    top = _Entry(_parse(_text(file), str(file)), str(file))
    if "annotations" in top.value:
        return _read_coco(top, file)
    return _read_karpathy(top)


def _read_karpathy(top: _Entry) -> Iterator[ListedImage]:
    for image in top.entries("images"):
        key = "cocoid" if "cocoid" in image.value else "imgid"
        yield ListedImage(
            filename=image.get("filename", str),
            subfolder=image.get("filepath", str, ""),
            image_id=image.get(key, int),
            split=_split(image.get("split", str)),
            captions=tuple(
                (sentence.get("sentid", int), sentence.get("raw", str)) for sentence in image.entries("sentences")
            ),
        )


def _read_coco(top: _Entry, file: Path) -> Iterator[ListedImage]:
    # captions_train2014.json -> train
    split = _split(re.sub(r"\d+$", "", file.stem.removeprefix("captions_")))
    captions: dict[int, list[tuple[int, str]]] = {}
    for annotation in top.entries("annotations"):
        caption = (annotation.get("id", int), annotation.get("caption", str))
        captions.setdefault(annotation.get("image_id", int), []).append(caption)
    for image in top.entries("images"):
        image_id = image.get("id", int)
        yield ListedImage(
            filename=image.get("file_name", str),
            subfolder="",
            image_id=image_id,
            split=split,
            captions=tuple(captions.pop(image_id, ())),
        )
    if captions:
        raise UserError(f"{file}: has captions of image id {next(iter(captions))}, which is not in its list of images")


def _read_lines(file: Path) -> Iterator[ListedImage]:
    caption_id = 0
    for number, line in enumerate(_text(file).splitlines()):
        if not line.strip():
            continue
        where = f"{file} line {number + 1}"
        entry = _Entry(_parse(line, where), where)
        texts = entry.get("captions", list)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: 'captions' must be a list of strings")
        yield ListedImage(
            filename=entry.get("image", str),
            subfolder="",
            image_id=number,
            split=_split(entry.get("split", str, "train")),
            captions=tuple(enumerate(texts, start=caption_id)),
        )
        caption_id += len(texts)
