"""The benchmarks in scripts/: other checkouts in the same process, caption lengths, and the PyTorch sides."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imgcap_jax
from imgcap_jax import errors

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of scripts/ by name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module


def _checkout(folder: Path, code: str = "") -> Path:
    """A folder with a package imgcap_jax that contains this code."""
    (folder / "imgcap_jax").mkdir()
    (folder / "imgcap_jax" / "__init__.py").write_text(code)
    return folder


def test_another_checkout_is_imported_in_its_block_only(script: Any, tmp_path: Path) -> None:
    """The own modules are the same objects after the block."""
    path = list(sys.path)
    with script("checkouts").package_of(_checkout(tmp_path, "name = 'other'")):
        assert import_module("imgcap_jax").__dict__["name"] == "other"
    assert sys.modules["imgcap_jax"] is imgcap_jax
    assert sys.modules["imgcap_jax.errors"] is errors
    assert sys.path == path


def test_modules_of_two_checkouts_are_not_mixed(script: Any, tmp_path: Path) -> None:
    """An editable installation finds a module that the other checkout lacks. This is an error."""
    with pytest.raises(ImportError), script("checkouts").package_of(_checkout(tmp_path)):
        import_module("imgcap_jax.errors")
    assert sys.modules["imgcap_jax.errors"] is errors


def test_a_checkout_with_another_interface_is_one_line(script: Any, tmp_path: Path) -> None:
    """The own candidates are built; what fails for the other checkout is named in one line."""
    options = argparse.Namespace(before=_checkout(tmp_path))

    def build() -> Any:
        return {"row": import_module("imgcap_jax.errors").UserError}

    with pytest.raises(SystemExit) as end:
        script("checkouts").of_each_checkout(options, build)
    assert f"--before {tmp_path}: this checkout" in str(end.value)
    assert "\n" not in str(end.value)


def test_real_lengths_have_the_stated_mean(script: Any) -> None:
    """10.75 words, deviation 2.4, at most T - 2; captions are bos, words, eos, pad."""
    measuring = script("measuring")
    counts = measuring.word_counts((20_000,), "captions")
    assert counts.mean() == pytest.approx(10.75, abs=0.05)
    assert counts.std() == pytest.approx(2.4, abs=0.05)
    tokens = measuring.random_captions({"B": 3, "M": 2, "T": 22, "V": 9}, "captions")
    drawn = measuring.word_counts((3, 2), "captions")
    np.testing.assert_array_equal((tokens > measuring.EOS).sum(-1), drawn)
    np.testing.assert_array_equal((tokens == measuring.EOS).argmax(-1), drawn + 1)
    np.testing.assert_array_equal((tokens != measuring.PAD).sum(-1), drawn + 2)


def test_packed_lstm_has_the_loss_of_single_steps(script: Any) -> None:
    """Show and Tell in PyTorch: both sides score the same words from the same inputs."""
    torch = pytest.importorskip("torch")
    decoders = script("torch_decoders")
    torch.manual_seed(0)
    stepped, packed = decoders.ShowTell(6, 5, 9).eval(), decoders.PackedShowTell(6, 5, 9).eval()
    state = {f"{name}_l0" if name.startswith("lstm") else name: value for name, value in stepped.state_dict().items()}
    packed.load_state_dict(state)
    tokens = torch.tensor([[[1, 4, 5, 2, 0, 0], [1, 4, 5, 6, 7, 2]], [[1, 8, 2, 0, 0, 0], [1, 4, 8, 2, 0, 0]]])
    regions = torch.randn(2, 3, 6)
    assert packed.loss(regions, tokens).item() == pytest.approx(stepped.loss(regions, tokens).item(), rel=1e-5)


def test_captions_of_pytorch_end_after_the_given_numbers_of_words(script: Any) -> None:
    """Beam search and sampling; a number that equals the limit means that there is no eos."""
    torch = pytest.importorskip("torch")
    decoders = script("torch_decoders")
    torch.manual_seed(0)
    decoder = decoders.UpDown(6, 5, 9)
    regions, words = torch.randn(3, 2, 6), torch.tensor([[2, 5], [4, 1], [1, 6]])
    sampled = decoders.self_critical_step(decoder, torch.optim.Adam(decoder.parameters()), regions, words, 6)
    assert torch.equal((sampled > decoders.EOS).sum(-1), words)
    assert torch.equal((sampled == decoders.EOS).sum(-1), (words < 6).long())
    for beam in (1, 2):
        found = decoders.decode(decoder.eval(), regions, beam, 6, words[:, 1])
        assert torch.equal((found > decoders.EOS).sum(-1), words[:, 1])


BARE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import benchmark, gpu_check
for name in {modules}:
    __import__(name)
"""


def test_benchmarks_need_jax_flax_and_optax_alone() -> None:
    """On a bare accelerator machine no other requirement of the package is installed, and none of its extras."""
    missing = ["PIL", "simplejpeg", "regex", "safetensors", "tensorflow_datasets", "grain", "array_record", "tyro"]
    missing += ["matplotlib", "tensorboardX", "pyarrow", "pycocoevalcap", "torch", "packaging"]
    code = "".join(path.read_text() for path in SCRIPTS.glob("*benchmark*.py")) + (SCRIPTS / "gpu_check.py").read_text()
    modules = sorted(set(re.findall(r"^ +from (imgcap_jax[.\w]+) import(?!.*# needs TFDS)", code, re.MULTILINE)))
    assert len(modules) > 10
    modules = [name for name in modules if not name.startswith("imgcap_jax.metrics.score")]
    program = BARE.format(missing=missing, modules=modules)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{SCRIPTS}"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_gpu_check_of_the_cpu_against_itself() -> None:
    """float32 has no difference at all; bfloat16 has one, within its tolerance."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{SCRIPTS}"}
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--platform", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = re.findall(r"^ok +(\w.*?) +(float32|bfloat16) +(\S+) of at most", ended.stdout, re.MULTILINE)
    assert len(found) == 14
    assert {difference for _, dtype, difference in found if dtype == "float32"} == {"0.0e+00"}
    assert float({name: one for name, dtype, one in found if dtype == "bfloat16"}["encoder, regions"]) > 0


def _gpu_check(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Runs gpu_check.sh with a stand-in for the interpreter, a shell script that receives its arguments."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{python}\n")
    interpreter.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(interpreter)}
    return subprocess.run([SCRIPTS / "gpu_check.sh"], capture_output=True, text=True, env=environment)


def test_gpu_check_names_the_parts_that_failed(tmp_path: Path) -> None:
    """The other parts run nevertheless."""
    python = (
        """case "$*" in *import*) echo gpu ;; *gpu_check.py) exit 1 ;; *float32*) exit 1 ;; *) echo "ran $*" ;; esac"""
    )
    ended = _gpu_check(tmp_path, python)
    assert ended.returncode == 1
    failed = [line.split()[5:7] for line in ended.stderr.splitlines() if line.startswith("failed, or out of time: ")]
    assert failed == [["scripts/gpu_check.py"], ["scripts/benchmark.py", "train"]]
    assert "ran scripts/benchmark.py train decode scst input population checkpoint --dtype bfloat16" in ended.stdout


@pytest.mark.parametrize(
    ("python", "message"), [("echo cpu", "JAX sees only the CPU"), ("exit 1", "cannot import JAX or start it")]
)
def test_gpu_check_needs_a_gpu(tmp_path: Path, python: str, message: str) -> None:
    ended = _gpu_check(tmp_path, python)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]


def _without_python(*arguments: str, folder: Path = REPOSITORY, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | variables
    command = [folder / "scripts" / "gpu_check.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_gpu_check_prints_its_help_and_refuses_other_arguments() -> None:
    for option in ("--help", "-h"):
        ended = _without_python(option, PYTHON="/nowhere")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith("For whoever has a GPU")
    ended = _without_python("cpu", PYTHON="/nowhere")
    assert ended.returncode == 2
    assert ended.stderr == "gpu_check: unknown arguments: cpu; use none, or --platform cpu\n"


def test_gpu_check_uses_the_virtual_environment_if_there_is_one(tmp_path: Path) -> None:
    """Otherwise python3."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "gpu_check.sh", tmp_path / "scripts")
    for name in (".venv/bin/python", "bin/python3"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'ImportError: {name}' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert "(ImportError: .venv/bin/python)" in _without_python(folder=tmp_path, PATH=path).stderr
    shutil.rmtree(tmp_path / ".venv")
    assert "(ImportError: bin/python3)" in _without_python(folder=tmp_path, PATH=path).stderr


@pytest.mark.parametrize("arguments", [[], ["--platform", "cpu"]])
def test_gpu_check_says_in_one_line_that_jax_is_missing(tmp_path: Path, arguments: list[str]) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without installed packages
    interpreter.chmod(0o755)
    ended = _without_python(*arguments, PYTHON=str(interpreter))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"gpu_check: {interpreter} cannot import JAX or start it (ModuleNotFoundError: No module named 'jax'); "
        "set PYTHON to one with jax, flax and optax\n"
    )


def test_several_benchmarks_end_with_one_table(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each runs in a process of its own with the same options. One that fails or runs out of time is named."""
    benchmark = script("benchmark")
    calls = []

    def run(command: list[str], timeout: float, **_: Any) -> None:
        options = dict(zip(command[3::2], command[4::2], strict=True))
        calls.append((command[2], options["--dtype"], options["--rounds"], timeout))
        if command[2] == "decode":
            raise subprocess.TimeoutExpired(command, timeout)
        row = {"benchmark": command[2], "case": "step", "dtype": options["--dtype"], "milliseconds": 1234.5}
        Path(options["--json"]).write_text(json.dumps([row]))

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["train", "decode", "--dtype", "float32", "bfloat16", "--rounds", "3", "--seconds", "100"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit, match=r"decode \(float32, out of time\), decode \(bfloat16, out of time\)"):
        benchmark.main()
    names = [("train", "float32"), ("decode", "float32"), ("train", "bfloat16"), ("decode", "bfloat16")]
    assert [call[:3] for call in calls] == [(*name, "3") for name in names]
    assert all(0 < call[3] <= 100 for call in calls)
    lines = [line.split("|")[1:5] for line in capsys.readouterr().out.splitlines() if line.startswith("| train")]
    found = [[part.strip() for part in line] for line in lines]
    assert found == [["train", "step", "float32", "1234"], ["train", "step", "bfloat16", "1234"]]


@pytest.mark.slow
def test_checkpoint_benchmark_measures_both_checkouts() -> None:
    sizes = ["--regions", "3", "--vocabulary", "20", "--rounds", "1", "--decoder", "show_tell", "--ema", "0.9"]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), "checkpoint", *sizes, "--before", str(REPOSITORY)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    pauses = [line for line in finished.stdout.splitlines() if "training stands still for" in line]
    assert [line.split(", ")[0] for line in pauses] == [
        f"{side}: {row}" for side in ("imgcap_jax", "before") for row in ("state", "best parameters")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "decode", "scst"])
def test_benchmarks_run_next_to_another_checkout(what: str) -> None:
    """Small sizes; the other checkout is this one. The benchmarks check the lengths of decoded captions themselves."""
    sizes = ["--batch", "2", "--captions", "2", "--regions", "3", "--vocabulary", "200", "--rounds", "1"]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), what, *sizes, "--before", str(REPOSITORY)]
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    finished = subprocess.run(command, capture_output=True, text=True, env=one_device)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[1].startswith("plain matmul rate of this machine: ")
    assert sum(line.startswith("captions of ") for line in lines) == 2  # full length and real lengths
    assert any(" to before (" in line for line in lines)
