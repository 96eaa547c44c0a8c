"""Downloads files: interrupted downloads resume, complete ones are verified and renamed into place.

A download is kept next to its destination as `.part` until its SHA-256 has been verified. `.part.json` records which
file it is a part of.

Only files whose SHA-256 is known are downloaded without HTTPS.
"""

import contextlib
import fcntl
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from imgcap_jax.errors import UserError
from imgcap_jax.files import disk_full, file_digest, reason
from imgcap_jax.terminal import Work, working

_log = logging.getLogger(__name__)

_STALLED_SECONDS = 30.0
# Tries without a new byte before giving up, before and after the first new byte. The pauses between them grow from
# 2 seconds to a minute, about 4 minutes in all, because networks fail for minutes in a download of hours.
_FIRST_TRIES, _LATER_TRIES = 4, 9
_PAUSE_SECONDS, _LONGEST_PAUSE = 2.0, 60.0
_LONG_PAUSE = 8.0  # seconds; longer pauses are announced
_CHUNK = 1 << 20
_MEGABYTE = 1_000_000
_CHANGED = "the file on the server has changed"


class _Unreachable(Exception):
    """No usable response; `status` is the HTTP status, if there is one."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _Broken(Exception):
    """A response that ended early."""


@dataclass(frozen=True)
class _Remote:
    """The file that the server says it sends. The parts of two requests fit together only if this is equal.

    Attributes:
        url: the requested URL.
        version: its strong ETag or its date, for If-Range; "" if there is neither.
        size: the size of the whole file in bytes; None if the server does not report it.
        sha256: the SHA-256 of the whole file if the server publishes it, else "".
    """

    url: str
    version: str
    size: int | None
    sha256: str


@dataclass(frozen=True)
class _Wanted:
    """The file that the caller wants; see `fetch`."""

    url: str
    sha256: str
    size: int | None

    @property
    def verified(self) -> bool:
        """Whether the checksum identifies the file, so that nobody on the way can replace it."""
        return len(self.sha256) == 64


class DownloadError(UserError):
    """The server cannot be reached, lacks the file, sends another one, or breaks the connection repeatedly."""


def fetch(
    url: str, path: Path, *, by_hand: str, elsewhere: str, sha256: str = "", size: int | None = None, shown: bool = True
) -> Path:
    """Downloads a file unless it exists already.

    A download that was interrupted, in this process or an earlier one, resumes where it stopped if the server still has
    the same file. Processes that need the same file wait for the first one.

    Args:
        url: the URL of the file: https, unless the whole SHA-256 is given.
        path: the destination.
        by_hand: what the user can do if the server can't be reached, for the error message.
        elsewhere: how to choose another folder than that of `path`, for the error message of a full disk.
        sha256: its SHA-256 in hexadecimal digits, or the start of it. A SHA-256 published by the Hugging Face Hub is
            checked as well.
        size: its size in bytes; None if it is not known.
        shown: whether to show the progress.

    Returns:
        The path.

    Raises:
        DownloadError: the server can't be reached, lacks the file or sends another one, or the connection fails
            repeatedly.
        UserError: the URL or a redirect is not https, the disk is full, or the destination can't be written.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if not path.is_file():
                part, record = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
                published = _receive_all(_Wanted(url, sha256, size), part, record, by_hand, shown)
                # The record stays until the part has its name. A process that is killed before does not download again.
                _check(url, part, record, [sha256, published], shown)
                os.replace(part, path)
                record.unlink(missing_ok=True)
    except OSError as error:
        if disk_full(error):
            raise UserError(
                f"{path.parent}: the disk is full; free some space and run the same command again, or {elsewhere}"
            ) from error
        raise UserError(
            f"{error.filename or path}: {reason(error)}; check this path and run the same command again, or {elsewhere}"
        ) from error
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock file is not deleted, because another process may already be waiting for it.
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("%s: another process is downloading this file; waiting for it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _receive_all(wanted: _Wanted, part: Path, record: Path, by_hand: str, shown: bool) -> str:
    """Completes the part, in several requests if the connection breaks; returns the published SHA-256 or ""."""
    url = wanted.url
    start = most = _size(part)
    fruitless = 0
    work: Work | None = None
    with contextlib.ExitStack() as stack:

        def show(done: int, total: int | None) -> None:
            nonlocal work
            if work is None:  # only once data arrives, so that an earlier error is printed alone
                title = f"downloading {PurePosixPath(urlsplit(url).path).name}"
                megabytes = None if total is None else -(-total // _MEGABYTE)
                work = stack.enter_context(
                    working(title, megabytes, "MB", done=done // _MEGABYTE, shown=shown, announced=True)
                )
            work.update(done // _MEGABYTE)

        while True:
            try:
                return _receive(wanted, part, record, show)
            except (_Unreachable, _Broken) as problem:
                size = _size(part)
                most, fruitless = max(most, size), 0 if size > most else fruitless + 1
                if isinstance(problem, _Unreachable) and most == start:
                    raise DownloadError(f"{url} can't be downloaded ({problem}); {by_hand}") from problem
                if fruitless >= (_LATER_TRIES if most > start else _FIRST_TRIES):
                    raise DownloadError(
                        f"the download of {url} stopped after {size / 1e6:.1f} MB ({problem}); run the same command "
                        "again to resume it"
                    ) from problem
                pause = min(_PAUSE_SECONDS * 2 ** max(fruitless - 1, 0), _LONGEST_PAUSE)
                if pause >= _LONG_PAUSE:
                    _log.warning("%s: %s; trying again in %.0f seconds", url, problem, pause)
            time.sleep(pause)


def _receive(wanted: _Wanted, part: Path, record: Path, show: Callable[[int, int | None], None]) -> str:
    """Requests the missing bytes of the part once; returns the published SHA-256 or ""."""
    url = wanted.url
    have, known = _size(part), _read_record(record)
    if known is None or known.url != url or not known.version:
        have = 0
    elif have and have == known.size:
        return known.sha256
    headers = {"User-Agent": "imgcap_jax"}
    if known and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known.version}
    redirects = _Redirects(insecure=wanted.verified)
    try:
        answer = _open(urllib.request.Request(url, headers=headers), redirects)
    except _Unreachable as problem:
        if problem.status != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        part.unlink()
        raise _Broken(_CHANGED) from problem
    with answer as response:
        remote, start = _remote(url, response, redirects.sha256)
        if start and (start != have or remote != known):
            part.unlink()
            raise _Broken(_CHANGED)
        if wanted.size is not None and remote.size not in (None, wanted.size):
            raise DownloadError(
                f"{url} is not the published file: the server sends {remote.size:,} bytes instead of "
                f"{wanted.size:,}; check the connection (a proxy or a login page) and run the same command again"
            )
        if have and not start:
            _log.warning("%s: the server sends the whole file again instead of the rest", url)
        with part.open("ab" if start else "wb") as file:
            # Only after the old part is gone, because the record does not describe the old part.
            if not start:
                record.write_text(json.dumps(asdict(remote)), encoding="utf-8")
            show(start, remote.size)
            while chunk := _read(response):
                file.write(chunk)
                show(file.tell(), remote.size)
    if remote.size is not None and _size(part) != remote.size:
        raise _Broken("the server closed the connection")
    return remote.sha256


def _open(request: urllib.request.Request, redirects: "_Redirects") -> HTTPResponse:
    redirects.check(request.full_url)
    try:
        response: HTTPResponse = urllib.request.build_opener(redirects).open(request, timeout=_STALLED_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            raise _Unreachable(f"the server answers {error.code} {error.reason}", error.code) from error
    except urllib.error.URLError as error:
        raise _Unreachable(_words(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(_words(error)) from error
    return response


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_words(error)) from error


def _words(error: object) -> str:
    if isinstance(error, TimeoutError) and error.errno is None:  # our timeout, not the system's
        return f"no data arrived for {_STALLED_SECONDS:.0f} seconds"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _remote(url: str, response: HTTPResponse, sha256: str) -> tuple[_Remote, int]:
    """The file that the response is part of, and the byte at which the response starts."""
    etag = response.headers.get("ETag", "")
    # A weak ETag, W/"...", does not guarantee identical bytes.
    version = response.headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag
    length = response.headers.get("Content-Length")
    start, size = 0, int(length) if length and length.isdecimal() else None
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if given is None:
            raise _Unreachable("the server sends a part of the file without saying which one")
        start, size = int(given[1]), int(given[2]) if given[2] != "*" else None
    return _Remote(url, version, size, sha256 or _published_sha256(response.headers)), start


def _published_sha256(headers: HTTPMessage) -> str:
    """The SHA-256 that the Hugging Face Hub publishes in the response that redirects to a large file, or "".

    https://github.com/huggingface/huggingface_hub, file_download.py, `get_hf_file_metadata`.
    """
    etag = headers.get("X-Linked-Etag", "").strip('"')
    return etag if re.fullmatch("[0-9a-f]{64}", etag) else ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and to http if `insecure`. Keeps the first SHA-256 that a redirect publishes."""

    def __init__(self, *, insecure: bool) -> None:
        self.sha256 = ""
        self._insecure = insecure

    def check(self, url: str) -> None:
        """Raises UserError unless the URL is secure enough."""
        if not (_is_secure(url) or (self._insecure and urlsplit(url).scheme == "http")):
            raise UserError(f"{url} is refused: files whose SHA-256 is not known are downloaded over https only")

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        self.check(newurl)
        self.sha256 = self.sha256 or _published_sha256(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_secure(url: str) -> bool:
    return urlsplit(url).scheme == "https"


def _check(url: str, part: Path, record: Path, checksums: list[str], shown: bool) -> None:
    title = f"checking {PurePosixPath(urlsplit(url).path).name}"
    with working(title, -(-_size(part) // _MEGABYTE), "MB", shown=shown) as work:
        digest = file_digest(part, lambda done: work.update(done // _MEGABYTE))
    for expected in checksums:
        if not digest.startswith(expected):
            part.unlink()
            record.unlink(missing_ok=True)
            digits = min(len(expected), 16)
            raise DownloadError(
                f"{url} is not the published file: its SHA-256 starts with {digest[:digits]}, not "
                f"with {expected[:digits]}; the download was deleted, run the same command again to repeat it"
            )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_record(path: Path) -> _Remote | None:
    try:
        remote = _Remote(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None  # missing, or half written by a killed process; the download then starts from scratch
    texts = all(isinstance(text, str) for text in (remote.url, remote.version, remote.sha256))
    return remote if texts and isinstance(remote.size, int | None) else None
