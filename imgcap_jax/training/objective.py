"""The contract of an objective: what is optimised, which batches it needs, and its compiled training step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import optax
from flax import nnx
from jax import Array

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.sources import CaptionSource
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.models.model import CaptionModel, Frozen, Params
from imgcap_jax.training.checkpoints import Checkpoints
from imgcap_jax.training.parallel import DataParallel, Step


@dataclass(frozen=True)
class StepSetup:
    """What an objective can use to make its training step.

    Attributes:
        graph: the model without its arrays; ``nnx.merge(graph, params, frozen)`` is the model.
        params: the trained parameters as training starts or resumes, on all devices. The first step donates these
            buffers; copy what you keep.
        frozen: the other variables of the model, on all devices.
        transformation: the optimizer.
        key: of dropout and samples (``step.step_stream``); fold in the step and the row (``step.keys_of_rows``).
        steps_per_epoch: for schedules that count epochs.
        accumulate: microbatches per step.
        ema_decay: decay of the averaged parameters per step, a number or a function of the step, for
            ``training.step.train_step``; 0: no average.
        vocabulary: the words of the model.
        max_words: ``decoding.max_words``, the longest caption that is decoded.
        references: what ``Objective.references`` returned.
        parallel: the devices; ``replicate`` puts constants on all of them.
        folder: the run's folder, for files that a resumed run needs.
        checkpoints: the run's checkpoints. ``checkpoints.step`` is None unless the run is resumed.
        teachers: the runs that the objective's field ``teachers`` names, if it has one. They read the same regions, and
            have the same vocabulary.
    """

    graph: nnx.GraphDef[CaptionModel]
    params: Params
    frozen: Frozen
    transformation: optax.GradientTransformation
    key: Array
    steps_per_epoch: int
    accumulate: int
    ema_decay: float | optax.Schedule
    vocabulary: Vocabulary
    max_words: int
    references: CaptionTable | None
    parallel: DataParallel
    folder: Path
    checkpoints: Checkpoints
    teachers: Sequence["Teacher"] = ()


class Teacher(NamedTuple):
    """A trained model that a run learns from: its graph without arrays, its parameters, its other variables."""

    graph: nnx.GraphDef[CaptionModel]
    params: Params
    frozen: Frozen


class Objective(Protocol):
    """What training optimises: a frozen dataclass whose fields become the options ``--objective.FIELD``.

    ``training.step.train_step`` makes a step from a loss over sums. It adds up gradients over microbatches and devices,
    updates the parameters and keeps the moving average, so that an objective only has to define its loss.
    """

    @property
    def title(self) -> str:
        """What is optimised, in a few words; printed at the start and stored in ``scores_<split>.json``."""
        ...

    @property
    def progress(self) -> Mapping[str, str]:
        """The metrics of the progress line and their formats, as {"loss": ".3f"}."""
        ...

    def references(self, sources: Sequence[CaptionSource], vocabulary: Vocabulary) -> CaptionTable | None:
        """The references that each batch has to contain, usually ``CaptionTable.as_references(sources, ...)``.

        All batches contain

        - "tokens" int32 [B,M,T]: captions as bos, words, eos, pad, T = data.max_words + 2. Images with fewer than M
          captions have rows of pad.
        - "weight" float32 [B]: 0 for rows that only fill the batch,
        - "row" int32 [B]: the index in the global batch,
        - "number" int32 [B]: the number of the image among all training images,
        - "image" uint8 [B,h,w,3] or "regions" [B,N,D] (with "region_mask" [B,N] if their number varies).

        Unless this returns None, they also contain "references" int32 [B,R,S] and "reference_count" float32 [B], and
        "reference_norms" float32 [B,R,n] if ``constants`` has set ``norms`` of the table.
        """
        ...

    def check(self, *, dataset: str, images: int, initialised: bool) -> None:
        """Checks that a new run can be trained, before anything is computed.

        Args:
            dataset: the name of the training data.
            images: the number of training images.
            initialised: whether the run starts from another run's parameters.

        Raises:
            UserError: training is impossible.
        """
        ...

    def constants(self, setup: StepSetup) -> Any:
        """What the step reads and does not change: a pytree of arrays on all devices (``setup.parallel.replicate``).

        In the simplest case it is ``setup.frozen``. Files that a resumed run needs are written here.
        """
        ...

    def make_step(self, setup: StepSetup) -> Step:
        """The training step, not compiled: (state, constants, batch) -> (state, metrics).

        It runs on each device with its part of the batch; see ``training.step.train_step``, which makes it. The state
        is a ``training.step.TrainState``. A step that is made in another way must reduce over
        ``training.parallel.AXIS``. Metrics are float32 [], the same on every device. They include "loss", "captions"
        (the number of captions in the batch), all of ``progress``, and "gradient_norm", which ``train_step`` adds.

        In a population (``training/population.py``) this runs inside a traced function. Settings that differ between
        its members are then traced values, and so is ``setup.key``.
        """
        ...
