"""CaptionModel: an encoder and a decoder, split into trained parameters and the rest."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.contract import Decoder, StepOutput
from imgcap_jax.models.layers import row_keys
from imgcap_jax.models.retrieval import Retriever
from imgcap_jax.precision import matmul_precision

Params = Any  # nnx.State of the trained parameters
Frozen = Any  # nnx.State of everything else
Part = TypeVar("Part", bound=nnx.Module)

# What a row's key is folded with for each of its uses.
START_KEYS, UNROLL_KEYS, DRAW_KEYS, RETRIEVAL_KEYS = 0, 1, 2, 3


class CaptionModel(nnx.Module):
    """Images or ready-made regions in, word scores out.

    Attributes:
        encoder: None if regions come from a feature store.
        decoder: see ``imgcap_jax.models.decoders.contract.Decoder``.
        retriever: adds words of similar training photos to the regions; None: nothing is added.
        dtype: type of the decoder's products; encoder_dtype: of the encoder's. Both are built with these types. The
            model sets the precision of their products (see ``imgcap_jax.precision``).
        rounded: the type that encoded regions are rounded to, as in a feature store; None: they are not.
    """

    def __init__(
        self,
        encoder: nnx.Module | None,
        decoder: Decoder,
        *,
        dtype: str = "float32",
        encoder_dtype: str = "float32",
        rounded: str | None = None,
        retriever: Retriever | None = None,
    ) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.retriever = retriever
        self.dtype, self.encoder_dtype, self.rounded = dtype, encoder_dtype, rounded

    def regions(self, batch: Mapping[str, Array]) -> Array:
        """The "regions" [B,N,D] of the batch or, without them, its "image" [B,h,w,3] encoded; float32.

        Raises:
            KeyError: the batch has only images, and there is no encoder.
        """
        if "regions" in batch:
            return batch["regions"].astype("float32")
        if self.encoder is None:
            raise KeyError("regions")
        with matmul_precision(self.encoder_dtype):
            regions = self.encoder(batch["image"])
        if self.rounded is None:
            return regions
        # The barrier keeps XLA from leaving out both conversions, as xla_allow_excess_precision permits.
        return jax.lax.optimization_barrier(regions.astype(self.rounded)).astype("float32")

    def seen(self, batch: Mapping[str, Array], keys: Array | None = None) -> tuple[Array, Array | None]:
        """What the decoder sees: ``regions`` [B,N',D] and their mask [B,N'], None: all of them exist.

        With a retriever, N' is N plus the number of retrieved words.

        Args:
            batch: see ``regions``; "region_mask" [B,N] and, for training photos, "number" [B] (see ``Retriever``).
            keys: [B], one PRNG key per row, for dropout; None: no dropout.
        """
        regions, mask = self.regions(batch), batch.get("region_mask")
        if self.retriever is None:
            return regions, mask
        with matmul_precision(self.dtype):
            words, there = self.retriever(regions, batch.get("number"), row_keys(keys, RETRIEVAL_KEYS))
        if mask is None:
            mask = jnp.ones(regions.shape[:2], bool)
        return jnp.concatenate([regions, words], axis=1), jnp.concatenate([mask, there], axis=1)

    def teacher_forced(
        self, batch: Mapping[str, Array], keys: Array | None = None, sampling: Array | None = None
    ) -> StepOutput:
        """Reads all "tokens" [B,M,T] except the last; returns the outputs [B,M,T-1,...], the input of ``score_words``.

        Their attention is that of the regions [B,M,T-1,N]; the rest of 1 is that of retrieved words.

        Args:
            batch: "tokens", and "image" or "regions"; see ``seen``.
            keys: [B], one PRNG key per row, for dropout and draws; None: no dropout.
            sampling: [], the probability of scheduled sampling, which needs keys; None: no sampling.
        """
        tokens = batch["tokens"]
        regions, mask = self.seen(batch, keys)
        with matmul_precision(self.dtype):
            memory, carry = self.decoder.start(
                regions,
                tokens.shape[1],
                steps=tokens.shape[2] - 1,
                region_mask=mask,
                dropout_keys=row_keys(keys, START_KEYS),
            )
            read, unroll_keys = tokens[:, :, :-1], row_keys(keys, UNROLL_KEYS)
            if sampling is None:
                outputs = self.decoder.unroll(read, memory, carry, dropout_keys=unroll_keys)
            else:
                draws = row_keys(keys, DRAW_KEYS)
                assert draws is not None
                outputs = self.decoder.unroll_sampled(read, memory, carry, sampling, draws, dropout_keys=unroll_keys)
        if self.retriever is None or outputs.attention is None:
            return outputs
        return outputs._replace(attention=outputs.attention[..., : regions.shape[1] - self.retriever.words])

    def score_words(self, hidden: Array) -> Array:
        """The decoder's logits [...,V] for ``output.hidden`` [...,F]."""
        with matmul_precision(self.dtype):
            return self.decoder.logits(StepOutput(hidden, None))


def split_trained(model: CaptionModel) -> tuple[nnx.GraphDef[CaptionModel], Params, Frozen]:
    """Splits a model into its graph, the trained parameters and the rest.

    Trained parameters are ``nnx.Param``s. Encoders keep frozen values in variables of another type.
    """
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest[0]


def without_values(build: Callable[[], Part]) -> Part | None:
    """Builds an encoder or a decoder whose parameters have shapes but no values, for a checkpoint to replace.

    Random initial values take seconds to compile. Here they are traced and not computed.

    Args:
        build: makes the part, and any ``nnx.Rngs`` that it needs.

    Returns:
        The part, with ``jax.ShapeDtypeStruct`` in place of arrays. None: it must be built with values, because it has
        variables that no checkpoint contains, or because ``build`` depends on values.

    Raises:
        UserError: as ``build`` does.
    """
    try:
        part: Part = nnx.eval_shape(build)
    except UserError:
        raise
    except Exception:  # of many types, if values are read; a true error occurs again when the part is built with values
        return None
    _, _, *others = nnx.split(part, nnx.Param, ...)
    return None if jax.tree.leaves(others) else part


def parameter_count(params: Params) -> int:
    """The number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
