"""Captions from one model or an ensemble: the jitted path from a batch to decoded words."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.beam import diverse_beam_search
from imgcap_jax.decoding.constrained import constrained_beam_search, constrained_rows
from imgcap_jax.decoding.decoded import Decoded
from imgcap_jax.decoding.greedy import greedy
from imgcap_jax.decoding.mbr import Knowledge, candidate_probabilities, joined, rerank
from imgcap_jax.decoding.rules import (
    ForbidBadEnding,
    ForbidRepeatedWords,
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
from imgcap_jax.metrics.agreement import Utility
from imgcap_jax.metrics.degeneration import BAD_ENDINGS, CONJUNCTIONS, FUNCTION_WORDS
from imgcap_jax.metrics.degeneration_device import FunctionWords
from imgcap_jax.models.decoders.contract import DecoderSettings, check_length
from imgcap_jax.models.model import CaptionModel, Frozen, Params
from imgcap_jax.models.neighbours import nearest_captions
from imgcap_jax.precision import matmul_precision
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK
from imgcap_jax.tokenizers import tokens_of


def check_decoding(decoding: Decoding, vocabulary: Vocabulary, decoder: DecoderSettings) -> None:
    """Raises UserError if a model cannot decode with these settings, before hours of training and not after them."""
    _rules(decoding, vocabulary), _must(decoding, vocabulary)
    check_length(decoder, decoding.max_words, "decoding.max_words")


def _rules(decoding: Decoding, vocabulary: Vocabulary) -> tuple[Rule, ...]:
    """The logit rules of the settings, with word ids of the vocabulary."""
    rules: list[Rule] = []
    if decoding.suppress_unk:
        rules.append(SuppressUnk())
    if decoding.min_words:
        rules.append(MinLength(decoding.min_words))
    if decoding.no_repeat_ngram:
        rules.append(NoRepeatNgram(decoding.no_repeat_ngram))
    if decoding.forbid_bad_endings:
        endings = vocabulary.known_ids(BAD_ENDINGS)
        if not endings:
            raise UserError(
                "forbid_bad_endings has no effect: the vocabulary has none of the English words on which captions must "
                "not end; leave it out"
            )
        rules.append(ForbidBadEnding(endings))
    if decoding.forbid_repeated_words:
        function_words = FunctionWords(vocabulary.known_ids(FUNCTION_WORDS), vocabulary.known_ids(CONJUNCTIONS))
        if not function_words.ids:
            raise UserError(
                "forbid_repeated_words has no effect: the vocabulary has none of the English function words that it "
                "leaves out; set it to false"
            )
        rules.append(ForbidRepeatedWords(function_words))
    if decoding.top_k:
        rules.append(TopK(decoding.top_k))
    if decoding.top_p < 1:
        rules.append(TopP(decoding.top_p))
    rules += decoding.rules
    if not decoding.prefix:
        return tuple(rules)
    prefix = _known(decoding.prefix, vocabulary, "prefix")
    if len(prefix) >= decoding.max_words:
        raise UserError(f"prefix has {len(prefix)} words; it must have fewer than max_words ({decoding.max_words})")
    return (ForcedPrefix(prefix, tuple(rules)),)


def _known(text: str, vocabulary: Vocabulary, setting: str) -> tuple[int, ...]:
    """The ids of a text's words. Raises UserError if the vocabulary lacks one."""
    words = tokens_of(text, vocabulary.tokenizer)
    ids = vocabulary.ids(words)
    for word, number in zip(words, ids, strict=True):
        if number == UNK:
            raise UserError(f"{setting}: the model's vocabulary lacks the word {word!r}; choose another")
    return ids


def _must(decoding: Decoding, vocabulary: Vocabulary) -> list[tuple[int, ...]]:
    """The ids of the forms of each word that must occur."""
    words = []
    for entry in decoding.must:
        forms = [_known(form, vocabulary, "must") for form in entry.split("|")]
        if any(len(form) != 1 for form in forms):
            raise UserError(
                f"must: {entry!r} is not a single word of the model's tokenizer ({vocabulary.tokenizer.label}), or "
                f"alternative words separated by |; separate words by commas"
            )
        words.append(tuple(form[0] for form in forms))
    return words


class CaptionFunction(Protocol):
    """Captions a batch. See ``caption_function``."""

    def __call__(
        self,
        params: Sequence[Params],
        frozen: Sequence[Frozen],
        batches: Sequence[Mapping[str, ArrayLike]],
        knowledge: Knowledge | None = None,
        /,
    ) -> Decoded:
        """One of each per model -> captions [B,K,T]. ``decoding.rerank`` needs the knowledge."""
        ...


def caption_function(
    graphs: Sequence[nnx.GraphDef[CaptionModel]], decoding: Decoding, vocabulary: Vocabulary
) -> CaptionFunction:
    """Makes the jitted function (params, frozen parts, batches, knowledge) -> Decoded [B,K,T].

    Several models with one vocabulary are an ensemble: the probability of a word is the mean of theirs, and each model
    has its own encoder. With ``decoding.pool``, each model searches on its own, and K is the sum of their captions. A
    batch contains "image" or "regions" [B,...]. For sampling it can contain "row" [B], the place of each image in the
    whole split, which determines the samples. The first ``decoding.returned`` of the K captions are the result.

    The memory is computed once per image and shared by its beams.

    Args:
        graphs: the models without their arrays.
        decoding: the search settings.
        vocabulary: the words of the models.

    Raises:
        UserError: the vocabulary lacks a word of the settings, or ``decoding.pool`` is set for one model.
    """
    if decoding.pool and len(graphs) < 2:
        raise UserError("pool joins the captions of several runs, and there is one; leave it out")
    rules, must = _rules(decoding, vocabulary), _must(decoding, vocabulary)
    parallel = decoding.samples or constrained_rows(decoding.beam, must)

    reranks = decoding.rerank != "none"

    def search(models: Sequence[CaptionModel], batches: Sequence[Mapping[str, Array]], place: int) -> Decoded:
        """The captions of one search. ``place`` is its number among those that are pooled."""
        steps = decoding.max_words  # a longer caption is cut there and has no eos
        starts = []
        for model, batch in zip(models, batches, strict=True):
            regions, mask = model.seen(batch)
            with matmul_precision(model.dtype):
                starts.append(model.decoder.start(regions, parallel, steps=steps, region_mask=mask))
        memories = [memory for memory, _ in starts]
        carry = tuple(carry for _, carry in starts)

        def step(carries: Any, tokens: Array) -> tuple[Any, Array]:
            stepped, logits = [], []
            for model, memory, carry in zip(models, memories, carries, strict=True):
                with matmul_precision(model.dtype):
                    carry, output = model.decoder.step(carry, tokens, memory)
                    stepped.append(carry)
                    logits.append(model.decoder.logits(output))
            return tuple(stepped), logits[0] if len(models) == 1 else _mean_probability(logits)

        if decoding.samples:
            rows = batches[0].get("row", jnp.arange(jax.tree.leaves(carry)[0].shape[0]))
            key = jax.random.key(decoding.seed)
            key = jax.random.fold_in(key, place) if place else key  # pooled models draw independently
            keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
            return sample(step, carry, keys, max_steps=steps, temperature=decoding.temperature, rules=rules)
        if parallel == 1:
            return greedy(step, carry, max_steps=steps, rules=rules)
        shared: dict[str, Any] = {
            "beam": decoding.beam,
            "max_steps": steps,
            "length_norm": decoding.length_norm,
            "length_penalty": decoding.length_penalty,
            "rules": rules,
            "n_best": None if reranks else decoding.n_best,  # rerank needs all beams
        }
        if must:
            return constrained_beam_search(step, carry, words=must, **shared)
        return diverse_beam_search(step, carry, groups=decoding.groups, diversity=decoding.diversity, **shared)

    @jax.jit
    def captions(
        params: Sequence[Params],
        frozen: Sequence[Frozen],
        batches: Sequence[Mapping[str, Array]],
        knowledge: Knowledge | None = None,
    ) -> Decoded:
        models = [nnx.merge(*parts) for parts in zip(graphs, params, frozen, strict=True)]
        batches = [_with_regions(model, batch, decoding.mirror) for model, batch in zip(models, batches, strict=True)]
        if decoding.rerank == "consensus":
            return _consensus(batches[0]["regions"], decoding, knowledge, len(vocabulary))
        groups = [slice(i, i + 1) for i in range(len(models))] if decoding.pool else [slice(None)]
        searches = [search(models[group], batches[group], place) for place, group in enumerate(groups)]
        return _reranked(searches, batches[0], decoding, knowledge) if reranks else searches[0]

    return captions


def _with_regions(model: CaptionModel, batch: Mapping[str, Array], mirror: bool) -> dict[str, Array]:
    """The batch with its "regions" [B,N,D], followed by those of the mirror images if ``mirror`` is set."""
    regions = model.regions(batch)
    if not mirror:
        return {**batch, "regions": regions}
    mirrored = model.regions({"image": batch["image"][:, :, ::-1]})
    return {**batch, "regions": jnp.concatenate([regions, mirrored], axis=1)}


def _consensus(regions: Array, decoding: Decoding, knowledge: Knowledge | None, words: int) -> Decoded:
    """The captions of the training photos that are nearest to regions [B,N,D], by their agreement.

    Words that are not among the first ``words`` ids, those of the vocabulary, become unk.
    """
    assert knowledge is not None
    assert knowledge.neighbours is not None
    captions, there, _ = nearest_captions(regions, knowledge.neighbours, decoding.mbr_neighbours)
    candidates = jnp.where(captions < words, captions, UNK)[..., : decoding.max_words]
    length = (candidates != PAD).sum(-1, keepdims=True)  # a caption that is cut has no eos
    candidates = jnp.where((jnp.arange(candidates.shape[-1]) == length) & there[..., None], EOS, candidates)
    unknown = jnp.zeros(candidates.shape)  # they have no log-probabilities
    found = Decoded(candidates, unknown, unknown[..., 0], unknown[..., 0], jnp.int32(0))
    return rerank(found, captions, _shares(there), _utility(decoding, knowledge))


def _shares(there: Array) -> Array:
    """The same probability for each caption that exists, float32 [B,R]."""
    return there / jnp.maximum(there.sum(-1, keepdims=True), 1)


def _utility(decoding: Decoding, knowledge: Knowledge) -> Utility:
    return Utility(knowledge.frequencies, decoding.mbr_cider, decoding.mbr_bleu)


def _reranked(
    searches: Sequence[Decoded], batch: Mapping[str, Array], decoding: Decoding, knowledge: Knowledge | None
) -> Decoded:
    """The captions of all searches by their agreement, best first."""
    assert knowledge is not None
    drawn, temperature = decoding.samples > 0, decoding.mbr_temperature
    weights = [candidate_probabilities(found, drawn=drawn, temperature=temperature) for found in searches]
    candidates = joined(searches)
    references, probabilities = candidates.tokens, jnp.concatenate(weights, axis=1) / len(weights)
    if decoding.mbr_neighbours:
        assert knowledge.neighbours is not None
        captions, there, _ = nearest_captions(batch["regions"], knowledge.neighbours, decoding.mbr_neighbours)
        share = decoding.mbr_neighbours_weight * _shares(there)
        length = max(references.shape[-1], captions.shape[-1])
        both = [jnp.pad(tokens, ((0, 0), (0, 0), (0, length - tokens.shape[-1]))) for tokens in (references, captions)]
        references = jnp.concatenate(both, axis=1)
        probabilities = jnp.concatenate([(1 - decoding.mbr_neighbours_weight) * probabilities, share], axis=1)
    return rerank(candidates, references, probabilities, _utility(decoding, knowledge))


def caption_rows(tokens: np.ndarray, decoding: Decoding) -> list[int]:
    """The rows of an image's tokens [K,T] that are its captions, best first, or its samples. Empty beams are left
    out."""
    return [m for m in range(len(tokens)) if tokens[m].any()][: decoding.returned]


def _mean_probability(logits: Sequence[Array]) -> Array:
    """The log of the mean of the models' probabilities, from the logits [B,M,V] of each."""
    log_probs = jnp.stack([jax.nn.log_softmax(one.astype(jnp.float32)) for one in logits])
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(len(logits))


@lru_cache(maxsize=4)  # compiled once, not at each validation
def attention_function(
    graph: nnx.GraphDef[CaptionModel],
) -> Callable[[Params, Frozen, Mapping[str, ArrayLike], ArrayLike], Array | None]:
    """Makes the jitted function (params, frozen, batch, tokens [B,M,T] without bos) -> attention [B,M,T,N].

    The model reads the captions again and attends to the same regions as when it wrote them. In this way a search does
    not have to carry maps that are rarely needed. The result is None for a decoder without attention.
    """

    @jax.jit
    def attention(params: Params, frozen: Frozen, batch: Mapping[str, Array], tokens: Array) -> Array | None:
        model = nnx.merge(graph, params, frozen)
        before = jnp.concatenate([jnp.full_like(tokens[:, :, :1], BOS), tokens], axis=-1)
        return model.teacher_forced({**batch, "tokens": before}).attention

    return attention
