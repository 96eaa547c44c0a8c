"""Of several captions of an image, the one that agrees most with the others: minimum Bayes risk (MBR).

A search returns the likeliest caption. MBR returns the caption whose expected score is the highest if the others are
taken as references (Kumar and Byrne 2004, https://aclanthology.org/N04-1022; Eikema and Aziz 2022,
https://arxiv.org/abs/2108.04718). The score is a metric that captions are judged by: CIDEr-D, smoothed BLEU-4, or a
weighted sum.

Letters: B images, K candidates per image, T caption length.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.metrics.bleu_device import bleu_4_pairs
from imgcap_jax.metrics.cider_device import DocumentFrequencies, cider_d_pairs, document_frequencies, prepare_references
from imgcap_jax.special_tokens import EOS, PAD, UNK
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, tokens_of

_COMPARED = 2**24  # pairs of words that are compared at a time, but those of at least one image


class Utility(NamedTuple):
    """What a caption gains with another one as its reference: cider * CIDEr-D (0 to 10) + bleu * BLEU-4 (0 to 1)."""

    frequencies: DocumentFrequencies
    cider: float
    bleu: float


def expected_utility(candidates: Array, references: Array, probabilities: Array, utility: Utility) -> Array:
    """The expected utility of each candidate, float32 [B,K].

    Args:
        candidates: int32 [B,K,T]; eos is not counted as a word.
        references: int32 [B,R,S], with which the candidates are compared, usually the candidates themselves.
        probabilities: float32 [B,R], of the references. Those of an image sum to 1.
        utility: the weights of the metrics, and the document frequencies of CIDEr-D.
    """
    pairs = candidates[0].size * references[0].size
    together = max(1, min(len(candidates), _COMPARED // max(1, pairs)))

    def of_image(image: tuple[Array, Array, Array]) -> Array:
        own, others, weights = (leaf[None] for leaf in image)
        return _of_images(own, others, weights, utility)[0]

    return jax.lax.map(of_image, (candidates, references, probabilities), batch_size=together)


def _of_images(candidates: Array, references: Array, probabilities: Array, utility: Utility) -> Array:
    """``expected_utility`` of all images at once."""
    words, others = (jnp.where(tokens == EOS, PAD, tokens) for tokens in (candidates, references))
    prepared = prepare_references(others, jnp.ones(len(words)), utility.frequencies)
    gain = jnp.zeros(())
    if utility.cider:
        gain += utility.cider * cider_d_pairs(words, prepared, utility.frequencies)  # [B,K,R]
    if utility.bleu:
        gain += utility.bleu * bleu_4_pairs(words, prepared)
    return (gain * probabilities[:, None, :]).sum(-1)


def most_agreed(
    captions: Mapping[int, Sequence[str]],
    corpus: Sequence[Sequence[str]] | None = None,
    *,
    cider: float = 1.0,
    bleu: float = 0.0,
    tokenizer: Tokenizer = DEFAULT,
) -> dict[int, str]:
    """The caption of each image that agrees most with the others. If captions tie, the first one is chosen.

    Args:
        captions: image id -> candidates, such as one caption per system. All count alike.
        corpus: the captions of each image that CIDEr-D's document frequencies are computed from, such as the training
            captions; None: the candidates.
        cider: the weight of CIDEr-D (0 to 10).
        bleu: the weight of smoothed BLEU-4 (0 to 1).
        tokenizer: splits all captions.

    Raises:
        ValueError: the corpus has fewer than two images.
    """
    ids: dict[str, int] = {}

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        return [[ids.setdefault(word, UNK + 1 + len(ids)) for word in tokens_of(text, tokenizer)] for text in texts]

    candidates = [encoded(texts) for texts in captions.values()]
    documents = candidates if corpus is None else [encoded(texts) for texts in corpus]
    utility = Utility(document_frequencies(documents, UNK + 1 + len(ids)), cider, bleu)
    most = max(map(len, candidates))
    longest = max(1, *(len(words) for texts in candidates for words in texts))
    tokens = np.full((len(candidates), most, longest), PAD, np.int32)
    there = np.zeros(tokens.shape[:2], np.float32)
    for image, texts in enumerate(candidates):
        there[image, : len(texts)] = 1 / len(texts)
        for place, words in enumerate(texts):
            tokens[image, place, : len(words)] = words
    gain = jax.jit(lambda tokens, there: expected_utility(tokens, tokens, there, utility))(tokens, there)
    best = np.where(there > 0, np.asarray(gain), -np.inf).argmax(axis=1)
    return {image: texts[number] for (image, texts), number in zip(captions.items(), best.tolist(), strict=True)}
