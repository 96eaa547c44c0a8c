"""Writes a dataset into a temporary folder, which gets its name when the dataset is complete."""

import contextlib
import io
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from imgcap_jax import remote
from imgcap_jax.data.builders.layout import SKIPPED_FILE, check_ours, write_checksums
from imgcap_jax.files import check_creatable, lock_file

if TYPE_CHECKING:  # imports TFDS, which takes a while
    from imgcap_jax.data.builders.base import CaptionBuilder

_PREFIX = "incomplete."  # that of TFDS
_ABANDONED = re.compile(r"incomplete\.[A-Za-z0-9_]{6,8}(_\d+\.\d+\.\d+)?")  # of this module, and of TFDS
# Age at which a folder without a lock is removed. TFDS writes such folders, as did older versions.
_ABANDONED_AFTER_SECONDS = 3600.0


@contextlib.contextmanager
def staging(home: Path) -> Iterator[Path]:
    """A temporary folder in the folder of a dataset. Removes what killed processes left there.

    A locked file next to the folder shows other processes that it is in use. The file is locked before the folder is
    made, so that no other process can take the folder for abandoned.

    Args:
        home: the folder of the dataset, made if it is missing. It is removed at the end if it is empty.

    Yields:
        The temporary folder.

    Raises:
        UserError: the folder of the dataset cannot be created.
    """
    check_creatable(home)
    try:
        _remove_abandoned(home)
        lock = None
        while lock is None:  # another process may be removing the new file, as one that was left
            folder = home / f"{_PREFIX}{secrets.token_hex(4)}"
            lock = lock_file(_lock_of(folder))
        with lock:
            try:
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                _lock_of(folder).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # if nothing is prepared under this name, leave no empty folder
            home.rmdir()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_abandoned(home: Path) -> None:
    """Removes the folders of processes that were killed, which can be as large as the dataset."""
    names = {path.name.removesuffix(".lock") for path in home.glob(f"{_PREFIX}*")}
    for name in filter(_ABANDONED.fullmatch, names):
        with contextlib.suppress(OSError):  # another process removes it, or another user owns it
            _remove_if_abandoned(home / name)


def _remove_if_abandoned(folder: Path) -> None:
    path = _lock_of(folder)
    if not path.exists():
        newest = max(one.lstat().st_mtime for one in (folder, *folder.rglob("*")))
        if time.time() - newest > _ABANDONED_AFTER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
        return
    lock = lock_file(path)
    if lock is not None:
        with lock:
            shutil.rmtree(folder, ignore_errors=True)
            path.unlink()


def write(
    name: str,
    data_dir: Path,
    make_builder: "Callable[[Path], CaptionBuilder]",
    say: Callable[[str], None],
    *,
    shown: bool,
) -> Path:
    """Builds a dataset in a separate folder, so that an older one of this name stays until the new one is complete.

    Args:
        name: the dataset's name.
        data_dir: folder of prepared datasets.
        make_builder: makes the builder for a folder.
        say: receives lines about the result.
        shown: whether to show the progress of computing checksums.

    Returns:
        The folder of the dataset.
    """
    with staging(data_dir / name) as place:
        builder = make_builder(place)
        built = Path(builder.data_dir)
        folder = data_dir / built.relative_to(place)
        check_ours(folder)
        with _quiet_tfds():
            builder.download_and_prepare(file_format="array_record")
        write_checksums(built, shown=shown)
        check_ours(folder)  # again, because building can take hours
        folder.parent.mkdir(exist_ok=True)
        if os.path.lexists(folder):
            folder.rename(place / "replaced")
        built.rename(folder)
    counts = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
    say(f"{name}: {counts} images in {remote.shown(folder)}")
    if builder.skipped:
        listed = remote.shown(folder / SKIPPED_FILE)
        say(f"{name}: {len(builder.skipped)} images or captions skipped or noted, listed in {listed}")
    for note in builder.notes:
        say(f"{name}: note: {note}")
    return folder


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Suppresses what TFDS prints and logs."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3.connectionpool")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tfds.enable_progress_bar()
