"""Teacher forcing: cross-entropy, or a loss per word of your own, and its training step."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from imgcap_jax.data.sources import CaptionSource
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError, check_range
from imgcap_jax.models.decoders.contract import steps_of
from imgcap_jax.models.layers import row_keys
from imgcap_jax.models.members import has_effect
from imgcap_jax.models.model import CaptionModel, Frozen, Params
from imgcap_jax.special_tokens import PAD, UNK
from imgcap_jax.training.losses import Distillation, LossSums, RDrop, SmoothedCrossEntropy, WordLoss, caption_loss
from imgcap_jax.training.objective import StepSetup
from imgcap_jax.training.parallel import Step
from imgcap_jax.training.step import keys_of_rows, train_step


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of the true words, each given the words before it."""

    progress: ClassVar[Mapping[str, str]] = {"loss": ".3f", "perplexity": ".2f"}

    label_smoothing: float = 0.1
    """The share of the target's mass that is spread evenly over all words, unk and eos (Szegedy et al. 2016)."""
    attention_penalty: float = 0.0
    """lambda of the doubly stochastic penalty of Xu et al. 2015, 1.0 in the paper; for decoders with attention."""
    sampling: float = 0.0
    """Scheduled sampling (Bengio et al. 2015): the final probability that an input word is replaced by one drawn from
    the model; 0: off."""
    sampling_start_epochs: float = 0.0
    """Epoch at which this probability starts to rise from 0."""
    sampling_ramp_epochs: float = 5.0
    """Epochs of its linear rise."""
    word_dropout: float = 0.0
    """The probability that an input word is replaced by unk (Bowman et al. 2016, https://arxiv.org/abs/1511.06349)."""
    r_drop: float = 0.0
    """Weight of the divergence between two passes with different dropout (Liang et al. 2021,
    https://arxiv.org/abs/2106.14448; 1 to 5 there). A step then takes twice as long; 0: one pass."""
    teachers: tuple[str, ...] = ()
    """The folders of runs with the same encoder and vocabulary, from whose mean distribution the model learns as well
    (word-level distillation, Kim and Rush 2016, https://arxiv.org/abs/1606.07947)."""
    distillation: float = 0.5
    """The share of the teachers' distribution in the loss."""
    word_loss: WordLoss | None = None
    """Your own loss per word, in place of cross-entropy; label_smoothing must then be 0."""

    def __post_init__(self) -> None:
        if not self.sampling and (self.sampling_start_epochs, self.sampling_ramp_epochs) != (0.0, 5.0):
            raise UserError(
                "objective.sampling is 0, so objective.sampling_start_epochs and objective.sampling_ramp_epochs have "
                "no effect; give objective.sampling as well"
            )
        check_range("objective.sampling", self.sampling, at_least=0, at_most=1)
        if not self.teachers and self.distillation != 0.5:
            raise UserError("objective.distillation has no effect without objective.teachers; give them as well")
        if self.teachers and self.r_drop:
            raise UserError("objective.teachers and objective.r_drop do not go together; leave one of them out")
        check_range("objective.distillation", self.distillation, above=0, at_most=1)
        check_range("objective.word_dropout", self.word_dropout, at_least=0, below=1)
        if self.sampling and (self.word_dropout or self.r_drop):
            raise UserError("objective.sampling goes with neither word_dropout nor r_drop; leave one out")
        for name in ("sampling_start_epochs", "sampling_ramp_epochs", "attention_penalty", "r_drop"):
            check_range(f"objective.{name}", getattr(self, name), at_least=0)
        check_range("objective.label_smoothing", self.label_smoothing, at_least=0, below=1)
        if self.word_loss is not None and not callable(self.word_loss):
            raise UserError(f"objective.word_loss is {self.word_loss!r}; it must have __call__(logits, targets)")
        if self.word_loss is not None and self.label_smoothing:
            raise UserError("objective.label_smoothing belongs to cross-entropy; set it to 0 with a word_loss")

    @property
    def title(self) -> str:
        """See ``Objective``."""
        loss = "cross-entropy" if self.word_loss is None else repr(self.word_loss)
        more = [(self.sampling, "scheduled sampling"), (self.word_dropout, "word dropout"), (self.r_drop, "R-Drop")]
        more.append((len(self.teachers), f"distillation from {len(self.teachers)}"))
        return ", ".join([loss, *(name for used, name in more if used)])

    def references(self, sources: Sequence[CaptionSource], vocabulary: Vocabulary) -> None:
        """None: batches contain the captions."""

    def check(self, *, dataset: str, images: int, initialised: bool) -> None:
        """Every run can be trained."""

    def constants(self, setup: StepSetup) -> "Frozen | WithTeachers":
        """See ``Objective``."""
        if not setup.teachers:
            return setup.frozen
        return WithTeachers(setup.frozen, tuple((teacher.params, teacher.frozen) for teacher in setup.teachers))

    def make_step(self, setup: StepSetup) -> Step:
        """See ``Objective``."""
        return cross_entropy_step(
            setup.graph,
            self,
            setup.transformation,
            key=setup.key,
            steps_per_epoch=setup.steps_per_epoch,
            accumulate=setup.accumulate,
            ema_decay=setup.ema_decay,
            teachers=[teacher.graph for teacher in setup.teachers],
        )

    def sampling_share(self, step: Array, steps_per_epoch: int) -> Array | None:
        """The probability of a drawn word at a step; None if it is always 0."""
        if not self.sampling:
            return None
        risen = step / steps_per_epoch - self.sampling_start_epochs
        ramp = self.sampling_ramp_epochs
        return self.sampling * (jnp.clip(risen / ramp, 0.0, 1.0) if ramp else jnp.where(risen >= 0, 1.0, 0.0))


class WithTeachers(NamedTuple):
    """What a step with teachers reads and does not change: the frozen part of the model, the arrays of each teacher."""

    frozen: Frozen
    teachers: tuple[tuple[Params, Frozen], ...]


class _Sums(NamedTuple):
    words: LossSums
    captions: Array


def longest_first(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch with the rows of the longest captions first, which is the cheapest order for ``scan_steps``."""
    order = jnp.argsort(-steps_of(batch["tokens"]), stable=True)
    return {name: leaf[order] for name, leaf in batch.items()}


# What a row's key is folded with, beside the numbers of models/model.py.
_WORD_KEYS, _SECOND_KEYS = 16, 17


def _with_unknown(tokens: Array, share: float | Array, keys: Array) -> Array:
    """Tokens [B,M,T] of which this share of the words is unk; bos, eos and pad remain."""
    drawn = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(row_keys(keys, _WORD_KEYS))
    return jnp.where((drawn < share) & (tokens > UNK), UNK, tokens)


def _taught(
    model: CaptionModel, hidden: Array, teachers: Sequence[CaptionModel], batch: Mapping[str, Array]
) -> tuple[Callable[[Array], Array], Array]:
    """What ``Distillation`` compares.

    Args:
        model: the student.
        hidden: [B,M,T,F], its outputs.
        teachers: they read the batch without dropout.
        batch: the batch.

    Returns:
        A function of the outputs of all of them, [n,F'] -> [n,2,V]: the logits of the student, and the log of the mean
        probability of the teachers; and these outputs [B,M,T,F'].
    """
    outputs = [hidden, *(jax.lax.stop_gradient(teacher.teacher_forced(batch).hidden) for teacher in teachers)]
    ends = list(itertools.accumulate(output.shape[-1] for output in outputs))

    def score(every: Array) -> Array:
        own, *others = (every[:, end - output.shape[-1] : end] for end, output in zip(ends, outputs, strict=True))
        log_probs = [jax.nn.log_softmax(one.score_words(part)) for one, part in zip(teachers, others, strict=True)]
        mean = jax.nn.logsumexp(jnp.stack(log_probs), axis=0)
        return jnp.stack([model.score_words(own), mean.astype(jnp.float32)], axis=1)

    return score, jnp.concatenate([output.astype(hidden.dtype) for output in outputs], axis=-1)


def cross_entropy_step(
    graph: nnx.GraphDef[CaptionModel],
    objective: CrossEntropy,
    transformation: optax.GradientTransformation,
    *,
    key: Array,
    steps_per_epoch: int = 1,
    accumulate: int = 1,
    ema_decay: float | optax.Schedule = 0.0,
    teachers: Sequence[nnx.GraphDef[CaptionModel]] = (),
) -> Step:
    """Makes ``step(state, constants, batch) -> (state, metrics)`` for ``DataParallel.compile``; see ``train_step``.

    The batch contains "tokens" [B,M,T], "weight" [B], "row" [B] (the index in the global batch, which determines the
    row's dropout) and "image" or "regions". The gradient is that of the mean over all words of the global batch. The
    constants are the frozen part of the model, or ``WithTeachers`` if the graphs of ``teachers`` are given.

    Metrics, all float32 [] and the same on every device: "loss" (the objective per word), "perplexity" (of the true
    words), "gradient_norm", "words", and "captions" (without the rows of pad of images with fewer than M captions).
    """
    word_loss = objective.word_loss or SmoothedCrossEntropy(objective.label_smoothing)
    if has_effect(objective.r_drop):
        word_loss = RDrop(objective.r_drop, word_loss)
    if teachers:
        word_loss = Distillation(objective.distillation, word_loss)

    def loss(
        params: Params, constants: Frozen | WithTeachers, batch: Mapping[str, Array], step: Array
    ) -> tuple[Array, _Sums]:
        frozen, arrays = constants if isinstance(constants, WithTeachers) else (constants, ())
        model = nnx.merge(graph, params, frozen)
        if not model.decoder.reads_at_once:
            batch = longest_first(batch)
        keys = keys_of_rows(key, step, batch["row"])
        read = batch
        if has_effect(objective.word_dropout):
            read = {**batch, "tokens": _with_unknown(batch["tokens"], objective.word_dropout, keys)}
        outputs = model.teacher_forced(read, keys, objective.sampling_share(step, steps_per_epoch))
        score: Callable[[Array], Array] = model.score_words
        hidden = outputs.hidden
        if has_effect(objective.r_drop):
            second = model.teacher_forced(read, row_keys(keys, _SECOND_KEYS)).hidden
            hidden, size = jnp.concatenate([hidden, second], axis=-1), second.shape[-1]

            def score_both(both: Array) -> Array:
                return jnp.stack([model.score_words(both[:, :size]), model.score_words(both[:, size:])], axis=1)

            score = score_both
        if teachers:
            models = [nnx.merge(of, *arrays) for of, arrays in zip(teachers, arrays, strict=True)]
            score, hidden = _taught(model, hidden, models, batch)
        sums = caption_loss(
            score,
            hidden,
            batch["tokens"],
            batch["weight"],
            word_loss=word_loss,
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
