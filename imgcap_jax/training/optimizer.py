"""The optimizer and its learning-rate schedule, from one flat set of fields."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from imgcap_jax.errors import UserError


@dataclass(frozen=True)
class Optimizer:
    """How parameters are updated. Epochs are counted in the training split's images.

    The defaults are today's usual recipe. The field's classic one (Xu et al. 2015; Karpathy's neuraltalk2) is
    ``Optimizer("adam", 4e-4, schedule="step", warmup_epochs=0, clip_norm=None, clip_value=0.1, weight_decay=0)``.
    """

    algorithm: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = 0.5
    """Linear warm-up from 0."""
    decay_every_epochs: float = 3.0
    """schedule "step": the rate is multiplied by decay_factor that often."""
    decay_factor: float = 0.8
    final_fraction: float = 0.01
    """schedule "cosine": the last rate, as a share of the peak."""
    clip_norm: float | None = 1.0
    """Gradients are scaled to at most this global norm."""
    clip_value: float | None = None
    """Each gradient entry is cut to +-this."""
    weight_decay: float = 0.01
    """adamw only; biases and norms are not decayed."""
    b1: float = 0.9
    b2: float = 0.999
    encoder_factor: float = 1.0
    """The encoder's learning rate as a multiple of the decoder's."""
    encoder_start_epochs: float = 0.0
    """The encoder stands still so long, until the decoder's gradients mean something to it.
    Its own still count in clip_norm and in Adam's moments."""
    accumulate: int = 1
    """Microbatches a step: memory of a batch / accumulate, gradients of the whole batch."""

    def __post_init__(self) -> None:
        if self.encoder_factor < 0 or self.encoder_start_epochs < 0:
            raise UserError("optimizer: encoder_factor and encoder_start_epochs are not below 0")
        if self.accumulate < 1 or self.learning_rate <= 0 or self.warmup_epochs < 0 or self.decay_every_epochs <= 0:
            raise UserError(
                "optimizer: accumulate is at least 1, learning_rate and decay_every_epochs are above 0, "
                "warmup_epochs is not below 0"
            )

    def rate(self, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
        """The learning rate as a function of the step."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        rest: optax.Schedule
        if self.schedule == "cosine":
            rest = optax.cosine_decay_schedule(self.learning_rate, max(1, total_steps - warmup), self.final_fraction)
        elif self.schedule == "step":
            rest = optax.exponential_decay(
                self.learning_rate,
                max(1, round(self.decay_every_epochs * steps_per_epoch)),
                self.decay_factor,
                staircase=True,
            )
        else:
            rest = optax.constant_schedule(self.learning_rate)
        if not warmup:
            return rest
        # The first step already moves: a rate of 0 would waste it.
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
        # On the update and not on the gradient, of which Adam would undo a factor.
        if self.encoder_start_epochs:
            start = round(self.encoder_start_epochs * steps_per_epoch)
            factor = optax.scale_by_schedule(lambda step: jnp.where(step < start, 0.0, self.encoder_factor))
            chain.append(optax.masked(factor, _of_encoder))
        elif self.encoder_factor != 1.0:
            chain.append(optax.masked(optax.scale(self.encoder_factor), _of_encoder))
        return optax.chain(*chain)


def _decayed(params: Any) -> Any:
    """Matrices and kernels are decayed; biases and norms, which have one axis, are not."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _of_encoder(params: Any) -> Any:
    """Marks what belongs to the encoder of a CaptionModel."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: "encoder" in jax.tree_util.keystr(path[:1]), params)
