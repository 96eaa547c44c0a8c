"""``imgcap plan`` on the machine that runs the tests, and what it refuses."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.plan.chips import CHIPS, usable_links
from imgcap_jax.plan.hlo import Analysis, Collective, Work
from imgcap_jax.plan.roofline import HOST, LINKS, MATRIX, MEMORY, estimate

EXPERIMENT = """
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.self_critical import SelfCritical

experiment = Experiment(
    data=CaptionData(dataset="coco_captions", image_size=16, batch_size=8, captions_per_image=2, max_words=6),
    encoder=SmallCNN(widths=(8, 8), blocks=(0, 0)),
    decoder=ShowTell(hidden_size=8, embedding_size=8),
    objective=CrossEntropy(),
    training=Training(epochs=2, validation_beam=2),
    decoding=Decoding(max_words=6),
)
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "small.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(autouse=True)
def no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))


def test_plan_of_this_machine(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "plan.json"
    command = ["plan", str(experiment), "--vocabulary", "300", "--words", "4", "--json", str(found)]
    assert main([*command, "--data.batch-size", "16"]) == 0
    text = capsys.readouterr().out
    assert "on local: 4 devices" in text
    assert "not run: all times are estimates" in text
    assert "113,287 training images (train + restval of Karpathy" in text
    assert "300 words (given)" in text
    assert "2 epochs, 14,162 steps" in text
    assert "would fill its memory (extrapolated from 4 and 8)" in text

    plan = json.loads(found.read_text())
    assert plan["compiled_not_run"]
    assert plan["training"]["steps"] == 2 * -(-113_287 // 16)
    step, search = plan["programs"]["training step"], plan["programs"]["validation search"]
    assert step["images_per_call"] == 16
    assert step["fits"]
    assert step["host_calls"] == step["loops_counted_once"] == search["loops_counted_once"] == []
    assert set(step["collectives"]) == {"all-reduce"}
    assert search["collectives"].get("all-reduce", {"bytes": 0})["bytes"] < 1e3
    # The gradients of all parameters are summed over the devices once.
    assert step["collectives"]["all-reduce"]["bytes"] >= 4 * 2 * 300 * 8
    # XLA counts the steps of a caption once; its count includes elementwise operations.
    assert step["flops"] > 0
    assert 0 < step["seconds"]["roofline"] == max(step["seconds"]["roofline"], step["seconds"][MATRIX])
    # The encoder has parameters, so its features are not stored.
    assert "encoder" not in plan["programs"]


def test_plan_of_self_critical_training(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scst.py"
    objective = "SelfCritical(samples=2, kl=0.1)"
    path.write_text(experiment.read_text().replace("objective=CrossEntropy()", f"objective={objective}"))
    found = tmp_path / "plan.json"
    sizes = ["--images", "64", "--vocabulary", "300", "--json", str(found)]
    assert main(["plan", str(path), *sizes, "--programs", "training"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    programs = json.loads(found.read_text())["programs"]
    assert list(programs) == ["training step"]
    step = programs["training step"]
    assert step["flops"] > 0
    assert set(step["collectives"]) == {"all-reduce"}
    assert step["host_calls"] == step["loops_counted_once"] == []


def test_prepared_datasets_are_read(
    experiment: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from imgcap_jax.cli.experiments import find
    from imgcap_jax.cli.options import override
    from imgcap_jax.plan.datasets import sizes_of

    settings = override(find(str(experiment)), ["--data.dataset", "scenes", "--data.data-dir", str(tiny_data)])
    sizes = sizes_of(settings, None, None)
    assert sizes.images == len(sizes.sources[0])
    assert len(sizes.vocabulary) > 10
    assert sizes.assumptions == ()
    assert sizes.references(settings) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no experiment; give a Python file"),
        (["FILE", "--data.dataset", "mine"], "mine is not prepared, and its sizes are not known"),
        (["FILE", "--topology", "v5e"], "--topology 'v5e' is malformed; use local, or a slice such as v5e:4x4"),
        (["FILE", "--images", "0"], "--images is 0; it must be at least 1"),
        (
            ["FILE", "--programs", "search,x"],
            "--programs has 'x'; it must be a comma-separated list of training, search",
        ),
        (["FILE", "--words", "-1"], "--words is -1.0; it must be above 0"),
        (["FILE", "--decoder.hiden-size", "3"], "did you mean --decoder.hidden-size"),
        (["FILE", "--data.batch-size", "6"], "data.batch_size is 6, which cannot be divided among 4 devices"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    options: list[str], message: str, experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(str(experiment) if option == "FILE" else option for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_tpu_compiler_is_named_if_it_is_missing(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else before(name))
    assert main(["plan", str(experiment), "--topology", "v5e:2x2"]) == 2
    assert 'pip install "jax[tpu]"' in capsys.readouterr().err


def test_a_program_that_jax_cannot_read_is_reported(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of another libtpu than JAX asks for."""

    def unreadable(self: Any) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    command = ["plan", str(experiment), "--images", "64", "--vocabulary", "100", "--programs", "training"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "GB in all, but JAX cannot read the program" in error
    assert error.rstrip().endswith('pip install "jax[tpu]"')


def work(flops: float, traffic: float, passes: int = 1, cycles: float = 0.0) -> Work:
    return Work("name", "fusion", "", 1, flops, passes, traffic, cycles)


def test_the_roofline_adds_the_longer_of_arithmetic_and_traffic_per_instruction() -> None:
    chip = CHIPS["TPU v5 lite"]
    second = chip.flops, chip.bandwidth
    analysis = Analysis([work(2 * second[0], 0.5 * second[1]), work(0.0, 3 * second[1])])
    found = estimate(analysis, chip, (2, 2), 4, 0.0)
    assert found.roofline == pytest.approx(5)
    assert (found.parts[MATRIX], found.parts[MEMORY], found.bound) == (
        pytest.approx(2),
        pytest.approx(3.5),
        MEMORY,
    )
    assert found.cycles is None
    # A float32 product in highest precision takes six passes.
    found = estimate(Analysis([work(second[0], 0.0, passes=6, cycles=9 * chip.clock)]), chip, (2, 2), 4, 0.0)
    assert found.parts[MATRIX] == pytest.approx(6)
    assert found.cycles == pytest.approx(9)
    assert found.seconds == pytest.approx(9)
    found = estimate(Analysis(), chip, (2, 2), 4, 30e9)
    assert (found.roofline, found.bound) == (pytest.approx(3), HOST)


def test_collectives_use_the_links_of_the_slice() -> None:
    chip = CHIPS["TPU v5 lite"]
    assert [usable_links(shape) for shape in ((1, 1), (2, 2), (4, 4), (16, 16), (2, 2, 1), ())] == [0, 2, 4, 4, 2, 0]
    summed = Analysis([], [Collective("all-reduce", 1, 100e9)])
    # 2 x 3/4 of 100 GB over two links of 50 GB/s
    assert estimate(summed, chip, (2, 2), 4, 0.0).parts[LINKS] == pytest.approx(1.5)
    assert estimate(summed, chip, (1, 1), 1, 0.0).parts[LINKS] == 0
    gathered = Analysis([], [Collective("all-gather", 1, 100e9)])
    assert estimate(gathered, chip, (2, 2), 4, 0.0).parts[LINKS] == pytest.approx(3)


def test_a_core_has_its_share_of_a_chip() -> None:
    half = CHIPS["TPU v4"].per_device(2)
    assert half.flops == CHIPS["TPU v4"].flops / 2
    assert half.cores == 2


def test_programs_do_not_touch_the_devices(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of a topology cannot hold arrays."""
    from imgcap_jax.cli.experiments import find
    from imgcap_jax.plan.datasets import sizes_of
    from imgcap_jax.plan.programs import Programs

    programs = Programs(find(str(experiment)), sizes_of(find(str(experiment)), 64, 100), jax.devices()[:2])
    placed: list[Any] = []
    monkeypatch.setattr(jax, "device_put", lambda leaf, *rest, **options: placed.append(rest) or leaf)
    step = programs.training_step()
    assert step.images == 8
    assert not [rest for rest in placed if rest]
