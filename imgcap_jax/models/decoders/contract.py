"""What every decoder offers: start, step, logits and unroll."""

import dataclasses
from abc import abstractmethod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.models.layers import row_keys

Memory = Any  # a pytree whose leaves lead with [B]
Carry = Any  # a pytree whose leaves lead with [B,M]


class StepOutput(NamedTuple):
    """What one step gives.

    hidden: [B,M,F], whatever ``logits`` reads.
    attention: [B,M,N] weights over the regions, or None; may sum to less than 1 (the rest is a sentinel).
    """

    hidden: Array
    attention: Array | None


class Decoder(nnx.Module):
    """A caption decoder. Training, greedy, sampling and beam search all drive these methods.

    ``keys`` [B] are PRNG keys for dropout, one a row of the batch; None means no dropout.
    """

    @abstractmethod
    def start(
        self, regions: Array, M: int, *, region_mask: Array | None = None, keys: Array | None = None
    ) -> tuple[Memory, Carry]:
        """Reads regions [B,N,D] once, for M parallel sequences an image.

        Returns:
            memory, what the steps read (leads with [B], never repeated M times), and the first carry
            (leads with [B,M], so that search can reorder it).
        """

    @abstractmethod
    def step(
        self, carry: Carry, token: Array, memory: Memory, *, keys: Array | None = None
    ) -> tuple[Carry, StepOutput]:
        """Reads one token [B,M] of each sequence and gives the next carry and its output."""

    @abstractmethod
    def logits(self, output: StepOutput) -> Array:
        """The scores of the next word, [..., V] for ``output.hidden`` [..., F]."""

    def unroll(self, tokens: Array, memory: Memory, carry: Carry, *, keys: Array | None = None) -> StepOutput:
        """Teacher forcing: reads tokens [B,M,T] in turn; the leaves of the output are [B,M,T,...]."""

        def body(carry: Carry, inputs: tuple[Array, Array]) -> tuple[Carry, StepOutput]:
            token, t = inputs
            return self.step(carry, token, memory, keys=row_keys(keys, t))

        steps = jnp.arange(tokens.shape[-1])
        _, outputs = jax.lax.scan(body, carry, (jnp.moveaxis(tokens, -1, 0), steps))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), outputs)


def check_settings(settings: Any) -> None:
    """Checks the fields of a decoder's settings that all decoders have in common: sizes and dropout.

    Raises:
        UserError: a size below 1, or a share of dropped units that is none.
    """
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if item.name.endswith("_size") and value is not None and value < 1:
            raise UserError(f"decoder.{item.name} is {value}; give 1 or more")
    if not 0 <= settings.dropout < 1:
        raise UserError(f"decoder.dropout is {settings.dropout}; give a share from 0 to below 1")


def spread(leaf: Array, M: int) -> Array:
    """Repeats a row's value for its M sequences: [B,...] -> [B,M,...]."""
    return jnp.broadcast_to(leaf[:, None], (leaf.shape[0], M, *leaf.shape[1:]))
