"""The files of a prepared dataset in addition to TFDS's records. Does not import TFDS, because that is slow."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgcap_jax import files
from imgcap_jax.errors import UserError, printable
from imgcap_jax.files import DIGESTS, file_digest, json_digest, read_digests, write_text
from imgcap_jax.terminal import working

ORIGIN_FILE = "origin.json"
SKIPPED_FILE = "skipped.json"
INFO_FILE = "dataset_info.json"  # written by TFDS
_MEGABYTE = 1_000_000
PREPARE_AGAIN = "delete its folder and prepare the dataset again"
_OURS = re.compile(
    r"dataset_info\.json|features\.json|skipped\.json|captions_[a-z][a-z0-9_]*\.json|[^/]+\.array_record-\d+-of-\d+"
)


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


def write_checksums(folder: Path, *, shown: bool = False) -> None:
    """Writes SHA256SUMS of a prepared dataset: the digests of its files, for `sha256sum -c`, and sizes as comments.

    `origin.json` is not among them. It contains its own digest, so that notes on a dataset are changed by replacing a
    single file. `shown`: whether to show the progress.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if name not in (DIGESTS, ORIGIN_FILE)]
    sizes = {name: (folder / name).stat().st_size for name in names}
    with counting_bytes("computing checksums", sum(sizes.values()), shown) as progress:
        files.write_digests(folder, names, [f"{size} bytes: {name}" for name, size in sizes.items()], progress)


@contextmanager
def counting_bytes(title: str, size: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows the progress of reading files of `size` bytes. Yields a function for the number of bytes that are read."""
    with working(title, -(-size // _MEGABYTE), "MB", shown=shown) as work:
        yield lambda done: work.update(done // _MEGABYTE)


def write_origin(folder: Path, origin: Origin) -> None:
    """Writes or replaces the origin of a dataset. If the process is killed, the dataset stays valid."""
    digests = read_digests(folder) or {}
    if ORIGIN_FILE in digests:  # SHA256SUMS of an older version
        lines = (folder / DIGESTS).read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        kept = [line for line in lines if not line.rstrip("\n").endswith(f" {ORIGIN_FILE}")]
        if kept and re.fullmatch("# [0-9]+ files\n", kept[-1]):
            kept[-1] = f"# {len(digests) - 1} files\n"
        write_text(folder / DIGESTS, "".join(kept))
    write_json(folder / ORIGIN_FILE, {**asdict(origin), "sha256": json_digest(asdict(origin))})


def read_origin(folder: Path) -> Origin | None:
    """The origin of a dataset; None: another program prepared it. Raises UserError if the file is damaged."""
    path = folder / ORIGIN_FILE
    if not path.exists():
        return None
    saved = files.read_json(path, PREPARE_AGAIN)
    with files.reading(path, PREPARE_AGAIN):
        values = {name: saved[name] for name in Origin.__dataclass_fields__ if name in saved}
        if not all(isinstance(value, str) for value in values.values()):
            raise ValueError("a text was expected")
        origin = Origin(**values)
        digests = read_digests(folder)
        elsewhere = digests is None or ORIGIN_FILE in digests  # in datasets of older versions
        digest = json_digest(asdict(origin))
        if saved.get("sha256", digest if elsewhere else "") != digest:
            raise ValueError("its digest has changed")
    return origin


def check_small_files(folder: Path) -> None:
    """Checks what is quick to check: the sizes of all files, and the digests of those next to the records.

    The indices of captions are not checked, because they are made again if they are damaged.

    Raises:
        UserError: a file is missing or was changed, or is a pipe or a device, which could be read without end.
    """
    with files.reading(folder, PREPARE_AGAIN):
        for path in folder.iterdir():
            files.refuse_pipes(path)
    digests = read_digests(folder)
    if digests is None:
        return
    if not (folder / ORIGIN_FILE).is_file():  # it has no digest in SHA256SUMS
        raise UserError(f"{folder / ORIGIN_FILE} is missing: {PREPARE_AGAIN}")
    with files.reading(folder / DIGESTS, PREPARE_AGAIN):
        text = (folder / DIGESTS).read_text(encoding="utf-8", errors="surrogateescape")
    if not files.are_complete(digests, text) and ORIGIN_FILE not in digests:
        raise UserError(f"{folder / DIGESTS} is damaged (not complete): {PREPARE_AGAIN}")
    for size, name in re.findall(r"^# ([0-9]{1,18}) bytes: (.+)$", text, flags=re.MULTILINE):
        if name in digests and not is_index(name):
            _check_size(folder / name, int(size))
    for name in (INFO_FILE, "features.json", ORIGIN_FILE, SKIPPED_FILE):
        if name in digests:
            with files.reading(folder / name, PREPARE_AGAIN):
                changed = file_digest(folder / name) != digests[name]
            if changed:
                raise UserError(f"{folder / name} is damaged (its digest has changed): {PREPARE_AGAIN}")


def check_ours(folder: Path) -> None:
    """Checks that every file of a folder that is about to be replaced was written by `imgcap data prepare`.

    Raises:
        UserError: the folder, or a file in it, is someone else's.
    """
    if not os.path.lexists(folder):
        return
    if not (folder / ORIGIN_FILE).is_file():
        raise UserError(f"{folder} was not written by imgcap data prepare; move it away, or use another --name")
    known = {DIGESTS, ORIGIN_FILE, *(read_digests(folder) or ())}
    foreign = [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in known and not _OURS.fullmatch(path.name) and not path.name.startswith(".new_")
    ]
    if foreign:
        raise UserError(
            f"{folder} contains {printable(foreign[0])}, which imgcap data prepare did not write; move it out of this "
            "folder, which is replaced"
        )


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
                saved = files.read_json(path, PREPARE_AGAIN)
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
