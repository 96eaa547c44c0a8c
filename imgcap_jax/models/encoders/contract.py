"""The contract of an encoder, and of the settings that build it."""

from typing import Any, Protocol

from flax import nnx
from jax import Array
from jax.typing import DTypeLike


class Encoder(Protocol):
    """Images in, regions out: an ``nnx.Module``.

    Every ``nnx.Param`` of the module is trained. Variables of any other type are frozen. The module must be a function
    of single images (no batch statistics), so that results do not depend on the number of devices.

    Attributes:
        region_count: N, regions per image.
        region_size: D, features per region.
    """

    region_count: int
    region_size: int

    def __call__(self, images: Array) -> Array:
        """Images uint8 [B,h,w,3] with h = w = image_size -> regions float32 [B,N,D].

        The normalisation of pixels is part of the encoder. Where regions form a square grid they come row by row, so
        that attention pictures are drawn correctly.
        """
        ...


class EncoderSettings(Protocol):
    """Settings of an encoder: a frozen dataclass whose fields become the options ``--encoder.FIELD``.

    ``--init-from`` requires that all fields except ``trainable_stages``, ``checkpoint_stages`` and ``folder`` are equal
    in both runs, because a decoder only understands the features it was trained with.
    """

    @property
    def region_size(self) -> int:
        """D, known before the encoder is built: the decoder and feature stores are made for it."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether no parameter is trained. The features of a frozen encoder are computed once and stored."""
        ...

    def build(self, image_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
        """Makes the encoder (see ``Encoder``).

        Args:
            image_size: side of the images in pixels.
            dtype: type that products are computed in; parameters and regions are float32.
            rngs: the stream ``params`` initialises weights. The same seed must give the same weights.

        Raises:
            UserError: the settings do not fit, or weights cannot be read.
        """
        ...
