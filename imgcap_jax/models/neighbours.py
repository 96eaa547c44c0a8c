"""The training photos whose captions fit a photo best (after Devlin et al. 2015, arXiv:1505.04467).

Devlin et al. compare photos by the features of a CNN. Here a ridge regression from the mean region features of a photo
predicts the words of its captions, and the prediction is compared with the words of the training captions. Features of
photos then matter as far as they say something about captions. Consensus captions of Flickr8k's validation photos score
45 CIDEr-D with plain features and 53 with predicted words.

The comparison runs on the device, within a search or the training step of a model that retrieves words.

Letters: B images, N regions, D region feature size, P components, I training photos, R captions per photo at most,
T caption length.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from imgcap_jax.array_files import read_arrays
from imgcap_jax.files import reading, replacing
from imgcap_jax.special_tokens import PAD

NEIGHBOURS = "neighbours.npz"  # file in a run's folder
VERSION = 4
"""Changes with every change of what ``index`` computes."""
COMPONENTS = 256
_RIDGE = 0.1  # added to the variances of the standardised features
_SMALLEST = 0.05  # added to the standard deviation of a feature, so that features that hardly vary count little
_WORDS = 2000  # the most frequent words


class Neighbours(NamedTuple):
    """The training photos, and how a photo is compared with them.

    Attributes:
        vectors: float32 [I,P], unit vectors: the words of the photos' captions, and their prediction.
        queries: float32 [I,P], the unit vectors that the photos are compared by themselves: predictions by a regression
            without the photo.
        mean: float32 [D], the mean features of the training photos.
        projection: float32 [D,P], predicts these vectors, apart from their length.
        captions: int32 [I,R,T], padded; a photo with fewer captions has rows of pad.
    """

    vectors: Array
    queries: Array
    mean: Array
    projection: Array
    captions: Array

    def save(self, path: Path, of: str) -> None:
        """Writes an .npz file. ``of`` identifies the photos and the features."""
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in self._asdict().items()}
        arrays |= {name: arrays[name].astype(np.float16) for name in ("vectors", "queries", "projection")}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, of=np.array(of), **arrays)

    @classmethod
    def load(cls, path: Path, of: str | None = None) -> "Neighbours | None":
        """Reads a file that ``save`` wrote. None: its photos or features are not ``of``, if that is given.

        Raises:
            UserError: the file is damaged.
        """
        with reading(path, "delete it and run the command again to recompute it"):
            arrays = read_arrays(path)
            if of is not None and str(arrays["of"]) != of:
                return None
            floats = {
                name: jnp.asarray(arrays[name], jnp.float32) for name in ("vectors", "queries", "mean", "projection")
            }
            return cls(**floats, captions=jnp.asarray(arrays["captions"], jnp.int32))


def index(features: np.ndarray, captions: np.ndarray) -> Neighbours:
    """The index of training photos.

    The vector of a training photo is the sum of two unit vectors: the words of its captions, and their prediction by a
    regression without this photo.

    Args:
        features: float32 [I,D], the mean region features of each photo.
        captions: int32 [I,R,T].
    """
    photos = len(features)
    mean, scale = features.mean(0), 1 / (features.std(0) + _SMALLEST)
    inputs = ((features - mean) * scale).astype(np.float64)
    words = _word_weights(captions)
    targets = words - words.mean(0)  # [I,W]
    covariance = inputs.T @ inputs / photos + _RIDGE * np.eye(inputs.shape[1])
    weights = np.linalg.solve(covariance, inputs.T @ targets / photos)  # [D,W]
    leverage = (inputs * np.linalg.solve(covariance, inputs.T).T).sum(1, keepdims=True) / photos  # [I,1]
    # What the regression would predict if it were fitted without the photo itself.
    left_out = (inputs @ weights - leverage * targets) / np.maximum(1 - leverage, 1e-6)
    both = _unit_rows(_unit_rows(left_out) + _unit_rows(targets))
    kept = min(COMPONENTS, *both.shape)
    axes = np.linalg.eigh(both.T @ both)[1][:, ::-1][:, :kept]  # [W,P]
    return Neighbours(
        jnp.asarray(_unit_rows(both @ axes), jnp.float32),
        jnp.asarray(_unit_rows(left_out @ axes), jnp.float32),
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(scale[:, None] * (weights @ axes), jnp.float32),
        jnp.asarray(captions, jnp.int32),
    )


def _word_weights(captions: np.ndarray) -> np.ndarray:
    """The share of a photo's captions with each of the most frequent words, times its idf: [I,R,T] -> [I,W]."""
    photos = len(captions)
    there = (captions != PAD).any(-1)
    caption = np.repeat(np.arange(captions[..., 0].size), captions.shape[-1])
    flat = captions.reshape(-1).astype(np.int64)
    size = int(flat.max(initial=0)) + 1
    pairs = np.unique(caption[flat != PAD] * size + flat[flat != PAD])
    of, word = pairs // size, pairs % size
    photo = of // captions.shape[1]
    frequency = np.bincount(np.unique(photo * size + word) % size, minlength=size)
    chosen = np.argsort(-frequency, kind="stable")[:_WORDS]
    column = np.full(size, -1)
    column[chosen] = np.arange(len(chosen))
    kept = column[word] >= 0
    counts = np.zeros((photos, len(chosen)), np.float32)
    np.add.at(counts, (photo[kept], column[word[kept]]), 1)
    idf = np.log(photos / np.maximum(frequency[chosen], 1))
    share: np.ndarray = counts / np.maximum(there.sum(1), 1)[:, None] * idf
    return share.astype(np.float64)


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def nearest_captions(
    regions: Array, neighbours: Neighbours, count: int, own: Array | None = None
) -> tuple[Array, Array, Array]:
    """The captions of the nearest training photos.

    Args:
        regions: float32 [B,N,D].
        neighbours: the index.
        count: the number of photos.
        own: int32 [B], the number of each photo if it is a training photo itself, or a view of one (see
            ``nearest_to_training_photos``); None: they are other photos.

    Returns:
        Captions int32 [B,count*R,T], whether each exists, bool [B,count*R], and the cosine of the vector of its photo
        with the prediction for the image, float32 [B,count*R].
    """
    if own is None:
        vectors = _unit((regions.mean(1) - neighbours.mean) @ neighbours.projection)
        cosines, photos = jax.lax.top_k(vectors @ neighbours.vectors.T, count)  # [B,count] both
    else:
        cosines, photos = nearest_to_training_photos(own, neighbours, count)
    captions = neighbours.captions[photos].reshape(len(regions), -1, neighbours.captions.shape[-1])
    return captions, (captions != PAD).any(-1), jnp.repeat(cosines, neighbours.captions.shape[1], axis=1)


def nearest_to_training_photos(own: Array, neighbours: Neighbours, count: int) -> tuple[Array, Array]:
    """The training photos that are nearest to training photos.

    A photo is compared as if the regression had not seen it, and it is not its own neighbour.

    Args:
        own: int32 [B], the numbers of the photos.
        neighbours: the index.
        count: the number of neighbours.

    Returns:
        Cosines float32 [B,count] and numbers of photos int32 [B,count], nearest first.
    """
    cosines = neighbours.queries[own] @ neighbours.vectors.T  # [B,I]
    return jax.lax.top_k(jnp.where(jnp.arange(cosines.shape[1]) == own[:, None], -1.0, cosines), count)


def _unit(vectors: Array) -> Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
