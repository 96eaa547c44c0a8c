"""The training photos that look most like a photo, and their captions (Devlin et al. 2015, arXiv:1505.04467).

Photos are compared by the mean of their region features, projected to principal components. The comparison runs on the
device, within a training step or a search.

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
COMPONENTS = 256
# A component of variance v is divided by v ** (_WHITENING / 2): 0 keeps all variances, 1 makes them equal. Between the
# two, captions of neighbours agreed best with the references of Flickr8k.
_WHITENING = 0.5
_SMALLEST = 0.05  # added to the standard deviation of a feature, so that features that hardly vary count little
_SAME = 0.9999  # cosine above which two photos are the same; rounding of stored features stays above it


class Neighbours(NamedTuple):
    """The training photos, and how a photo is compared with them.

    Attributes:
        vectors: float32 [I,P], unit vectors.
        mean: float32 [D], the mean features of the training photos.
        projection: float32 [D,P].
        captions: int32 [I,R,T], padded; a photo with fewer captions has rows of pad.
    """

    vectors: Array
    mean: Array
    projection: Array
    captions: Array

    def save(self, path: Path, of: str) -> None:
        """Writes an .npz file. ``of`` identifies the photos and the features."""
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in self._asdict().items()}
        arrays |= {name: arrays[name].astype(np.float16) for name in ("vectors", "projection")}
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
            floats = {name: jnp.asarray(arrays[name], jnp.float32) for name in ("vectors", "mean", "projection")}
            return cls(**floats, captions=jnp.asarray(arrays["captions"], jnp.int32))


def index(features: np.ndarray, captions: np.ndarray) -> Neighbours:
    """The index of training photos.

    Args:
        features: float32 [I,D], the mean region features of each photo.
        captions: int32 [I,R,T].
    """
    mean, scale = features.mean(0), 1 / (features.std(0) + _SMALLEST)
    scaled = (features - mean) * scale
    variance, axes = np.linalg.eigh((scaled.T @ scaled).astype(np.float64) / len(scaled))
    kept = min(COMPONENTS, int((variance > 1e-6 * variance[-1]).sum()))
    axes = axes[:, ::-1][:, :kept] * variance[::-1][:kept] ** (-_WHITENING / 2)
    projection = (scale[:, None] * axes).astype(np.float32)
    return Neighbours(
        jnp.asarray(_unit(jnp.asarray((features - mean) @ projection))),
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(projection),
        jnp.asarray(captions, jnp.int32),
    )


def nearest_captions(
    regions: Array, neighbours: Neighbours, count: int, own: Array | None = None
) -> tuple[Array, Array, Array]:
    """The captions of the nearest training photos.

    Args:
        regions: float32 [B,N,D].
        neighbours: the index.
        count: the number of photos.
        own: int32 [B], the number of each photo if it is a training photo itself, which is left out; None: they are
            other photos. Photos with nearly the same features are left out too.

    Returns:
        Captions int32 [B,count*R,T], whether each exists, bool [B,count*R], and the cosine of the features of its photo
        with those of the image, float32 [B,count*R].
    """
    vectors = _unit((regions.mean(1) - neighbours.mean) @ neighbours.projection)
    cosines = vectors @ neighbours.vectors.T  # [B,I]
    same = cosines > _SAME
    if own is not None:
        same |= jnp.arange(cosines.shape[1]) == own[:, None]
    cosines, photos = jax.lax.top_k(jnp.where(same, -1.0, cosines), count)  # [B,count] both
    captions = neighbours.captions[photos].reshape(len(regions), -1, neighbours.captions.shape[-1])
    return captions, (captions != PAD).any(-1), jnp.repeat(cosines, neighbours.captions.shape[1], axis=1)


def _unit(vectors: Array) -> Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
