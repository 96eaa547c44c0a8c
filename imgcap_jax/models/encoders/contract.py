"""The contract of an encoder, and of the settings that build it."""

from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError


class Encoder(Protocol):
    """Images in, regions out: an ``nnx.Module``.

    Every ``nnx.Param`` of the module is trained. Variables of any other type are frozen, such as the ``FrozenVariable``
    of ``models/encoders/pretrained/weights.py``. The module must treat each image independently (no batch statistics),
    so that results do not depend on the number of devices. Random encoders (dropout) are not supported. All images have
    N regions.

    Checkpoints contain trained parameters only: ``EncoderSettings.build`` must make the same frozen values each time.

    Attributes:
        region_count: N, regions per image.
        region_size: D, features per region.
    """

    region_count: int
    region_size: int

    def __call__(self, images: Array) -> Array:
        """Images uint8 [B,h,w,3] with h = w = image_size -> regions float32 [B,N,D].

        The normalisation of pixels is part of the encoder. Regions of a square grid must come row by row, so that
        attention pictures are correct.
        """
        ...


class EncoderSettings(Protocol):
    """Settings of an encoder: a frozen dataclass whose fields become the options ``--encoder.FIELD``.

    The features of a frozen encoder are stored under a key of the settings, the weights, the attributes ``mean`` and
    ``std`` of the encoder if it has them, and, for a class of your own, the file that defines it.

    ``--init-from`` requires that all fields except ``trainable_stages``, ``checkpoint_stages`` and ``folder`` are equal
    in both runs, because a decoder only understands the features it was trained with.

    Settings whose encoder reads a weights file also have ``weights_digest``, ``with_weights`` and ``pretrained``, which
    take the place of the functions of this module.
    """

    @property
    def region_size(self) -> int:
        """D, known before the encoder is built: the decoder and feature stores are made for it."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether no parameter is trained. The encoder must then have no ``nnx.Param``.

        Its features are stored, unless each epoch draws new augmentations (``data.views`` is 1 and
        ``data.augmentation`` is set).
        """
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


def build_encoder(settings: EncoderSettings, image_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
    """``settings.build``, with a check that a frozen encoder has nothing to train.

    Raises:
        UserError: it has; see also ``EncoderSettings.build``.
    """
    encoder = settings.build(image_size, dtype=dtype, rngs=rngs)
    if settings.frozen and jax.tree.leaves(nnx.state(encoder, nnx.Param)):
        raise UserError(
            f"encoder: {type(settings).__name__} is frozen but has variables of type nnx.Param, which are trained; use "
            f"FrozenVariable, or set frozen to False"
        )
    return encoder


def weights_digest(settings: Any) -> str | None:
    """A digest of the weights file that ``settings.build`` reads, None if it reads none.

    Features, and therefore captions, change with the file, which a name or a path does not identify. The file is
    downloaded if necessary. A process reads it once.

    Args:
        settings: an encoder's settings, or those of ready-made regions.

    Raises:
        UserError: the file is missing, or can't be downloaded or read; or the settings' own `weights_digest` is not a
            method that returns text.
    """
    own = _method(settings, "weights_digest")
    digest = None if own is None else own()
    if digest is not None and not isinstance(digest, str):
        raise UserError(
            f"encoder: weights_digest of {type(settings).__name__} returned {digest!r:.80}; it must return text, "
            f"such as that of digest_of_file, or None"
        )
    return digest


def _method(settings: Any, name: str) -> Any:
    """A method that settings can have, or None. Raises UserError if it is something else, such as a property."""
    found = getattr(settings, name, None)
    if found is not None and not callable(found):
        raise UserError(f"encoder: {name} of {type(settings).__name__} is not a method; define it without @property")
    return found


def pretrained(settings: Any) -> Any:
    """The settings of the same encoder with its pretrained weights, none of which is trained.

    Args:
        settings: an encoder's settings.

    Raises:
        UserError: the encoder has no pretrained weights.
    """
    if settings.frozen:
        return settings
    own = _method(settings, "pretrained")
    if own is None:
        raise UserError(f"encoder: {type(settings).__name__} has no pretrained weights")
    return own()


def with_weights(settings: Any, path: Path) -> Any:
    """The settings with the weights file at another path, as on another machine.

    Args:
        settings: an encoder's settings, or those of ready-made regions.
        path: the file.

    Raises:
        UserError: the encoder reads no weights file.
    """
    own = _method(settings, "with_weights")
    if own is None:
        raise UserError(f"encoder: {type(settings).__name__} reads no weights file; leave out --weights")
    return own(path)
