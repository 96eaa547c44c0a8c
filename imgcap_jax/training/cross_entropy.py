"""The training step of teacher-forced cross-entropy, as run on one device of many."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.models.model import CaptionModel, Frozen, Params
from imgcap_jax.special_tokens import PAD
from imgcap_jax.training.losses import LossSums, caption_loss
from imgcap_jax.training.parallel import AXIS, Step


@dataclass(frozen=True)
class CrossEntropy:
    """What is minimised."""

    label_smoothing: float = 0.1
    attention_penalty: float = 0.0
    """lambda of Xu et al.'s doubly stochastic penalty; 1.0 in the paper."""
    sampling: float = 0.0
    """Scheduled sampling (Bengio et al. 2015): the highest share of words read that the model drew itself; 0: off."""
    sampling_start_epochs: float = 0.0
    """From when on that share rises."""
    sampling_ramp_epochs: float = 5.0
    """How long it rises, linearly."""

    def __post_init__(self) -> None:
        if not self.sampling and (self.sampling_start_epochs, self.sampling_ramp_epochs) != (0.0, 5.0):
            raise UserError("objective.sampling is 0, so when it starts and rises says nothing; give a share as well")
        if not 0 <= self.sampling <= 1 or self.sampling_start_epochs < 0 or self.sampling_ramp_epochs < 0:
            raise UserError("objective: sampling is 0 to 1, sampling_start_epochs and sampling_ramp_epochs at least 0")
        if not 0 <= self.label_smoothing < 1 or self.attention_penalty < 0:
            raise UserError("objective: label_smoothing is at least 0 and below 1, attention_penalty at least 0")

    def sampling_share(self, step: Array, steps_per_epoch: int) -> Array | None:
        """The share of words that are drawn at a step; None where none ever is."""
        if not self.sampling:
            return None
        risen = step / steps_per_epoch - self.sampling_start_epochs
        ramp = self.sampling_ramp_epochs
        return self.sampling * (jnp.clip(risen / ramp, 0.0, 1.0) if ramp else jnp.where(risen >= 0, 1.0, 0.0))


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


def cross_entropy_step(
    graph: nnx.GraphDef[CaptionModel],
    objective: CrossEntropy,
    transformation: optax.GradientTransformation,
    *,
    key: Array,
    steps_per_epoch: int = 1,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Step:
    """Makes ``step(state, frozen, batch) -> (state, metrics)`` for ``DataParallel.compile``.

    The batch part holds "tokens" [B,M,T], "weight" [B], "row" [B] (the index in the global batch, from which
    the row's dropout keys come) and "image" or "regions". The local *sums* are differentiated, and gradients
    and words summed over devices before they are divided: captions differ in length, so a mean of means would
    weigh words unevenly.

    Metrics, all [] float32 and the same on every device: "loss" (the objective a word), "perplexity" (of the
    true words), "gradient_norm", "words", "captions" (rows of pad, of images with fewer than M, not counted).
    """

    def loss(params: Params, frozen: Frozen, batch: Mapping[str, Array], step: Array) -> tuple[Array, LossSums]:
        model = nnx.merge(graph, params, frozen)
        step_key = jax.random.fold_in(key, step)
        keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(batch["row"])
        outputs = model.teacher_forced(batch, keys, objective.sampling_share(step, steps_per_epoch))
        sums = caption_loss(
            model.score_words,
            outputs.hidden,
            batch["tokens"],
            batch["weight"],
            label_smoothing=objective.label_smoothing,
            attention=outputs.attention,
            attention_penalty=objective.attention_penalty,
            region_mask=batch.get("region_mask"),
        )
        return sums.objective, sums

    gradient = jax.grad(loss, has_aux=True)

    def summed_gradient(
        params: Params, frozen: Frozen, batch: Mapping[str, Array], step: Array
    ) -> tuple[Params, LossSums]:
        if accumulate == 1:
            return gradient(params, frozen, batch, step)

        def add(total: tuple[Params, LossSums], part: Mapping[str, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, part, step)), None

        parts = {
            name: leaf.reshape(accumulate, leaf.shape[0] // accumulate, *leaf.shape[1:]) for name, leaf in batch.items()
        }
        zero = LossSums(*(jnp.zeros((), jnp.float32),) * 3)
        return jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), zero), parts)[0]

    def step(state: TrainState, frozen: Frozen, batch: Mapping[str, Array]) -> tuple[TrainState, Any]:
        present = (batch["tokens"][:, :, 0] != PAD) * batch["weight"][:, None]
        summed = (*summed_gradient(state.params, frozen, batch, state.step), present.sum())
        gradients, sums, captions = jax.lax.psum(summed, AXIS)
        words = jnp.maximum(sums.words, 1.0)
        gradients = jax.tree.map(lambda leaf: leaf / words, gradients)
        updates, optimizer = transformation.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Early on, the average follows quickly instead of remembering the random start.
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1.0 + count) / (10.0 + count))
            ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
        metrics = {
            "loss": sums.objective / words,
            "perplexity": jnp.exp(-sums.log_likelihood / words),
            "gradient_norm": optax.global_norm(gradients),
            "words": sums.words,
            "captions": captions,
        }
        return TrainState(state.step + 1, params, optimizer, ema), metrics

    return step
