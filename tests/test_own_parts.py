"""Each kind of part, added from a file outside of the package: the examples of docs/adding_parts.md."""

import csv
import importlib
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from imgcap_jax.captioner import Captioner
from imgcap_jax.cli.main import main
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.sources import open_source
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, from_json
from imgcap_jax.models.encoders.contract import build_encoder
from imgcap_jax.run.extraction import Extraction
from imgcap_jax.run.folder import Run
from imgcap_jax.user_code import load_all_code, load_code

REPOSITORY = Path(__file__).resolve().parent.parent
Blocks = Callable[[Path], list[tuple[str, str, int]]]
Forget = Callable[[], None]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def folder(code_blocks: Blocks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page, and the prepared dataset."""
    folder = tmp_path_factory.mktemp("own_parts")
    for language, text, _ in code_blocks(REPOSITORY / "docs" / "adding_parts.md"):
        if language == "python":
            name = text.split("\n", 1)[0].removeprefix("# ")
            assert name.startswith("my_")
            (folder / name).write_text(text)
    Image.fromarray(np.full((40, 40, 3), (210, 20, 40), np.uint8)).save(folder / "red.png")
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, forget_code: Forget) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "data"))


@pytest.fixture(scope="module")
def trained_own(folder: Path) -> Path:
    """The run of my_experiment.py, stopped once and resumed."""
    arguments = ["imgcap", "train", "my_experiment.py", "--run", "runs/squares", "--training.checkpoint-minutes", "0"]
    program = (
        "import imgcap_jax.train as t, signal, os, sys\n"
        "from imgcap_jax.cli.main import main\n"
        "save = t.Checkpoints.save\n"
        "def stop(self, state, progress):\n"
        "    save(self, state, progress)\n"
        "    self.wait()\n"
        "    if progress.step == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.Checkpoints.save = stop\n"
        f"main({arguments[1:]!r})\n"
    )
    environment = {"TFDS_DATA_DIR": str(folder / "data")}
    _imgcap(folder, environment, "data", "prepare", "my_dataset.py", "--name", "squares")
    killed = _python(folder, environment, program)
    assert killed.returncode == -9, killed.stderr
    resumed = _imgcap(folder, environment, *arguments[1:])
    assert "resuming runs/squares at step 7 of 100" in resumed.stdout
    return folder / "runs" / "squares"


def _python(folder: Path, environment: dict[str, str], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def _imgcap(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; from imgcap_jax.cli.main import main; sys.exit(main({list(arguments)!r}))"
    done = _python(folder, environment, program)
    assert done.returncode == 0, done.stderr
    return done


CODE = ["my_decoder.py", "my_encoder.py", "my_objective.py", "my_metric.py", "my_rule.py"]
CODE_OPTIONS = [word for name in CODE for word in ("--code", name)]


def test_a_run_of_own_parts_trains_resumes_evaluates_and_captions(
    trained_own: Path, refused: Refused, forget_code: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    names = json.loads((trained_own / "experiment.json").read_text())
    assert names["decoder"]["type"] == "my_decoder:Elman"
    assert names["decoding"]["rules"] == [{"type": "my_rule:Wordy", "words": 4, "cost": 2.0}]
    metrics = [json.loads(line) for line in (trained_own / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in metrics if line["kind"] == "validation"]
    assert all(0 <= line["Mentions"] <= 1 for line in validations)
    assert {"loss", "activation"} <= set(next(line for line in metrics if line["kind"] == "train"))

    line = refused(["evaluate", str(trained_own)])
    assert "needs my_encoder.py (which defines Patches), my_decoder.py (which defines Elman)" in line
    needed = ["my_encoder.py", "my_decoder.py", "my_objective.py", "my_rule.py", "my_metric.py"]
    assert f"add {' '.join(f'--code {name}' for name in needed)} " in line
    assert str(trained_own / "code") in line
    line = refused(["evaluate", str(trained_own), "--code", "my_encoder.py"])
    assert "needs my_decoder.py (which defines Elman), my_objective.py" in line

    forget_code()
    assert main(["evaluate", str(trained_own), "--split", "test", *CODE_OPTIONS]) == 0
    printed = capsys.readouterr().out
    assert "Mentions 100.0" in printed
    assert "Mentions:square" in printed
    assert "rules Wordy(words=4, cost=2.0)" in printed

    assert main(["evaluate", str(trained_own), *CODE_OPTIONS, "--decode.rules.0.words", "3", "5"]) == 0
    swept = json.loads((trained_own / "sweep_val.json").read_text())
    assert [one["decoding"]["rules"] for one in swept] == [[f"Wordy(words={n}, cost=2.0)"] for n in (3, 5)]

    forget_code()
    assert main(["caption", "red.png", "--run", str(trained_own), *CODE_OPTIONS]) == 0
    assert "red.png: " in capsys.readouterr().out
    forget_code()
    captioner = Captioner.load(trained_own, code=CODE)
    (caption,) = captioner(["red.png"])
    assert len(caption.words) >= 4


def test_a_service_of_ones_own_gets_all_metrics_of_a_finished_run(trained_own: Path, forget_code: Forget) -> None:
    forget_code()
    options = ["--log", "my_service:Table", "--code", "my_service.py"]
    assert main(["train", "my_experiment.py", "--run", str(trained_own), *options]) == 0
    lines = [json.loads(line) for line in (trained_own / "metrics.jsonl").read_text().splitlines()]
    expected = [
        [line["kind"], str(line["step"]), name, str(value)]
        for line in lines
        for name, value in line.items()
        if name not in ("kind", "step") and value is not None
    ]
    with (trained_own / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file)) == expected


def test_smoke_and_overrides_reach_the_fields_of_own_parts(
    trained_own: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    options = [
        "--decoder.gain",
        "0.5",
        "--encoder.patch",
        "8",
        "--metrics.0.word",
        "red",
        "--decoding.rules.0.words",
        "3",
    ]
    assert main(["train", "my_experiment.py", "--smoke", *options]) == 0
    _check_smoke(capsys.readouterr(), options)
    run = Run.load(Path("runs/my_experiment_smoke"))
    fields = json.loads((run.folder / "experiment.json").read_text())
    assert (fields["decoder"]["gain"], fields["encoder"]["patch"], fields["metrics"][0]["word"]) == (0.5, 8, "red")
    assert fields["decoding"]["rules"][0]["words"] == 3
    assert main(["train", "my_experiment.py", "--help"]) == 0
    assert "--decoder.gain" in capsys.readouterr().out
    assert "did you mean --decoder.gain" in refused(["train", "my_experiment.py", "--decoder.gian", "1"])


def _check_smoke(printed: Any, options: list[str]) -> None:
    """It says what was checked. It shows no score and no defect of captions, which mean nothing after a few steps."""
    *_, data, encoder, training, validation, checkpoints, last = printed.out.splitlines()
    assert re.fullmatch(r"  data +\d+ training images and \d+ validation images were read", data)
    assert encoder.split(maxsplit=1) == ["encoder", "Patches, trained: run in each step"]
    assert re.search(r"\d+ compiled steps of .+; the loss is finite and (fell|went) from [\d.]+ to [\d.]+$", training)
    assert re.search(r"decoded \(beam 2.*\) and scored with BLEU, .*CIDEr-D, Mentions$", validation)
    assert checkpoints.split(maxsplit=1) == ["checkpoints", "were written, and restored bit for bit"]
    assert last == f"the path works; now run: imgcap train my_experiment.py {' '.join(options)}"
    before = printed.out[: printed.out.index("checked:")]
    assert "compiling the training step ..." in before
    assert "compiling decoding (beam 2" in before
    assert re.search(r"validation at step \d+: \d+ images decoded and scored\n", before)
    assert "CIDEr-D" not in before + printed.err
    assert "of the captions" not in before + printed.err


KEEPS_ARRAYS = """
import functools
from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import nnx
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.decoding.settings import Decoding
from my_decoder import Elman, ElmanDecoder


@functools.cache
def half():
    return jnp.float32(2.0) ** -1


@dataclass(frozen=True, kw_only=True)
class Keeping(Elman):
    def build(self, region_size, vocabulary_size, *, dtype, rngs):
        return KeepingDecoder(self, region_size, vocabulary_size, dtype=dtype, rngs=rngs)


class KeepingDecoder(ElmanDecoder):
    def __init__(self, config, region_size, vocabulary_size, *, dtype, rngs):
        super().__init__(config, region_size, vocabulary_size, dtype=dtype, rngs=rngs)
        self.shift = jnp.ones(config.hidden_size) / 8
        scale = jnp.sqrt(4.0) * half()
        self.act = lambda x: x * scale

    def logits(self, output):
        return self.words(self.act(output.hidden + self.shift), self.embedding)


@dataclass(frozen=True)
class KeepingCNN(SmallCNN):
    def build(self, image_size, *, dtype, rngs):
        encoder = super().build(image_size, dtype=dtype, rngs=rngs)
        encoder.scale = half() * jnp.ones(8)
        return encoder


experiment = Experiment(
    data=CaptionData(dataset="squares", image_size=32, batch_size=8, min_count=1),
    encoder=KeepingCNN(widths=(8, 8), blocks=(0, 0)),
    decoder=Keeping(hidden_size=8, embedding_size=8),
    training=Training(epochs=1, validation_images=2),
    decoding=Decoding(beam=2, max_words=3),
)
"""


def test_own_parts_can_keep_arrays_in_attributes_closures_and_caches(
    trained_own: Path, forget_code: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are built with values, also if a checkpoint replaces those."""
    Path("my_keeping.py").write_text(KEEPS_ARRAYS)
    sys.path.append(os.getcwd())
    assert main(["train", "my_keeping.py", "--run", "runs/keeping"]) == 0
    forget_code()
    sys.path.append(os.getcwd())
    assert main(["train", "my_keeping.py", "--run", "runs/keeping"]) == 0
    assert "resuming runs/keeping" in capsys.readouterr().out
    code = ["--code", "my_decoder.py", "--code", "my_keeping.py"]
    forget_code()
    assert main(["caption", "red.png", "--run", "runs/keeping", *code]) == 0
    assert "red.png: " in capsys.readouterr().out
    assert main(["evaluate", "runs/keeping", *code]) == 0


def test_an_own_reward_refines_a_run_of_own_parts(
    trained_own: Path, forget_code: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "my_scst.py", "--init-from", str(trained_own), "--run", "runs/scst", "--training.epochs", "1"]
    assert main([*command, "--objective.reward.words", "4"]) == 0
    assert "CiderOfLength(words=4, penalty=0.1)" in capsys.readouterr().out
    forget_code()
    more = ["--code", "my_reward.py"]
    assert main(["evaluate", "runs/scst", "--split", "val", *CODE_OPTIONS, *more]) == 0
    scores = json.loads(Path("runs/scst/scores_val.json").read_text())
    assert "CiderOfLength" in scores["objective"]


def test_own_regions_optimizer_and_loss_train_and_evaluate(
    trained_own: Path, forget_code: Forget, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    command = ["train", "my_variant.py", "--run", "runs/variant", "--objective.word-loss.gamma", "1.5"]
    assert main([*command, "--optimizer.learning-rate", "0.01"]) == 0
    assert "steps of Focal(gamma=1.5)" in capsys.readouterr().out
    forget_code()
    code = ["my_decoder.py", "my_regions.py", "my_optimizer.py", "my_loss.py", "my_metric.py", "my_rule.py"]
    line = refused(["evaluate", "runs/variant", *[word for name in code for word in ("--code", name)]])
    assert "needs my_tokenizer.py (which defines Turkish)" in line
    assert json.loads(Path("runs/variant/vocabulary.json").read_text())["tokenizer"] == "ptb-turkish"
    options = [word for name in [*code, "my_tokenizer.py"] for word in ("--code", name)]
    forget_code()
    assert main(["evaluate", "runs/variant", "--split", "test", *options]) == 0
    scores = json.loads(Path("runs/variant/scores_test.json").read_text())
    assert scores["scores"]["CIDEr-D"] > 1  # three colours can be told apart by their mean
    assert "|tok:ptb-turkish|" in scores["signature"]
    assert "METEOR" not in scores["scores"]
    assert "METEOR is missing: METEOR is defined for the words of English captions" in capsys.readouterr().out
    line = refused(["caption", "red.png", "--run", "runs/variant", *options])
    assert "trained on ready-made regions" in line


def test_code_that_changed_since_the_run_is_noted(
    trained_own: Path, forget_code: Forget, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("my_decoder.py")
    before = path.read_text()
    kept = trained_own / "code" / "my_decoder.py"
    assert kept.read_text() == before
    path.write_text(before + "\n# changed\n")
    try:
        assert main(["caption", "red.png", "--run", str(trained_own), *CODE_OPTIONS]) == 0
        assert "my_decoder.py has changed since" in capsys.readouterr().err
        # The copy that the run keeps is as good.
        forget_code()
        code = [word for name in CODE for word in ("--code", str(trained_own / "code" / name))]
        assert main(["caption", "red.png", "--run", str(trained_own), *code]) == 0
        assert "has changed" not in capsys.readouterr().err
    finally:
        path.write_text(before)
    check = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=trained_own / "code", capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


EVIL = """
from dataclasses import dataclass
from pathlib import Path
Path("executed").write_text("")

@dataclass(frozen=True)
class Thing:
    hidden_size: int = 8
    def build(self, *arguments, **options):
        raise RuntimeError
"""


@pytest.mark.parametrize(
    "name",
    [
        "evil:Thing",
        "evil_package.inner:Thing",
        "imgcap_jax.evil:Thing",
        "imgcap_jax.experiments.evil:Thing",
        "imgcap_jax.cli.main:main",
        "subprocess:Popen",
        "os:system",
        "this:Thing",
        "Thing",
    ],
)
def test_a_run_of_a_stranger_executes_nothing(
    trained: Path, tmp_path: Path, name: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its own copies, nor modules that lie about, nor classes that are not settings."""
    run = tmp_path / "run"
    (run / "code").mkdir(parents=True)
    (run / "evil_package").mkdir()
    for place in (run, run / "code", tmp_path):
        (place / "evil.py").write_text(EVIL)
    (run / "evil_package" / "inner.py").write_text(EVIL)
    (run / "evil_package" / "__init__.py").write_text(EVIL)
    (run / "vocabulary.json").write_text((trained / "vocabulary.json").read_text())
    fields = json.loads((trained / "experiment.json").read_text())
    fields["decoder"] = {"type": name, "hidden_size": 8}
    (run / "experiment.json").write_text(json.dumps(fields))
    for place in (run, tmp_path):
        monkeypatch.chdir(place)
        monkeypatch.syspath_prepend(str(place))
        Image.new("RGB", (8, 8)).save("photo.png")
        line = refused(["caption", "photo.png", "--run", str(run)])
        assert str(run) in line
        assert not Path("executed").exists()


def test_only_the_source_that_is_named_is_executed(
    trained: Path, tmp_path: Path, refused: Refused, forget_code: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a compiled file next to it, and not a file next to it with the name of a module that is imported later."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    code = run / "code"
    code.mkdir()
    harmless = (
        "from dataclasses import dataclass\n"
        "from imgcap_jax.models.decoders.attend import ShowAttendTell\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(ShowAttendTell):\n"
        "    pass\n"
    )
    (code / "my_harmless.py").write_text(EVIL)
    compiled = py_compile.compile(
        str(code / "my_harmless.py"), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    assert Path(str(compiled)).parent == code / "__pycache__"
    (code / "my_harmless.py").write_text(harmless)
    for name in ("evil", "tensorflow", "pandas", "simplejpeg", "matplotlib"):
        (code / f"{name}.py").write_text(EVIL)
    fields = json.loads((run / "experiment.json").read_text())
    fields["decoder"]["type"] = "my_harmless:Mine"
    (run / "experiment.json").write_text(json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), (90, 10, 10)).save("photo.png")
    assert main(["caption", "photo.png", "--run", str(run), "--code", str(code / "my_harmless.py")]) == 0
    assert str(code) not in sys.path
    (code / "my_harmless.py").write_text(f"import evil\n{harmless}")
    assert "imports evil, which is not installed" in refused(
        ["caption", "photo.png", "--run", str(run), "--code", str(code / "my_harmless.py")]
    )
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("experiment.json", b"\xff\xfe"),
        ("experiment.json", b"[" * 100_000),
        ("experiment.json", b"[]"),
        ("experiment.json", b'{"type": ":"}'),
        ("experiment.json", b'{"type": "x\\u001b[2J\\nimgcap: ok:Y"}'),
        ("experiment.json", b'{"type": "imgcap_jax.experiment:Experiment", "training": null}'),
        ("experiment.json", b'{"type": "Training", "seed": "x"}'),
        ("init_from.json", b"x"),
        ("init_from.json", b"[]"),
        ("init_from.json", b'{"run": 5}'),
    ],
)
def test_a_damaged_run_costs_one_line(
    trained: Path, tmp_path: Path, file: str, content: bytes, refused: Refused
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("experiment.json", "vocabulary.json"):
        shutil.copy(trained / name, run)
    (run / file).write_bytes(content)
    line = refused(["evaluate", str(run)])
    assert str(run) in line
    assert line.isprintable()


def test_damaged_digests_are_ignored(trained_own: Path, tmp_path: Path, forget_code: Forget) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_own, run)
    (run / "code" / "SHA256SUMS").write_bytes(b"word\n\xff\n\n" + b"0" * 64 + b"  my_decoder.py\n")
    with pytest.warns(UserWarning, match=r"my_decoder\.py has changed"):
        Captioner.load(run, code=CODE)


def test_code_that_is_named_twice_is_the_same_code(trained_own: Path, forget_code: Forget) -> None:
    command = ["train", "my_experiment.py", "--run", "runs/twice", "--training.epochs", "0.2"]
    assert main([*command, "--code", "my_decoder.py", "--code", "my_rule.py"]) == 0
    forget_code()
    sys.path.append(os.getcwd())
    decoder = importlib.import_module("my_decoder")
    captioner = Captioner.load("runs/squares", code=CODE)
    assert type(captioner.runs[0].experiment.decoder) is decoder.Elman
    # Files can import each other in any order.
    forget_code()
    child, base = load_all_code(["my_scst.py", *CODE, "my_reward.py", "my_experiment.py"])[:2]
    assert child.start.decoder.__class__.__name__ == "Elman"
    assert type(child.start.decoder) is base.Elman


FROZEN = """
from dataclasses import dataclass
import jax.numpy as jnp
from flax import nnx
SCALE = 1.0

@dataclass(frozen=True)
class Flat:
    region_size: int = 3
    frozen: bool = True
    trained: bool = False

    def build(self, image_size, *, dtype, rngs):
        return FlatEncoder(self.trained, rngs)

class FlatEncoder(nnx.Module):
    region_count, region_size = 1, 3

    def __init__(self, trained, rngs):
        self.layer = nnx.Linear(3, 3, rngs=rngs) if trained else None

    def __call__(self, images):
        return SCALE * images.astype(jnp.float32).mean((1, 2))[:, None]
"""


def test_features_of_an_own_frozen_encoder_follow_its_code(trained_own: Path, tmp_path: Path) -> None:
    path = tmp_path / "my_flat.py"
    source = open_source("squares", "val")
    features = []
    for scale in ("1.0", "100.0"):
        path.write_text(FROZEN.replace("SCALE = 1.0", f"SCALE = {scale}"))
        flat = load_code(path).Flat
        experiment = Experiment(encoder=flat(), data=CaptionData("squares", image_size=32))
        regions = Extraction(experiment, tmp_path / "cache", progress=False).regions(source, views=1)
        features.append(np.asarray(regions.read(0, 0)[0], np.float32))
    np.testing.assert_allclose(features[1], 100 * features[0], rtol=1e-2)
    with pytest.raises(UserError, match=r"Flat is frozen but has variables of type nnx\.Param"):
        build_encoder(flat(trained=True), 32, dtype=np.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("type: str = 'gru'", "decoder.type: a field of settings cannot be called type"),
        ("dropout: float = float('nan')", "dropout is nan"),
        ("names: list = None", "read back"),
    ],
)
def test_fields_that_could_not_be_read_back_are_refused(
    trained_own: Path, tmp_path: Path, settings: str, message: str, refused: Refused
) -> None:
    value = "['a']" if "list" in settings else ""
    (tmp_path / "my_fields.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, replace\n"
        "from my_decoder import Elman\n"
        "from my_experiment import experiment\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Odd(Elman):\n"
        f"    {settings}\n"
        f"experiment = replace(experiment, decoder=Odd({f'names={value}' if value else ''}))\n"
    )
    sys.path.append(os.getcwd())
    line = refused(["train", str(tmp_path / "my_fields.py"), "--run", str(tmp_path / "run")])
    assert message in line or "which a run cannot store" in line


def test_settings_that_a_run_could_not_store_are_refused_before_training(tmp_path: Path, refused: Refused) -> None:
    source = Path("my_experiment.py").read_text()
    (tmp_path / "my_bad.py").write_text(
        "from dataclasses import dataclass, replace\n"
        "from collections.abc import Callable\n"
        "from my_decoder import Elman\n"
        f"{source}\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class WithFunction(Elman):\n"
        "    function: Callable = abs\n"
        "experiment = replace(experiment, decoder=WithFunction())\n"
    )
    for name in ("my_decoder", "my_encoder", "my_metric", "my_objective", "my_rule"):
        (tmp_path / f"{name}.py").write_text(Path(f"{name}.py").read_text())
    line = refused(["train", str(tmp_path / "my_bad.py"), "--run", str(tmp_path / "run")])
    assert "decoder.function is of type builtin_function_or_method, which a run cannot store" in line
    with pytest.raises(UserError, match=r"decoder: \w*Path.* has no 'build'"):
        Experiment(decoder=Path())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("json.py", "x = 1", "another Python module is called json; rename the file"),
        ("my-code.py", "x = 1", "cannot name a Python module"),
        ("my_broken.py", "1 / 0", "my_broken.py, line 1"),
        ("my_syntax.py", "def", "SyntaxError"),
        ("my_code.txt", "x = 1", "is not a Python file"),
    ],
)
def test_code_that_cannot_be_loaded_is_reported(
    trained: Path, tmp_path: Path, name: str, text: str, message: str, refused: Refused
) -> None:
    (tmp_path / name).write_text(text)
    assert message in refused(["evaluate", str(trained), "--code", str(tmp_path / name)])
    assert not Path("executed").exists()
    missing = refused(["evaluate", str(trained), "--code", str(tmp_path / "my_absent.py")])
    assert "my_absent.py: no such file" in missing


def test_experiments_without_module_names_are_read(trained: Path) -> None:
    text = (trained / "experiment.json").read_text()
    expected = from_json(text, "here")

    def bare(value: object) -> object:
        if isinstance(value, dict):
            return {key: item.rpartition(":")[2] if key == "type" else bare(item) for key, item in value.items()}
        return value

    old = bare(json.loads(text))
    assert isinstance(old, dict)
    del old["metrics"]
    del old["decoding"]["rules"]
    del old["data"]["tokenizer"]
    assert old["decoder"]["type"] == "ShowAttendTell"
    assert from_json(json.dumps(old), "here") == expected
