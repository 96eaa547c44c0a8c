"""Captions from a model: the jitted path from a batch to decoded words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from imgcap_jax.decoding.beam import beam_search
from imgcap_jax.decoding.decoded import Decoded
from imgcap_jax.decoding.greedy import greedy
from imgcap_jax.decoding.rules import NoRepeatNgram, SuppressUnk
from imgcap_jax.errors import UserError
from imgcap_jax.models.model import CaptionModel, Frozen, Params


@dataclass(frozen=True)
class Decoding:
    """How captions are searched for."""

    beam: int = 3
    """Beams; 1 is greedy."""
    length_norm: float = 0.7
    """Captions are ranked by log-probability / length ** length_norm."""
    max_words: int = 20
    suppress_unk: bool = True
    """Never write <unk>."""
    no_repeat_ngram: int = 0
    """No n-gram of this size twice in a caption (3: trigram blocking); 0: off."""

    def but(self, beam: int | None, length_norm: float | None, max_words: int | None) -> "Decoding":
        """The same settings but for those that are given (not None).

        Raises:
            UserError: a number that no search can work with.
        """
        given = {"beam": beam, "length_norm": length_norm, "max_words": max_words}
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name, lowest in (("beam", 1), ("max_words", 1), ("length_norm", 0), ("no_repeat_ngram", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)}; give {lowest} or more")

    @property
    def rules(self) -> tuple[Any, ...]:
        """The logit rules that the fields ask for."""
        rules: list[Any] = []
        if self.suppress_unk:
            rules.append(SuppressUnk())
        if self.no_repeat_ngram:
            rules.append(NoRepeatNgram(self.no_repeat_ngram))
        return tuple(rules)


def caption_function(
    graph: nnx.GraphDef[CaptionModel], decoding: Decoding
) -> Callable[[Params, Frozen, Mapping[str, ArrayLike]], Decoded]:
    """Makes the jitted function (params, frozen, batch with "image" or "regions" [B,...]) -> Decoded [B,K,T].

    The memory is computed once an image; beams share it.
    """

    @jax.jit
    def captions(params: Params, frozen: Frozen, batch: Mapping[str, Array]) -> Decoded:
        model = nnx.merge(graph, params, frozen)
        beams = decoding.beam
        memory, carry = model.decoder.start(model.regions(batch), beams, region_mask=batch.get("region_mask"))

        def step(carry: Any, tokens: Array) -> tuple[Any, Array]:
            carry, output = model.decoder.step(carry, tokens, memory)
            return carry, model.decoder.logits(output)

        steps = decoding.max_words + 1  # the words and eos
        if decoding.beam == 1:
            return greedy(step, carry, max_steps=steps, rules=decoding.rules)
        return beam_search(
            step,
            carry,
            beam=decoding.beam,
            max_steps=steps,
            length_norm=decoding.length_norm,
            rules=decoding.rules,
        )

    return captions
