"""Self-critical sequence training (Rennie et al. 2017, https://arxiv.org/abs/1612.00563): its settings and its step.

Captions are sampled, scored and learned from in one compiled step that never leaves the device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from imgcap_jax.decoding.greedy import greedy
from imgcap_jax.decoding.sampling import sample
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.bleu_device import bleu_4
from imgcap_jax.metrics.cider import SIGMA
from imgcap_jax.metrics.cider_device import DocumentFrequencies, References, cider_d, prepare_references
from imgcap_jax.models.layers import row_keys
from imgcap_jax.models.model import CaptionModel, Frozen, Params
from imgcap_jax.special_tokens import BOS, EOS, PAD
from imgcap_jax.training.losses import packed_cross_entropy
from imgcap_jax.training.parallel import Step
from imgcap_jax.training.step import keys_of_rows, train_step


@dataclass(frozen=True)
class SelfCritical:
    """Expected reward is maximised by REINFORCE with a baseline, starting from a run trained by cross-entropy.

    Checkpoints are selected by captions of ``training.validation_beam`` beams: give as many as captions will be decoded
    with. The policy may say unk, which matches no reference, so that it learns not to.
    """

    progress: ClassVar[Mapping[str, str]] = {"reward": ".3f", "baseline": ".3f", "length": ".1f"}
    """The metrics of the progress line, and their formats."""

    samples: int = 5
    """Captions drawn an image (M), of at most decoding.max_words."""
    baseline: Literal["mean", "greedy"] = "mean"
    """What a sample's reward is compared with: the mean of the image's other samples (Luo 2020,
    https://arxiv.org/abs/2003.09971), or the greedy caption's (Rennie et al. 2017)."""
    cider: float = 1.0
    """Weight of CIDEr-D (0 to 10, its idf from the training captions) in the reward."""
    bleu: float = 0.0
    """Weight of the caption's BLEU-4 (0 to 1)."""
    reward_eos: bool = True
    """The end of a caption counts as a word in candidates, references and document frequencies: SacreEOS's STANDARD
    (Hu et al. 2023, https://arxiv.org/abs/2305.12254, who show captions that break off without it); else NO<EOS>."""
    temperature: float = 1.0
    """Of the policy that is sampled and trained: logits are divided by it. Where the start was trained with label
    smoothing, samples at 1 are mostly noise; 0.6 did better."""
    entropy: float = 0.0
    """Bonus for each nat of a caption's surprisal, -log p, added to its reward: the entropy of the policy."""
    kl: float = 0.0
    """Penalty for each nat by which a caption is likelier than in the run training started from, under the same
    dropout: the KL divergence from it (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593)."""

    def __post_init__(self) -> None:
        if self.baseline not in ("mean", "greedy"):
            raise UserError(f"objective.baseline is {self.baseline!r}; give mean or greedy")
        if self.samples < 1 or not 0.01 <= self.temperature < math.inf:
            raise UserError("objective: samples is at least 1, temperature at least 0.01")
        weights = (self.cider, self.bleu, self.entropy, self.kl)
        if not all(0 <= weight < math.inf for weight in weights) or not self.cider + self.bleu:
            raise UserError(
                "objective: cider, bleu, entropy and kl are finite and not below 0, and cider or bleu is above 0"
            )
        if self.samples == 1 and (self.baseline == "mean" or self.entropy or self.kl):
            raise UserError("objective.samples is 1; a mean of others, entropy and kl need 2 or more")

    @property
    def title(self) -> str:
        """What is optimised: as SacreEOS 1.0.0 writes it (rewards with their weights where they are not 1 and 0), and
        what it has no words for."""
        rewards = [(self.cider, f"Cider-D[n4,s{SIGMA}]"), (self.bleu, "BLEU[n4]")]
        named = ",".join(name if weight == 1 else f"{weight:g}*{name}" for weight, name in rewards if weight)
        mode = "STANDARD" if self.reward_eos else "NO<EOS>"
        base = "average" if self.baseline == "mean" else "greedy"
        others = [(self.temperature, 1.0, "temperature"), (self.entropy, 0.0, "entropy"), (self.kl, 0.0, "kl")]
        more = "".join(f", {name} {value:g}" for value, default, name in others if value != default)
        return f"self-critical, {mode}_wInit+{named}+{base}[nspi{self.samples}]+1.0.0{more}"


class Constants(NamedTuple):
    """What a step reads and never changes: the model's frozen part, document frequencies, and, for the KL penalty, the
    parameters at the start."""

    frozen: Frozen
    frequencies: DocumentFrequencies
    start: Params | None


class _Sums(NamedTuple):
    """Over all samples [B,M]; see the metrics of ``self_critical_step``."""

    objective: Array
    captions: Array
    reward: Array
    squared_reward: Array
    baseline: Array
    words: Array
    ended: Array
    bad_endings: Array
    surprisal: Array
    divergence: Array


def self_critical_step(
    graph: nnx.GraphDef[CaptionModel],
    objective: SelfCritical,
    transformation: optax.GradientTransformation,
    *,
    key: Array,
    max_words: int,
    bad_endings: Sequence[int],
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Step:
    """Makes ``step(state, constants, batch) -> (state, metrics)`` for ``DataParallel.compile``; see ``train_step``.

    The batch part holds "references" int32 [B,R,S] and "reference_count" [B], of which document frequencies were made
    as well, "weight" [B], "row" [B] (each image's index in the global batch, on which its samples and dropout
    depend) and "image" or "regions". Constants are ``Constants``.

    Of M sampled captions y of an image, the gradient of -sum_m A(y_m) log p(y_m) is taken, divided by the captions of
    the whole batch; A is the reward less the baseline and p the policy that was sampled, dropout included. That is an
    unbiased estimate of the gradient of the mean reward. Entropy and KL divergence are of whole captions and enter the
    reward, compared with the other samples', so that their gradients are unbiased too.

    Args:
        graph: of the model.
        objective: the settings.
        transformation: the optimizer.
        key: of samples and dropout.
        max_words: T, the longest caption with its eos; one that reaches it is cut and scored as it is.
        bad_endings: ids of words on which no caption ends well, to be counted.
        accumulate: microbatches.
        ema_decay: see ``train_step``.

    Metrics, all [] float32 and the same on every device, means over the sampled captions: "loss" (what is
    differentiated), "reward", "reward_deviation" (standard deviation), "baseline", "length" (words without eos),
    "ended" and "bad_endings" (shares), "surprisal" (-log p in nats), "kl" (in nats; with a KL penalty only),
    "gradient_norm"; and "captions", their number.
    """

    def explore(
        params: Params, constants: Constants, batch: Mapping[str, Array], regions: Array, keys: Array
    ) -> tuple[Array, Array, _Sums]:
        """Tokens [B,M,T] of the samples, their advantages [B,M] and sums over them."""
        model = nnx.merge(graph, params, constants.frozen)
        mask, weight = batch.get("region_mask"), batch["weight"][:, None]
        references = prepare_references(batch["references"], batch["reference_count"], constants.frequencies)

        def begun(count: int, keys: Array | None) -> tuple[Any, Any]:
            """The decoder's step and first carry; with keys, under the dropout that ``teacher_forced`` then draws."""
            model.decoder.make_room(max_words)
            memory, first = model.decoder.start(regions, count, region_mask=mask, keys=row_keys(keys, 0))
            unroll_keys = row_keys(keys, 1)

            def feed(carry: Any, tokens: Array) -> tuple[Any, Array]:
                inner, t = carry
                step_keys = model.decoder.step_keys(unroll_keys, t[0, 0])
                inner, output = model.decoder.step(inner, tokens, memory, keys=step_keys)
                return (inner, t + 1), model.decoder.logits(output)

            return feed, (first, jnp.zeros((regions.shape[0], count), jnp.int32))

        draws = row_keys(keys, 2)
        assert draws is not None
        feed, carry = begun(objective.samples, keys)
        drawn = sample(feed, carry, draws, max_steps=max_words, temperature=objective.temperature)
        reward = rewards(objective, drawn.tokens, references, constants.frequencies)
        if objective.baseline == "greedy":
            best = greedy(*begun(1, None), max_steps=max_words)
            baseline = jnp.broadcast_to(
                rewards(objective, best.tokens, references, constants.frequencies), reward.shape
            )
            advantage = reward - baseline
        else:
            advantage = _above_others(reward)
            baseline = reward - advantage
        divergence = jnp.zeros_like(reward)
        if objective.kl:
            start = nnx.merge(graph, constants.start, constants.frozen)
            divergence = drawn.score - _log_probs(start, batch, drawn.tokens, keys, objective.temperature)
        if objective.kl or objective.entropy:
            advantage -= _above_others(objective.kl * divergence + objective.entropy * drawn.score)
        words = ((drawn.tokens != PAD) & (drawn.tokens != EOS)).sum(-1)
        last = jnp.take_along_axis(drawn.tokens, jnp.maximum(words - 1, 0)[..., None], axis=-1)[..., 0]
        measured = {
            "captions": jnp.ones_like(reward),
            "reward": reward,
            "squared_reward": reward**2,
            "baseline": baseline,
            "words": words,
            "ended": (drawn.tokens == EOS).any(-1),
            "bad_endings": jnp.isin(last, jnp.array(bad_endings, jnp.int32)),
            "surprisal": -drawn.score,
            "divergence": divergence,
        }
        sums = {name: (value * weight).sum() for name, value in measured.items()}
        return drawn.tokens, advantage * weight, _Sums(objective=jnp.zeros(()), **sums)

    def loss(params: Params, constants: Constants, batch: Mapping[str, Array], step: Array) -> tuple[Array, _Sums]:
        model = nnx.merge(graph, params, constants.frozen)
        keys = keys_of_rows(key, step, batch["row"])
        regions = model.regions(batch)
        tokens, advantage, sums = explore(*lax.stop_gradient((params, constants, batch, regions)), keys)
        outputs = model.teacher_forced({**batch, "regions": regions, "tokens": _after_bos(tokens)}, keys)
        counted = jnp.where(tokens != PAD, advantage[..., None], 0.0)  # [B,M,T]
        _, total = packed_cross_entropy(
            lambda hidden: _policy(model.score_words(hidden), objective.temperature),
            outputs.hidden,
            tokens,
            counted,
            label_smoothing=0.0,
        )
        return total, sums._replace(objective=lax.stop_gradient(total))

    def measure(sums: _Sums) -> tuple[Array, dict[str, Array]]:
        captions = jnp.maximum(sums.captions, 1.0)
        mean = _Sums(*(value / captions for value in sums))
        metrics = {
            "loss": mean.objective,
            "reward": mean.reward,
            "reward_deviation": jnp.sqrt(jnp.maximum(mean.squared_reward - mean.reward**2, 0.0)),
            "baseline": mean.baseline,
            "length": mean.words,
            "ended": mean.ended,
            "bad_endings": mean.bad_endings,
            "surprisal": mean.surprisal,
            "captions": sums.captions,
        }
        if objective.kl:
            metrics["kl"] = mean.divergence
        return captions, metrics

    return train_step(loss, measure, transformation, accumulate=accumulate, ema_decay=ema_decay)


def rewards(objective: SelfCritical, tokens: Array, references: References, frequencies: DocumentFrequencies) -> Array:
    """The weighted sum of CIDEr-D and BLEU-4 of captions int32 [B,M,T] (words, eos, pad): float32 [B,M].

    References and frequencies have to hold eos exactly where ``objective.reward_eos`` counts it.
    """
    counted = tokens if objective.reward_eos else jnp.where(tokens == EOS, PAD, tokens)
    reward = jnp.zeros(tokens.shape[:2])
    if objective.cider:
        reward += objective.cider * cider_d(counted, references, frequencies)
    if objective.bleu:
        reward += objective.bleu * bleu_4(counted, references.tokens, references.per_image)
    return reward


def _above_others(values: Array) -> Array:
    """By how much each value [B,M] is above the mean of the image's others; exactly 0 where all are equal."""
    return (values[:, :, None] - values[:, None, :]).sum(-1) / (values.shape[1] - 1)


def _after_bos(tokens: Array) -> Array:
    """[B,M,T] -> [B,M,T+1]."""
    return jnp.concatenate([jnp.full_like(tokens[..., :1], BOS), tokens], axis=-1)


def _policy(logits: Array, temperature: float) -> Array:
    """The logits [...,V] of what ``sample`` draws from: pad and bos are never drawn."""
    words = jnp.arange(logits.shape[-1])
    return jnp.where((words == PAD) | (words == BOS), -1e9, logits.astype(jnp.float32) / temperature)


def _log_probs(
    model: CaptionModel, batch: Mapping[str, Array], tokens: Array, keys: Array, temperature: float
) -> Array:
    """Log-probabilities [B,M] that a model gives to captions [B,M,T], under the dropout of ``keys`` [B]."""
    hidden = model.teacher_forced({**batch, "tokens": _after_bos(tokens)}, keys).hidden  # [B,M,T,F]

    def score(step: tuple[Array, Array]) -> Array:
        hidden, token = step  # a place of all captions at a time, for the logits of all would take gigabytes
        log_probs = jax.nn.log_softmax(_policy(model.score_words(hidden), temperature))  # [B,M,V]
        return jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]

    scores = lax.map(score, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(tokens, 2, 0)))  # [T,B,M]
    return jnp.where(jnp.moveaxis(tokens, 2, 0) != PAD, scores, 0.0).sum(0)
