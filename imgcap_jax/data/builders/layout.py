"""What lies in a prepared dataset's folder beside TFDS's records. Imports no TFDS, to be quick."""

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

    `fingerprint` changes whenever preparing again would write something else; `kind` is the builder's name,
    and `folder` the folder that a folder's dataset was prepared from.
    """

    kind: str
    source: str
    licence: str
    fingerprint: str
    folder: str = ""


def _index_file(split: str) -> str:
    """Name of the file beside the records that holds a split's ids, file names and captions."""
    return f"captions_{split}.json"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON. Raises UserError where the disk is full."""
    write_text(path, json.dumps(value, ensure_ascii=False))


class CaptionIndex:
    """Ids, file names and captions of a split in the order of its records, to be kept beside them."""

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
        """The saved index, or None where there is none that can be read."""
        index = cls()
        try:
            saved = json.loads((folder / _index_file(split)).read_text(encoding="utf-8"))
            index.image_id, index.filename, index.captions = (
                saved[key] for key in ("image_id", "filename", "captions")
            )
        except (OSError, ValueError, KeyError):
            return None
        return index
