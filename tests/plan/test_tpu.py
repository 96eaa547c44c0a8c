"""The programs of small experiments, compiled by the TPU compiler for four v5e chips. Nothing is run.

Skipped if libtpu is not installed. Most of the time is that of the compiler.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.plan.datasets import sizes_of
from imgcap_jax.plan.feed import AbstractParallel, FeedPlan, PlannedRows, device_loop
from imgcap_jax.plan.hlo import Analysis, analyse
from imgcap_jax.plan.hlo_text import parse
from imgcap_jax.plan.programs import Program, Programs
from imgcap_jax.plan.topology import Topology, open_topology
from imgcap_jax.training.parallel import AXIS
from imgcap_jax.training.self_critical import SelfCritical

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

VOCABULARY = 1000
FEATURES = 2 * 2 * 1280 * 2  # bytes of the regions of a photo of 64 pixels
EXPERIMENT = Experiment(
    data=CaptionData(dataset="coco_captions", image_size=64, batch_size=64, captions_per_image=5, max_words=12),
    encoder=EfficientNetLite(variant=0),
    decoder=ShowAttendTell(hidden_size=128, embedding_size=128, attention_size=128, region_size=128),
    training=Training(validation_beam=3),
    decoding=Decoding(beam=3, max_words=12),
)


@pytest.fixture(scope="module", autouse=True)
def no_cache() -> Iterator[None]:
    """JAX cannot read a kept program for devices that are not there."""
    before: bool = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture(scope="module")
def slice_of_four() -> Topology:
    return open_topology("v5e:2x2")


def programs(topology: Topology, images: int = 200, memory: float | None = None, **changes: Any) -> Programs:
    experiment = replace(EXPERIMENT, **changes)
    sizes = sizes_of(experiment, images, VOCABULARY)
    return Programs(experiment, sizes, topology.devices, memory=memory or topology.chip.memory)


def analysed(program: Program) -> Analysis:
    return analyse(program.text, program.trips)


@pytest.mark.parametrize("objective", ["cross-entropy", "self-critical"])
def test_a_training_step_has_one_all_reduce_and_no_callback(objective: str, slice_of_four: Topology) -> None:
    changes = {} if objective == "cross-entropy" else {"objective": SelfCritical(temperature=0.6)}
    program = programs(slice_of_four, **changes).training_step()
    found = analysed(program)
    assert found.host == []
    assert found.unknown_loops == []
    # The sum of all gradients and metrics over the devices, in one all-reduce. In self-critical training, the number of
    # images is summed once per call, because the device feed has whole batches only.
    summed, *others = sorted(found.collectives, key=lambda one: -one.bytes)
    assert sum(one.bytes for one in others) == (4 if objective == "self-critical" else 0)
    assert (summed.kind, summed.count) == ("all-reduce", 1)
    parameters = 4 * 2 * VOCABULARY * 128  # at least the two matrices of the vocabulary
    assert parameters < summed.bytes < 4 * parameters
    assert found.flops > program.flops > 0  # XLA counts the steps of a caption once
    # Per device 16 images with 5 captions of 10.4 words and eos, whose product with the vocabulary is computed, and
    # differentiated by both factors.
    assert found.flops > 3 * 2 * (16 * 5 * 11.4) * 128 * VOCABULARY
    # The features of all images are in the memory of each chip.
    assert program.feed == FeedPlan(1, 200 * FEATURES, 4)
    assert program.memory.arguments > 200 * FEATURES
    assert found.cycles > 0
    assert 0 < program.memory.total < 1e9
    # Dropout does not interleave 16-bit halves.
    assert "u16" not in "".join(one.result[0].dtype for one in _all(program) if one.opcode == "bitcast-convert")


def test_features_of_which_each_chip_has_a_part_are_drawn_within_groups(slice_of_four: Topology) -> None:
    images = 20_000
    program = programs(slice_of_four, images, memory=0.3e9).training_step()
    assert program.feed == FeedPlan(2, images * FEATURES, 4)
    found = analysed(program)
    assert found.unknown_loops == []
    summed = {name.partition(" among ")[2]: one for name, one in found.by_collective().items()}
    assert set(summed) == {"", "2"}
    assert (summed[""].kind, summed[""].count, summed["2"].count) == ("all-reduce", 1, 1)
    assert summed["2"].bytes == 2 * 16 * FEATURES  # the rows of two devices
    # The half of the features is an argument, and no step copies it.
    half = images * FEATURES / 2
    assert half < program.memory.arguments < 1.5 * half
    assert program.memory.temporaries < half / 2
    assert found.bytes < half


@pytest.mark.parametrize(("regions", "region_size"), [(49, 1280), (36, 2048), (100, 2048)])
def test_rows_are_read_without_a_copy_of_the_table(regions: int, region_size: int, slice_of_four: Topology) -> None:
    """The compiler copies tables with rows of more than 2**15 words."""
    parallel = AbstractParallel("shard_map", slice_of_four.devices)
    inputs = {"regions": ((regions, region_size), np.float16), "region_mask": ((regions,), np.bool_)}
    rows = PlannedRows(EXPERIMENT.data, inputs, batch=64, images=40_000, captions=200_000, references=None)

    def step(state: Any, constants: Any, batch: Any) -> tuple[Any, Any]:
        return state + jax.lax.psum(batch["regions"].astype("float32").sum(), AXIS), {"loss": state}

    state = parallel.replicate(np.float32(0))
    for shards in (1, 2):
        loop, arguments, _ = device_loop(step, rows, parallel, shards, state, ())
        memory = loop.lower(*arguments).compile().memory_analysis()  # type: ignore[attr-defined]
        table = 40_000 * regions * region_size * 2 / shards
        assert table < memory.argument_size_in_bytes < 1.1 * table
        assert memory.temp_size_in_bytes < 0.1 * table


def test_a_search_has_no_collective(slice_of_four: Topology) -> None:
    found = analysed(programs(slice_of_four).search())
    assert (found.collectives, found.host, found.unknown_loops) == ([], [], [])
    assert found.flops > 0


def test_an_encoder_has_the_convolutions_of_accelerators(slice_of_four: Topology) -> None:
    program = programs(slice_of_four).encoder()
    assert program is not None
    found = analysed(program)
    assert (found.collectives, found.host) == ([], [])
    # On a CPU, a few images at a time pass through all stages in a loop, and depthwise convolutions are sums.
    opcodes = [one.opcode for one in _all(program)]
    assert "while" not in opcodes
    assert any(
        one.opcode == "convolution" and int(one.attribute(r"feature_group_count=(\d+)") or 1) > 1
        for one in _all(program)
    )


def _all(program: Program) -> list[Any]:
    return [one for part in parse(program.text).computations.values() for one in part.instructions.values()]
