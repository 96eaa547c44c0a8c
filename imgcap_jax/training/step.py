"""What the training steps of all objectives share: gradients summed over devices, the update, the moving average."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from imgcap_jax.models.model import Params
from imgcap_jax.training.parallel import AXIS, Step

Loss = Callable[[Params, Any, Mapping[str, Array], Array], tuple[Array, Any]]
"""(params, constants, part of a batch, step []) -> (a sum to be minimised [], a pytree of other sums [])."""
Measure = Callable[[Any], tuple[Array, dict[str, Array]]]
"""The sums of the whole batch -> (what the minimised sum is divided by [], metrics [])."""


@struct.dataclass
class TrainState:
    """Everything a step changes: step [] int32, params, optimizer state, EMA of params (None: not kept)."""

    step: Array
    params: Params
    optimizer: Any
    ema: Params | None

    @property
    def best_guess(self) -> Params:
        """The parameters to caption with: the average where one is kept."""
        return self.params if self.ema is None else self.ema


def first_state(params: Params, transformation: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step."""
    # A real copy: donating one buffer under two names fails.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, transformation.init(params), average)


def keys_of_rows(key: Array, step: Array, row: Array) -> Array:
    """A key for each image of a step, [B], from its index in the global batch, ``row`` [B]: the same on any devices."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda index: jax.random.fold_in(step_key, index))(row)


def train_step(
    loss: Loss,
    measure: Measure,
    transformation: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Step:
    """Makes ``step(state, constants, batch) -> (state, metrics)`` for ``DataParallel.compile``.

    The local *sums* are differentiated, and gradients and sums are added up over microbatches and devices before they
    are divided: a mean of means would weigh captions of different lengths unevenly.

    Args:
        loss: differentiated by its first argument.
        measure: says what the gradient is divided by; "gradient_norm" is added to its metrics.
        transformation: the optimizer.
        accumulate: microbatches.
        ema_decay: decay a step of the averaged parameters, where the state keeps them.
    """
    gradient = jax.grad(loss, has_aux=True)

    def summed_gradient(params: Params, constants: Any, batch: Mapping[str, Array], step: Array) -> tuple[Params, Any]:
        if accumulate == 1:
            return gradient(params, constants, batch, step)

        def add(total: Any, part: Mapping[str, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, constants, part, step)), None

        parts = {
            name: leaf.reshape(accumulate, leaf.shape[0] // accumulate, *leaf.shape[1:]) for name, leaf in batch.items()
        }
        one = {name: leaf[0] for name, leaf in parts.items()}
        shapes = jax.eval_shape(gradient, params, constants, one, step)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zero, parts)[0]

    def step(state: TrainState, constants: Any, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        gradients, sums = jax.lax.psum(summed_gradient(state.params, constants, batch, state.step), AXIS)
        divisor, metrics = measure(sums)
        gradients = jax.tree.map(lambda leaf: leaf / divisor, gradients)
        updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Early on, the average follows quickly instead of remembering the random start.
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1.0 + count) / (10.0 + count))
            ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, optimizer, ema), metrics

    return step
