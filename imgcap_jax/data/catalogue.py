"""The datasets in a folder: prepared, damaged, or not complete."""

import contextlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from imgcap_jax.data.builders.layout import PREPARE_AGAIN
from imgcap_jax.data.sources import describe, find_damaged, find_prepared, read_origin
from imgcap_jax.errors import UserError
from imgcap_jax.files import read_json, reason
from imgcap_jax.remote import url_of

_FEATURES = "features.json"  # written by TFDS


@dataclass(frozen=True)
class ListedDataset:
    """A dataset in the folder of datasets.

    Attributes:
        name: its name, as in ``imgcap data inspect NAME``.
        size: the size of its files, in bytes.
        splits: the number of images per split; empty if the dataset has a problem.
        source: the folder that it was prepared from, or another note on its origin.
        problem: why it cannot be used and what to do, in one line; "" if it can be used. File sizes are checked, and
            the digests of the files next to the records. The records themselves are not read.
    """

    name: str
    size: int
    splits: dict[str, int] = field(default_factory=dict)
    source: str = ""
    problem: str = ""


def list_datasets(data_dir: Path) -> list[ListedDataset]:
    """The caption datasets in a folder, sorted by name; none if the folder does not exist. Other folders are left out.

    Raises:
        OSError: the folder cannot be read.
        UserError: the folder is in a bucket.
    """
    if (url := url_of(data_dir)) is not None:
        raise UserError(f"datasets in a bucket can't be listed; give a name: imgcap data inspect NAME --data-dir {url}")
    folders = sorted(path for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
    return [found for folder in folders if (found := _listed(folder)) is not None]


def _listed(home: Path) -> ListedDataset | None:
    """The dataset in a folder; None if there is none."""
    name, data_dir = home.name, home.parent
    folder = find_prepared(name, data_dir) or find_damaged(name, data_dir)
    if folder is None:
        if not any(home.glob("incomplete.*")) and not any(home.glob("*/incomplete.*")):  # TFDS's name of them
            return None
        problem = "not complete: it is being prepared, or that was interrupted; prepare it again"
        return ListedDataset(name, _size(home), problem=problem)
    try:
        description, origin = describe(name, data_dir), read_origin(folder)
        if "captions" not in read_json(folder / _FEATURES, PREPARE_AGAIN)["featuresDict"]["features"]:
            return None
    except (UserError, OSError, KeyError, TypeError) as error:
        return ListedDataset(name, _size(folder), problem=reason(error))
    return ListedDataset(name, _size(folder), description.splits, origin.folder or origin.source)


def _size(folder: Path) -> int:
    """The size of the files in a folder, in bytes, while another process may rename them."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(parent, name))
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size
