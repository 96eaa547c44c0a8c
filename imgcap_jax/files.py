"""Writing files so that a kill leaves the old one or the new one, never half of it; and owning a folder."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imgcap_jax.errors import UserError

OWNER = ".lock"  # in a folder that a process owns


def cache_folder(name: str) -> Path:
    """Folder `name` for what can be made again: in `$IMGCAP_CACHE`, else in imgcap_jax of `$XDG_CACHE_HOME` or
    `~/.cache`."""
    if chosen := os.environ.get("IMGCAP_CACHE"):
        return Path(chosen).expanduser() / name
    # The XDG rules say that a path which is not absolute is to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "imgcap_jax" / name


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room: as the system does, or in its words as C++ libraries do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def check_writable(path: Path) -> None:
    """Raises UserError where ``replacing`` could not write this file, before hours are spent on what is to be in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe, which can't be replaced: give the name of a file")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"{path} can't be written: choose a folder that exists and can be written")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and renames it when all went well.

    A link stays one, and what it leads to is replaced.

    Raises:
        UserError: the disk is full, or the path can't be written.
    """
    if path.exists() and not path.is_file():
        check_writable(path)
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if disk_full(error):
            raise UserError(f"{path}: the disk is full; free some space and give the same command again") from error
        if error.filename is not None and Path(error.filename) in (temporary, *target.parents):
            raise UserError(f"{path} can't be written ({error.strerror}): choose another place") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file (UTF-8) by way of ``replacing``. Raises UserError where the disk is full."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def owning(folder: Path, doing: str) -> Iterator[None]:
    """Owns a folder while entered; the system ends it with the process, however that ends.

    Args:
        folder: is made where it is missing.
        doing: what another process that owns it is told to be doing.

    Raises:
        UserError: another process owns it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / OWNER).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is {doing} {folder}; wait for it, or choose another folder") from None
        yield
