"""Teacher-forced cross-entropy: its settings and its training step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.models.model import CaptionModel, Frozen, Params
from imgcap_jax.special_tokens import PAD
from imgcap_jax.training.losses import LossSums, caption_loss
from imgcap_jax.training.parallel import Step
from imgcap_jax.training.step import keys_of_rows, train_step


@dataclass(frozen=True)
class CrossEntropy:
    """What is minimised."""

    progress: ClassVar[Mapping[str, str]] = {"loss": ".3f", "perplexity": ".2f"}
    """The metrics of the progress line, and their formats."""

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

    @property
    def title(self) -> str:
        """What is optimised, in a few words."""
        return "cross-entropy" + (", scheduled sampling" if self.sampling else "")

    def sampling_share(self, step: Array, steps_per_epoch: int) -> Array | None:
        """The share of words that are drawn at a step; None where none ever is."""
        if not self.sampling:
            return None
        risen = step / steps_per_epoch - self.sampling_start_epochs
        ramp = self.sampling_ramp_epochs
        return self.sampling * (jnp.clip(risen / ramp, 0.0, 1.0) if ramp else jnp.where(risen >= 0, 1.0, 0.0))


class _Sums(NamedTuple):
    words: LossSums
    captions: Array


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
    """Makes ``step(state, frozen, batch) -> (state, metrics)`` for ``DataParallel.compile``; see ``train_step``.

    The batch part holds "tokens" [B,M,T], "weight" [B], "row" [B] (the index in the global batch, from which
    the row's dropout keys come) and "image" or "regions". Gradients are of the mean over all words of the batch.

    Metrics, all [] float32 and the same on every device: "loss" (the objective a word), "perplexity" (of the
    true words), "gradient_norm", "words", "captions" (rows of pad, of images with fewer than M, not counted).
    """

    def loss(params: Params, frozen: Frozen, batch: Mapping[str, Array], step: Array) -> tuple[Array, _Sums]:
        model = nnx.merge(graph, params, frozen)
        keys = keys_of_rows(key, step, batch["row"])
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
        present = (batch["tokens"][:, :, 0] != PAD) * batch["weight"][:, None]
        return sums.objective, _Sums(sums, present.sum())

    def measure(sums: _Sums) -> tuple[Array, dict[str, Array]]:
        words = jnp.maximum(sums.words.words, 1.0)
        return words, {
            "loss": sums.words.objective / words,
            "perplexity": jnp.exp(-sums.words.log_likelihood / words),
            "words": sums.words.words,
            "captions": sums.captions,
        }

    return train_step(loss, measure, transformation, accumulate=accumulate, ema_decay=ema_decay)
