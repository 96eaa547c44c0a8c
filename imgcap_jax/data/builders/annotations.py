"""Finds and reads annotation files. Their format is recognised by file name and keys.

Captions are always the raw sentences; Karpathy's `tokens` are never read.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imgcap_jax.data.builders import json_lists, tables
from imgcap_jax.data.builders.layout import Skipped
from imgcap_jax.data.builders.listed import ListedImage, Row, group, known_split, shown, with_distinct_ids
from imgcap_jax.errors import UserError, counted

SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
EXPECTED = (
    "dataset_*.json (Karpathy), captions_*.json (COCO), *.jsonl, *_train.json (BLIP), metadata.csv, captions.txt, "
    "results.csv or *.token.txt"
)
ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")


@dataclass(frozen=True)
class Annotations:
    """What annotation files list.

    Attributes:
        images: in the order of the files.
        skipped: lines that could not be read.
        notes: one line each about splits that were chosen or are missing.
        from_rows: whether images were joined from the rows of a list.
    """

    images: tuple[ListedImage, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    from_rows: bool


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
        if path.suffix not in ENDINGS:
            raise UserError(f"{path}: not an annotation file; pass a folder of images with {EXPECTED}")
        folder = path.parent.parent if path.parent.name == "annotations" else path.parent
        return folder, [path]
    # A folder can contain the files of several formats, as Flickr8k with Karpathy's JSON does. The first group counts.
    for formats in (_complete_formats, _other_formats):
        found = [files for files in formats(path) if files]
        if found:
            break
    else:
        raise UserError(f"{path}: no annotation file; the folder must contain {EXPECTED}")
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(path)) for files in found for file in files)
        raise UserError(f"{path}: several annotation files ({names}); pass the one to use instead of the folder")
    return path, found[0]


def _complete_formats(folder: Path) -> list[list[Path]]:
    """The annotation files of each format that gives splits. Files that exclude each other are separate formats."""
    karpathy = _files(folder, "dataset*.json")
    lines = _files(folder, "*.jsonl")
    one_per_split = len({json_lists.split_in_file_name(file) for file in lines} - {None}) == len(lines)
    return [
        *([file] for file in karpathy),
        _files(folder, "captions_*.json"),
        *([lines] if one_per_split else ([file] for file in lines)),
    ]


def _other_formats(folder: Path) -> list[list[Path]]:
    below = sorted(folder.glob("*/metadata.jsonl")) + sorted(folder.glob("*/metadata.csv"))
    lists = [file for file in _files(folder, "*.json") if json_lists.split_in_file_name(file)]
    names = ("captions.txt", "*.csv", "*.tsv", "*.token.txt", "*.token")
    texts = [file for name in names for file in _files(folder, name) if ".lemma." not in file.name]
    return [below, lists, *([file] for file in texts)]


def _files(folder: Path, pattern: str) -> list[Path]:
    return [file for place in (folder, folder / "annotations") for file in sorted(place.glob(pattern))]


def read_annotations(root: Path, files: Sequence[Path]) -> Annotations:
    """Reads all images that the files list, in the order of the files.

    Args:
        root: the folder that contains the files, which is usually that of the images. Paths of images are relative to
            it.
        files: the annotation files.

    Raises:
        UserError: invalid JSON, a missing key, an invalid id, split or file name, an image listed twice, or a file
            without images.
    """
    images: list[ListedImage] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    read_from: dict[str, Path] = {}
    from_rows = False
    for file in files:
        read = _read(file, skipped)
        rows = [one for one in read if isinstance(one, Row)]
        from_rows |= bool(rows)
        listed = [one for one in read if isinstance(one, ListedImage)] or _grouped(rows, root, file, notes)
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
    images = with_distinct_ids(images)
    seen: dict[int, ListedImage] = {}
    for image in images:
        name = shown(image.filename)
        if re.search("[\ud800-\udfff]", image.filename + image.subfolder):
            raise UserError(
                f"{image.where}: the file name {name} contains a lone surrogate, which no file can store; "
                "rename the file"
            )
        if not SPLIT_NAME.fullmatch(image.split) or image.split == "all":
            raise UserError(f"{image.where}: {name} has the split {shown(repr(image.split))}; use train, val or test")
        if (other := seen.setdefault(image.image_id, image)) is not image and not _same_photo(image, other):
            raise UserError(
                f"{image.where}: image id {image.image_id} is listed twice, for {shown(other.filename)} and {name}; "
                "give each image its own image_id"
            )
    if missing := [split for split in ("train", "val") if split not in read_from]:
        notes.append(f"there is no split {' or '.join(missing)}, which training needs; {_how_to_split(files[0])}")
    return Annotations(tuple(images), tuple(skipped), tuple(notes), from_rows)


def _same_photo(image: ListedImage, other: ListedImage) -> bool:
    """Whether one photo is listed in two splits, which is reported later, for all such photos at once."""
    same = (image.filename, image.subfolder) == (other.filename, other.subfolder)
    return same and image.split != other.split


def _how_to_split(file: Path) -> str:
    if file.stem == "metadata":
        return f"put photos into the folders train and validation, each with its own {file.name}"
    if file.suffix == ".jsonl":
        return 'write "split": "train" or "split": "val" into each line'
    return "add a file for it, or write the split into each entry"


def _read(file: Path, skipped: list[Skipped]) -> Sequence[ListedImage | Row]:
    if file.suffix == ".jsonl":
        return json_lists.read_json_lines(file)
    if file.suffix == ".json":
        return json_lists.read_json(file)
    rows, malformed = tables.read_table(file)
    skipped += malformed
    return rows


def _grouped(rows: list[Row], root: Path, file: Path, notes: list[str]) -> list[ListedImage]:
    """The images of a list, with their splits."""
    metadata = file.stem == "metadata"  # of Hugging Face's image folders: names are relative to the file
    if metadata and file.parent not in (root, root / "annotations"):
        below = file.parent.relative_to(root).as_posix()
        rows = [replace(row, image=posixpath.join(below, row.image)) for row in rows]
    stated = any(row.split for row in rows)
    if file.suffix not in (".json", ".jsonl") and not metadata and not stated:
        return _with_splits(rows, file, notes)
    of_file = known_split(file.parent.name) if metadata else json_lists.split_in_file_name(file)

    def given(row: Row) -> str | None:
        return row.split or of_file or (json_lists.split_in_path(row.image) if metadata else None)

    if stated and (unstated := [row for row in rows if not given(row)]):
        notes.append(
            f"{counted(len(unstated), 'row')} of {len(rows):,} without a split: train (first: {unstated[0].where}); "
            "write a split into each row if they belong to another one"
        )
    return group(rows, lambda row: given(row) or "train")


def _with_splits(rows: list[Row], file: Path, notes: list[str]) -> list[ListedImage]:
    """The images of a table that gives no splits."""
    official = tables.official_splits(file.parent)
    if official:
        known = [row for row in rows if row.image in official]
        left_out = counted(len({row.image for row in rows} - official.keys()), "photo")
        notes.append(f"the splits are those of {file.parent}/*Images.txt; not in any of them, and left out: {left_out}")
        return group(known, lambda row: official[row.image])
    notes.append(
        f"{file.name} gives no splits, so the name of each photo decides: about {tables.VAL_SHARE:.0%} are val, "
        f"{tables.TEST_SHARE:.0%} test and the others train; a column split sets other ones"
    )
    return group(rows, tables.random_split(rows))
