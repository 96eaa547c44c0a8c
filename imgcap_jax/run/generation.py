"""Captions from a model, or from several: the jitted path from a batch to decoded words."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.beam import diverse_beam_search
from imgcap_jax.decoding.constrained import constrained_beam_search, constrained_rows
from imgcap_jax.decoding.decoded import Decoded
from imgcap_jax.decoding.greedy import greedy
from imgcap_jax.decoding.rules import (
    ForbidBadEnding,
    ForcedPrefix,
    MinLength,
    NoRepeatNgram,
    Rule,
    SuppressUnk,
    TopK,
    TopP,
)
from imgcap_jax.decoding.sampling import sample
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.metrics.degeneration import BAD_ENDINGS
from imgcap_jax.models.model import CaptionModel, Frozen, Params
from imgcap_jax.special_tokens import BOS, UNK
from imgcap_jax.text import tokenize


def check_decoding(decoding: Decoding, vocabulary: Vocabulary, decoder: Any) -> None:
    """Raises UserError where captions can't be searched for so: before hours of training, not after.

    ``decoder`` are the settings of one.
    """
    _rules(decoding, vocabulary), _must(decoding, vocabulary)
    most = getattr(decoder, "max_length", None)
    if most is not None and decoding.max_words > most:
        raise UserError(f"max_words is {decoding.max_words}, but the decoder reads at most {most} tokens; give fewer")


def _rules(decoding: Decoding, vocabulary: Vocabulary) -> tuple[Rule, ...]:
    """The logit rules that the settings ask for, in words of the vocabulary."""
    rules: list[Rule] = []
    if decoding.suppress_unk:
        rules.append(SuppressUnk())
    if decoding.min_words:
        rules.append(MinLength(decoding.min_words))
    if decoding.no_repeat_ngram:
        rules.append(NoRepeatNgram(decoding.no_repeat_ngram))
    if decoding.forbid_bad_endings:
        rules.append(ForbidBadEnding(bad_endings(vocabulary)))
    if decoding.top_k:
        rules.append(TopK(decoding.top_k))
    if decoding.top_p < 1:
        rules.append(TopP(decoding.top_p))
    if not decoding.prefix:
        return tuple(rules)
    prefix = _known(decoding.prefix, vocabulary, "prefix")
    if len(prefix) >= decoding.max_words:
        raise UserError(f"prefix has {len(prefix)} words; give fewer than max_words ({decoding.max_words})")
    return (ForcedPrefix(prefix, tuple(rules)),)


def bad_endings(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ids of the words of ``BAD_ENDINGS`` that a vocabulary has."""
    return tuple(number for number in vocabulary.ids(sorted(BAD_ENDINGS)) if number != UNK)


def _known(text: str, vocabulary: Vocabulary, setting: str) -> tuple[int, ...]:
    """Ids of a text's words. Raises UserError where one is unknown."""
    words = tokenize(text)
    ids = vocabulary.ids(words)
    for word, number in zip(words, ids, strict=True):
        if number == UNK:
            raise UserError(f"{setting}: the model doesn't know the word {word!r}; choose another")
    return ids


def _must(decoding: Decoding, vocabulary: Vocabulary) -> list[tuple[int, ...]]:
    """Ids of the forms of each word that has to occur."""
    words = []
    for entry in decoding.must:
        forms = [_known(form, vocabulary, "must") for form in entry.split("|")]
        if any(len(form) != 1 for form in forms):
            raise UserError(f"must: {entry!r} is not a word, or words with | between them; give several one by one")
        words.append(tuple(form[0] for form in forms))
    return words


CaptionFunction = Callable[[Sequence[Params], Sequence[Frozen], Sequence[Mapping[str, ArrayLike]]], Decoded]


def caption_function(
    graphs: Sequence[nnx.GraphDef[CaptionModel]], decoding: Decoding, vocabulary: Vocabulary
) -> CaptionFunction:
    """Makes the jitted function of params, frozen parts and batches, one each a model, -> Decoded [B,K,T].

    Several models of one vocabulary are an ensemble: a word's probability is the mean of theirs, and each looks at the
    image through its own encoder. A batch holds "image" or "regions" [B,...], and, where captions are drawn, may hold
    "row" [B], each image's place in the whole, on which its samples depend. Of a search's K captions the first
    ``decoding.n_best`` count.

    The memory is computed once an image; beams share it.

    Raises:
        UserError: words that the vocabulary lacks, or more of them than the models can read.
    """
    rules, must = _rules(decoding, vocabulary), _must(decoding, vocabulary)
    parallel = decoding.samples or constrained_rows(decoding.beam, must)

    @jax.jit
    def captions(params: Sequence[Params], frozen: Sequence[Frozen], batches: Sequence[Mapping[str, Array]]) -> Decoded:
        models = [nnx.merge(*parts) for parts in zip(graphs, params, frozen, strict=True)]
        for model in models:
            model.decoder.make_room(decoding.max_words)
        starts = [
            model.decoder.start(model.regions(batch), parallel, region_mask=batch.get("region_mask"))
            for model, batch in zip(models, batches, strict=True)
        ]
        memories = [memory for memory, _ in starts]
        carry = tuple(carry for _, carry in starts)

        def step(carries: Any, tokens: Array) -> tuple[Any, Array]:
            stepped, logits = [], []
            for model, memory, carry in zip(models, memories, carries, strict=True):
                carry, output = model.decoder.step(carry, tokens, memory)
                stepped.append(carry)
                logits.append(model.decoder.logits(output))
            return tuple(stepped), logits[0] if len(models) == 1 else _mean_probability(logits)

        steps = decoding.max_words  # a caption of so many words is left without eos
        if decoding.samples:
            rows = batches[0].get("row", jnp.arange(jax.tree.leaves(carry)[0].shape[0]))
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(decoding.seed)))(rows)
            return sample(step, carry, keys, max_steps=steps, temperature=decoding.temperature, rules=rules)
        if parallel == 1:
            return greedy(step, carry, max_steps=steps, rules=rules)
        shared: dict[str, Any] = {
            "beam": decoding.beam,
            "max_steps": steps,
            "length_norm": decoding.length_norm,
            "length_penalty": decoding.length_penalty,
            "rules": rules,
            "n_best": decoding.n_best,
        }
        if must:
            return constrained_beam_search(step, carry, words=must, **shared)
        return diverse_beam_search(step, carry, groups=decoding.groups, diversity=decoding.diversity, **shared)

    return captions


def _mean_probability(logits: Sequence[Array]) -> Array:
    """The log of the models' mean probabilities, from the logits [B,M,V] of each."""
    log_probs = jnp.stack([jax.nn.log_softmax(one.astype(jnp.float32)) for one in logits])
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(len(logits))


def attention_function(
    graph: nnx.GraphDef[CaptionModel],
) -> Callable[[Params, Frozen, Mapping[str, ArrayLike], ArrayLike], Array | None]:
    """Makes the jitted function (params, frozen, batch, tokens [B,M,T] without bos) -> attention [B,M,T,N].

    The captions are read once more by the model that wrote them, which attends to the same regions then: a search need
    not carry maps along that nobody may ask for. None for a decoder without attention.
    """

    @jax.jit
    def attention(params: Params, frozen: Frozen, batch: Mapping[str, Array], tokens: Array) -> Array | None:
        model = nnx.merge(graph, params, frozen)
        before = jnp.concatenate([jnp.full_like(tokens[:, :, :1], BOS), tokens], axis=-1)
        return model.teacher_forced({**batch, "tokens": before}).attention

    return attention
