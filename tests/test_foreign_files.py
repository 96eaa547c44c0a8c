"""Damaged files of every kind that is read: scripts/fuzz.py finds no traceback and no silent change."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from imgcap_jax.data import features
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.meteor import tables

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fuzz.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = load()


@pytest.fixture(autouse=True)
def _restore_what_kinds_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "_BLOCK_BATCHES", 1)
    monkeypatch.setattr(tables, "official_folder", tables.official_folder)


def failures(name: str, inputs: int, home: Path) -> list[str]:
    source = fuzz.Input(name, home)
    found = []
    for number in range(inputs):
        source.damage(0, number)
        outcome = source.read(number)
        if outcome.result not in fuzz.ALLOWED:
            found.append(f"{outcome} (repeat it: scripts/fuzz.py --kind {name} --only {number})")
    return found


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_damaged_files_give_one_line_or_the_same_value(name: str, tmp_path: Path) -> None:
    assert failures(name, 12, tmp_path / "files") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.KINDS)
def test_many_damaged_files(name: str, tmp_path: Path) -> None:
    assert failures(name, 400, tmp_path / "files") == []


def outcomes(kind: object, home: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    monkeypatch.setitem(fuzz.KINDS, "mine", kind)
    source = fuzz.Input("mine", home)
    found = []
    for number in range(30):
        source.damage(0, number)
        found.append(source.read(number).result)
    return Counter(found)


def test_failures_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path) -> None:
        (folder / "numbers.json").write_text(json.dumps(list(range(100))))

    def careless(folder: Path) -> str:
        return fuzz.digest(json.loads((folder / "numbers.json").read_text()))

    def explained(line: str) -> object:
        def read(folder: Path) -> str:
            try:
                return careless(folder)
            except Exception as error:
                raise UserError(line.format(folder)) from error

        return read

    found = {
        name: outcomes(kind, tmp_path / name, monkeypatch)
        for name, kind in {
            "traceback": fuzz.Kind(make, careless),
            "unclear": fuzz.Kind(make, explained("damaged")),
            "folder": fuzz.Kind(make, explained("{} is damaged")),
            "lines": fuzz.Kind(make, explained("{}/numbers.json\ndamaged")),
            "clear": fuzz.Kind(make, explained("{}/numbers.json is damaged")),
            "named": fuzz.Kind(make, explained("{} has no numbers"), naming=("has no numbers",)),
            "silent": fuzz.Kind(make, explained("{}/numbers.json is damaged"), checked=True),
        }.items()
    }
    errors = found["traceback"]["TRACEBACK"]
    assert errors > 0
    assert [found[name]["UNCLEAR"] for name in ("unclear", "folder", "lines")] == [errors] * 3
    assert found["clear"]["clear"] == found["named"]["clear"] == errors
    assert found["clear"]["changed"] == found["silent"]["SILENT"] > 0
    assert found["clear"]["fine"] == found["silent"]["fine"] == 30 - errors - found["silent"]["SILENT"]


def test_script_reports_and_repeats(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--kind", "torch_zip", "--seed", "3", "--only", "4", "5"]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert printed[0] == printed[1]
    assert printed[0].splitlines()[0] == "seed 3"
    assert "Outcome(number=5, result=" in printed[0]


ENDS = """
import os, runpy, sys, time
fuzz = runpy.run_path(sys.argv[1])

def make(folder):
    (folder / "numbers.json").write_text("1" * 1000)

def read(folder):
    text = (folder / "numbers.json").read_text(errors="replace")
    if text == "1" * 1000:
        return ""
    (folder / "numbers.json").write_text("written by the reader")
    {}

fuzz["KINDS"]["regions"] = fuzz["Kind"](make, read)
fuzz["work"].__globals__["SECONDS"] = 3.0
fuzz["work"].__globals__["MEMORY"] = 80 << 20
fuzz["work"].__globals__["__file__"] = __file__
sys.argv[1:2] = []
sys.exit(fuzz["main"]())
"""


@pytest.mark.parametrize(
    ("what", "result"),
    [
        ("os.abort()", "CRASH: exit status -6"),
        ("time.sleep(60)", "TIME: more than 3 s"),
        ("b = bytearray(b'x') * (100 << 20); return ''", "MEMORY: 10"),
    ],
)
def test_dead_slow_and_large_workers_are_reported_and_their_files_kept(
    what: str, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "ends.py"
    script.write_text(
        ENDS.replace("{}", what).replace("sys.argv[1]", repr(str(SCRIPT))).replace("sys.argv[1:2] = []", "")
    )
    keep = tmp_path / "keep"
    command = [sys.executable, str(script), "--kind", "regions", "--inputs", "1", "--keep", str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"1 x {result}" in done.stdout
    assert "--kind regions --seed 0 --only 0" in done.stdout
    # The files as they were before they were read.
    kind = fuzz.Kind(lambda folder: (folder / "numbers.json").write_text("1" * 1000), lambda folder: "")
    monkeypatch.setitem(fuzz.KINDS, "regions", kind)
    source = fuzz.Input("regions", tmp_path / "again")
    source.damage(0, 0)
    assert [path.name for path in (keep / "regions").iterdir()] == ["0"]
    kept = (keep / "regions" / "0" / "numbers.json").read_bytes()
    assert kept == (source.folder / "numbers.json").read_bytes() != b"1" * 1000


def test_inputs_that_did_not_fail_are_not_kept(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--kind", "torch_zip", "--inputs", "3", "--keep", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert list((tmp_path / "torch_zip").iterdir()) == []
