"""Several encoders of the same photo, whose features are concatenated region by region."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.files import json_digest
from imgcap_jax.models.encoders.contract import EncoderSettings, build_encoder, pretrained, weights_digest


@dataclass(frozen=True)
class Concatenated:
    """Settings of several encoders with the same grid. D is the sum of their D.

    Networks of different sizes make different mistakes, so a decoder that sees all of their features describes photos
    better than with those of the best one.
    """

    encoders: tuple[EncoderSettings, ...]
    """The encoders, in the order of their features."""

    def __post_init__(self) -> None:
        if not self.encoders:
            raise UserError("encoder.encoders is empty; it must name at least one encoder")
        for number, settings in enumerate(self.encoders):
            if not hasattr(settings, "build"):
                raise UserError(
                    f"encoder.encoders.{number} is {type(settings).__name__}, which does not encode photos; "
                    f"use settings of an encoder"
                )

    @property
    def region_size(self) -> int:
        """D."""
        return sum(settings.region_size for settings in self.encoders)

    @property
    def frozen(self) -> bool:
        """Whether no parameter of any of them is trained."""
        return all(settings.frozen for settings in self.encoders)

    def weights_digest(self) -> str | None:
        """A digest of the weights files of all encoders; None if none of them reads a file."""
        digests = [weights_digest(settings) for settings in self.encoders]
        return json_digest(digests) if any(digests) else None

    def pretrained(self) -> Self:
        """See `contract.pretrained`."""
        return replace(self, encoders=tuple(map(pretrained, self.encoders)))

    def with_weights(self, path: Path) -> Self:
        """See `contract.with_weights`. Raises UserError, because each encoder has a file of its own."""
        raise UserError(
            "encoder: each of the concatenated encoders reads its own weights file, and --weights cannot say which of "
            "them it replaces; leave it out"
        )

    def build(self, image_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "ConcatenatedEncoder":
        """Builds the encoders for square images of `image_size` pixels.

        Raises:
            UserError: they have different numbers of regions; see also `EncoderSettings.build`.
        """
        encoders = [build_encoder(settings, image_size, dtype=dtype, rngs=rngs) for settings in self.encoders]
        counts = [encoder.region_count for encoder in encoders]
        if len(set(counts)) > 1:
            raise UserError(
                f"encoder.encoders have {', '.join(map(str, counts))} regions at {image_size} pixels; they must have "
                f"the same number, so set grid"
            )
        return ConcatenatedEncoder(encoders)


class ConcatenatedEncoder(nnx.Module):
    """See `Concatenated`.

    Attributes:
        region_count: N, regions per image.
        region_size: D, features per region.
    """

    def __init__(self, encoders: Sequence[Any]) -> None:
        self.encoders = nnx.List(encoders)
        self.region_count: int = encoders[0].region_count
        self.region_size: int = sum(encoder.region_size for encoder in encoders)

    @property
    def mean(self) -> str:
        """The means of the pixels that the encoders subtract, for the key of stored features."""
        return str([getattr(encoder, "mean", None) for encoder in self.encoders])

    @property
    def std(self) -> str:
        """The divisors of the pixels, for the key of stored features."""
        return str([getattr(encoder, "std", None) for encoder in self.encoders])

    def __call__(self, images: jax.Array) -> jax.Array:
        """images [B,h,w,3] uint8 -> regions [B,N,D] float32."""
        return jnp.concatenate([encoder(images) for encoder in self.encoders], axis=-1)
