"""The files of a prepared dataset in addition to TFDS's records. Does not import TFDS, because that is slow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcap_jax.files import write_text

ORIGIN_FILE = "origin.json"
SKIPPED_FILE = "skipped.json"


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


def _index_file(split: str) -> str:
    """Name of the file, next to the records, that contains a split's ids, file names and captions."""
    return f"captions_{split}.json"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON. Raises a UserError if the disk is full."""
    write_text(path, json.dumps(value, ensure_ascii=False))


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
        write_json(folder / _index_file(split), vars(self))

    @classmethod
    def load(cls, folder: Path, split: str) -> "CaptionIndex | None":
        """The saved index, or None if it is missing or unreadable."""
        index = cls()
        try:
            saved = json.loads((folder / _index_file(split)).read_text(encoding="utf-8"))
            index.image_id, index.filename, index.captions = (
                saved[key] for key in ("image_id", "filename", "captions")
            )
        except (OSError, ValueError, KeyError):
            return None
        return index
