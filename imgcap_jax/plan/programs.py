"""The programs that an experiment runs, compiled for a list of devices from shapes alone.

The devices can be those of a topology that is not present (``jax.experimental.topologies``): nothing is executed and
no array is placed on them.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from imgcap_jax.data.regions import RegionFiles, has_ready_regions
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.loops import Loop, loop_name
from imgcap_jax.models.encoders.contract import build_encoder
from imgcap_jax.models.model import split_trained
from imgcap_jax.plan.chips import HOST_BANDWIDTH
from imgcap_jax.plan.datasets import WORDS, Sizes
from imgcap_jax.plan.feed import AbstractParallel, ArrayShape, FeedPlan, PlannedRows, device_loop, shape_of
from imgcap_jax.precision import at_precision, compute_dtype, matmul_precision
from imgcap_jax.run.evaluation import batch_size
from imgcap_jax.run.extraction import BATCH as ENCODER_BATCH
from imgcap_jax.run.extraction import encoder_dtype, uses_store
from imgcap_jax.run.folder import Run
from imgcap_jax.run.generation import caption_function, check_decoding
from imgcap_jax.training.losses import passes_of_loops
from imgcap_jax.training.objective import StepSetup
from imgcap_jax.training.optimizer import steps_of
from imgcap_jax.training.step import average_decay, first_state, step_stream


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        name: "training step", "validation search" or "encoder".
        images: images per call, over all devices.
        text: the HLO of one device after optimisation.
        memory: bytes of one device, see ``Memory``.
        flops: XLA's own count for one device, in which the body of a loop counts once.
        fed_bytes: bytes that one device receives from the host per call, or per step of a loop over steps.
        loops: how often the loops whose length depends on the data are assumed to run.
        seconds: the time to compile.
        feed: what gives a training step its batches; None for other programs.
    """

    name: str
    images: int
    text: str
    memory: "Memory"
    flops: float
    fed_bytes: int
    loops: Mapping[Loop, int]
    seconds: float
    feed: FeedPlan | None = None

    def trips(self, op_name: str) -> int | None:
        """How often a loop of this name runs; None: it has no name of ``imgcap_jax.loops``."""
        found = loop_name(op_name)
        return None if found is None else self.loops.get(found)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    arguments: what the program reads. results: what it returns. aliased: the part of the results that takes the buffers
    of arguments. temporaries: everything between.
    """

    arguments: int
    results: int
    aliased: int
    temporaries: int

    @property
    def total(self) -> int:
        """What must fit into the device's memory."""
        return self.arguments + self.results - self.aliased + self.temporaries


class Programs:
    """The programs of an experiment on some devices."""

    def __init__(
        self,
        experiment: Experiment,
        sizes: Sizes,
        devices: Sequence[jax.Device],
        *,
        memory: float,
        words: float = WORDS,
    ) -> None:
        """Builds shapes; nothing is compiled yet.

        Args:
            experiment: what is planned.
            sizes: of its data.
            devices: what it is compiled for.
            memory: bytes of memory of each of them.
            words: mean words per caption, without eos.

        Raises:
            UserError: the experiment's parts do not go together.
        """
        if experiment.compares_photos:
            raise UserError(
                "an index of training photos cannot be planned; leave out retrieval, and set objective.neighbours to 0"
            )
        if getattr(experiment.objective, "teachers", ()):
            raise UserError("teachers cannot be planned; leave out objective.teachers")
        platform = devices[0].platform
        self._dtype = compute_dtype(experiment.training.dtype, platform)
        self._encoder_dtype = encoder_dtype(experiment, platform)
        self.experiment = experiment = _for_plan(experiment, self._dtype)
        self.sizes = sizes
        self.stored = uses_store(experiment)
        self._words = words
        self._memory = memory
        self._parallel = AbstractParallel("shard_map", devices)
        self._run = Run(Path(), experiment, sizes.vocabulary)
        check_decoding(experiment.decoding, sizes.vocabulary, experiment.decoder)
        self._graph, self._params, self._frozen = split_trained(self._model())

    def _model(self) -> Any:
        model = self._run.model(with_encoder=not self.stored, restored=True)
        graph, state = nnx.split(model)
        return nnx.merge(graph, jax.tree.map(shape_of, state))

    @property
    def devices(self) -> int:
        """The number of devices."""
        return len(self._parallel.devices)

    @property
    def steps_per_epoch(self) -> int:
        """Training steps per epoch."""
        return max(1, -(-self.sizes.images // self.experiment.data.batch_size))

    @property
    def total_steps(self) -> int:
        """Training steps of the experiment, unless it stops early."""
        return max(1, steps_of(self.experiment.training.epochs, self.steps_per_epoch))

    def training_step(self, images: int | None = None) -> Program:
        """The training step of a global batch size; None: that of the experiment."""
        experiment, sizes = self.experiment, self.sizes
        images = images or experiment.data.batch_size
        self._parallel.check_batch_size(images, experiment.optimizer.accumulate)
        transformation = experiment.optimizer.build(self.steps_per_epoch, self.total_steps)
        first = partial(first_state, transformation=transformation, ema=experiment.training.ema_decay > 0)
        state = self._parallel.replicate(jax.eval_shape(first, self._params))
        references = sizes.references(experiment)
        # A resumed run: it reads its start from its checkpoints, of which only the shapes are needed.
        checkpoints: Any = SimpleNamespace(step=0, restore_start=lambda params: params)
        with tempfile.TemporaryDirectory() as folder:
            setup = StepSetup(
                graph=self._graph,
                params=state.params,
                frozen=self._parallel.replicate(self._frozen),
                transformation=transformation,
                key=step_stream(experiment.training.seed),
                steps_per_epoch=self.steps_per_epoch,
                accumulate=experiment.optimizer.accumulate,
                ema_decay=average_decay(experiment.training.ema_decay, initialised=False),
                vocabulary=sizes.vocabulary,
                max_words=experiment.decoding.max_words,
                references=references,
                parallel=self._parallel,
                folder=Path(folder),
                checkpoints=checkpoints,
            )
            constants = experiment.objective.constants(setup)
        step = at_precision(experiment.objective.make_step(setup), self._dtype)
        constants = self._parallel.replicate(constants)
        data, inputs = experiment.data, self._inputs()
        loops = self._training_loops(images, sampled=references is not None)
        feed = FeedPlan(None, 0, self.devices)
        if self.stored:
            planned = PlannedRows(
                data, inputs, batch=images, images=sizes.stored, captions=sizes.captions, references=references
            )
            feed = planned.feed(data.feed, self._parallel, self._memory - _bytes((state, constants)))
            if feed.shards is not None:
                loop, arguments, sent = device_loop(step, planned, self._parallel, feed.shards, state, constants)
                return self._compiled("training step", images, loops, loop, *arguments, fed_bytes=sent, feed=feed)
        rows: dict[str, ArrayShape] = {
            "tokens": ((data.captions_per_image, data.max_words + 2), np.int32),
            "weight": ((), np.float32),
            "row": ((), np.int32),
            **inputs,
        }
        if references is not None:
            rows["references"] = ((references.most, references.tokens.shape[1]), np.int32)
            rows["reference_count"] = ((), np.float32)
            if references.norms is not None:
                rows["reference_norms"] = ((references.most, references.norms.shape[1]), np.float32)
        batch, compiled = self._batch(rows, images), self._parallel.compile(step)
        return self._compiled("training step", images, loops, compiled, state, constants, batch, feed=feed)

    def _training_loops(self, images: int, *, sampled: bool) -> dict[Loop, int]:
        """How often the loops of a training step run: all steps, but only the words that captions have."""
        data, optimizer, objective = self.experiment.data, self.experiment.optimizer, self.experiment.objective
        steps = self.experiment.decoding.max_words if sampled else data.max_words + 1
        captions = getattr(objective, "samples", data.captions_per_image) if sampled else data.captions_per_image
        rows = images // self.devices // optimizer.accumulate * captions
        words = min(round(rows * (self._words + 1)), rows * steps)
        chunks = passes_of_loops(rows * steps, words)
        return {"training_steps": 1, "caption_steps": steps, "caption_steps_of_half": 0, "search": steps, **chunks}

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the time of loops is based on, one line each."""
        data, decoding = self.experiment.data, self.experiment.decoding
        return (
            f"the longest caption of each batch has data.max_words = {data.max_words} words; of sampled captions and "
            f"searches, decoding.max_words = {decoding.max_words}",
            f"{self._words:g} words per caption on average, without eos",
            f"{HOST_BANDWIDTH / 1e9:g} GB/s from the host to each chip",
            f"products in {self._dtype}, those of the encoder in {self._encoder_dtype}",
        )

    def search(self) -> Program:
        """The search of a validation."""
        training = self.experiment.training
        decoding = self.experiment.decoding.plain(training.validation_beam)
        function = self._parallel.map_rows(caption_function([self._graph], decoding, self.sizes.vocabulary))
        images = batch_size(training.validation_images or sys.maxsize, self.devices)
        batch = self._batch({**self._inputs(), "row": ((), np.int32)}, images)
        params, frozen = map(self._parallel.replicate, (self._params, self._frozen))
        loops: dict[Loop, int] = {"search": decoding.max_words}
        return self._compiled("validation search", images, loops, function, [params], [frozen], [batch])

    def encoder(self) -> Program | None:
        """The encoder that computes stored features; None if the training step contains it or there is none."""
        if not has_encoder(self.experiment):
            return None
        graph, state = nnx.split(self._encoder())

        def encode(state: Any, images: Array) -> Any:
            with matmul_precision(self._encoder_dtype):
                return nnx.merge(graph, state)(images)

        images = ENCODER_BATCH * self.devices
        side = self.experiment.data.image_size
        batch = self._batch({"image": ((side, side, 3), np.uint8)}, images)
        return self._compiled(
            "encoder", images, {}, self._parallel.map_rows(encode), self._parallel.replicate(state), batch["image"]
        )

    def _encoder(self) -> Any:
        """The encoder, whose variables have no values."""
        settings: Any = self.experiment.encoder
        dtype, size = jnp.dtype(self._encoder_dtype), self.experiment.data.image_size

        def build() -> Any:
            return build_encoder(settings, size, dtype=dtype, rngs=nnx.Rngs(self.experiment.training.seed))

        return nnx.eval_shape(build)

    def _inputs(self) -> dict[str, ArrayShape]:
        """What a row of a batch contains of its image: name -> (shape, dtype)."""
        experiment = self.experiment
        settings: Any = experiment.encoder
        if not self.stored:
            return {"image": ((experiment.data.image_size,) * 2 + (3,), np.uint8)}
        if has_ready_regions(settings):
            count = getattr(settings, "max_regions", 36)
            # Files are kept in a feature store, regions of your own as they are read.
            dtype = experiment.data.feature_dtype if isinstance(settings, RegionFiles) else np.float32
            return {"regions": ((count, settings.region_size), jnp.dtype(dtype)), "region_mask": ((count,), np.bool_)}
        encoder = self._encoder()
        return {"regions": ((encoder.region_count, encoder.region_size), jnp.dtype(experiment.data.feature_dtype))}

    def _batch(self, rows: Mapping[str, ArrayShape], size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return self._parallel.shapes_of_rows(
            {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in rows.items()}
        )

    def _compiled(
        self,
        name: str,
        images: int,
        loops: Mapping[Loop, int],
        function: Callable[..., Any],
        *arguments: Any,
        fed_bytes: int | None = None,
        feed: FeedPlan | None = None,
    ) -> Program:
        """Compiles a function. ``fed_bytes``: None: the host sends the last argument, split over the devices."""
        start = time.perf_counter()
        compiled: Any = function.lower(*arguments).compile()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - start
        found = compiled.memory_analysis()
        memory = Memory(
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.alias_size_in_bytes,
            found.temp_size_in_bytes,
        )
        if fed_bytes is None:
            fed_bytes = _bytes(arguments[-1]) // self.devices
        analysis = compiled.cost_analysis() or {}
        flops = float(analysis.get("flops", 0.0))
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            raise UnreadableError(memory) from error
        return Program(name, images, text, memory, flops, fed_bytes, loops, seconds, feed)


def has_encoder(experiment: Experiment) -> bool:
    """Whether an encoder computes stored features; otherwise the training step contains it or there is none."""
    return uses_store(experiment) and not has_ready_regions(experiment.encoder)


def _bytes(tree: Any) -> int:
    """The bytes of the arrays of a tree, of which only the shapes need be known."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class UnreadableError(Exception):
    """JAX cannot read the program that a compiler of another version made; only its memory is known."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory


def _for_plan(experiment: Experiment, dtype: Literal["float32", "bfloat16"]) -> Experiment:
    """The experiment with this type of products, and random weights in place of a file, whose values do not matter."""
    experiment = replace(experiment, training=replace(experiment.training, dtype=dtype))
    encoder: Any = experiment.encoder
    if hasattr(encoder, "weights") and not has_ready_regions(encoder):
        return replace(experiment, encoder=replace(encoder, weights="random"))
    return experiment
