"""CaptionModel: an encoder and a decoder, split into trained parameters and the rest."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array

from imgcap_jax.models.decoders.contract import Decoder, StepOutput
from imgcap_jax.models.layers import row_keys

Params = Any  # nnx.State of the trained parameters
Frozen = Any  # nnx.State of everything else

# What a row's key is folded with for each of its uses.
START_KEYS, UNROLL_KEYS, DRAW_KEYS = 0, 1, 2


class CaptionModel(nnx.Module):
    """Images or ready-made regions in, word scores out.

    Attributes:
        encoder: None if regions come from a feature store.
        decoder: see ``imgcap_jax.models.decoders.contract.Decoder``.
    """

    def __init__(self, encoder: nnx.Module | None, decoder: Decoder) -> None:
        self.encoder = encoder
        self.decoder = decoder

    def regions(self, batch: Mapping[str, Array]) -> Array:
        """The "regions" [B,N,D] of the batch or, without them, its "image" [B,h,w,3] encoded; float32.

        Raises:
            KeyError: the batch has only images, and there is no encoder.
        """
        if "regions" in batch:
            return batch["regions"].astype("float32")
        if self.encoder is None:
            raise KeyError("regions")
        return self.encoder(batch["image"])

    def teacher_forced(
        self, batch: Mapping[str, Array], keys: Array | None = None, sampling: Array | None = None
    ) -> StepOutput:
        """Reads all "tokens" [B,M,T] except the last; returns the outputs [B,M,T-1,...], the input of ``score_words``.

        Args:
            batch: "tokens", and "image" or "regions".
            keys: [B], one PRNG key per row, for dropout and draws; None: no dropout.
            sampling: [], the probability of scheduled sampling, which needs keys; None: no sampling.
        """
        tokens = batch["tokens"]
        memory, carry = self.decoder.start(
            self.regions(batch),
            tokens.shape[1],
            steps=tokens.shape[2] - 1,
            region_mask=batch.get("region_mask"),
            dropout_keys=row_keys(keys, START_KEYS),
        )
        read, unroll_keys = tokens[:, :, :-1], row_keys(keys, UNROLL_KEYS)
        if sampling is None:
            return self.decoder.unroll(read, memory, carry, dropout_keys=unroll_keys)
        draws = row_keys(keys, DRAW_KEYS)
        assert draws is not None
        return self.decoder.unroll_sampled(read, memory, carry, sampling, draws, dropout_keys=unroll_keys)

    def score_words(self, hidden: Array) -> Array:
        """The decoder's logits [...,V] for ``output.hidden`` [...,F]."""
        return self.decoder.logits(StepOutput(hidden, None))


def split_trained(model: CaptionModel) -> tuple[nnx.GraphDef[CaptionModel], Params, Frozen]:
    """Splits a model into its graph, the trained parameters and the rest.

    Trained parameters are ``nnx.Param``s. Encoders keep frozen values in variables of another type.
    """
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest[0]


def parameter_count(params: Params) -> int:
    """The number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
