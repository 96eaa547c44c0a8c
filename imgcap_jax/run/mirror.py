"""Keeps a run in a bucket and its working copy alike (see ``remote``)."""

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import DIGESTS, OWNER, lock_file, read_digests, read_json, reading, write_text
from imgcap_jax.remote import Bucket, File, each, files_in, pulling_alone, url_of
from imgcap_jax.terminal import working

_IDENTITY = ".remote"  # the run's random name, in both copies: a run that was deleted and started again is another one
_NEWEST = "checkpoints/newest/"
_CHECKPOINT = re.compile(r"(checkpoints/(\w+)/(\d+))/.+")
_POLL_SECONDS = 2.0
_ATTEMPTS = 3  # to push, before training stops; to pull a run that changes meanwhile
_RETRY_SECONDS = 10.0


def _is_temporary(name: str) -> bool:
    """Whether a file is not a part of a run: a lock, or one that is being written."""
    return any(part.startswith(".") or ".orbax-checkpoint-tmp" in part for part in name.split("/"))


def _local_files(folder: Path) -> dict[str, File]:
    return {name: file for name, file in files_in(folder).items() if not _is_temporary(name)}


def _by_checkpoint(names: Mapping[str, Any] | Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The files outside of checkpoints, and those of each checkpoint: its folder -> its files, the digests last."""
    others: list[str] = []
    checkpoints: dict[str, list[str]] = {}
    for name in names:
        if found := _CHECKPOINT.fullmatch(name):
            checkpoints.setdefault(found[1], []).append(name)
        else:
            others.append(name)
    for folder, files in checkpoints.items():
        files.sort(key=lambda name, last=f"{folder}/{DIGESTS}": name == last)  # type: ignore[misc]
    return others, checkpoints


def _complete(checkpoints: Mapping[str, Sequence[str]]) -> list[str]:
    """The folders of the checkpoints that have their digests, which are written last; the newest of each kind last."""

    def order(folder: str) -> tuple[bool, int]:
        _, kind, step = folder.split("/")
        return kind == "newest", int(step)

    return sorted((one for one, files in checkpoints.items() if files[-1] == f"{one}/{DIGESTS}"), key=order)


def _newest(checkpoints: Mapping[str, Sequence[str]]) -> tuple[int, int]:
    """The step of the newest complete checkpoint, and the number of its files, which grows when it is validated."""
    complete = [one for one in _complete(checkpoints) if one.startswith(_NEWEST)]
    return (int(complete[-1].removeprefix(_NEWEST)), len(checkpoints[complete[-1]])) if complete else (-1, 0)


def pull(folder: Path, *, everything: bool = False) -> None:
    """Brings the working copy of a run up to date. Does nothing for an ordinary folder.

    A copy that is ahead of the bucket is left as it is: training was interrupted before it was pushed. So is one in
    which another process trains.

    Args:
        folder: the working copy.
        everything: also pull what only training reads: the newest checkpoints.

    Raises:
        UserError: the bucket cannot be reached, or the copy belongs to another run and was never pushed.
    """
    url = url_of(folder)
    if url is None:
        return
    with pulling_alone(folder):
        if (folder / OWNER).exists():
            lock = lock_file(folder / OWNER)
            if lock is None:
                return
            lock.close()
        _pull(Bucket(url), folder, everything)


def _pull(bucket: Bucket, folder: Path, everything: bool) -> None:
    """``pull`` without locks. If the run changes meanwhile, because it is trained elsewhere, it starts again."""
    for _ in range(_ATTEMPTS):
        try:
            return _pull_once(bucket, folder, everything)
        except FileNotFoundError:
            continue
    raise UserError(f"{bucket.url} changes while it is read; try again")


def _pull_once(bucket: Bucket, folder: Path, everything: bool) -> None:
    theirs, ours = bucket.files(), _local_files(folder)
    name, pushed = _read_identity(folder)
    others, checkpoints = _by_checkpoint([name for name in theirs if not _is_temporary(name)])
    complete = _complete(checkpoints)
    _, our_checkpoints = _by_checkpoint(ours)
    their_name = bucket.read(_IDENTITY).decode(errors="replace") if _IDENTITY in theirs else ""
    if not complete:  # no run, or one whose first checkpoint was not pushed completely
        if pushed and name != their_name:  # it was deleted in the bucket
            _delete(folder, ours)
            (folder / _IDENTITY).unlink()
        return
    if name != their_name and ours and not pushed:
        raise UserError(f"{folder} has a run that is not the one in {bucket.url}; move one of them away")
    if name != their_name:
        _delete(folder, ours)
        our_checkpoints = {}
    if _newest(our_checkpoints) > _newest(checkpoints):
        return
    _write_identity(folder, their_name, pushed=True)
    wanted = [one for one in complete if everything or one.split("/")[1] == "best"]
    missing = [one for one in wanted if not _same(bucket, folder, one)]
    kinds = {one.split("/")[1] for one in wanted}
    for one, names in our_checkpoints.items():
        if one in missing or (one not in wanted and one.split("/")[1] in kinds):
            _delete(folder, names[::-1])  # the digests first
    files = [*others, *(name for one in missing for name in checkpoints[one])]
    with working(f"reading {bucket.url}", len(files), "files") as work:

        def get(name: str) -> None:
            bucket.get(name, folder / name)
            work.advance()

        # In this order a checkpoint never lacks the metrics of its steps, nor its own files.
        each(get, others)
        for one in missing:
            each(get, checkpoints[one][:-1])
            get(checkpoints[one][-1])


def _read_identity(folder: Path) -> tuple[str | None, bool]:
    """The name of the run in a working copy, None if it has none, and whether it was ever pushed completely."""
    path = folder / _IDENTITY
    if not path.is_file():
        return None, False
    found = read_json(path, "delete it")
    with reading(path, "delete it"):
        return str(found["name"]), bool(found["pushed"])


def _write_identity(folder: Path, name: str, *, pushed: bool) -> None:
    write_text(folder / _IDENTITY, json.dumps({"name": name, "pushed": pushed}) + "\n")


def _same(bucket: Bucket, folder: Path, checkpoint: str) -> bool:
    """Whether the working copy has a checkpoint completely."""
    digests = f"{checkpoint}/{DIGESTS}"
    return (folder / digests).is_file() and (folder / digests).read_bytes() == bucket.read(digests)


def _delete(folder: Path, names: Mapping[str, Any] | Sequence[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            for parent in (folder / name).parents:
                if parent == folder:
                    break
                parent.rmdir()


def push(folder: Path, names: Sequence[str]) -> None:
    """Pushes single files of a run's working copy, at once. A file that is missing here is deleted there."""
    url = url_of(folder)
    if url is None:
        return
    bucket = Bucket(url)
    for name in names:
        if (folder / name).is_file():
            bucket.put(folder / name, name)
        else:
            bucket.remove(name)


class Mirror:
    """Pushes a run to its bucket while it is trained. For an ordinary folder, it does nothing.

    A thread looks for checkpoints that are complete, and then pushes all files that have changed, the digests of each
    checkpoint last: a checkpoint without them does not count. Files that were deleted here are then deleted there.
    """

    def __init__(self, folder: Path) -> None:
        """Pulls the run, and pushes what an interrupted process could not. The folder is locked by the caller.

        Raises:
            UserError: see ``pull``.
        """
        self._folder, self._url = folder, url_of(folder)
        self._failure: UserError | None = None
        self._pushed: dict[str, File] = {}  # what the bucket has, as it was here
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._url is None:
            return
        self._bucket = Bucket(self._url)
        with pulling_alone(folder):
            _pull(self._bucket, folder, everything=True)
        there = [name for name in self._bucket.files() if not _is_temporary(name)]
        local = _local_files(folder)
        _, checkpoints = _by_checkpoint(there)
        same = {one for one in _complete(checkpoints) if _same(self._bucket, folder, one)}
        for name in there:
            found = _CHECKPOINT.fullmatch(name)
            known = found is not None and found[1] in same
            self._pushed[name] = local[name] if known and name in local else File(-1)
        self._name = _read_identity(folder)[0] or secrets.token_hex(8)
        self._bucket.write(_IDENTITY, self._name.encode())  # fails before training if the bucket can't be written
        self._push()

    @property
    def failed(self) -> bool:
        """Whether pushing has failed several times. Training then saves and stops."""
        return self._failure is not None

    def check(self) -> None:
        """Raises UserError if pushing has failed several times."""
        if self._failure is not None:
            raise UserError(
                f"{self._failure}; the run is in {self._folder}, and the same command on this machine resumes and "
                f"uploads it"
            )

    def __enter__(self) -> "Mirror":
        if self._url is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._url is None:
            return
        self._ended.set()
        if kind is not None and not issubclass(kind, UserError):
            return  # interrupted twice, or an error of the program
        with working(f"writing {self._url}"):
            self._thread.join()
            try:
                if not self.failed:
                    self._push(everything=True)
            except UserError as error:
                self._failure = error
        if kind is None:
            self.check()

    def _run(self) -> None:
        failures = 0
        while not self._ended.wait(_RETRY_SECONDS if failures else _POLL_SECONDS):
            try:
                self._push()
                failures = 0
            except UserError as error:
                failures += 1
                if failures == _ATTEMPTS:
                    self._failure = error
                    return

    def _push(self, *, everything: bool = False) -> None:
        """Pushes what has changed, if there is a new checkpoint or ``everything`` is wanted."""
        newest = {name: file for name, file in _local_files(self._folder).items() if name.startswith(_NEWEST)}
        # What a newest checkpoint refers to, best parameters and metrics, is older: it is listed afterwards.
        later = _local_files(self._folder)
        local = {name: file for name, file in later.items() if not name.startswith(_NEWEST)} | newest
        others, checkpoints = _by_checkpoint(local)
        new = [
            one for one in _complete(checkpoints) if self._pushed.get(f"{one}/{DIGESTS}") != local[f"{one}/{DIGESTS}"]
        ]
        if _newest(checkpoints) < (0, 0) or not (new or everything):
            return
        if not any(name.endswith(DIGESTS) for name in self._pushed):
            new.reverse()  # without a newest checkpoint, a run cannot be resumed
        _write_identity(self._folder, self._name, pushed=_read_identity(self._folder)[1])

        def put(name: str) -> None:
            if self._pushed.get(name) != local[name]:
                self._bucket.put(self._folder / name, name)
                self._pushed[name] = local[name]

        # In this order a checkpoint never lacks the metrics of its steps, nor its own files.
        for name in others:
            with suppress(FileNotFoundError):
                put(name)
        for one in new:
            with suppress(FileNotFoundError):  # deleted meanwhile, as it is no longer one of the latest
                self._push_checkpoint(one, checkpoints[one], local, put)
        _write_identity(self._folder, self._name, pushed=True)
        gone = [name for name in self._pushed if name not in local and name not in later]
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{DIGESTS}")):
            self._remove(name)

    def _push_checkpoint(
        self, checkpoint: str, names: Sequence[str], local: Mapping[str, File], put: Callable[[str], None]
    ) -> None:
        """Pushes a checkpoint, unless it changes meanwhile; then it is pushed the next time."""
        *files, digests = names
        text = (self._folder / digests).read_bytes()
        listed = read_digests(self._folder / checkpoint) or {"": ""}
        if any(f"{checkpoint}/{name}" not in local for name in listed):  # some are already deleted
            return
        replaced = any(name in self._pushed and self._pushed[name] != local[name] for name in files)
        if replaced and digests in self._pushed:  # another checkpoint of the same step
            self._remove(digests)
        each(put, files)
        if (self._folder / digests).read_bytes() == text:
            self._bucket.write(digests, text)
            self._pushed[digests] = local[digests]

    def _remove(self, name: str) -> None:
        self._bucket.remove(name)
        del self._pushed[name]
