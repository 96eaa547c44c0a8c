"""The contract of a decoder: settings that build it, and the methods start, step and logits.

Training, greedy search, sampling, all beam searches, ensembles and self-critical training drive the same methods. A new
decoder is one file with a settings class (see ``DecoderSettings``) and a subclass of ``Decoder``; docs/adding_parts.md
has an example. ``imgcap_jax.models.layers`` has LSTM cells, attention, dropout and output layers.

Letters: B images per batch, M parallel sequences per image (captions in training, beams in search), T tokens, N regions
per image, D region feature size, F size of ``output.hidden``, V vocabulary size.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from imgcap_jax.errors import UserError
from imgcap_jax.models.layers import draw_words, dropout, row_keys
from imgcap_jax.models.unrolling import scan_steps
from imgcap_jax.special_tokens import BOS, EOS, PAD

Memory = Any  # a pytree whose leaves lead with [B]
Carry = Any  # a pytree whose leaves lead with [B,M]


class StepOutput(NamedTuple):
    """The output of one step.

    hidden: [B,M,F], the input of ``logits``.
    attention: float32 [B,M,N], weights over the regions (of several heads, their mean), or None. They can sum to less
        than 1 (the rest goes to a sentinel).
    """

    hidden: Array
    attention: Array | None


class DecoderSettings(Protocol):
    """Settings of a decoder: a frozen dataclass whose fields become the options ``--decoder.FIELD``.

    Two optional attributes are read as well:

    - ``max_length``: the number of tokens that the decoder can read. Without it, or with None, there is no limit. It is
      checked against ``data.max_words + 1`` and ``decoding.max_words`` before training and before decoding.
    - the fields of ``CommonSettings``, if the class inherits them.
    """

    def build(self, region_size: int, vocabulary_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "Decoder":
        """Makes the decoder.

        Args:
            region_size: D.
            vocabulary_size: V.
            dtype: type that matrix products are computed in; parameters are float32.
            rngs: the stream ``params`` initialises parameters.

        Raises:
            UserError: the settings do not go together.
        """
        ...


def check_length(settings: DecoderSettings, tokens: int, setting: str) -> None:
    """Raises UserError if a decoder of these settings cannot read this many tokens; ``setting`` asks for them."""
    longest = getattr(settings, "max_length", None)
    if longest is not None and tokens > longest:
        raise UserError(
            f"decoder.max_length is {longest}, but {setting} needs {tokens} tokens; use a larger decoder.max_length or "
            f"fewer words"
        )


def has_attention(settings: DecoderSettings, region_size: int) -> bool:
    """Whether a decoder of these settings returns the attention of each step. Nothing is computed."""

    def attention() -> Array | None:
        decoder = settings.build(region_size, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
        memory, carry = decoder.start(jnp.zeros((1, 2, region_size)), 1, steps=1)
        return decoder.step(carry, jnp.zeros((1, 1), jnp.int32), memory)[1].attention

    return jax.eval_shape(attention) is not None


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """The settings that all decoders of ``imgcap_jax`` have. Sizes are numbers of units.

    The Transformer refuses ``variational_dropout``.

    Fields whose names end in ``_size``, ``heads`` or ``layers`` must be positive or None; this is checked for the
    fields of subclasses too.

    Raises:
        UserError: a size is not positive, or ``dropout`` is not at least 0 and below 1.
    """

    hidden_size: int = 512
    """Units of the recurrent state, or of a layer."""
    embedding_size: int = 512
    """Size of the word vectors."""
    dropout: float = 0.5
    """Probability of dropping a unit."""
    variational_dropout: bool = False
    """One dropout mask per caption instead of one per step, also on the recurrent state (Gal & Ghahramani 2016)."""
    tied_embedding: bool = False
    """The output layer shares the matrix of the word embedding (Press & Wolf 2017)."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name.endswith(("_size", "heads", "layers")) and value is not None and value < 1:
                raise UserError(f"decoder.{item.name} is {value}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"decoder.dropout is {self.dropout}; it must be at least 0 and below 1")

    def check_tied(self, output_size: int) -> None:
        """Raises UserError if the embedding is tied to an output layer that reads vectors of another size."""
        if self.tied_embedding and output_size != self.embedding_size:
            raise UserError(
                f"decoder: tied_embedding needs hidden_size ({output_size}) equal to "
                f"embedding_size ({self.embedding_size}); set both to the same number"
            )


class Decoder(nnx.Module):
    """A caption decoder. A subclass implements ``start``, ``step`` and ``logits``.

    All methods are traced by ``jax.jit``: they must be pure, and Python control flow must depend on shapes only. Every
    parameter is an ``nnx.Param``; other variables are not saved.

    **Dropout.** ``dropout_keys`` [B] are PRNG keys, one per row of the batch; None means no dropout. A subclass sets
    ``rate`` and ``variational`` from its settings and calls ``drop`` (and ``drop_recurrent`` for an LSTM's state).
    Masks depend on the row's key alone, so that any number of devices draws the same ones. For this reason
    ``nnx.Dropout`` must not be used.

    **Rows.** A step computes each row of the batch independently of the other rows and of their number: a search
    reorders rows, and training continues with the first half of them when all captions of the others have ended.

    **Speed.** If a step uses ``layers.Linear`` and ``layers.Embed``, the gradient of each weight is computed in one
    product after the scan, not in a thin one per step. For other functions of weights or memory, see
    ``models/constants.py``.

    **Another run's weights.** ``--init-from`` copies parameters by path and maps the axes in ``word_axes`` by word,
    because the other run can have another vocabulary.

    Attributes:
        rate: probability of dropping a unit.
        variational: whether the dropout masks of a caption are the same at all steps.
        word_axes: the end of a parameter's path -> the axis that counts words. The default fits an embedding
            ``self.embedding = Embed(...)`` and an output layer ``self.words = WordLogits(...)``.
    """

    rate: float = 0.0
    variational: bool = False
    word_axes: ClassVar[Mapping[str, int]] = {
        "['embedding']['embedding']": 0,
        "['words']['kernel']": 1,
        "['words']['bias']": 0,
    }

    @abstractmethod
    def start(
        self,
        regions: Array,
        M: int,
        *,
        steps: int,
        region_mask: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> tuple[Memory, Carry]:
        """Reads the regions once, for M parallel sequences per image.

        Args:
            regions: float32 [B,N,D].
            M: sequences per image.
            steps: T, the number of tokens that will be read. A cache needs this length, which differs between training
                and decoding.
            region_mask: bool [B,N], the regions that exist; None: all of them.
            dropout_keys: [B], or None.

        Returns:
            memory: what every step reads, computed once. The first axis of every leaf is B; nothing is repeated M
                times.
            carry: the state before the first token. Every leaf, a step counter included, leads with [B,M], so that a
                search can reorder it.
        """

    @abstractmethod
    def step(
        self, carry: Carry, token: Array, memory: Memory, *, dropout_keys: Array | None = None
    ) -> tuple[Carry, StepOutput]:
        """Reads one token int32 [B,M] of each sequence; returns the next carry and the output.

        The next carry has the shapes and dtypes of the first one. After eos, a search feeds pad; its output is ignored.
        """

    @abstractmethod
    def logits(self, output: StepOutput) -> Array:
        """The scores of the next word: ``output.hidden`` [...,F] -> float32 [...,V].

        It must read ``output.hidden`` only, and need not mask pad and bos. Training calls it once for all steps, in
        chunks of words.
        """

    def unroll(self, tokens: Array, memory: Memory, carry: Carry, *, dropout_keys: Array | None = None) -> StepOutput:
        """Teacher forcing: reads tokens [B,M,T] one after the other; the leaves of the output are [B,M,T,...].

        Outputs after the last word of all sequences of a row are zeros. In training, these steps are skipped where
        possible. The cost is lowest if the rows of the longest captions come first.

        A decoder that can read all tokens at once overrides this. The result must equal that of stepping, dropout
        included (see ``step_keys``).
        """
        graph, params = nnx.split(self)

        def step(params: Any, memory: Memory, carry: Carry, inputs: tuple[Array, Any]) -> tuple[Carry, StepOutput]:
            token, step_keys = inputs
            return nnx.merge(graph, params).step(carry, token, memory, dropout_keys=step_keys)

        inputs = jnp.moveaxis(tokens, -1, 0), self._keys_of_steps(dropout_keys, tokens.shape[-1])
        outputs = scan_steps(step, params, memory, carry, inputs, steps_of(tokens))
        return _steps_third(outputs)

    def unroll_sampled(
        self,
        tokens: Array,
        memory: Memory,
        carry: Carry,
        probability: Array,
        sampling_keys: Array,
        *,
        dropout_keys: Array | None = None,
    ) -> StepOutput:
        """Scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099).

        As ``unroll``, but each token except the first is replaced, with the given probability [], by one drawn from the
        model's own distribution. The draws depend on ``sampling_keys`` [B]. No gradient flows through them.
        """
        graph, params = nnx.split(self)

        def step(
            params: Any, memory: Memory, carry: tuple[Carry, Array], inputs: tuple[Array, Array, Array, Any]
        ) -> tuple[tuple[Carry, Array], StepOutput]:
            (token, replaced, place, step_keys), (carry, drawn) = inputs, carry
            decoder = nnx.merge(graph, params)
            token = jnp.where(replaced, drawn, token)
            carry, output = decoder.step(carry, token, memory, dropout_keys=step_keys)
            return (carry, _drawn(_fixed_logits(graph, params, output), place)), output

        M, T = tokens.shape[1:]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (2, T, M)))(sampling_keys)  # [B,2,T,M]
        coin, place = jnp.moveaxis(uniform, 0, 2)  # [T,B,M] both
        read = jnp.moveaxis(tokens, -1, 0)  # [T,B,M]
        replaced = (coin < probability) & (jnp.arange(T)[:, None, None] > 0) & (read != PAD)
        inputs = read, replaced, place, self._keys_of_steps(dropout_keys, T)
        outputs = scan_steps(step, params, memory, (carry, jnp.zeros_like(tokens[..., 0])), inputs, steps_of(tokens))
        return _steps_third(outputs)

    @property
    def reads_at_once(self) -> bool:
        """Whether ``unroll`` reads all tokens at once, because a subclass has its own. Stepping then costs more."""
        return type(self).unroll is not Decoder.unroll

    def unroll_chosen(
        self,
        choose: Callable[[Array, Array], tuple[Array, Array]],
        memory: Memory,
        carry: Carry,
        xs: Array,
        *,
        dropout_keys: Array | None = None,
    ) -> tuple[StepOutput, Array, Array]:
        """Reads the words that it chooses itself, until every sequence has ended.

        The outputs equal those of ``unroll`` for these words, and have the same gradients. No gradient flows through
        the choice.

        Args:
            choose: (logits float32 [B,M,V], x [B,M]) -> (words int32 [B,M], numbers float32 [B,M]). It must not close
                over any array.
            memory, carry: from ``start``.
            xs: [B,M,T], what ``choose`` reads at each step. T is the maximum number of words, including eos.
            dropout_keys: [B], or None.

        Returns:
            The outputs [B,M,T,...]; the words int32 [B,M,T]: words, eos, pad; the numbers float32 [B,M,T], 0 after eos.
        """
        graph, params = nnx.split(self)

        def step(params: Any, memory: Memory, carry: Any, inputs: tuple[Array, Any]) -> Any:
            (carry, last, ended), (x, step_keys) = carry, inputs
            carry, output = nnx.merge(graph, params).step(carry, last, memory, dropout_keys=step_keys)
            words, numbers = choose(_fixed_logits(graph, params, output), x)
            words = jnp.where(ended, PAD, words)
            return (carry, words, ended | (words == EOS)), (output, words, jnp.where(ended, 0.0, numbers))

        start, ended = jnp.full(xs.shape[:2], BOS, jnp.int32), jnp.zeros(xs.shape[:2], bool)
        inputs = jnp.moveaxis(xs, -1, 0), self._keys_of_steps(dropout_keys, xs.shape[-1])
        ys = scan_steps(step, params, memory, (carry, start, ended), inputs, until=lambda carry: carry[2].all(axis=1))
        assert PAD == 0  # the words of steps that are not computed are zeros
        return _steps_third(ys)

    def _keys_of_steps(self, dropout_keys: Array | None, length: int) -> Array | None:
        """``step_keys`` of steps 0 to length - 1: [T,B]."""
        if dropout_keys is None:
            return None
        return jax.vmap(lambda t: self.step_keys(dropout_keys, t))(jnp.arange(length))

    def step_keys(self, dropout_keys: Array | None, t: Array) -> Array | None:
        """The dropout keys [B] of step ``t``: other keys at each step or, if variational, the same ones."""
        return dropout_keys if self.variational else row_keys(dropout_keys, t)

    def drop(self, x: Array, dropout_keys: Array | None, number: int) -> Array:
        """Dropout of x [B,...]; ``number`` distinguishes the places within a step where units are dropped."""
        return dropout(x, self.rate, row_keys(dropout_keys, number))

    def drop_recurrent(
        self, carry: tuple[Array, Array], dropout_keys: Array | None, number: int
    ) -> tuple[Array, Array]:
        """An LSTM's (h, c) as the next step reads it: with variational dropout, units of h are dropped."""
        hidden, cell = carry
        return (self.drop(hidden, dropout_keys, number) if self.variational else hidden), cell


def steps_of(tokens: Array) -> Array:
    """The number of steps [B] after which no sequence of a row reads a word that another word follows.

    Args:
        tokens: int32 [B,M,T], the input of the steps: bos, words, then (if there is room) eos and pad.
    """
    places = jnp.arange(1, tokens.shape[-1] + 1, dtype=jnp.int32)
    return jnp.where((tokens != PAD) & (tokens != EOS), places, 0).max(axis=(1, 2))


def _steps_third(ys: Any) -> Any:
    """Stacked outputs of steps, leaves [T,B,M,...] -> [B,M,T,...]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), ys)


def _fixed_logits(graph: nnx.GraphDef[Decoder], params: Any, output: StepOutput) -> Array:
    """The logits [B,M,V] of an output, as constants: neither the output nor the parameters get a gradient."""
    params, output = jax.lax.stop_gradient((params, output))
    return nnx.merge(graph, params).logits(output)


def _drawn(logits: Array, place: Array) -> Array:
    """Words from the softmax of logits [B,M,V] by uniform numbers ``place`` [B,M]: int32 [B,M], never pad or bos."""
    words = jnp.arange(logits.shape[-1])
    logits = jnp.where((words == PAD) | (words == BOS), -jnp.inf, logits.astype(jnp.float32))
    return draw_words(logits, place)[0]


def spread(leaf: Array, M: int) -> Array:
    """Repeats the value of a row for its M sequences: [B,...] -> [B,M,...]."""
    return jnp.broadcast_to(leaf[:, None], (leaf.shape[0], M, *leaf.shape[1:]))
