"""The training step that all objectives share: gradients summed over devices, the update, the moving average."""

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
"""(params, constants, part of a batch, step []) -> (the sum to minimise [], a pytree of other sums [])."""
Measure = Callable[[Any], tuple[Array, dict[str, Array]]]
"""The sums over the whole batch -> (the divisor of the minimised sum [], metrics [])."""


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    step: int32 [], the number of steps done. params: the trained parameters. optimizer: the optimizer state.
    ema: the exponential moving average of the parameters; None if there is none.
    """

    step: Array
    params: Params
    optimizer: Any
    ema: Params | None

    @property
    def best_guess(self) -> Params:
        """The parameters to caption with: the average if there is one, else ``params``."""
        return self.params if self.ema is None else self.ema


def first_state(params: Params, transformation: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step."""
    # A copy, because the same buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, transformation.init(params), average)


def average_decay(decay: float, *, initialised: bool) -> float | optax.Schedule:
    """The decay of the averaged parameters at each step, for ``train_step``.

    Args:
        decay: the decay per step.
        initialised: whether the parameters were trained before. If they are random, the decay at step t (from 0 on) is
            min(decay, (1 + t) / (10 + t)), so that the average soon forgets them: it is 0.1 at first, and reaches 0.99
            after 890 steps and 0.999 after 8990. Trained parameters are averaged with the decay itself.
    """
    if initialised or not decay:
        return decay
    return lambda step: jnp.minimum(decay, (1.0 + step) / (10.0 + step))


STEP_STREAM = 0x53544550
"""Folded into the seed's key for the keys of steps. Larger than the number of keys that initial parameters take."""


def step_stream(seed: int | Array) -> Array:
    """The PRNG key [] of all steps of a run: dropout, scheduled sampling, self-critical samples.

    Initial parameters take ``fold_in(key(seed), i)`` for i = 0, 1, ... (``flax.nnx.Rngs(seed)``), and step t takes
    ``fold_in(step_stream(seed), t)``. Without the constant, the first steps would use the keys of parameters.
    """
    return jax.random.fold_in(jax.random.key(seed), STEP_STREAM)


def keys_of_rows(key: Array, step: Array, row: Array) -> Array:
    """One PRNG key [B] per image of a step, from its index in the global batch, ``row`` [B].

    The keys do not depend on the number of devices.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda index: jax.random.fold_in(step_key, index))(row)


def train_step(
    loss: Loss,
    measure: Measure,
    transformation: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | optax.Schedule = 0.0,
) -> Step:
    """Makes ``step(state, constants, batch) -> (state, metrics)`` for ``DataParallel.compile``.

    Each device differentiates a *sum*. Gradients and sums are added over microbatches and devices, and only then
    divided. A mean of means would give captions of different lengths different weights.

    Args:
        loss: the function to differentiate, by its first argument.
        measure: returns the divisor of the gradient and the metrics. "gradient_norm" is added to the metrics.
        transformation: the optimizer.
        accumulate: microbatches per step.
        ema_decay: decay per step of the averaged parameters, if the state has them; a number, or a function of the step
            (``average_decay``).
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
        gradients, sums = summed_gradient(state.params, constants, batch, state.step)
        if jax.lax.axis_size(AXIS) > 1:  # on a CPU, the sum over one device copies all gradients
            gradients, sums = jax.lax.psum((gradients, sums), AXIS)
        divisor, metrics = measure(sums)
        gradients = jax.tree.map(lambda leaf: leaf / divisor, gradients)
        updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            decay = ema_decay(state.step.astype(jnp.float32)) if callable(ema_decay) else ema_decay
            ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, optimizer, ema), metrics

    return step
