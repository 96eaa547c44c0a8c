"""Fixtures for all tests."""

import hashlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Must be set before JAX is imported: four virtual devices on every machine, and a persistent compilation cache.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(scope="session", autouse=True)
def no_progress_lines() -> Iterator[None]:
    """On a slow machine, a line about the progress of long work would be mixed with the output that a test expects."""
    from imgcap_jax import terminal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "FIRST_LINE_SECONDS", 3600.0)
        yield


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs() -> Iterator[None]:
    """Each compiled program takes several memory mappings, of which Linux allows a process 65,530."""
    yield
    if "jax" in sys.modules:
        import jax

        jax.clear_caches()


@pytest.fixture
def as_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the CPU run what is traced from here on as it would be compiled for another platform: gpu or tpu."""
    import jax

    def use(platform: str) -> None:
        def chosen(*operands: Any, default: Any = None, **per_platform: Any) -> Any:
            return per_platform.get(platform, default)(*operands)

        monkeypatch.setattr(jax.lax, "platform_dependent", chosen)

    return use


@pytest.fixture
def progress_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines about the progress of long work, one per update; without a terminal, a clock decides which appear."""
    from imgcap_jax import terminal

    lines: list[str] = []
    update = terminal.Work.update

    def recorded(work: terminal.Work, *arguments: Any) -> None:
        update(work, *arguments)
        if work in terminal._in_lines:
            lines.append(work.line())

    monkeypatch.setattr(terminal.Work, "update", recorded)
    return lines


@pytest.fixture(autouse=True)
def no_deprecated_call(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Orbax and TFDS log deprecated calls, and do not warn of them. Warnings are errors by pyproject.toml."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    logged = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    assert not [message for message in logged if "deprecat" in message.lower()]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data. Tests that read it are skipped if it does not exist."""
    folder = Path(os.environ.get("IMGCAP_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist (set IMGCAP_SHARED to the folder that contains data/)")
    return folder


TINY = """
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.decoding.settings import Decoding

experiment = Experiment(
    data=CaptionData(dataset="scenes", image_size=32, batch_size=8, captions_per_image=3, min_count=1),
    encoder=SmallCNN(widths=(8, 8), blocks=(0, 0)),
    decoder=ShowAttendTell(
        hidden_size=8, embedding_size=8, attention_size=4, region_size=None, dropout=0.3
    ),
    training=Training(
        epochs=2, ema_decay=0.9, validation_images=8, checkpoint_minutes=0.0, log_steps=1
    ),
    decoding=Decoding(beam=2),
)
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 40 training scenes of 32 pixels."""
    from imgcap_jax.data.prepare import prepare
    from imgcap_jax.data.scenes.builder import SceneSplits

    folder = tmp_path_factory.mktemp("data")
    splits = SceneSplits(train=40, val=8, test=12, test_compositional=8, image_size=32)
    prepare("scenes", data_dir=folder, scenes=splits, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the tiny experiment: 10 steps, with a checkpoint after each."""
    path = tmp_path_factory.mktemp("experiments") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def trained(tiny_data: Path, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny experiment."""
    from imgcap_jax.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    arguments = ["train", str(tiny_file), "--run", str(folder / "run"), "--cache", str(folder / "cache")]
    assert main([*arguments, "--data.data-dir", str(tiny_data)]) == 0
    return folder / "run"


@pytest.fixture
def refused(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Runs a command that must fail with one error line and exit code 2; returns the line.

    ``capture`` is the fixture that captures the output, by default capsys.
    """
    from imgcap_jax.cli.main import main

    def run(arguments: list[str], capture: Any = None) -> str:
        capture = capture or request.getfixturevalue("capsys")
        capture.readouterr()
        assert main(arguments) == 2
        lines = [line for line in capture.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("imgcap: ")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def code_blocks() -> Callable[[Path], list[tuple[str, str, int]]]:
    """Reads the code blocks of a Markdown file: (language, text, line number of the first line)."""

    def read(path: Path) -> list[tuple[str, str, int]]:
        text = path.read_text()
        return [
            (found[1], found[2], text.count("\n", 0, found.start()) + 2)
            for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        ]

    return read


@pytest.fixture
def forget_code() -> Iterator[Callable[[], None]]:
    """A function that unloads all user code, as in a new process. It is also called after the test."""
    from imgcap_jax import user_code

    names, path = set(sys.modules), list(sys.path)

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith(("my_", "evil"))]:
            del sys.modules[name]
        user_code._named.files.clear()
        user_code._named.digests.clear()
        sys.path[:] = path

    yield forget
    forget()
    assert not {name for name in set(sys.modules) - names if name.startswith(("my_", "evil"))}


class FileServer(ThreadingHTTPServer):
    """Serves files with ranges, and records every request in `asked` as (path, range).

    Attributes:
        files: contents by path.
        redirects: the target of a path, and the SHA-256 published in the redirect.
        limits: the number of bytes after which each of the next responses breaks off; the last value is repeated.
        statuses: the HTTP status of each of the next responses, 0 for the file itself; the last value is repeated.
        delay: seconds before the connection of a response is closed.
        ranges: whether parts of files are sent at all.
        honours_if_range: whether a range request for another version returns the whole file, as it should.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, tuple[str, str]] = {}
        self.limits: list[int | None] = [None]
        self.statuses = [0]
        self.delay = 0.0
        self.honours_if_range = True
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def _take(answers: list[Any]) -> Any:
    return answers.pop(0) if len(answers) > 1 else answers[0]


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        if self.path in self.server.redirects:
            target, sha256 = self.server.redirects[self.path]
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("X-Linked-Etag", f'"{sha256}"')
            self.end_headers()
            return
        status = _take(self.server.statuses)
        if status or self.path not in self.server.files:
            self.send_error(status or 404)
            return
        content = self.server.files[self.path]
        etag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
        wanted = self.headers["Range"]
        if wanted and self.server.ranges and (not self.server.honours_if_range or self.headers["If-Range"] == etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: _take(self.server.limits)])
        self.wfile.flush()
        time.sleep(self.server.delay)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A running server. Of all URLs without https, only its own count as secure."""
    from imgcap_jax import downloads

    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setattr(downloads, "_is_secure", lambda url: url.startswith((f"{server.base}/", "https://")))
        monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.0)
        monkeypatch.setenv("no_proxy", "*")
        yield server
        server.shutdown()
        thread.join()
