"""What every decoder offers: start, step, logits and unroll."""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from imgcap_jax.errors import UserError
from imgcap_jax.models.layers import draw_words, dropout, row_keys
from imgcap_jax.models.unrolling import scan_steps
from imgcap_jax.special_tokens import BOS, PAD

Memory = Any  # a pytree whose leaves lead with [B]
Carry = Any  # a pytree whose leaves lead with [B,M]


class StepOutput(NamedTuple):
    """What one step gives.

    hidden: [B,M,F], whatever ``logits`` reads.
    attention: [B,M,N] weights over the regions, or None; may sum to less than 1 (the rest is a sentinel).
    """

    hidden: Array
    attention: Array | None


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """The settings that all decoders have. Sizes are numbers of units.

    Raises:
        UserError: a size or number below 1, or a share of dropped units that is none.
    """

    hidden_size: int = 512
    embedding_size: int = 512
    dropout: float = 0.5
    variational_dropout: bool = False
    """One mask a caption instead of one a step, on the recurrent state too (Gal & Ghahramani 2016)."""
    tied_embedding: bool = False
    """The output layer shares the word embedding's matrix (Press & Wolf 2017)."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name.endswith(("_size", "heads", "layers")) and value is not None and value < 1:
                raise UserError(f"decoder.{item.name} is {value}; give 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"decoder.dropout is {self.dropout}; give a share from 0 to below 1")

    def check_tied(self, output_size: int) -> None:
        """Raises UserError where the embedding is tied to an output layer that reads vectors of another size."""
        if self.tied_embedding and output_size != self.embedding_size:
            raise UserError(
                f"decoder: tied_embedding needs hidden_size ({output_size}) equal to "
                f"embedding_size ({self.embedding_size}); set both to the same number"
            )


class Decoder(nnx.Module):
    """A caption decoder. Training, greedy, sampling and beam search all drive these methods.

    ``keys`` [B] are PRNG keys for dropout, one a row of the batch; None means no dropout.

    Attributes:
        rate: share of units dropped.
        variational: whether a caption's dropout masks are the same at all steps.
        max_steps: how many tokens it can read; None: any number.
        room: of those, how many its cache is made for.
    """

    rate: float
    variational: bool
    max_steps: int | None = None
    room: int | None = None

    def make_room(self, steps: int) -> None:
        """Prepares for so many tokens, before ``start``: a decoder with a cache makes it as long, and no longer.

        Raises:
            UserError: it can't read so many.
        """
        if self.max_steps is None:
            return
        if steps > self.max_steps:
            raise UserError(
                f"captions take {steps} steps, but the decoder reads at most {self.max_steps} tokens; "
                f"give fewer words, or train it with a larger decoder.max_length"
            )
        self.room = steps

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

        graph, params = nnx.split(self)

        def step(constants: tuple[Any, Memory], carry: Carry, inputs: tuple[Array, Any]) -> tuple[Carry, StepOutput]:
            (params, memory), (token, keys) = constants, inputs
            return nnx.merge(graph, params).step(carry, token, memory, keys=keys)

        inputs = jnp.moveaxis(tokens, -1, 0), self._keys_of_steps(keys, tokens.shape[-1])
        outputs = scan_steps(step, (params, memory), carry, inputs)
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), outputs)

    def unroll_sampled(
        self,
        tokens: Array,
        memory: Memory,
        carry: Carry,
        probability: Array,
        sampling_keys: Array,
        *,
        keys: Array | None = None,
    ) -> StepOutput:
        """Scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099): ``unroll``, but from the second
        on each token is, with the given probability [], one drawn from the model's own distribution of it instead.

        Whether and what is drawn depends on the row's key of ``sampling_keys`` [B]. No gradient flows through draws.
        """
        graph, params = nnx.split(self)

        def step(
            constants: tuple[Any, Memory], carry: tuple[Carry, Array], inputs: tuple[Array, Array, Array, Any]
        ) -> tuple[tuple[Carry, Array], StepOutput]:
            (params, memory), (token, replaced, place, keys), (carry, drawn) = constants, inputs, carry
            decoder = nnx.merge(graph, params)
            token = jnp.where(replaced, drawn, token)
            carry, output = decoder.step(carry, token, memory, keys=keys)
            return (carry, _drawn(jax.lax.stop_gradient(decoder.logits(output)), place)), output

        M, T = tokens.shape[1:]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (2, T, M)))(sampling_keys)  # [B,2,T,M]
        coin, place = jnp.moveaxis(uniform, 0, 2)  # [T,B,M] both
        read = jnp.moveaxis(tokens, -1, 0)  # [T,B,M]
        replaced = (coin < probability) & (jnp.arange(T)[:, None, None] > 0) & (read != PAD)
        inputs = read, replaced, place, self._keys_of_steps(keys, T)
        outputs = scan_steps(step, (params, memory), (carry, jnp.zeros_like(tokens[..., 0])), inputs)
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), outputs)

    def _keys_of_steps(self, keys: Array | None, length: int) -> Array | None:
        """``step_keys`` of steps 0 to length - 1: [T,B]."""
        return None if keys is None else jax.vmap(lambda t: self.step_keys(keys, t))(jnp.arange(length))

    def step_keys(self, keys: Array | None, t: Array) -> Array | None:
        """The dropout keys [B] of step ``t``: new ones each step, or (variational) always the caption's."""
        return keys if self.variational else row_keys(keys, t)

    def drop(self, x: Array, keys: Array | None, number: int) -> Array:
        """Drops units of x [B,...]; ``number`` tells the places of a step at which units are dropped apart."""
        return dropout(x, self.rate, row_keys(keys, number))

    def drop_recurrent(self, carry: tuple[Array, Array], keys: Array | None, number: int) -> tuple[Array, Array]:
        """An LSTM's (h, c) as the next step reads it: h dropped where dropout is variational."""
        hidden, cell = carry
        return (self.drop(hidden, keys, number) if self.variational else hidden), cell


def _drawn(logits: Array, place: Array) -> Array:
    """A word from the softmax of logits [B,M,V] by a uniform number ``place`` [B,M]: int32 [B,M], never pad or bos."""
    words = jnp.arange(logits.shape[-1])
    logits = jnp.where((words == PAD) | (words == BOS), -jnp.inf, logits.astype(jnp.float32))
    return draw_words(jax.nn.softmax(logits), place).astype(jnp.int32)


def spread(leaf: Array, M: int) -> Array:
    """Repeats a row's value for its M sequences: [B,...] -> [B,M,...]."""
    return jnp.broadcast_to(leaf[:, None], (leaf.shape[0], M, *leaf.shape[1:]))
