"""``imgcap plan`` on the machine that runs the tests, and what it refuses."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from imgcap_jax.cli.main import main
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.plan.chips import CHIPS, Slice
from imgcap_jax.plan.feed import FeedPlan, PlannedRows
from imgcap_jax.plan.hlo import Analysis, Collective, Work
from imgcap_jax.plan.roofline import HOST, LINKS, MATRIX, MEMORY, estimate
from imgcap_jax.report.plan import feed_lines
from imgcap_jax.training.parallel import DataParallel

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
    assert text.startswith("2 programs to compile, each can take minutes; --programs training compiles one\n")
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
    # Per device 4 images with 2 captions of 5 tokens. Their product with the vocabulary is computed, and differentiated
    # by both factors.
    assert step["flops"] >= 3 * 2 * (4 * 2 * 5) * 8 * 300
    seconds, chip = step["seconds"], plan["chip"]
    assert seconds[MATRIX] == pytest.approx(step["flops"] / chip["flops"])
    assert seconds[MEMORY] == pytest.approx(step["main_memory_bytes"] / chip["bandwidth"])
    assert seconds["estimate"] == seconds["roofline"] >= max(seconds[MATRIX], seconds[MEMORY])
    # The links between devices of this machine are not known, and no time is made up.
    assert seconds[LINKS] is None
    assert "interconnect, ms" in text
    assert "not known" in text
    assert "training step: the speed of the links is not known; collectives are not part of the times" in text
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
    from imgcap_jax.data.vocabulary import SPECIAL
    from imgcap_jax.plan.datasets import sizes_of

    settings = override(find(str(experiment)), ["--data.dataset", "scenes", "--data.data-dir", str(tiny_data)])
    sizes = sizes_of(settings, None, None)
    assert sizes.images == len(sizes.sources[0])
    assert len(sizes.vocabulary) > 10
    assert sizes.assumptions == ()
    assert sizes.references(settings) is None
    source = sizes.sources[0]
    assert sizes.stored == len(source)
    assert sizes.captions == sum(len(source.captions(i)) for i in range(len(source)))
    # A given number replaces that number only.
    more = sizes_of(settings, 5000, None)
    assert (more.images, more.vocabulary.words) == (5000, sizes.vocabulary.words)
    assert more.assumptions == ("5,000 training images (given)", f"{len(sizes.vocabulary)} words (scenes, prepared)")
    larger = sizes_of(settings, None, 500)
    assert (larger.images, len(larger.vocabulary)) == (sizes.images, 500)
    fewer = override(settings, ["--data.min-count", "200"])
    assert sizes_of(fewer, 5000, None).vocabulary.words == (*SPECIAL, "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no experiment; give a Python file"),
        (["FILE", "--data.dataset", "mine"], "mine is not prepared, and its sizes are not known"),
        (["FILE", "--topology", "v5e"], "--topology 'v5e' is malformed; use local, or a slice such as v5e:4x4"),
        (
            ["FILE", "--topology", "v9z:2x2"],
            "--topology v9z:2x2: v9z is not known; use a slice of v4, v5e, v5p, v6e, tpu7x",
        ),
        (["FILE", "--topology", "v2-8"], "--topology v2-8: v2 is not known; use a slice of v4, v5e, v5p, v6e, tpu7x"),
        (["FILE", "--topology", "v5p:2x2"], "--topology v5p:2x2: slices of v5p have 3 axes, such as v5p:2x2x1"),
        (["FILE", "--topology", "v5litepod-7"], "--topology v5litepod-7: known types are v5litepod-1, v5litepod-4, v5"),
        (["FILE", "--programs", "encoder"], "--programs encoder: the experiment stores no features of an encoder"),
        (["FILE", "--images", "0"], "--images is 0; it must be at least 1"),
        (
            ["FILE", "--programs", "search,x"],
            "--programs has 'x'; it must be a comma-separated list of training, search",
        ),
        (["FILE", "--words", "-1"], "--words is -1.0; it must be above 0"),
        (["FILE", "--decoder.hiden-size", "3"], "did you mean --decoder.hidden-size"),
        (["FILE", "--data.data-dir", "nowhere"], "is not prepared in nowhere"),
        (
            ["FILE", "--data.min-count", "3"],
            "data.min_count is 3, but the known number of words of coco_captions is for 5",
        ),
        (["FILE", "--data.batch-size", "6"], "data.batch_size is 6, which cannot be divided among 4 devices"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    options: list[str],
    message: str,
    experiment: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _without_libtpu(monkeypatch)
    assert main(["plan", *(str(experiment) if option == "FILE" else option for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_tpu_compiler_is_named_if_it_is_missing(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_libtpu(monkeypatch)
    for given, name in {
        "v5e:2x2": "v5e:2x2",
        "v5litepod-8": "v5e:2x4",
        "v6e-256": "v6e:16x16",
        "v4-8": "v4:2x2x1",
        "v5p-32": "v5p:2x2x4",
    }.items():
        assert main(["plan", str(experiment), "--topology", given]) == 2
        error = capsys.readouterr().err
        assert f"--topology {name} needs the TPU compiler" in error
        assert 'pip install -c constraints.txt "jax[tpu]"' in error


def _without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else before(name))


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
    assert error.rstrip().endswith('pip install -c constraints.txt "jax[tpu]"')


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Used 20.58G of 15.75G hbm. Exceeded hbm capacity by 4.83G.",
        "Ran out of memory on hbm, the memory required for HLO temporaries (20.58G) exceeds available hbm (15.75G).",
    ],
)
def test_a_program_that_is_too_large_is_reported_with_numbers(
    message: str, experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of libtpu 0.0.42 and 0.0.52."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert main(["plan", str(experiment), "--images", "64", "--vocabulary", "100", "--programs", "search"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("local: it does not fit: 20.58G of 15.75G hbm")


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ("8", "a batch of 16 images cannot be compiled: it does not fit: 9G of 8G hbm; a batch of 4 images cannot be "),
        ("4", "it does not fit: 9G of 8G hbm; a batch of 2 images cannot be divided"),
    ],
)
def test_a_batch_size_that_cannot_be_estimated_has_a_reason(
    batch: str,
    reason: str,
    experiment: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from imgcap_jax.plan.programs import Program, Programs

    compile_step = Programs.training_step

    def only_the_first(self: Programs, images: int | None = None) -> Program:
        if images is not None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 9G of 8G hbm.")
        return compile_step(self)

    monkeypatch.setattr(Programs, "training_step", only_the_first)
    found = tmp_path / "plan.json"
    sizes = ["--images", "64", "--vocabulary", "100", "--data.batch-size", batch, "--json", str(found)]
    assert main(["plan", str(experiment), "--programs", "training", *sizes]) == 0
    assert "fill the memory of a device is not estimated: " in (text := capsys.readouterr().out)
    assert reason in text
    plan = json.loads(found.read_text())
    assert plan["images_per_device_that_fill_memory"] is None
    assert reason in plan["filling_not_estimated"]


def test_memory_that_does_not_grow_with_the_batch_is_reported(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgcap_jax.plan.programs import Memory

    monkeypatch.setattr(Memory, "total", property(lambda self: 10**9))
    sizes = ["--images", "64", "--vocabulary", "100"]
    assert main(["plan", str(experiment), "--programs", "training", *sizes]) == 0
    assert "not estimated: 2 and 4 images take 1.000 and 1.000 GB, which is no growth" in capsys.readouterr().out


def work(flops: float, traffic: float, passes: int = 1, cycles: float = 0.0) -> Work:
    return Work("name", "fusion", "", 1, flops, passes, traffic, cycles)


def test_the_roofline_adds_the_longer_of_arithmetic_and_traffic_per_instruction() -> None:
    chip = CHIPS["TPU v5 lite"]
    second = chip.flops, chip.bandwidth
    analysis = Analysis([work(2 * second[0], 0.5 * second[1]), work(0.0, 3 * second[1])])
    found = estimate(analysis, chip, FOUR, 4, 0.0)
    assert found.roofline == pytest.approx(5)
    assert (found.parts[MATRIX], found.parts[MEMORY], found.bound) == (
        pytest.approx(2),
        pytest.approx(3.5),
        MEMORY,
    )
    assert found.cycles is None
    # A float32 product in highest precision takes six passes.
    found = estimate(Analysis([work(second[0], 0.0, passes=6, cycles=9 * chip.clock)]), chip, FOUR, 4, 0.0)
    assert found.parts[MATRIX] == pytest.approx(6)
    assert found.cycles == pytest.approx(9)
    assert found.seconds == pytest.approx(9)
    found = estimate(Analysis(), chip, FOUR, 4, 30e9)
    assert (found.roofline, found.bound) == (pytest.approx(3), HOST)


def slice_of(*shape: int) -> Slice:
    """A slice whose devices are numbered along the first axis first."""
    return Slice(shape, tuple(place[::-1] for place in np.ndindex(shape[::-1])))


FOUR = slice_of(2, 2)


@pytest.mark.parametrize(
    ("kind", "shape", "links"),
    [
        # An axis without wrap-around has one link per chip and direction, because its ends have no second one.
        ("TPU v5 lite", (1, 1), 0),
        ("TPU v5 lite", (2, 2), 2),
        ("TPU v5 lite", (4, 4), 2),
        ("TPU v5 lite", (8, 16), 3),
        ("TPU v5 lite", (16, 16), 4),
        ("TPU v6 lite", (4, 8), 2),
        ("TPU v6 lite", (16, 16), 4),
        ("TPU v4", (2, 2, 1), 2),
        ("TPU v4", (2, 4, 4), 3),
        ("TPU v4", (4, 4, 4), 6),
        ("TPU v5", (4, 4, 8), 6),
        ("TPU7x", (2, 2, 2), 3),
    ],
)
def test_axes_with_wrap_around_have_two_links(kind: str, shape: tuple[int, ...], links: int) -> None:
    assert slice_of(*shape).links(CHIPS[kind]) == links


def test_the_links_of_16x16_chips_are_those_of_the_published_all_reduce() -> None:
    """Google states an all-reduce bandwidth of 51.2 TB/s for the 256 chips of v5e, and of 102.4 TB/s for v6e."""
    for kind, bandwidth in (("TPU v5 lite", 51.2e12), ("TPU v6 lite", 102.4e12)):
        assert slice_of(16, 16).links(CHIPS[kind]) * CHIPS[kind].link * 256 == pytest.approx(bandwidth)


def test_collectives_use_the_links_of_the_slice() -> None:
    chip = CHIPS["TPU v5 lite"]
    summed = Analysis([], [Collective("all-reduce", 1, 100e9)])
    # 2 x 3/4 of 100 GB over two links of 50 GB/s
    assert estimate(summed, chip, FOUR, 4, 0.0).parts[LINKS] == pytest.approx(1.5)
    assert estimate(summed, chip, slice_of(1, 1), 1, 0.0).parts[LINKS] == 0
    gathered = Analysis([], [Collective("all-gather", 1, 100e9)])
    assert estimate(gathered, chip, FOUR, 4, 0.0).parts[LINKS] == pytest.approx(3)


def test_groups_of_devices_use_the_links_between_them() -> None:
    chip = CHIPS["TPU v5 lite"]
    scattered = Analysis([], [Collective("reduce-scatter", 1, 100e9, group=(0, 1))])
    # 1/2 of 100 GB over one link of 50 GB/s
    assert estimate(scattered, chip, FOUR, 4, 0.0).parts[LINKS] == pytest.approx(1)
    assert estimate(scattered, chip, slice_of(16, 16), 256, 0.0).parts[LINKS] == pytest.approx(1)
    row = Analysis([], [Collective("reduce-scatter", 1, 160e9, group=tuple(range(16)))])
    assert estimate(row, chip, slice_of(16, 16), 256, 0.0).parts[LINKS] == pytest.approx(1.5)  # a ring
    assert estimate(row, chip, slice_of(16, 8), 128, 0.0).parts[LINKS] == pytest.approx(1.5)


def test_groups_within_a_chip_use_no_links() -> None:
    """A chip of TPU7x is two devices. The sum of the gradients keeps its time next to a group of these two."""
    chip = CHIPS["TPU7x"].per_device(2)
    places = tuple(place for place in slice_of(2, 2, 1).coordinates for _ in range(2))
    scattered = Collective("reduce-scatter", 1, 100e9, group=(0, 1))
    summed = Collective("all-reduce", 1, 100e9)
    # 2 x 7/8 of 100 GB over the half of two links of 100 GB/s
    found = estimate(Analysis([], [scattered, summed]), chip, Slice((2, 2, 1), places), 8, 0.0)
    assert found.parts[LINKS] == pytest.approx(1.75)
    assert estimate(Analysis([], [summed]), chip, Slice((1, 1, 1), places[:2]), 2, 0.0).parts[LINKS] == 0


def test_links_that_are_not_known_take_no_made_up_time() -> None:
    chip = replace(CHIPS["TPU v5 lite"], link=0.0)
    summed = Analysis([work(chip.flops, 0.0)], [Collective("all-reduce", 1, 100e9)])
    for unknown in (estimate(summed, chip, FOUR, 4, 0.0), estimate(summed, CHIPS["TPU v5 lite"], None, 4, 0.0)):
        assert unknown.parts[LINKS] is None
        assert (unknown.roofline, unknown.bound) == (pytest.approx(1), MATRIX)
    assert estimate(summed, chip, None, 1, 0.0).parts[LINKS] == 0  # one device has nothing to send
    assert estimate(Analysis(), chip, None, 4, 0.0).parts[LINKS] == 0


def test_features_in_the_memory_of_the_devices_are_counted(experiment: Path) -> None:
    from imgcap_jax.cli.experiments import find
    from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
    from imgcap_jax.plan.datasets import sizes_of
    from imgcap_jax.plan.hlo import analyse
    from imgcap_jax.plan.programs import Program, Programs

    small = find(str(experiment))
    stored = replace(small, encoder=EfficientNetLite(variant=0), data=replace(small.data, image_size=32))
    size = 1000 * 1280 * 2  # one region of 1280 numbers of 16 bits per image

    def step(feed: Any, memory: float) -> Program:
        settings = replace(stored, data=replace(stored.data, feed=feed))
        return Programs(settings, sizes_of(settings, 1000, 300), jax.devices(), memory=memory).training_step()

    # 60 % of the memory that the state leaves has room for half of the features.
    host, split = step("host", 1e9), step("device", size)
    assert host.feed == FeedPlan(None, size, 4)
    assert split.feed == FeedPlan(2, size, 4)
    captions, numbers = 5000 * (6 + 2) * 4, 256 * 8 * (3 + 2) * 4
    more = split.memory.arguments - host.memory.arguments
    assert size / 2 + captions <= more + host.fed_bytes <= size / 2 + captions + numbers + 1e4
    assert split.fed_bytes == 8 * (3 + 2) * 4 < host.fed_bytes
    sent, drawn = analyse(host.text, host.trips), analyse(split.text, split.trips)
    assert set(sent.by_collective()) == {"all-reduce"}
    assert set(drawn.by_collective()) == {"reduce-scatter among 2", "all-reduce"}
    # Each device contributes its part of the rows of two devices.
    assert drawn.by_collective()["reduce-scatter among 2"].bytes == 2 * 2 * 1280 * 2
    # The arithmetic is that of one step.
    assert drawn.unknown_loops == []
    assert drawn.flops == pytest.approx(sent.flops, rel=0.01)


def test_the_feed_is_that_of_training() -> None:
    data = CaptionData(views=2)
    rows = PlannedRows(
        data, {"regions": ((49, 1280), np.float16)}, batch=8, images=1000, captions=5000, references=None
    )
    size, free = 2 * 1000 * 49 * 1280 * 2, 2e8
    parallel = DataParallel("shard_map", jax.devices()[:4])
    assert rows.feed("auto", parallel, free) == FeedPlan(None, size, 4)  # on a CPU
    assert rows.feed("device", parallel, 1e9) == FeedPlan(1, size, 4)
    assert rows.feed("device", parallel, free) == FeedPlan(4, size, 4)
    too_large = rows.feed("device", parallel, 1e7)
    assert too_large.shards is None
    (line,) = feed_lines(too_large, "chip")
    assert line.startswith("Features of all training images: 0.25 GB, on the host, which sends each batch (note: ")
    assert "take 0.1 GB on each of 4 devices, more than 60% of the 0.0 GB that are free there" in line
    assert feed_lines(FeedPlan(2, size, 4), "chip") == [
        "Features of all training images: 0.25 GB, split over groups of 2 chips: 0.13 GB in the memory of each"
    ]


def test_a_core_has_its_share_of_a_chip() -> None:
    half = CHIPS["TPU v4"].per_device(2)
    assert half.flops == CHIPS["TPU v4"].flops / 2
    assert half.cores == 2


def test_programs_do_not_touch_the_devices(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of a topology cannot hold arrays."""
    from imgcap_jax.cli.experiments import find
    from imgcap_jax.plan.datasets import sizes_of
    from imgcap_jax.plan.programs import Programs

    programs = Programs(find(str(experiment)), sizes_of(find(str(experiment)), 64, 100), jax.devices()[:2], memory=1e9)
    placed: list[Any] = []
    monkeypatch.setattr(jax, "device_put", lambda leaf, *rest, **options: placed.append(rest) or leaf)
    step = programs.training_step()
    assert step.images == 8
    assert not [rest for rest in placed if rest]
