"""The optimizer and its learning-rate schedule, from one flat set of fields."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from imgcap_jax.errors import check_range

_MOST_STEPS = 2**31 - 1  # optax counts steps in int32, up to this number


class OptimizerSettings(Protocol):
    """Settings of an optimizer: a frozen dataclass whose fields become the options ``--optimizer.FIELD``.

    If they also have a method ``rate(steps_per_epoch, total_steps)`` that returns an optax schedule, the learning rate
    of each step is logged.
    """

    @property
    def accumulate(self) -> int:
        """Microbatches per step."""
        ...

    def build(self, steps_per_epoch: int, total_steps: int) -> optax.GradientTransformation:
        """The transformation of the gradient of the whole batch, schedule included."""
        ...


@dataclass(frozen=True)
class Optimizer:
    """How parameters are updated. Epochs are passes over the images of the training split.

    The classic recipe of the field (Xu et al. 2015; Karpathy's neuraltalk2) is
    ``Optimizer("adam", 4e-4, schedule="step", warmup_epochs=0, clip_norm=None, clip_value=0.1, weight_decay=0)``.
    """

    algorithm: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    """The peak learning rate."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = 0.5
    """Epochs of linear warm-up from 0."""
    decay_every_epochs: float = 3.0
    """schedule "step": every this many epochs, the rate is multiplied by decay_factor."""
    decay_factor: float = 0.8
    final_fraction: float = 0.01
    """schedule "cosine": the final rate as a fraction of the peak."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: no clipping."""
    clip_value: float | None = None
    """Each entry of the gradient is clipped to +-this; None: no clipping."""
    weight_decay: float = 0.01
    """adamw only; biases and norms are not decayed."""
    b1: float = 0.9
    b2: float = 0.999
    encoder_factor: float = 1.0
    """The encoder's learning rate as a multiple of the decoder's."""
    encoder_start_epochs: float = 0.0
    """Epochs for which the encoder is not updated, because an untrained decoder's gradients would spoil it. Its
    gradients still count in clip_norm and in Adam's moments."""
    accumulate: int = 1
    """Microbatches per step: the memory of batch_size / accumulate images, the gradient of the whole batch."""

    def __post_init__(self) -> None:
        for name in ("encoder_factor", "encoder_start_epochs", "warmup_epochs", "weight_decay"):
            check_range(f"optimizer.{name}", getattr(self, name), at_least=0)
        for name in ("learning_rate", "decay_every_epochs", "decay_factor", "clip_norm", "clip_value"):
            if getattr(self, name) is not None:
                check_range(f"optimizer.{name}", getattr(self, name), above=0)
        for name in ("b1", "b2"):
            check_range(f"optimizer.{name}", getattr(self, name), at_least=0, below=1)
        check_range("optimizer.final_fraction", self.final_fraction, at_least=0, at_most=1)
        check_range("optimizer.accumulate", self.accumulate, at_least=1)

    def rate(self, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
        """The learning rate as a function of the step."""
        warmup = steps_of(self.warmup_epochs, steps_per_epoch)
        rest: optax.Schedule
        if self.schedule == "cosine":
            rest = optax.cosine_decay_schedule(self.learning_rate, max(1, total_steps - warmup), self.final_fraction)
        elif self.schedule == "step":
            rest = optax.exponential_decay(
                self.learning_rate,
                max(1, steps_of(self.decay_every_epochs, steps_per_epoch)),
                self.decay_factor,
                staircase=True,
            )
        else:
            rest = optax.constant_schedule(self.learning_rate)
        if not warmup:
            return rest
        # The first step has a rate above 0; otherwise it would be wasted.
        rise = optax.linear_schedule(self.learning_rate / warmup, self.learning_rate, max(1, warmup - 1))
        return optax.join_schedules([rise, rest], [warmup])

    def build(self, steps_per_epoch: int, total_steps: int) -> optax.GradientTransformation:
        """The optax chain: clipping, then the algorithm with its schedule."""
        rate = self.rate(steps_per_epoch, total_steps)
        chain: list[optax.GradientTransformation] = []
        if self.clip_value is not None:
            chain.append(optax.clip(self.clip_value))
        if self.clip_norm is not None:
            chain.append(optax.clip_by_global_norm(self.clip_norm))
        if self.algorithm == "adamw":
            chain.append(optax.adamw(rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=_decayed))
        elif self.algorithm == "adam":
            chain.append(optax.adam(rate, self.b1, self.b2))
        else:
            chain.append(optax.sgd(rate))
        # Applied to the update: Adam would cancel a factor of the gradient.
        if self.encoder_start_epochs:
            start = steps_of(self.encoder_start_epochs, steps_per_epoch)
            factor = optax.scale_by_schedule(lambda step: jnp.where(step < start, 0.0, self.encoder_factor))
            chain.append(optax.masked(factor, _of_encoder))
        elif self.encoder_factor != 1.0:
            chain.append(optax.masked(optax.scale(self.encoder_factor), _of_encoder))
        return optax.chain(*chain)


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """The number of steps of a number of epochs, at most 2**31 - 1."""
    return round(min(epochs * steps_per_epoch, _MOST_STEPS))


LearningRate = Callable[[int], Array | np.ndarray]


def learning_rate_of(settings: OptimizerSettings, steps_per_epoch: int, total_steps: int) -> LearningRate | None:
    """The learning rate as a function of the step, float32 []; None if the optimizer has no method ``rate``.

    It is computed on the host's CPU, so that neither it nor its reader waits for the steps that an accelerator has to
    do.
    """
    rate = getattr(settings, "rate", None)
    if not callable(rate):
        return None
    schedule = rate(steps_per_epoch, total_steps)
    compiled = jax.jit(lambda step: jnp.asarray(schedule(step), jnp.float32))
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        device = jax.local_devices()[0]

    def at(step: int) -> Array:
        with jax.default_device(device):
            return compiled(np.int32(step))

    at(0)  # compiles it, before the time of steps is measured
    return at


def _decayed(params: Any) -> Any:
    """Matrices and kernels are decayed. Biases and norms have one axis and are not."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _of_encoder(params: Any) -> Any:
    """Selects the parameters of the encoder of a CaptionModel."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: "encoder" in jax.tree_util.keystr(path[:1]), params)
