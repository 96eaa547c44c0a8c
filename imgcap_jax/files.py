"""Reads and writes files: atomic replacement, digests, errors of damaged files in one line, locks of folders."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from imgcap_jax.errors import UserError, printable

OWNER = ".lock"  # file in a locked folder
_LOCK_TRIES = 100  # each one fails only if another process has just released the lock
_FLOCK_TRIES, _FLOCK_SECONDS = 3, 0.005
_CHUNK = 1 << 20
DIGESTS = "SHA256SUMS"  # digests of the files in a folder, as `sha256sum` writes them


def local_path(text: str, advice: str = "only paths of local or mounted file systems are supported") -> Path:
    """The path that a user gave. Raises UserError, with advice, for a URL, which would become a local path."""
    if not text:
        raise UserError("an empty path; give a folder or a file")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(f"{text} is a URL; {advice}")
    return Path(text)


def cache_folder(name: str) -> Path:
    """The folder `name` of files that can be made again, in `$IMGCAP_CACHE`, or else in `$XDG_CACHE_HOME/imgcap_jax`,
    or else in `~/.cache/imgcap_jax`."""
    if chosen := os.environ.get("IMGCAP_CACHE"):
        return local_path(chosen, "IMGCAP_CACHE must be a local folder").expanduser() / name
    # The XDG specification says that a relative path must be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "imgcap_jax" / name


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE, errno.EFBIG)


def _disk_error(error: BaseException) -> int | None:
    """The number of a disk's error: its own or, from C++ libraries, by the system's message; None for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return next((number for number in _DISK_ERRORS if os.strerror(number) in str(error)), None)


def check_name(path: Path) -> None:
    """Raises UserError for the path of a folder that cannot be stored in files, which are UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{printable(str(path))}: the name is not UTF-8; rename the file or folder") from error


def disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full."""
    return _disk_error(error) in (errno.ENOSPC, errno.EDQUOT)


def check_writable(path: Path) -> None:
    """Raises UserError if ``replacing`` could not write this file, before its contents are computed."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe, which can't be replaced: give the name of a file")
    folder = path.absolute().parent
    while not os.path.lexists(folder):  # it will be made
        folder = folder.parent
    try:  # permissions do not say it: some folders refuse files even of the superuser
        os.rmdir(tempfile.mkdtemp(prefix=".new_", dir=folder))
    except OSError as error:
        raise UserError(f"{path} can't be written ({reason(error)}): choose another folder") from error


def check_creatable(folder: Path) -> None:
    """Raises UserError if a folder is missing and cannot be created. No new folder is left behind."""
    made: list[Path] = []
    try:
        for path in reversed((folder.absolute(), *folder.absolute().parents)):
            if path.is_dir():
                continue
            try:
                path.mkdir()
            except FileExistsError as error:
                if path.is_dir():  # another process has just made it
                    continue
                raise UserError(f"{folder} can't be created ({path} is not a folder); choose another folder") from error
            except OSError as error:
                if not path.parent.is_dir():  # another process has just deleted it
                    return
                raise UserError(f"{folder} can't be created ({reason(error)}); choose another folder") from error
            made.append(path)
    finally:
        with suppress(OSError):  # another process uses it
            for path in reversed(made):
                path.rmdir()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name when everything in it is written.

    Raises:
        UserError: the folder exists and is not empty, or it can't be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; give a new folder")
    with disk_errors(f"writing {folder}"):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        try:
            made.chmod(0o755)
            yield made
            os.replace(made, folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns an error of the disk (full, failing, read-only) into a UserError; ``what`` names the file or folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        if disk_full(error):
            reason, advice = "the disk is full", "free some space"
        else:
            reason, advice = os.strerror(number), "check the disk and its permissions"
        raise UserError(f"{what}: {reason}; {advice} and run the same command again") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, in the same folder, and renames it to ``path`` after success.

    A symbolic link at ``path`` is replaced, never followed: in a folder of somebody else it could point anywhere.

    Raises:
        UserError: the disk is full, or the path cannot be written.
    """
    if path.exists() and not path.is_file():
        check_writable(path)
    try:
        with disk_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            # A new folder with a random name: nobody can have put a link in the place of the temporary file.
            folder = Path(tempfile.mkdtemp(prefix=".new_", dir=path.absolute().parent))
    except UserError as error:
        raise UserError(f"{path} can't be written ({reason(error)}): choose another place") from error
    try:
        with disk_errors(str(path)):
            yield folder / path.name
            os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) with ``replacing``. Raises UserError if the disk is full."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def refuse_pipes(path: Path) -> None:
    """Raises UserError for a pipe or a device, which could be read without end. OSError: the path can't be examined."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device; give a file")


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Refuses pipes and devices, and turns every error while a file is read into one line, as ``explaining`` does.

    Args:
        path: the file.
        advice: what the user can do, without a full stop.

    Raises:
        UserError: the file is missing, cannot be read or is damaged.
    """
    with explaining(path, advice):
        refuse_pipes(path)
        yield


@contextmanager
def explaining(path: Path, advice: str) -> Iterator[None]:
    """Turns every error into one line that names the file, for a file that is open or was checked by ``reading``.

    Readers of foreign formats raise almost any type of exception on damaged files. Arguments and errors are those of
    ``reading``. The file system is not accessed.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {advice}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({reason(error)}): {advice}") from error
    except Exception as error:
        raise UserError(f"{path} is damaged ({reason(error)}): {advice}") from error


def reason(error: BaseException) -> str:
    """What went wrong, in one printable line, for a message that names the file. Foreign messages are cut."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not {error.encoding}"
    if isinstance(error, RecursionError):
        return "too deeply nested"
    if isinstance(error, KeyError):
        return printable(f"{error} is missing"[:200])
    if isinstance(error, UserError):
        return printable(str(error))
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__


def read_json(path: Path, advice: str) -> Any:
    """Reads a JSON file (UTF-8). NaN, Infinity and half surrogate pairs, which are not JSON, are refused.

    Raises:
        UserError: see ``reading``.
    """
    with reading(path, advice):
        return parse_json(path.read_text(encoding="utf-8-sig"))


def parse_json(text: str) -> Any:
    """Parses JSON as ``read_json`` does. Raises ValueError or RecursionError."""
    value = json.loads(text, parse_constant=_not_json)
    if "\\u" in text:
        _check_text(value)
    return value


def without_nan(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: null in their place. Tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _check_text(value: Any) -> None:
    """Raises UnicodeEncodeError if a text contains half of a surrogate pair, which no file can store."""
    json.dumps(value, ensure_ascii=False).encode()


def file_digest(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """The SHA-256 digest of a file, in hexadecimal.

    Args:
        path: the file.
        progress: receives the number of bytes that were read, from time to time.
    """
    digest, done = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(done)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """The SHA-256 digest of a JSON value, in hexadecimal. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_digests(
    folder: Path,
    names: Sequence[str] | None = None,
    comments: Sequence[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the digests of files in ``folder`` to its SHA256SUMS, for ``damages`` and for ``sha256sum -c``.

    Args:
        folder: the folder.
        names: relative paths; None: all files below the folder.
        comments: lines to write above the digests.
        progress: receives the number of bytes that were read, from time to time.
    """
    if names is None:
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    digest = _digester(progress)
    _write_digests(folder, {name: digest(folder / name) for name in names if name != DIGESTS}, comments)


def add_digests(folder: Path, names: Sequence[str]) -> None:
    """Adds the digests of files in ``folder`` to its SHA256SUMS, without reading the other files again."""
    _write_digests(folder, {**(read_digests(folder) or {}), **{name: file_digest(folder / name) for name in names}})


def _write_digests(folder: Path, digests: Mapping[str, str], comments: Sequence[str] = ()) -> None:
    above = "".join(f"# {comment}\n" for comment in comments)
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    write_text(folder / DIGESTS, f"{above}{lines}# {len(digests)} files\n")


def read_digests(folder: Path) -> dict[str, str] | None:
    """The digests that ``write_digests`` wrote: relative path -> digest. None: there is no SHA256SUMS.

    Comments (#) are ignored. A line in another form has the digest "", as has a SHA256SUMS that can't be read; no file
    equals that.
    """
    try:
        refuse_pipes(folder / DIGESTS)
        text = (folder / DIGESTS).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None
    except (UserError, OSError):
        return {DIGESTS: ""}
    written = (line for line in text.removesuffix("\n").split("\n") if not line.startswith("#"))
    lines = (re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in written)
    return dict((line[2], line[1]) if line else (DIGESTS, "") for line in lines)


def _digester(progress: Callable[[int], None]) -> Callable[[Path], str]:
    """``file_digest`` of several files, which reports the bytes of all of them together."""
    total = 0

    def digest(path: Path) -> str:
        nonlocal total
        before = total

        def add(done: int) -> None:
            nonlocal total
            total = before + done
            progress(total)

        return file_digest(path, add)

    return digest


def damages(folder: Path, progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """What has changed in a folder since ``write_digests``, one line per file; empty if nothing, or without digests.

    Files that were added since then (by file managers, network file systems) are no damage. ``progress`` receives the
    number of bytes that were read, from time to time.
    """
    digests = read_digests(folder)
    if digests is None:
        return []
    if DIGESTS in digests or not are_complete(digests, (folder / DIGESTS).read_text("utf-8", "surrogateescape")):
        return [f"{DIGESTS} has changed"]
    found = []
    digest_of = _digester(progress)
    for name, digest in digests.items():
        if not os.path.isfile(folder / name):  # unlike Path.is_file, False for names that no file can have
            found.append(f"{name} is missing")
        elif digest_of(folder / name) != digest:
            found.append(f"{name} has changed")
    return found


def are_complete(digests: Mapping[str, str], text: str) -> bool:
    """Whether the text of a SHA256SUMS has as many digests as its last line says."""
    return text.endswith(f"\n# {len(digests)} files\n") or text == "# 0 files\n"


def appending(path: Path) -> TextIO:
    """Opens a text file (UTF-8) to append to it. Raises OSError (ELOOP) if it is a symbolic link."""
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666),
        "a",
        encoding="utf-8",
    )


def is_private(folder: Path) -> bool:
    """Whether the folder belongs to this user and nobody else can write to it. It is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class OwnedError(UserError):
    """Another process has locked a folder."""


@contextmanager
def owning(folder: Path, doing: str) -> Iterator[None]:
    """Locks a folder while entered. The system releases the lock when the process ends for any reason.

    At the end, the lock's file is deleted, and so are the folders that were made for it, if they are empty.

    Args:
        folder: made if it is missing.
        doing: what the owner of the lock is doing, for the error of other processes.

    Raises:
        OwnedError: another process has locked the folder.
        UserError: its lock is a symbolic link, or it cannot be created.
    """
    path = folder.absolute() / OWNER
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        try:
            lock = lock_file(path)
        except OSError:
            check_creatable(folder)
            raise
        if lock is None:
            check_creatable(folder)
            raise OwnedError(f"another process is {doing} {folder}; wait for it, or choose another folder")
        with lock:
            try:
                yield
            finally:
                if _is_at(path, lock):
                    path.unlink()  # while it is locked; a process that has just opened it notices this (see lock_file)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise UserError(f"{folder / OWNER} is a symbolic link; delete it") from error
        raise
    finally:
        with suppress(OSError):  # not empty, or another process uses it
            for parent in made:
                parent.rmdir()


def lock_file(path: Path) -> TextIO | None:
    """Opens and locks a file, in a folder that is made if it is missing. None: another process has locked it.

    The lock lasts until the file is closed. Who deletes the file does so before.
    """
    for _ in range(_LOCK_TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = appending(path)
        except (FileNotFoundError, FileExistsError):
            if os.path.lexists(path.parent) and not path.parent.is_dir():
                raise
            continue  # the last owner deleted the folder while it was made here
        if not _locked(lock, fcntl.LOCK_EX):
            lock.close()
            return None
        if _is_at(path, lock):
            return lock
        lock.close()  # the last owner deleted the file after it was opened here; another process can lock a new one
    return None


def is_locked(path: Path) -> bool:
    """Whether a process has locked a file (see ``lock_file``). The file is not made. False if it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # A shared lock, for microseconds: a process that wants its own lock meanwhile tries again.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(file)
    return False


def _locked(file: TextIO, how: int) -> bool:
    """Locks an open file. Tries a few times, because ``is_locked`` can have a lock for microseconds."""
    for attempt in range(_FLOCK_TRIES):
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < _FLOCK_TRIES:
                time.sleep(_FLOCK_SECONDS)
    return False


def _is_at(path: Path, file: TextIO) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False
