"""Random access to prepared TFDS datasets, without TensorFlow.

The folder of a dataset is `<data_dir>/<name>/<version>` or, for the official `coco_captions`,
`<data_dir>/<name>/<config>/<version>`.
"""

import bisect
import contextlib
import copy
import difflib
import functools
import itertools
import logging
import os
import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from imgcap_jax.data.builders import coco, layout
from imgcap_jax.data.builders.layout import (
    INFO_FILE,
    PREPARE_AGAIN,
    SKIPPED_FILE,
    CaptionIndex,
    Origin,
    Skipped,
    check_small_files,
    counting_bytes,
    index_file,
)
from imgcap_jax.data.builders.listed import split_name
from imgcap_jax.errors import UserError
from imgcap_jax.files import DIGESTS, damages, explaining, read_digests, read_json, reading
from imgcap_jax.remote import place, pull_tree
from imgcap_jax.terminal import working

_ALIASES = {"coco": coco.NAME}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_DEPTHS = ("*", "*/*")  # of the folder of a version: without and with a config

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionExample:
    """One image, encoded (JPEG or PNG), with its captions.

    `scene` is the JSON of a drawn scene, otherwise "". `regions` [n, D] is None unless the dataset has that feature.
    """

    image: bytes
    filename: str
    image_id: int
    captions: tuple[str, ...]
    scene: str = ""
    regions: np.ndarray | None = None


@dataclass(frozen=True)
class DatasetDescription:
    """A prepared dataset: its folder, its origin, the number of images per split, and the skipped entries.

    `fingerprint` changes whenever the dataset is prepared from other data. The key of every cache of values that are
    computed from its images should include it.
    """

    name: str
    folder: Path
    source: str
    licence: str
    splits: dict[str, int]
    skipped: tuple[Skipped, ...]
    fingerprint: str


class CaptionSource:
    """Random access to the examples of one split. Picklable; any number of threads may read it."""

    def __init__(self, description: DatasetDescription, split: str, data_dir: Path) -> None:
        import tensorflow_datasets as tfds

        self.name = description.name
        self.split = split
        self.fingerprint = description.fingerprint
        self._data_dir = data_dir
        folder = description.folder
        stored = _stored_splits(folder)
        parts = ["train", "restval"] if split == "train" and "restval" in stored else [split]
        _check_features(folder / "features.json")
        if not hasattr(tfds, "builder_from_directory"):  # TFDS prints why, and goes on
            raise UserError(
                "TensorFlow Datasets is not installed with all its requirements: "
                "pip install --force-reinstall tensorflow-datasets"
            )
        with reading(folder, PREPARE_AGAIN):
            builder = tfds.builder_from_directory(folder)
            try:
                # Images stay encoded, because the pipeline decodes them at the size that it needs.
                self._records = builder.as_data_source("+".join(parts), decoders={"image": tfds.decode.SkipDecoding()})
            except NotImplementedError as error:
                raise UserError(
                    f"{folder}: not stored as array_record; move the folder away and run: "
                    f"imgcap data prepare {self.name}"
                ) from error
            self._length = len(self._records)
            self._files = [Path(file) for part in parts for file in builder.info.splits[part].filepaths]
            if any(file.parent != folder for file in self._files):
                raise ValueError("its records are in another folder")
            counts = [count for part in parts for count in builder.info.splits[part].shard_lengths]
        self._ends = list(itertools.accumulate(counts))  # the number of the first record after each file
        if self._length != sum(stored[part] for part in parts):
            raise UserError(f"{folder / INFO_FILE} is damaged (the number of images): {PREPARE_AGAIN}")
        self._index: CaptionIndex | None = None
        self._index = self._load_index(folder, parts, stored)

    def _load_index(self, folder: Path, parts: list[str], stored: dict[str, int]) -> CaptionIndex:
        whole = CaptionIndex()
        digests = read_digests(folder)
        start = 0
        for part in parts:
            digest = None if digests is None else digests.get(index_file(part), "")
            index = CaptionIndex.load(folder, part, stored[part], digest)
            if index is None:
                if digest is not None:
                    _log.warning("%s is damaged; it is made again from the records", folder / index_file(part))
                index = CaptionIndex()
                for number in range(start, start + stored[part]):
                    example = self[number]
                    index.add(example.image_id, example.filename, example.captions)
                # The index is only a cache. A dataset on a read-only disk is scanned every time.
                with contextlib.suppress(OSError, UserError):
                    index.save(folder, part)
            whole.image_id += index.image_id
            whole.filename += index.filename
            whole.captions += index.captions
            start += stored[part]
        return whole

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_first, (self.name, self.split, self._data_dir, self._length)

    def first(self, count: int) -> "CaptionSource":
        """The same split with only its first `count` examples (all of them if it has fewer)."""
        if count >= self._length:
            return self
        part = copy.copy(self)
        part._length = count
        part.fingerprint = f"{self.fingerprint}[:{count}]"
        return part

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> CaptionExample:
        """Example i, 0 <= i < len(self). Raises an IndexError otherwise."""
        if not 0 <= i < self._length:
            raise IndexError(f"example {i} is out of range; there are {len(self)}")
        file = self._files[bisect.bisect_right(self._ends, i)]
        with explaining(file, f"{PREPARE_AGAIN} ({self.name}, image {i})"):  # pipes were refused when it was opened
            features = self._records[i]
            image_id = int(features["image/id"])
            if self._index is not None and self._index.image_id[i] != image_id:
                raise ValueError(f"the image id is {image_id}; expected {self._index.image_id[i]}")
            return CaptionExample(
                image=features["image"],
                filename=features["image/filename"].decode(),
                image_id=image_id,
                captions=tuple(text.decode() for text in features["captions"]["text"]),
                scene=features["scene"].decode() if "scene" in features else "",
                regions=features.get("regions"),
            )

    def __iter__(self) -> Iterator[CaptionExample]:
        return (self[i] for i in range(len(self)))

    @property
    def _whole(self) -> CaptionIndex:
        assert self._index is not None
        return self._index

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of example i, without reading its image."""
        return tuple(self._whole.captions[i])

    def image_ids(self) -> list[int]:
        """The image ids, in the order of the examples."""
        return list(self._whole.image_id[: self._length])

    def filenames(self) -> list[str]:
        """The images' file names, in the order of the examples."""
        return list(self._whole.filename[: self._length])


def default_data_dir() -> Path:
    """The default folder of TFDS: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return place(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_source(name: str, split: str, data_dir: Path | None = None) -> CaptionSource:
    """Opens a split of a prepared dataset. A split `restval` counts as part of `train`, as is usual for COCO.

    Raises:
        UserError: the dataset is not prepared, the split is unknown or empty, or COCO's training split has the
            wrong size.
    """
    data_dir = place(str(data_dir)) if data_dir else default_data_dir()
    description = describe(name, data_dir)
    if split not in description.splits:
        has = ", ".join(description.splits)
        raise UserError(
            f"{description.name} has no split {split!r}; it has {has}{_split_advice(split, description.splits)}"
        )
    if not description.splits[split]:
        raise UserError(f"{description.name}: split {split!r} is empty; {PREPARE_AGAIN}")
    if description.name == coco.NAME and split == "train":
        coco.check_train_size(description.splits["train"], description.folder)
    return CaptionSource(description, split, data_dir)


def _split_advice(asked: str, splits: Collection[str]) -> str:
    """What to do if there is no such split. People call the split val "validation", "valid" or "dev"."""
    if split_name(asked) in splits:
        return f"; did you mean {split_name(asked)}?"
    if same := [split for split in splits if split_name(split) == asked]:
        return f"; its split {same[0]!r} must be called {asked!r}: rename it and prepare the dataset again"
    if asked in ("train", "val"):
        return "; training needs train and val: divide the dataset into these and prepare it again"
    return ""


def _open_first(name: str, split: str, data_dir: Path, count: int) -> CaptionSource:
    return open_source(name, split, data_dir).first(count)


def split_names(name: str, data_dir: Path | None = None) -> list[str]:
    """The splits of a prepared dataset. `restval` counts as part of `train`.

    Raises:
        UserError: the dataset is not prepared.
    """
    return list(describe(name, data_dir).splits)


def describe(name: str, data_dir: Path | None = None) -> DatasetDescription:
    """Describes a prepared dataset, from the files next to its records.

    Raises:
        UserError: the dataset is not prepared. The message contains the command that prepares it.
    """
    data_dir = data_dir or default_data_dir()
    name = _ALIASES.get(name, name)
    folder = find_prepared(name, data_dir)
    if folder is None:
        _not_prepared(name, data_dir)
    check_small_files(folder)
    splits = _stored_splits(folder)
    if "train" in splits:
        splits["train"] += splits.pop("restval", 0)
    origin = read_origin(folder)
    return DatasetDescription(
        name=name,
        folder=folder,
        source=origin.source or origin.folder,
        licence=origin.licence,
        splits=splits,
        skipped=_read_skipped(folder / SKIPPED_FILE),
        fingerprint=origin.fingerprint,
    )


def read_origin(folder: Path) -> Origin:
    """The origin of a prepared dataset. If TFDS itself prepared it, the origin is derived from the folder names.

    Raises:
        UserError: the file is damaged.
    """
    if (origin := layout.read_origin(folder)) is not None:
        return origin
    if coco.NAME in folder.parts:
        return coco.ORIGIN
    return Origin("tfds", f"TFDS dataset {folder.parent.name}", "", f"{folder.parent.name}:{folder.name}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, not {type(value).__name__}")
    return value


def _read_skipped(path: Path) -> tuple[Skipped, ...]:
    if not path.exists():
        return ()
    saved = read_json(path, PREPARE_AGAIN)
    with reading(path, PREPARE_AGAIN):
        return tuple(Skipped(_text(entry["name"]), _text(entry["reason"])) for entry in saved)


def check_dataset(name: str, data_dir: Path | None = None, *, shown: bool = True) -> list[str]:
    """Checks all files of a prepared dataset.

    Their digests are compared. For a dataset without digests, which an older version prepared, all records are read.

    Args:
        name: the name of the dataset.
        data_dir: folder of prepared datasets; None: TFDS's standard folder.
        shown: whether to show the progress.

    Returns:
        One line for each damaged file; empty if there are none.

    Raises:
        UserError: the dataset is not prepared.
    """
    folder = find_prepared(_ALIASES.get(name, name), data_dir or default_data_dir())
    if folder is not None and (digests := read_digests(folder)) is not None:
        try:
            read_origin(folder)
        except UserError as error:
            return [str(error)]
        size = sum((folder / file).stat().st_size for file in digests if os.path.isfile(folder / file))
        with counting_bytes(f"checking {name}", size, shown) as progress:
            return [f"{folder / found}" for found in damages(folder, progress)]
    try:
        for split in split_names(name, data_dir):
            source = open_source(name, split, data_dir)
            ids = source.image_ids()
            with working(f"checking {name} {split}", len(source), "images", shown=shown) as work:
                for i, example in enumerate(source):
                    work.advance()
                    if (example.image_id, example.captions) != (ids[i], source.captions(i)):
                        return [f"{folder}: the index of the split {split} does not belong to the records"]
    except UserError as error:
        if folder is None:
            raise
        return [str(error)]
    return []


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the newest version of a prepared dataset, or None if it is not prepared."""
    if not _NAME.fullmatch(name):
        return None
    _pull(data_dir / name)
    versions = [
        info.parent
        for pattern in _DEPTHS
        for info in (data_dir / name).glob(f"{pattern}/{INFO_FILE}")
        # TFDS writes to incomplete.XXXXXX_<version> until the dataset is complete.
        if _VERSION.fullmatch(info.parent.name)
    ]
    return max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None)


@functools.cache
def _pull(dataset: Path) -> None:
    """Completes the working copy of a dataset in a bucket, once per process."""
    pull_tree(dataset, INFO_FILE)


def find_damaged(name: str, data_dir: Path) -> Path | None:
    """The folder of a version that has checksums but has lost the file that TFDS finds it by; None if there is none."""
    if not _NAME.fullmatch(name):
        return None
    digests = [path for pattern in _DEPTHS for path in (data_dir / name).glob(f"{pattern}/{DIGESTS}")]
    return next((path.parent for path in digests if _VERSION.fullmatch(path.parent.name)), None)


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Parses datasets and weights: "flickr8k*2+coco_subset" is [("flickr8k", 2.0), ("coco_subset", 1.0)].

    A weight is the number of times that an epoch repeats each image of its dataset (see `mixtures`).

    Raises:
        UserError: a name is invalid or occurs twice, or a weight is not a positive number.
    """
    mixture: dict[str, float] = {}
    for part in text.split("+"):
        name, star, weight_text = (piece.strip() for piece in part.partition("*"))
        name = _ALIASES.get(name, name)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"dataset {text!r}: {name!r} is not a dataset name; write a mixture as flickr8k*2+coco_subset"
            )
        if name in mixture:
            raise UserError(f"dataset {text!r}: {name!r} occurs twice; use a weight instead, e.g. {name}*2")
        try:
            weight = float(weight_text) if star else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(
                f"dataset {text!r}: the weight {weight_text!r} is not a positive number; write e.g. {name}*2"
            )
        mixture[name] = weight
    return list(mixture.items())


def _not_prepared(name: str, data_dir: Path) -> NoReturn:
    if (damaged := find_damaged(name, data_dir)) is not None:
        raise UserError(f"{damaged / layout.INFO_FILE} is missing: {PREPARE_AGAIN}")
    known = {"scenes": "scenes", coco.NAME: "coco", "flickr8k": "flickr8k", "flickr30k": "flickr30k"}
    there = sorted(folder.name for folder in data_dir.glob("*/") if find_prepared(folder.name, data_dir) is not None)
    last = Path(name).name
    near = [last] if last in there else difflib.get_close_matches(name, there, n=1, cutoff=0.7)
    if near and name not in known:
        raise UserError(f"dataset {name!r} is not prepared in {data_dir}; did you mean {near[0]}?")
    if Path(name).is_dir() and name not in known:
        raise UserError(
            f"{name} is a folder, not the name of a prepared dataset; run: imgcap data prepare {shlex.quote(name)}"
        )
    command = known.get(name, f"FOLDER --name {name if _NAME.fullmatch(name) else 'NAME'}")
    raise UserError(
        f"dataset {name!r} is not prepared in {data_dir} (prepared datasets: {', '.join(there) or 'none'}); "
        f"run: imgcap data prepare {command}; or, if it is in another folder, set TFDS_DATA_DIR or pass --data-dir "
        "(imgcap train: --data.data-dir)"
    )


def _check_features(path: Path) -> None:
    """Raises a UserError unless all features are classes of TFDS, which imports the module of each class."""
    pending = [read_json(path, PREPARE_AGAIN)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            name = value.get("pythonClassName", "")
            if name and not str(name).startswith("tensorflow_datasets."):
                raise UserError(f"{path}: {str(name)[:200]!r} is not a feature of TFDS, and is not imported")
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _stored_splits(folder: Path) -> dict[str, int]:
    path = folder / INFO_FILE
    info = read_json(path, PREPARE_AGAIN)
    with reading(path, PREPARE_AGAIN):
        splits = {_text(split["name"]): [int(count) for count in split["shardLengths"]] for split in info["splits"]}
        if any(not 0 <= count < 2**40 for counts in splits.values() for count in counts):
            raise ValueError("the number of images")
        return {split: sum(counts) for split, counts in splits.items()}
