"""Fixtures for all tests."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Must be set before JAX is imported: four virtual devices on every machine, and a persistent compilation cache.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


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
        # An interrupted progress bar remains above the line.
        lines = [line for line in capture.readouterr().err.splitlines() if line.strip() and "━" not in line]
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
