"""CaptionModel: an encoder and a decoder, and which of their parameters are trained."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array

from imgcap_jax.models.decoders.contract import Decoder, StepOutput
from imgcap_jax.models.layers import row_keys

Params = Any  # nnx.State of the trained parameters
Frozen = Any  # nnx.State of everything else


class CaptionModel(nnx.Module):
    """Images or ready regions in, word scores out.

    Attributes:
        encoder: None where regions come from a feature store.
        decoder: see ``imgcap_jax.models.decoders.contract.Decoder``.
    """

    def __init__(self, encoder: nnx.Module | None, decoder: Decoder) -> None:
        self.encoder = encoder
        self.decoder = decoder

    def regions(self, batch: Mapping[str, Array]) -> Array:
        """The batch's "regions" [B,N,D] where it has them, else its "image" [B,h,w,3] put through the encoder; float32.

        Raises:
            KeyError: only images, but there is no encoder.
        """
        if "regions" in batch:
            return batch["regions"].astype("float32")
        if self.encoder is None:
            raise KeyError("regions")
        return self.encoder(batch["image"])

    def teacher_forced(
        self, batch: Mapping[str, Array], keys: Array | None = None, sampling: Array | None = None
    ) -> StepOutput:
        """Reads "tokens" [B,M,T] but the last: the outputs [B,M,T-1,...], which ``score_words`` turns into words.

        Args:
            batch: "tokens", and "image" or "regions".
            keys: [B] PRNG keys of dropout; None: no dropout.
            sampling: [], the probability of scheduled sampling, for which keys are needed; None: none.
        """
        tokens = batch["tokens"]
        self.decoder.make_room(tokens.shape[-1] - 1)
        memory, carry = self.decoder.start(
            self.regions(batch), tokens.shape[1], region_mask=batch.get("region_mask"), keys=row_keys(keys, 0)
        )
        read, unroll_keys = tokens[:, :, :-1], row_keys(keys, 1)
        if sampling is None:
            return self.decoder.unroll(read, memory, carry, keys=unroll_keys)
        draws = row_keys(keys, 2)
        assert draws is not None
        return self.decoder.unroll_sampled(read, memory, carry, sampling, draws, keys=unroll_keys)

    def score_words(self, hidden: Array) -> Array:
        """The decoder's logits [...,V] for ``output.hidden`` [...,F]."""
        return self.decoder.logits(StepOutput(hidden, None))


def split_trained(model: CaptionModel) -> tuple[nnx.GraphDef[CaptionModel], Params, Frozen]:
    """Splits a model into its graph, the parameters that are trained and all the rest.

    What is trained is an ``nnx.Param``; encoders keep what is frozen in variables of another type.
    """
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest[0]


def parameter_count(params: Params) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
