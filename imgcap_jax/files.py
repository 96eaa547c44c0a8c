"""Writes files atomically, so that a kill leaves the old or the new file, and locks folders."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imgcap_jax.errors import UserError

OWNER = ".lock"  # file in a locked folder


def cache_folder(name: str) -> Path:
    """The folder `name` of files that can be made again, in `$IMGCAP_CACHE`, or else in `$XDG_CACHE_HOME/imgcap_jax`,
    or else in `~/.cache/imgcap_jax`."""
    if chosen := os.environ.get("IMGCAP_CACHE"):
        return Path(chosen).expanduser() / name
    # The XDG specification says that a relative path must be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "imgcap_jax" / name


def disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full: by its number or, from C++ libraries, by the system's message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def check_writable(path: Path) -> None:
    """Raises UserError if ``replacing`` could not write this file, before its contents are computed."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe, which can't be replaced: give the name of a file")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"{path} can't be written: choose a folder that exists and can be written")


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns an error that says that the disk is full into a UserError; ``what`` names the file or folder."""
    try:
        yield
    except Exception as error:
        if disk_full(error):
            raise UserError(f"{what}: the disk is full; free some space and give the same command again") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to ``path`` to write to, and renames it after success.

    If ``path`` is a symbolic link, the file that it points to is replaced.

    Raises:
        UserError: the disk is full, or the path cannot be written.
    """
    if path.exists() and not path.is_file():
        check_writable(path)
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with disk_errors(str(path)):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, target)
    except OSError as error:
        if error.filename is not None and Path(error.filename) in (temporary, *target.parents):
            raise UserError(f"{path} can't be written ({error.strerror}): choose another place") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) with ``replacing``. Raises UserError if the disk is full."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def owning(folder: Path, doing: str) -> Iterator[None]:
    """Locks a folder while entered. The system releases the lock when the process ends for any reason.

    Args:
        folder: made if it is missing.
        doing: what the owner of the lock is doing, for the error of other processes.

    Raises:
        UserError: another process has locked the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / OWNER).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is {doing} {folder}; wait for it, or choose another folder") from None
        yield
