"""Synchronises a run in a bucket with its working copy (see ``remote``).

Runs are copied, instead of using paths in buckets (``etils.epath``) everywhere. Orbax's atomic renames, appended logs,
locks and digests then work as on any disk, there is one code path, and training does not wait for the network.
``epath`` also has no recursive listing with sizes, which synchronising needs.

What always holds:
- A checkpoint counts, here and there, once it has its digests, which are copied last and deleted first.
- A checkpoint is copied after the metrics of its steps, and a newest one after the best one that it refers to.
- A name in both copies identifies the run. A run that was never pushed is never moved or replaced.
- A working copy that is ahead of the bucket is not changed, except for damaged checkpoints that the bucket has.
- Nothing is deleted here except checkpoints that the bucket has replaced. The copy of a run is moved aside if the
  bucket has another run, or, by training only, if the bucket has none.
- The bucket is changed only by training, and by ``push``. Training deletes no file that only others have put there.
"""

import json
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError, printable
from imgcap_jax.files import (
    DIGESTS,
    OWNER,
    damages,
    disk_errors,
    lock_file,
    read_digests,
    read_json,
    reading,
    reason,
    write_text,
)
from imgcap_jax.remote import Bucket, File, Vanished, each, files_in, pulling_alone, until_settled, url_of
from imgcap_jax.terminal import working
from imgcap_jax.training.checkpoints import CHECKPOINTS, DAMAGED

_IDENTITY = ".remote"  # the run's random name, in both copies: a run that was deleted and started again is another one
_NEWEST = "checkpoints/newest/"
_CHECKPOINT = re.compile(r"(checkpoints/(\w+)/(\d+))/.+")
# Written and pushed by an evaluation, on any machine.
_RESULT = re.compile(r"((captions|n_best|references|scores|sweep)_[^/]*|confidence)\.json")
_POLL_SECONDS = 2.0
_ATTEMPTS = 3  # to push, before training stops
_RETRY_SECONDS = 10.0
_ERROR_SECONDS = 20.0  # to push what is on disk after an error of the program


def _is_temporary(name: str) -> bool:
    """Whether a file is not pushed: a lock, one that is being written, or one of a damaged checkpoint."""
    hidden = any(part.startswith(".") or ".orbax-checkpoint-tmp" in part for part in name.split("/"))
    return hidden or name.startswith(f"{CHECKPOINTS}/{DAMAGED}/")


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


def pull(folder: Path, *, to_train: bool = False) -> None:
    """Brings the working copy of a run up to date. Does nothing for an ordinary folder.

    A copy that is ahead of the bucket is left as it is: training was interrupted before it was pushed. So is one in
    which another process trains.

    Args:
        folder: the working copy.
        to_train: whether the run is trained. The newest checkpoints are then pulled too, and the copy of a run that is
            no longer in the bucket is moved aside.

    Raises:
        UserError: the bucket cannot be reached, it has lost the run, or the copy belongs to another run and was never
            pushed.
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
        _pull(Bucket(url), folder, to_train)


def _pull(bucket: Bucket, folder: Path, to_train: bool) -> list[str]:
    """``pull`` without locks. If the run changes meanwhile, because it is trained elsewhere, it starts again.

    Returns the files outside of checkpoints that were copied.
    """
    return until_settled(bucket.url, lambda: _pull_once(bucket, folder, to_train))


def _pull_once(bucket: Bucket, folder: Path, to_train: bool) -> list[str]:
    theirs, ours = bucket.files(), _local_files(folder)
    name, pushed = _read_identity(folder)
    others, checkpoints = _by_checkpoint([name for name in theirs if not _is_temporary(name)])
    complete = _complete(checkpoints)
    _, our_checkpoints = _by_checkpoint(ours)
    their_name = bucket.read(_IDENTITY).decode(errors="replace") if _IDENTITY in theirs else ""
    if not complete:  # no run, or one whose first checkpoint was not pushed completely
        if pushed and name != their_name:
            if to_train:
                _move_aside(bucket, folder)
            elif ours:
                raise UserError(f"{bucket.url} has lost its run; to use what this machine has of it, copy {folder}")
        return []
    if name != their_name and ours and not pushed:
        raise UserError(f"{folder} has a run that is not the one in {bucket.url}; move one of them away")
    if name != their_name and pushed:
        _move_aside(bucket, folder)
        our_checkpoints = {}
    wanted = [one for one in complete if to_train or one.split("/")[1] == "best"]
    is_ahead = _newest(our_checkpoints) > _newest(checkpoints)
    if is_ahead:
        # The bucket can have later results, of another machine.
        others = [name for name in others if name not in ours or _RESULT.fullmatch(name)]
        wanted = [one for one in wanted if one in our_checkpoints and _is_damaged(folder / one)]
    else:
        _write_identity(folder, their_name, pushed=True)
    missing = [one for one in wanted if not _same(bucket, folder, one)]
    kinds = {one.split("/")[1] for one in wanted}
    for one, names in our_checkpoints.items():
        if one in missing or (one not in wanted and one.split("/")[1] in kinds and not is_ahead):
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
    return others


def _move_aside(bucket: Bucket, folder: Path) -> None:
    """Moves the copy of a run that is no longer in the bucket into another folder, except for its lock."""
    number = 1
    while (aside := folder.parent / f"{folder.name}.old{number}").exists():
        number += 1
    with disk_errors(str(aside)):
        aside.mkdir()
        for path in folder.iterdir():
            if path.name != OWNER:
                path.rename(aside / path.name)
    line = f"{bucket.url} no longer has the run that this machine has a copy of; the copy is kept in {aside}"
    print(f"imgcap: note: {printable(line)}", file=sys.stderr)


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
    """Whether the working copy has a checkpoint of the bucket, complete and undamaged."""
    digests = f"{checkpoint}/{DIGESTS}"
    with suppress(Vanished, OSError):
        there = bucket.read(digests)
        return (folder / digests).read_bytes() == there and not _is_damaged(folder / checkpoint)
    return False


def _is_damaged(checkpoint: Path) -> bool:
    """Whether the files of a checkpoint differ from its digests, or cannot be read."""
    with suppress(OSError):
        return bool(damages(checkpoint))
    return True


def _delete(folder: Path, names: Sequence[str]) -> None:
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
        # What the bucket has, as it was here, except for files that only others have put there.
        self._pushed: dict[str, File] = {}
        self._ended = threading.Event()
        self._given_up = threading.Event()  # nothing is pushed any more
        self._complete = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._url is None:
            return
        self._bucket = Bucket(self._url)
        with pulling_alone(folder):
            pulled = _pull(self._bucket, folder, to_train=True)
        there = [name for name in self._bucket.files() if not _is_temporary(name)]
        local = _local_files(folder)
        _, checkpoints = _by_checkpoint(there)
        complete = _complete(checkpoints)
        same = {one for one in complete if _same(self._bucket, folder, one)}
        for name in there:
            found = _CHECKPOINT.fullmatch(name)
            known = found[1] in same if found is not None else name in pulled
            if known and name in local:
                self._pushed[name] = local[name]
            # What is left of a run whose first push was interrupted is deleted too.
            elif name.startswith(f"{CHECKPOINTS}/") or not (complete or _RESULT.fullmatch(name)):
                self._pushed[name] = File(-1)
        for one in _complete(_by_checkpoint(local)[1]):
            if one not in same and _is_damaged(folder / one):  # it is not pushed as long as its digests are these
                self._pushed[f"{one}/{DIGESTS}"] = local[f"{one}/{DIGESTS}"]
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
            ) from self._failure

    def __enter__(self) -> "Mirror":
        if self._url is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._url is None:
            return
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._ended.set()  # interrupted twice
            self._given_up.set()
            return
        with working(f"writing {self._url}"):
            if kind is None or issubclass(kind, UserError):
                self._finish()
            else:  # an error of the program, or the end of another process
                self.drain(_ERROR_SECONDS)
        if kind is None:
            self.check()

    def drain(self, seconds: float) -> UserError | None:
        """Pushes what is on disk, in any thread, for at most this time. No file is begun afterwards.

        If the time is too short, a note says so. Returns the error if pushing fails.
        """
        if self._url is None:
            return None
        worker = threading.Thread(target=self._finish, daemon=True)
        worker.start()
        worker.join(max(0.0, seconds))
        if worker.is_alive():
            self._given_up.set()
            line = f"{self._url} lacks the newest checkpoint; it is in {self._folder}, and this machine uploads it"
            print(f"imgcap: note: {printable(line)} when training resumes", file=sys.stderr, flush=True)
            return None
        if not self._complete and self._failure is None:
            self._failure = UserError(f"{self._url} lacks the newest checkpoint, because its upload has ended")
        try:
            self.check()
        except UserError as error:
            return error
        return None

    def _finish(self) -> None:
        """Ends the thread, and pushes everything."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if not self.failed:
                self._push(everything=True)
                self._complete = True
        except Exception as error:  # of the bucket, or of the disk
            self._failure = self._explained(error)

    def _run(self) -> None:
        failures = 0
        while not self._ended.wait(_RETRY_SECONDS if failures else _POLL_SECONDS):
            try:
                self._push()
                failures = 0
            except Exception as error:
                failures += 1
                if failures == _ATTEMPTS:
                    self._failure = self._explained(error)
                    return

    def _explained(self, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        place = error.filename if isinstance(error, OSError) and error.filename else self._folder
        explained = UserError(f"{place} can't be pushed to {self._url} ({reason(error)})")
        explained.__cause__ = error
        return explained

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
                self._check_time()
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
            self._check_time()
            self._bucket.write(digests, text)
            self._pushed[digests] = local[digests]

    def _check_time(self) -> None:
        """Raises UserError if no more files are to be pushed."""
        if self._given_up.is_set():
            raise UserError(f"{self._url} lacks the newest checkpoint, because its upload took too long")

    def _remove(self, name: str) -> None:
        self._check_time()
        self._bucket.remove(name)
        del self._pushed[name]
