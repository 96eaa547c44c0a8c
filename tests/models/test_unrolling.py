"""``scan_steps`` against ``jax.lax.scan``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.models import unrolling
from imgcap_jax.models.decoders.contract import Decoder
from imgcap_jax.models.unrolling import constant_product, scan_steps

T, B, H, V = 5, 3, 4, 7


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def rows(x: jax.Array, table: jax.Array) -> jax.Array:
    return table[x]


def step(constants: Any, carry: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
    """Reads a table, multiplies by a weight twice and by its transpose once, and applies a mask."""
    token, mask = inputs
    word = constant_product(rows, token, constants["table"])
    hidden = jnp.tanh(constant_product(matmul, carry, constants["weight"]) + word + constants["bias"])
    hidden = constant_product(matmul, hidden, constants["weight"]) + hidden @ constants["weight"].T
    hidden = jnp.where(mask[:, None], hidden, carry)
    return hidden, constant_product(matmul, hidden, constants["out"])


def inputs() -> tuple[Any, jax.Array, Any]:
    rng = np.random.default_rng(0)
    shapes = {"table": (V, H), "weight": (H, H), "bias": (H,), "out": (H, V)}
    constants = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    xs = jnp.asarray(rng.integers(0, V, (T, B))), jnp.asarray(rng.random((T, B)) < 0.7)
    return constants, jnp.asarray(rng.normal(size=(B, H)), jnp.float32), xs


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.checkpoint, lambda f: jax.jit(f)], ids=["plain", "checkpoint", "jit"]
)
def test_values_and_gradients_equal_those_of_lax_scan(wrap: Any) -> None:
    constants, carry, xs = inputs()
    direction = jax.random.normal(jax.random.key(0), (T, B, V))

    def ours(constants: Any, carry: jax.Array) -> jax.Array:
        return (scan_steps(step, constants, carry, xs) * direction).sum()

    def theirs(constants: Any, carry: jax.Array) -> jax.Array:
        return (jax.lax.scan(lambda c, x: step(constants, c, x), carry, xs)[1] * direction).sum()

    value, got = jax.value_and_grad(wrap(ours), argnums=(0, 1))(constants, carry)
    expected_value, expected = jax.value_and_grad(theirs, argnums=(0, 1))(constants, carry)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_of_every_kernel_is_computed_after_the_scan(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a layer passes a copy of its weight to ``constant_product``, gradients are correct but slow."""
    name, decoder = decoder_case
    if name == "transformer":
        pytest.skip("the Transformer has no scan")
    seen: list[bool] = []
    record = unrolling._Recorder.record

    def watched(self: Any, product: Any, x: Any, weight: Any) -> Any:
        seen.append(id(weight) in self._numbers)
        return record(self, product, x, weight)

    monkeypatch.setattr(unrolling._Recorder, "record", watched)
    graph, params = nnx.split(decoder)
    regions, tokens = (jnp.asarray(x) for x in decoder_inputs)

    def total(params: Any) -> jax.Array:
        decoder = nnx.merge(graph, params)
        memory, carry = decoder.start(regions, 2, steps=tokens.shape[2])
        return decoder.unroll(tokens, memory, carry).hidden.sum()

    jax.jit(jax.grad(total)).lower(params)
    assert all(seen)
    # The step is traced twice, once for the shapes. Counted are the embedding, the cells and the attention.
    least = {"show": 2, "attend": 4, "att2in": 5, "adaptive": 5, "up": 5, "aoa": 4}[name.split("_")[0]]
    assert len(seen) >= 2 * least
