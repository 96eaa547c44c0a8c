"""Self-critical sequence training (Rennie et al. 2017, https://arxiv.org/abs/1612.00563).

One compiled step samples captions, scores them and computes the policy gradient. It never leaves the device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.sources import CaptionSource
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.decoded import StepFn
from imgcap_jax.decoding.greedy import greedy
from imgcap_jax.decoding.sampling import sample, uniform_numbers
from imgcap_jax.errors import UserError, check_range
from imgcap_jax.metrics.bleu_device import bleu_4
from imgcap_jax.metrics.cider import SIGMA
from imgcap_jax.metrics.cider_device import (
    DeviceReferences,
    DocumentFrequencies,
    cider_d,
    document_frequencies,
    prepare_references,
    reference_norms,
    with_norms,
)
from imgcap_jax.metrics.degeneration import BAD_ENDINGS, CONJUNCTIONS, FUNCTION_WORDS
from imgcap_jax.metrics.degeneration_device import FunctionWords, repeated_words
from imgcap_jax.models.layers import draw_words, row_keys
from imgcap_jax.models.members import has_effect
from imgcap_jax.models.model import DRAW_KEYS, START_KEYS, UNROLL_KEYS, CaptionModel, Frozen, Params
from imgcap_jax.models.neighbours import NEIGHBOURS, Neighbours
from imgcap_jax.special_tokens import BOS, EOS, PAD
from imgcap_jax.training.checkpoints import Checkpoints
from imgcap_jax.training.losses import CROSS_ENTROPY, packed_word_loss
from imgcap_jax.training.neighbour_captions import NeighbourCaptions, captions_of_neighbours
from imgcap_jax.training.objective import StepSetup
from imgcap_jax.training.parallel import Step
from imgcap_jax.training.step import keys_of_rows, train_step


class Reward(Protocol):
    """A reward per caption, computed on the device: a pure function that ``jax.jit`` can trace.

    ``cider_d`` and ``bleu_4`` are rewards. As a field of an experiment it is a frozen dataclass, whose fields become
    the options ``--objective.reward.FIELD``. No gradient flows through a reward.
    """

    def __call__(self, tokens: Array, references: DeviceReferences, frequencies: DocumentFrequencies, /) -> Array:
        """Rewards of captions.

        Args:
            tokens: int32 [B,M,T]: words, then eos if ``objective.reward_eos`` is set (a caption that was cut has none),
                then pad.
            references: the references of the same images; ``references.tokens`` int32 [B,R,S] has the same form.
            frequencies: the document frequencies of the training captions.

        Returns:
            Rewards float32 [B,M].
        """
        ...


FREQUENCIES = "document_frequencies.npz"  # file in a run's folder


@dataclass(frozen=True)
class SelfCritical:
    """REINFORCE with a baseline: maximises the expected reward, starting from a run trained with cross-entropy.

    Checkpoints are selected by the CIDEr-D of captions decoded with ``training.validation_beam`` beams. Use the beam
    that captions will be decoded with. The policy can sample unk. It matches no reference, so the policy learns to
    avoid it.
    """

    progress: ClassVar[Mapping[str, str]] = {"reward": ".3f", "baseline": ".3f", "length": ".1f"}

    samples: int = 5
    """Captions sampled per image (M), each of at most decoding.max_words words."""
    baseline: Literal["mean", "greedy"] = "mean"
    """The value that is subtracted from the reward of a sample. mean: the mean reward of the image's other samples (Luo
    2020, https://arxiv.org/abs/2003.09971). greedy: the reward of the greedy caption (Rennie et al. 2017)."""
    cider: float = 1.0
    """Weight of CIDEr-D (0 to 10, with document frequencies of the training captions) in the reward."""
    bleu: float = 0.0
    """Weight of BLEU-4 (0 to 1) in the reward."""
    reward: Reward | None = None
    """A custom reward that is added to these, with weight 1."""
    repetition: float = 0.0
    """Weight of the penalty for repeated words, such as the second "car" of "a car in a car": subtracted from the
    reward for each of them."""
    neighbours: int = 0
    """The captions of this many nearest training photos (``models/neighbours.py``) are further references. The reward
    is then smoother, and the policy learns the captions of single photos by heart more slowly."""
    neighbours_weight: float = 0.5
    """The share of the reward that comes from these references."""
    reward_eos: bool = True
    """Whether the end of a caption counts as a word in candidates, references and document frequencies. Without it,
    captions break off (Hu et al. 2023, https://arxiv.org/abs/2305.12254). SacreEOS calls True STANDARD and False
    NO<EOS>."""
    temperature: float = 1.0
    """The logits of the policy are divided by it, for sampling and for the loss. If the initial run was trained with
    label smoothing, samples at temperature 1 are mostly noise; 0.6 gave better scores."""
    entropy: float = 0.0
    """Weight of the entropy bonus: added per nat of a caption's surprisal, -log p."""
    kl: float = 0.0
    """Weight of the KL penalty: subtracted per nat by which a caption is more likely than under the initial parameters
    with the same dropout (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593)."""

    def __post_init__(self) -> None:
        if self.baseline not in ("mean", "greedy"):
            raise UserError(f"objective.baseline is {self.baseline!r}; it must be mean or greedy")
        if self.samples < 1:
            raise UserError(f"objective.samples is {self.samples}; it must be at least 1")
        if not 0.01 <= self.temperature < math.inf:
            raise UserError(f"objective.temperature is {self.temperature}; it must be at least 0.01")
        for name in ("cider", "bleu", "repetition", "entropy", "kl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must be finite and not negative")
        check_range("objective.neighbours", self.neighbours, at_least=0)
        check_range("objective.neighbours_weight", self.neighbours_weight, above=0, at_most=1)
        if not self.neighbours and self.neighbours_weight != SelfCritical.neighbours_weight:
            raise UserError("objective.neighbours_weight has no effect without objective.neighbours; give both")
        if not self.cider + self.bleu and self.reward is None:
            raise UserError("objective: cider and bleu are both 0; set one of them, or a reward of your own")
        if self.samples == 1 and (self.baseline == "mean" or self.entropy or self.kl):
            raise UserError("objective.samples is 1; baseline mean, entropy and kl need at least 2")

    @property
    def title(self) -> str:
        """What is optimised, as a SacreEOS 1.0.0 signature.

        Weights other than 0 and 1, and settings that SacreEOS has no notation for, are added.
        """
        rewards = [(self.cider, f"Cider-D[n4,s{SIGMA}]"), (self.bleu, "BLEU[n4]")]
        names = [name if weight == 1 else f"{weight:g}*{name}" for weight, name in rewards if weight]
        named = ",".join(names + ([repr(self.reward)] if self.reward is not None else []))
        mode = "STANDARD" if self.reward_eos else "NO<EOS>"
        base = "average" if self.baseline == "mean" else "greedy"
        others = [
            (self.temperature, 1.0, "temperature"),
            (self.repetition, 0.0, "repetition"),
            (self.entropy, 0.0, "entropy"),
            (self.kl, 0.0, "kl"),
            (self.neighbours, 0, "neighbours"),
            (self.neighbours_weight, 0.5, "neighbours_weight"),
        ]
        more = "".join(f", {name} {value:g}" for value, default, name in others if value != default)
        return f"self-critical, {mode}_wInit+{named}+{base}[nspi{self.samples}]+1.0.0{more}"

    def references(self, sources: Sequence[CaptionSource], vocabulary: Vocabulary) -> CaptionTable:
        """All captions of each image, with eos if the reward counts it."""
        return CaptionTable.as_references(sources, vocabulary, eos=self.reward_eos)

    def check(self, *, dataset: str, images: int, initialised: bool) -> None:
        """See ``Objective``."""
        if not initialised:
            raise UserError(
                "self-critical training refines a model that already writes captions: train one with cross-entropy, "
                "then give --init-from RUN"
            )
        if images < 2:
            raise UserError(
                f"{dataset} has one training image, but document frequencies need at least 2; use a larger dataset"
            )

    def function_words(self, vocabulary: Vocabulary) -> FunctionWords:
        """The words that cannot be repeated words.

        Raises:
            UserError: there is a penalty for repeated words, but the vocabulary has no function words.
        """
        function_words = FunctionWords(vocabulary.known_ids(FUNCTION_WORDS), vocabulary.known_ids(CONJUNCTIONS))
        if self.repetition and not function_words.ids:
            raise UserError(
                "objective.repetition has no effect: the vocabulary has none of the English function words that it "
                "leaves out; set it to 0"
            )
        return function_words

    def constants(self, setup: StepSetup) -> "Constants":
        """See ``Objective``. The run keeps the document frequencies and, for a KL penalty, the initial parameters."""
        assert setup.references is not None
        frequencies = _document_frequencies(setup, setup.references)
        if setup.references.norms is None:  # computed once, and not at every step
            setup.references.norms = reference_norms(setup.references.tokens, frequencies)
        start = _start(setup.params, setup.checkpoints) if self.kl else None
        others = None
        if self.neighbours:
            index = Neighbours.load(setup.folder / NEIGHBOURS)
            assert index is not None  # the session has made it
            others = captions_of_neighbours(index, self.neighbours, frequencies, eos=self.reward_eos)
        return Constants(setup.frozen, *setup.parallel.replicate((frequencies, start, others)))

    def make_step(self, setup: StepSetup) -> Step:
        """See ``Objective``."""
        function_words = self.function_words(setup.vocabulary)
        return self_critical_step(
            setup.graph,
            self,
            setup.transformation,
            key=setup.key,
            max_words=setup.max_words,
            bad_endings=setup.vocabulary.known_ids(BAD_ENDINGS),
            function_words=function_words,
            accumulate=setup.accumulate,
            ema_decay=setup.ema_decay,
        )

    def rewards(self, tokens: Array, references: DeviceReferences, frequencies: DocumentFrequencies) -> Array:
        """The weighted sum of all rewards, float32 [B,M], of captions int32 [B,M,T] (words, eos, pad).

        References and frequencies must contain eos if and only if ``reward_eos`` is set.
        """
        counted = tokens if self.reward_eos else jnp.where(tokens == EOS, PAD, tokens)
        terms: list[tuple[float, Reward | None]] = [(self.cider, cider_d), (self.bleu, bleu_4), (1.0, self.reward)]
        total = jnp.zeros(tokens.shape[:2])
        for weight, reward in terms:
            if has_effect(weight) and reward is not None:
                value = reward(counted, references, frequencies)
                if value.shape != total.shape:
                    raise UserError(
                        f"objective.reward returned {list(value.shape)} numbers for {list(total.shape)} captions; it "
                        f"must return one per caption"
                    )
                total += weight * value
        return total


def _document_frequencies(setup: StepSetup, references: CaptionTable) -> DocumentFrequencies:
    """Document frequencies of the training captions, counted once and kept in the run."""
    path = setup.folder / FREQUENCIES
    if setup.checkpoints.step is not None and path.is_file():
        return DocumentFrequencies.load(path, references.fingerprint)
    frequencies = document_frequencies(list(references.captions()), references.words)
    if jax.process_index() == 0:
        frequencies.save(path, references.fingerprint)
    return frequencies


def _start(params: Params, checkpoints: Checkpoints) -> Params:
    """A copy of the initial parameters, which a resumed run reads from its own checkpoints."""
    if checkpoints.step is not None:
        return checkpoints.restore_start(params)
    checkpoints.keep_start(params)
    return jax.tree.map(jnp.copy, params)  # training donates the buffers of the state


class Constants(NamedTuple):
    """What a step reads and does not change.

    frozen: the frozen part of the model. frequencies: the document frequencies of the training captions.
    start: the initial parameters, for a KL penalty; else None. neighbours: the captions of each training photo's
    neighbours, if they are further references; else None.
    """

    frozen: Frozen
    frequencies: DocumentFrequencies
    start: Params | None
    neighbours: NeighbourCaptions | None = None


class _Sums(NamedTuple):
    """Sums over all samples [B,M]; see the metrics of ``self_critical_step``."""

    objective: Array
    captions: Array
    reward: Array
    squared_reward: Array
    baseline: Array
    words: Array
    ended: Array
    bad_endings: Array
    repeated_words: Array
    surprisal: Array
    divergence: Array


class _Samples(NamedTuple):
    """Sampled captions int32 [B,M,T] and their log-probabilities [B,M]."""

    tokens: Array
    score: Array


def self_critical_step(
    graph: nnx.GraphDef[CaptionModel],
    objective: SelfCritical,
    transformation: optax.GradientTransformation,
    *,
    key: Array,
    max_words: int,
    bad_endings: Sequence[int],
    function_words: FunctionWords,
    rewards: Reward | None = None,
    accumulate: int = 1,
    ema_decay: float | optax.Schedule = 0.0,
) -> Step:
    """Makes ``step(state, constants, batch) -> (state, metrics)`` for ``DataParallel.compile``; see ``train_step``.

    The batch contains "references" int32 [B,R,S], "reference_count" [B], "weight" [B], "row" [B] and "image" or
    "regions". The document frequencies must come from references of the same form. The norms of the references are
    looked up if it contains "reference_norms" [B,R,4] (``cider_device.reference_norms``), and else computed. "row" is
    the index in the global batch; it determines the samples and the dropout of an image. The constants are
    ``Constants``.

    The step minimises -sum_m A(y_m) log p(y_m) over the M sampled captions y of each image, divided by the number of
    captions in the global batch. A is the reward minus the baseline. p is the sampled policy, dropout included. The
    gradient is an unbiased estimate of that of the mean reward. Entropy and KL divergence are those of whole captions.
    They are added to the reward and compared with those of the other samples, so that their gradients are unbiased too.

    Args:
        graph: the model without its arrays.
        objective: the settings.
        transformation: the optimizer.
        key: PRNG key of samples and dropout.
        max_words: T, the maximum length of a caption with its eos. A longer caption is cut and scored without eos.
        bad_endings: ids of the words that count as a bad ending.
        function_words: ids of the words that cannot be repeated words; see ``repeated_words``.
        rewards: the reward before the penalty for repeated words; None: ``objective.rewards``.
        accumulate: microbatches per step.
        ema_decay: see ``train_step``.

    Returns:
        The step. Its metrics are float32 [], the same on every device, and means over the sampled captions: "loss" (the
        objective), "reward", "reward_deviation" (standard deviation), "baseline", "length" (words without eos),
        "ended", "bad_endings" and "repeated_words" (shares of captions), "surprisal" (-log p in nats) and "kl" (in
        nats; only with a KL penalty). Further metrics are "gradient_norm" and "captions", the number of sampled
        captions.
    """
    rewards = rewards or objective.rewards

    def started(model: CaptionModel, batch: Mapping[str, Array], count: int, keys: Array | None) -> tuple[Any, Any]:
        """The decoder's memory and first carry, for this number of captions per image."""
        regions, mask = model.seen(batch, keys)
        return model.decoder.start(
            regions,
            count,
            steps=max_words,
            region_mask=mask,
            dropout_keys=row_keys(keys, START_KEYS),
        )

    def sampled_in_one_pass(model: CaptionModel, batch: Mapping[str, Array], keys: Array) -> tuple[Array, _Samples]:
        """Samples captions; what the decoder computed for them is differentiated. Returns hidden too: [B,M,T,F]."""
        outputs, tokens, log_probs = model.decoder.unroll_chosen(
            lambda logits, place: draw_words(_policy(logits, objective.temperature), place),
            *started(model, batch, objective.samples, keys),
            uniform_numbers(row_keys(keys, DRAW_KEYS), objective.samples, max_words),
            dropout_keys=row_keys(keys, UNROLL_KEYS),
        )
        return outputs.hidden, _Samples(tokens, log_probs.sum(-1))

    def sampled_then_read(model: CaptionModel, batch: Mapping[str, Array], keys: Array) -> tuple[Array, _Samples]:
        """The same for a decoder that reads all tokens at once faster than it steps."""
        feed, carry = begun(*lax.stop_gradient((model, batch)), objective.samples, keys)
        drawn = sample(feed, carry, row_keys(keys, DRAW_KEYS), max_steps=max_words, temperature=objective.temperature)
        hidden = model.teacher_forced({**batch, "tokens": _after_bos(drawn.tokens)}, keys).hidden
        return hidden, _Samples(drawn.tokens, drawn.score)

    def begun(model: CaptionModel, batch: Mapping[str, Array], count: int, keys: Array | None) -> tuple[StepFn, Any]:
        """The decoder's step and first carry. With keys, the dropout masks are those of ``teacher_forced``."""
        memory, first = started(model, batch, count, keys)
        unroll_keys = row_keys(keys, UNROLL_KEYS)

        def feed(carry: Any, tokens: Array) -> tuple[Any, Array]:
            inner, t = carry
            step_keys = model.decoder.step_keys(unroll_keys, t[0, 0])
            inner, output = model.decoder.step(inner, tokens, memory, dropout_keys=step_keys)
            return (inner, t + 1), model.decoder.logits(output)

        return feed, (first, jnp.zeros((len(batch["regions"]), count), jnp.int32))

    def judge(
        params: Params, constants: Constants, batch: Mapping[str, Array], samples: _Samples, keys: Array
    ) -> tuple[Array, _Sums]:
        """The advantages [B,M] of samples, and sums over them."""
        weight = batch["weight"][:, None]
        given, count = batch["references"], batch["reference_count"]
        norms = batch.get("reference_norms")
        if norms is None:
            references = prepare_references(given, count, constants.frequencies)
        else:
            references = with_norms(given, count, norms)

        others = None
        if constants.neighbours is not None:
            others = constants.neighbours.references(batch["number"])

        def rewarded(tokens: Array) -> tuple[Array, Array]:
            """The rewards of captions [B,M,T], and the number of repeated words of each, both [B,M]."""
            repeated = repeated_words(tokens, function_words)
            reward, share = rewards(tokens, references, constants.frequencies), objective.neighbours_weight
            if others is not None:
                reward = (1 - share) * reward + share * rewards(tokens, others, constants.frequencies)
            return reward - objective.repetition * repeated, repeated

        tokens, score = samples
        reward, repeated = rewarded(tokens)
        if objective.baseline == "greedy":
            model = nnx.merge(graph, params, constants.frozen)
            best = greedy(*begun(model, batch, 1, None), max_steps=max_words)
            baseline = jnp.broadcast_to(rewarded(best.tokens)[0], reward.shape)
            advantage = reward - baseline
        else:
            advantage = _above_others(reward)
            baseline = reward - advantage
        divergence = jnp.zeros_like(reward)
        if constants.start is not None:
            start = nnx.merge(graph, constants.start, constants.frozen)
            divergence = score - _log_probs(start, batch, tokens, keys, objective.temperature)
        if constants.start is not None or has_effect(objective.entropy):
            advantage -= _above_others(objective.kl * divergence + objective.entropy * score)
        words = ((tokens != PAD) & (tokens != EOS)).sum(-1)
        last = jnp.take_along_axis(tokens, jnp.maximum(words - 1, 0)[..., None], axis=-1)[..., 0]
        measured = {
            "captions": jnp.ones_like(reward),
            "reward": reward,
            "squared_reward": reward**2,
            "baseline": baseline,
            "words": words,
            "ended": (tokens == EOS).any(-1),
            "bad_endings": jnp.isin(last, jnp.array(bad_endings, jnp.int32)),
            "repeated_words": repeated > 0,
            "surprisal": -score,
            "divergence": divergence,
        }
        sums = {name: (value * weight).sum() for name, value in measured.items()}
        return advantage * weight, _Sums(objective=jnp.zeros(()), **sums)

    def loss(params: Params, constants: Constants, batch: Mapping[str, Array], step: Array) -> tuple[Array, _Sums]:
        model = nnx.merge(graph, params, constants.frozen)
        keys = keys_of_rows(key, step, batch["row"])
        batch = {**batch, "regions": model.regions(batch)}
        drawn = sampled_then_read if model.decoder.reads_at_once else sampled_in_one_pass
        hidden, samples = drawn(model, batch, keys)
        advantage, sums = judge(*lax.stop_gradient((params, constants, batch, samples)), keys)
        counted = jnp.where(samples.tokens != PAD, advantage[..., None], 0.0)  # [B,M,T]
        _, total = packed_word_loss(
            lambda hidden: _policy(model.score_words(hidden), objective.temperature),
            hidden,
            samples.tokens,
            counted,
            CROSS_ENTROPY,
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
            "repeated_words": mean.repeated_words,
            "surprisal": mean.surprisal,
            "captions": sums.captions,
        }
        if has_effect(objective.kl):
            metrics["kl"] = mean.divergence
        return captions, metrics

    return train_step(loss, measure, transformation, accumulate=accumulate, ema_decay=ema_decay)


def _above_others(values: Array) -> Array:
    """Each value [B,M] minus the mean of the image's other values. Exactly 0 if all values are equal."""
    return (values[:, :, None] - values[:, None, :]).sum(-1) / (values.shape[1] - 1)


def _after_bos(tokens: Array) -> Array:
    """Prepends bos to captions: [B,M,T] -> [B,M,T+1]."""
    return jnp.concatenate([jnp.full_like(tokens[..., :1], BOS), tokens], axis=-1)


def _policy(logits: Array, temperature: float) -> Array:
    """The logits [...,V] of the distribution that ``sample`` draws from: pad and bos are never drawn."""
    words = jnp.arange(logits.shape[-1])
    return jnp.where((words == PAD) | (words == BOS), -1e9, logits.astype(jnp.float32) / temperature)


def _log_probs(
    model: CaptionModel, batch: Mapping[str, Array], tokens: Array, keys: Array, temperature: float
) -> Array:
    """Log-probabilities [B,M] of captions [B,M,T] under a model with the dropout of ``keys`` [B]."""
    hidden = model.teacher_forced({**batch, "tokens": _after_bos(tokens)}, keys).hidden  # [B,M,T,F]

    def score(step: tuple[Array, Array]) -> Array:
        hidden, token = step  # one position at a time, because the logits of all positions take gigabytes
        log_probs = jax.nn.log_softmax(_policy(model.score_words(hidden), temperature))  # [B,M,V]
        return jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]

    scores = lax.map(score, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(tokens, 2, 0)))  # [T,B,M]
    return jnp.where(jnp.moveaxis(tokens, 2, 0) != PAD, scores, 0.0).sum(0)
