"""The files of a prepared dataset in addition to TFDS's records. Does not import TFDS, because that is slow."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcap_jax import files
from imgcap_jax.errors import UserError
from imgcap_jax.files import DIGESTS, file_digest, read_digests, write_text

ORIGIN_FILE = "origin.json"
SKIPPED_FILE = "skipped.json"
INFO_FILE = "dataset_info.json"  # written by TFDS
PREPARE_AGAIN = "prepare the dataset again"


@dataclass(frozen=True)
class Skipped:
    """An image or caption that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Origin:
    """Where a prepared dataset comes from.

    `kind` is the name of the builder. `fingerprint` changes whenever preparing the dataset again would write other
    data. `folder` is the source folder if the dataset was prepared from a folder.
    """

    kind: str
    source: str
    licence: str
    fingerprint: str
    folder: str = ""


def index_file(split: str) -> str:
    """Name of the file, next to the records, that contains a split's ids, file names and captions."""
    return f"captions_{split}.json"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON. Raises a UserError if the disk is full."""
    write_text(path, json.dumps(value, ensure_ascii=False))


def write_digests(folder: Path) -> None:
    """Writes SHA256SUMS of a prepared dataset: the digest of each file, for `sha256sum -c`, and sizes as comments."""
    files.write_digests(folder)
    names = sorted(read_digests(folder) or ())
    sizes = "".join(f"# {(folder / name).stat().st_size} bytes: {name}\n" for name in names)
    write_text(folder / DIGESTS, sizes + (folder / DIGESTS).read_text(encoding="utf-8"))


def write_origin(folder: Path, origin: dict[str, str]) -> None:
    """Replaces the origin of a prepared dataset. If the process is killed, the dataset stays valid."""
    if (digests := read_digests(folder)) is None:
        write_json(folder / ORIGIN_FILE, origin)
        return
    text = (folder / DIGESTS).read_text(encoding="utf-8", errors="surrogateescape")
    others = [line for line in text.splitlines(keepends=True) if not line.rstrip("\n").endswith(f" {ORIGIN_FILE}")]
    write_text(folder / DIGESTS, "".join(others))
    write_json(folder / ORIGIN_FILE, origin)
    if ORIGIN_FILE in digests:
        added = [
            f"# {(folder / ORIGIN_FILE).stat().st_size} bytes: {ORIGIN_FILE}\n",
            f"{file_digest(folder / ORIGIN_FILE)}  {ORIGIN_FILE}\n",
        ]
        write_text(folder / DIGESTS, "".join([*others, *added]))


def check_small_files(folder: Path) -> None:
    """Compares the files next to the records with their digests, except the indices of captions, and the sizes of all.

    Raises:
        UserError: a file is missing or was changed.
    """
    digests = read_digests(folder)
    if digests is None:
        return
    with files.reading(folder / DIGESTS, PREPARE_AGAIN):
        text = (folder / DIGESTS).read_text(encoding="utf-8", errors="surrogateescape")
    for size, name in re.findall(r"^# ([0-9]+) bytes: (.+)$", text, flags=re.MULTILINE):
        # An index of captions is made again if it is damaged.
        if name in digests and not is_index(name):
            _check_size(folder / name, int(size))
    for name in (INFO_FILE, "features.json", ORIGIN_FILE, SKIPPED_FILE):
        if name in digests and file_digest(folder / name) != digests[name]:
            raise UserError(f"{folder / name} is damaged (its digest has changed): {PREPARE_AGAIN}")


def _check_size(path: Path, expected: int) -> None:
    with files.reading(path, PREPARE_AGAIN):
        size = path.stat().st_size
    if size != expected:
        raise UserError(f"{path} is damaged ({size:,} bytes; expected {expected:,}): {PREPARE_AGAIN}")


def is_index(name: str) -> bool:
    """Whether a file is the index of a split's captions."""
    return re.fullmatch(index_file("[a-z][a-z0-9_]*"), name) is not None


class CaptionIndex:
    """Ids, file names and captions of a split, in the order of its records. Saved next to the records."""

    def __init__(self) -> None:
        self.image_id: list[int] = []
        self.filename: list[str] = []
        self.captions: list[list[str]] = []

    def add(self, image_id: int, filename: str, captions: Sequence[str]) -> None:
        self.image_id.append(image_id)
        self.filename.append(filename)
        self.captions.append(list(captions))

    def save(self, folder: Path, split: str) -> None:
        write_json(folder / index_file(split), vars(self))

    @classmethod
    def load(cls, folder: Path, split: str, count: int, digest: str | None) -> "CaptionIndex | None":
        """The saved index, or None if it is missing or damaged.

        Args:
            folder: the prepared dataset.
            split: the name of the split.
            count: the number of images in the split.
            digest: the digest of the file; None: not known.
        """
        index = cls()
        path = folder / index_file(split)
        try:
            with files.reading(path, PREPARE_AGAIN):
                if digest is not None and file_digest(path) != digest:
                    return None
                saved = json.loads(path.read_text(encoding="utf-8"))
                index.image_id, index.filename, index.captions = (
                    saved[key] for key in ("image_id", "filename", "captions")
                )
        except UserError:
            return None
        return index if index._is_complete(count) else None

    def _is_complete(self, count: int) -> bool:
        columns = (self.image_id, self.filename, self.captions)
        return (
            all(isinstance(column, list) and len(column) == count for column in columns)
            and all(type(image_id) is int for image_id in self.image_id)
            and all(isinstance(name, str) for name in self.filename)
            and all(
                isinstance(of_image, list) and of_image and all(isinstance(text, str) for text in of_image)
                for of_image in self.captions
            )
        )
