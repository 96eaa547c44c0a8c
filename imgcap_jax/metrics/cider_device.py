"""CIDEr-D of token ids on the device: the reward of self-critical training (Rennie et al., 2017).

The result equals that of ``imgcap_jax.metrics.cider`` on the same words. All arrays are float32 or int32. N-grams are
compared word by word, and their document frequencies are looked up in a prefix tree of the corpus's n-grams. Both are
exact, without hashing.

Ids below the vocabulary size are the words of the vocabulary. Words of the references that are not in the vocabulary
have further ids. They count in the length and the norm of a reference, but no candidate can match them. ``unk`` is
treated as a word that no reference contains.

Letters: B images per batch, M captions per image, R references per image, T caption length, K_n n-grams of order n,
W ids.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from imgcap_jax.array_files import read_arrays
from imgcap_jax.errors import UserError
from imgcap_jax.files import reading, replacing
from imgcap_jax.metrics.cider import SIGMA, inverse_document_frequency
from imgcap_jax.metrics.corpus import ORDERS, n_grams, unpair
from imgcap_jax.metrics.device_grams import Grams
from imgcap_jax.special_tokens import PAD


class DocumentFrequencies(NamedTuple):
    """The n-grams of a corpus and their inverse document frequencies (idf).

    The n-grams of an order are sorted by the number of their first n-1 words, then by their last word. The number of an
    n-gram is its index in this order. The number of a single word is its id.

    Attributes:
        start: for each order from 2 on, the number of the first n-gram that begins with each (n-1)-gram,
            int32 [K_(n-1) + 1].
        last: for each order from 2 on, the last word of each n-gram, int32 [K_n].
        idf: for each order, the idf of each n-gram, float32 [K_n] (order 1: [W]).
        unseen: the idf of an n-gram that is not in the corpus, float32 [].
    """

    start: tuple[Array, ...]
    last: tuple[Array, ...]
    idf: tuple[Array, ...]
    unseen: Array

    def save(self, path: Path, of: str) -> None:
        """Writes an .npz file. ``of`` identifies the corpus.

        Raises:
            UserError: the disk is full.
        """
        named = {f"{name}{i}": leaf for name in ("start", "last", "idf") for i, leaf in enumerate(getattr(self, name))}
        with replacing(path) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {
                name: np.asarray(leaf) for name, leaf in {**named, "of": of, "unseen": self.unseen}.items()
            }
            np.savez(file, digest=_digest(arrays), **arrays)

    @classmethod
    def load(cls, path: Path, of: str | None = None) -> "DocumentFrequencies":
        """Reads a file that ``save`` wrote. ``of`` identifies the corpus; None: any corpus.

        Raises:
            UserError: the file is damaged, or its ``of`` differs.
        """
        with reading(path, "delete it and run the command again to recompute it"):
            arrays = read_arrays(path)
            digest = arrays.pop("digest", None)  # files of earlier versions have none
            if digest is not None and str(digest) != _digest(arrays):
                raise ValueError("its digest differs")
            start, last, idf = (
                tuple(jnp.asarray(arrays[f"{name}{i}"]) for i in range(count))
                for name, count in (("start", ORDERS - 1), ("last", ORDERS - 1), ("idf", ORDERS))
            )
            found = cls(start, last, idf, jnp.asarray(arrays["unseen"]))
            if of is None or str(arrays["of"]) == of:
                return found
        raise UserError(f"{path} belongs to other captions; delete it and run the command again to recompute it")


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def document_frequencies(corpus: Sequence[Sequence[Sequence[int]]], words: int) -> DocumentFrequencies:
    """Computes, on the host, the document frequency of each n-gram: the number of images whose captions contain it.

    Args:
        corpus: the word ids of each caption of each image, with eos if the reward counts it.
        words: W, larger than every id.

    Raises:
        ValueError: the corpus has fewer than two images, so that every idf would be 0.
    """
    if len(corpus) < 2:
        raise ValueError(f"document frequencies need at least two images; the corpus has {len(corpus)}")
    captions = [caption for texts in corpus for caption in texts]
    lengths = np.array([len(caption) for caption in captions], np.int64)
    image = np.repeat(np.repeat(np.arange(len(corpus)), [len(texts) for texts in corpus]), lengths)
    flat = np.array([word for caption in captions for word in caption], np.int64)
    sizes, start, last, idf = [words], [], [], []

    def number(grams: np.ndarray, order: int) -> np.ndarray:
        keys, numbers = np.unique(grams, return_inverse=True)
        prefix, word = unpair(keys)
        start.append(jnp.asarray(np.searchsorted(prefix, np.arange(sizes[-1] + 1)), jnp.int32))
        last.append(jnp.asarray(word, jnp.int32))
        sizes.append(len(keys))
        return numbers

    for place, gram in n_grams(flat, lengths, number):
        values = inverse_document_frequency(image[place], gram, images=len(corpus), grams=sizes[-1])
        idf.append(jnp.asarray(values, jnp.float32))
    return DocumentFrequencies(tuple(start), tuple(last), tuple(idf), jnp.float32(np.log(len(corpus))))


class DeviceReferences(NamedTuple):
    """Reference captions on the device.

    tokens: ids int32 [B,R,T], padded.
    norm: norms of their tf-idf vectors, float32 [B,R,ORDERS].
    per_image: the number of real references of each image, float32 [B].
    """

    tokens: Array
    norm: Array
    per_image: Array


def prepare_references(tokens: Array, per_image: Array, frequencies: DocumentFrequencies) -> DeviceReferences:
    """Computes the tf-idf norms of references int32 [B,R,T]. The first ``per_image`` [B] of each image are real."""
    return with_norms(tokens, per_image, _norms(tokens, frequencies))


def with_norms(tokens: Array, per_image: Array, norms: Array) -> DeviceReferences:
    """``prepare_references`` of references whose norms [B,R,ORDERS] are known (``reference_norms``)."""
    # Padding rows of a batch have no references; 1 avoids a division by 0.
    return DeviceReferences(tokens, norms, jnp.maximum(per_image, 1).astype(jnp.float32))


def reference_norms(tokens: np.ndarray, frequencies: DocumentFrequencies) -> np.ndarray:
    """The tf-idf norms of all references of a dataset, computed once: int32 [C,T] -> float32 [C,ORDERS]."""
    norms = np.zeros((len(tokens), ORDERS), np.float32)
    compute = jax.jit(_norms)
    # Captions of similar length together: the time of one grows with the square of the width.
    lengths = (tokens != PAD).sum(axis=1)
    widths = -(-np.maximum(lengths, 1) // _WIDTH) * _WIDTH
    for width in np.unique(widths).tolist():
        (rows,) = np.nonzero(widths == width)
        for first in range(0, len(rows), _TOGETHER):
            chosen = rows[first : first + _TOGETHER]
            part = np.zeros((_TOGETHER, width), np.int32)  # one shape per width, so one compilation
            part[: len(chosen), : tokens.shape[1]] = tokens[chosen, :width]
            norms[chosen] = np.asarray(compute(part, frequencies))[: len(chosen)]
    return norms


_TOGETHER, _WIDTH = 2048, 16  # captions per call, and the step of their widths in tokens


def _norms(tokens: Array, frequencies: DocumentFrequencies) -> Array:
    """The tf-idf norms of captions, int32 [...,T] -> float32 [...,ORDERS]."""
    grams, idf = Grams(tokens), _idf(tokens, frequencies)
    # An n-gram occurs at ``count`` positions. Each adds count * idf^2 to the squared norm.
    return jnp.sqrt(jnp.stack([(grams.counts(grams, n) * idf[n] ** 2).sum(-1) for n in range(ORDERS)], -1))


def cider_d(candidates: Array, references: DeviceReferences, frequencies: DocumentFrequencies) -> Array:
    """Computes the CIDEr-D of each caption, 0 to 10.

    Args:
        candidates: ids int32 [B,M,T], pad after the last word, with eos if it counts as a word.
        references: the references of the same images.
        frequencies: the document frequencies of the training captions.

    Returns:
        Scores float32 [B,M].
    """
    return cider_d_pairs(candidates, references, frequencies).sum(-1) / references.per_image[:, None]


def cider_d_pairs(candidates: Array, references: DeviceReferences, frequencies: DocumentFrequencies) -> Array:
    """The CIDEr-D of each caption with each reference alone, 0 to 10: [B,M,R]. Arguments: see ``cider_d``."""
    ours, theirs = Grams(candidates[:, :, None]), Grams(references.tokens[:, None])  # [B,M,1,T] and [B,1,R,T]
    idf = [values[:, :, None] for values in _idf(candidates, frequencies)]  # [B,M,1,T]
    similarity = jnp.zeros(())
    for order in range(ORDERS):
        own, common = ours.counts(ours, order), ours.counts(theirs, order)  # [B,M,1,T], [B,M,R,T]
        weight = idf[order] ** 2  # [B,M,1,T]
        # The sum runs over positions, so the term of an n-gram is divided by the number of its positions.
        product = jnp.minimum(own, common) * common * weight / jnp.maximum(own, 1)
        norm = jnp.sqrt((own * weight).sum(-1))  # [B,M,1]
        scale = norm * references.norm[:, None, :, order]  # [B,M,R]
        similarity += product.sum(-1) / jnp.where(scale > 0, scale, 1)
    # The official code uses the number of bigrams as the length.
    difference = jnp.maximum(ours.length - 1, 0) - jnp.maximum(theirs.length - 1, 0)
    return 10 * similarity * jnp.exp(-(difference.astype(jnp.float32) ** 2) / (2 * SIGMA**2)) / ORDERS


def _idf(tokens: Array, frequencies: DocumentFrequencies) -> list[Array]:
    """The idf of the n-gram that begins at each position, [...,T] for each order; arbitrary after the end."""
    known = (tokens >= 0) & (tokens < len(frequencies.idf[0]))
    number = jnp.where(known, tokens, 0)
    found = [jnp.where(known, frequencies.idf[0][number], frequencies.unseen)]
    for order in range(1, ORDERS):
        word = jnp.roll(tokens, -order, -1)
        number, known = _look_up(number, known, word, frequencies.start[order - 1], frequencies.last[order - 1])
        idf = frequencies.idf[order]
        found.append(jnp.where(known, idf[number] if len(idf) else 0.0, frequencies.unseen))
    return found


def _look_up(prefix: Array, known: Array, word: Array, start: Array, last: Array) -> tuple[Array, Array]:
    """Finds n-grams by binary search.

    Args:
        prefix: int32 [...,T], the number of the first n-1 words.
        known: bool [...,T], whether the first n-1 words are in the corpus.
        word: int32 [...,T], the last word.
        start: see ``DocumentFrequencies``.
        last: see ``DocumentFrequencies``.

    Returns:
        The numbers of the n-grams int32 [...,T], and whether they are in the corpus, bool [...,T].
    """
    if not len(last):
        return jnp.zeros_like(prefix), jnp.zeros_like(known)
    low, high = start[prefix], start[prefix + 1]
    end = high

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        right = (low < high) & (last[jnp.minimum(middle, len(last) - 1)] < word)
        return jnp.where(right, middle + 1, low), jnp.where(right, high, jnp.minimum(middle, high))

    low, _ = lax.fori_loop(0, len(last).bit_length(), halve, (low, high))
    place = jnp.minimum(low, len(last) - 1)
    return place, known & (low < end) & (last[place] == word)
