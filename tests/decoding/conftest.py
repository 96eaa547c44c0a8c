"""Tiny decoders. Each has a step function for the searches and a NumPy implementation for the reference searches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.special_tokens import BOS, EOS

IMAGES, STEPS, VOCABULARY, HIDDEN = 3, 4, 6, 5


@dataclass(frozen=True)
class Toy:
    """A family of random decoders. A prefix is a sequence of words without bos."""

    parameters: Callable[[int], dict[str, np.ndarray]]
    """seed -> arrays. The arrays "image" and "eos" have a leading batch axis."""
    start: Callable[[Any, int], Any]
    """(parameters, M) -> carry with leaves [B,M,...]."""
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]
    """(parameters, carry, tokens [B,M]) -> (carry, logits [B,M,V])."""
    log_probs: Callable[[Any, int, Sequence[int]], np.ndarray]
    """(parameters, image, prefix) -> log-probabilities of the next word, float64 [V]."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def random_eos(rng: np.random.Generator) -> np.ndarray:
    """An offset of the eos logit per image, so that some captions end immediately and others never end."""
    return rng.normal(0, 2, (IMAGES, 1))


def rnn_parameters(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"word": (VOCABULARY, HIDDEN), "back": (HIDDEN, HIDDEN), "out": (HIDDEN, VOCABULARY)}
    drawn = {name: rng.normal(0, 1, shape) for name, shape in shapes.items()}
    drawn |= {"image": rng.normal(0, 1, (IMAGES, HIDDEN)), "eos": random_eos(rng)}
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def rnn_start(p: Any, parallel: int) -> Any:
    hidden = jnp.broadcast_to(p["image"][:, None], (p["image"].shape[0], parallel, HIDDEN))
    # The logits also depend on a second leaf of another rank and dtype, so a search must reorder both leaves.
    return {"hidden": hidden, "fed": jnp.zeros(hidden.shape[:2], jnp.int32)}


def rnn_step(p: Any, carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
    hidden = jnp.tanh(carry["hidden"] @ p["back"] + p["word"][tokens])
    fed = carry["fed"] + tokens
    logits = 2 * hidden @ p["out"] + 0.5 * jnp.sin(fed)[..., None] * jnp.arange(VOCABULARY)
    return {"hidden": hidden, "fed": fed}, logits.at[..., EOS].add(p["eos"])


def rnn_log_probs(p: Any, image: int, prefix: Sequence[int]) -> np.ndarray:
    hidden, fed = p["image"][image].astype(np.float64), 0
    for word in (BOS, *prefix):
        hidden = np.tanh(hidden @ p["back"] + p["word"][word])
        fed += word
    logits = 2 * hidden @ p["out"] + 0.5 * np.sin(fed) * np.arange(VOCABULARY)
    logits[EOS] += p["eos"][image, 0]
    return log_softmax(logits)


def table_parameters(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 2, (IMAGES, STEPS, VOCABULARY, VOCABULARY))  # image, position, last word, next word
    table[..., EOS] += random_eos(rng)[..., None]
    return {"image": table.astype(np.float32)}


def table_start(p: Any, parallel: int) -> Any:
    batch = p["image"].shape[0]
    return {
        "t": jnp.zeros((batch, parallel), jnp.int32),
        "row": jnp.tile(jnp.arange(batch)[:, None], parallel),
    }


def table_step(p: Any, carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
    logits = p["image"][carry["row"], carry["t"], tokens]
    return {"t": carry["t"] + 1, "row": carry["row"]}, logits


def table_log_probs(p: Any, image: int, prefix: Sequence[int]) -> np.ndarray:
    return log_softmax(p["image"][image, len(prefix), (BOS, *prefix)[-1]])


TOYS = {
    "rnn": Toy(rnn_parameters, rnn_start, rnn_step, rnn_log_probs),
    "table": Toy(table_parameters, table_start, table_step, table_log_probs),
}


@pytest.fixture(scope="session", params=TOYS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return TOYS[request.param]


@pytest.fixture(scope="session")
def table() -> Toy:
    return TOYS["table"]
