"""``scan_steps`` against ``jax.lax.scan``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.models import constants
from imgcap_jax.models.constants import with_constants
from imgcap_jax.models.decoders.contract import Decoder
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.models.unrolling import FEWEST_ROWS, _TracedStep, scan_steps

T, B, H, V = 5, 2 * FEWEST_ROWS + 1, 4, 7


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def rows(x: jax.Array, table: jax.Array) -> jax.Array:
    return table[x]


def scaled(x: jax.Array, per_row: jax.Array, weight: jax.Array) -> jax.Array:
    """Not linear in its constants, which are of the memory and of the weights."""
    return jnp.sin(per_row * x) @ weight


def kept(x: jax.Array, exists: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.where(exists[:, None], x, 0.0) @ weight


def step(weights: Any, memory: Any, carry: Any, inputs: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Calls with one weight twice, with a weight's transpose, with two constants; a mask; integers in the carry."""
    (hidden, count), (token, mask) = carry, inputs
    word = with_constants(rows, token, weights["table"])
    new = jnp.tanh(with_constants(matmul, hidden, weights["weight"]) + word + weights["bias"])
    new = with_constants(matmul, new, weights["weight"]) + new @ weights["weight"].T
    new = new + with_constants(scaled, hidden, memory["scale"], weights["out"][:, :H]) * memory["shift"]
    new = with_constants(scaled, new, memory["scale"], weights["square"])
    for weight in (weights["square"], weights["weight"]):  # a constant without a gradient, twice
        new = new + with_constants(kept, hidden, memory["exists"], weight)
    hidden = jnp.where(mask[:, None] & memory["exists"][:, None], new, hidden)
    return (hidden, count + 1), (with_constants(matmul, hidden, weights["out"]), count)


def inputs() -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    shapes = {"table": (V, H), "weight": (H, H), "bias": (H,), "out": (H, V), "square": (H, H)}
    weights = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    memory = {name: jnp.asarray(rng.normal(size=(B, H)), jnp.float32) for name in ("scale", "shift")}
    memory["exists"] = jnp.arange(B) != 3
    carry = jnp.asarray(rng.normal(size=(B, H)), jnp.float32), jnp.zeros(B, jnp.int32)
    return weights, memory, carry, (jnp.asarray(rng.integers(0, V, (T, B))), jnp.asarray(rng.random((T, B)) < 0.7))


def by_lax(weights: Any, memory: Any, carry: Any, xs: Any) -> Any:
    return jax.lax.scan(lambda carry, x: step(weights, memory, carry, x), carry, xs)[1]


# The numbers of counted steps choose how many rows the products of the weights' gradients have: all, 3/4, 5/8.
LENGTHS = {
    "none": None,
    "all": [T] * B,
    "descending": sorted((np.arange(B) % T + 1).tolist(), reverse=True),
    "unordered": (np.arange(B) * 3 % T + 1).tolist(),
    "short second half": [T] * (B // 2) + [2] * (B - B // 2),
    "only short": [2] * B,
    "none at all": [0] * B,
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_values_and_gradients_equal_those_of_lax_scan(lengths: Any) -> None:
    weights, memory, (hidden, count), xs = inputs()
    counted = jnp.arange(T)[:, None] < (jnp.full(B, T) if lengths is None else jnp.asarray(lengths))  # [T,B]
    direction = jax.random.normal(jax.random.key(0), (T, B, V))
    ours = lambda *a: scan_steps(step, *a, None if lengths is None else jnp.asarray(lengths))  # noqa: E731

    def by_lax_counted(*a: Any) -> Any:
        y, count = by_lax(*a)
        return y * counted[..., None], count * counted

    def total(scan: Any, weights: Any, scale: Any, hidden: Any) -> tuple[jax.Array, jax.Array]:
        """A loss that does not leave out the steps after a row's end."""
        y, counts = scan(weights, memory | {"scale": scale}, (hidden, count), xs)
        return (y * direction + jnp.cos(y)).sum(), counts

    (value, aux), got = jax.jit(jax.value_and_grad(lambda *a: total(ours, *a), argnums=(0, 1, 2), has_aux=True))(
        weights, memory["scale"], hidden
    )
    (expected_value, expected_aux), expected = jax.value_and_grad(
        lambda *a: total(by_lax_counted, *a), argnums=(0, 1, 2), has_aux=True
    )(weights, memory["scale"], hidden)
    undifferentiated, _ = total(ours, weights, memory["scale"], hidden)
    np.testing.assert_allclose(undifferentiated, expected_value, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(aux, expected_aux)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def test_steps_of_captions_that_have_ended_are_not_computed() -> None:
    weights, memory, carry, xs = inputs()
    lengths = jnp.where(jnp.arange(B) < B // 2, 4, 2)
    (y, count), _ = jax.vjp(lambda weights: scan_steps(step, weights, memory, carry, xs, lengths), weights)
    computed = np.asarray(y != 0).any(axis=-1)  # [T,B]
    expected = np.arange(T)[:, None] < np.asarray(lengths)
    np.testing.assert_array_equal(computed, expected)
    np.testing.assert_array_equal(count, np.where(expected, np.arange(T)[:, None], 0))


def test_a_scan_until_all_rows_have_ended() -> None:
    """The length of each row depends on what the steps compute: they end after 1, 2 or 3 steps."""
    weights, memory, carry, xs = inputs()
    memory["ends"] = jnp.arange(B) % 3 + 1
    direction = jax.random.normal(jax.random.key(0), (T, B, V))

    def counting(weights: Any, memory: Any, carry: Any, x: Any) -> Any:
        following, y = step(weights, memory, carry[0], x)
        return (following, following[1] >= memory["ends"]), y

    def ours(weights: Any) -> Any:
        start = carry, jnp.zeros(B, bool)
        y, counts = scan_steps(counting, weights, memory, start, xs, until=lambda carry: carry[1])
        return (y * direction + jnp.cos(y)).sum(), counts

    def theirs(weights: Any) -> Any:
        y = by_lax(weights, memory, carry, xs)[0] * (jnp.arange(T)[:, None] < memory["ends"])[..., None]
        return (y * direction + jnp.cos(y)).sum()

    (value, counts), got = jax.value_and_grad(ours, has_aux=True)(weights)
    expected_value, expected = jax.value_and_grad(theirs)(weights)
    np.testing.assert_allclose([value, ours(weights)[0]], [expected_value] * 2, rtol=1e-4)
    assert int(counts.max()) == 2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "wrap",
    [jax.checkpoint, jax.jit, jax.vmap, lambda f: lambda h: jax.lax.cond(True, f, lambda h: h, h)],
    ids=["checkpoint", "jit", "vmap", "cond"],
)
def test_calls_within_another_transformation_are_plain_calls(wrap: Any) -> None:
    weights, _, (hidden, _), (tokens, _) = inputs()

    def wrapped(weights: Any, memory: Any, carry: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = wrap(lambda h: jnp.tanh(with_constants(matmul, h, weights["weight"])))(carry)
        carry = carry + with_constants(rows, token, weights["table"])
        return carry, carry

    def total(scan: Any, weights: Any) -> jax.Array:
        return (scan(weights) ** 2).sum()

    got = jax.grad(lambda w: total(lambda w: scan_steps(wrapped, w, (), hidden, tokens), w))(weights)
    expected = jax.grad(
        lambda w: total(lambda w: jax.lax.scan(lambda c, x: wrapped(w, (), c, x), hidden, tokens)[1], w)
    )(weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.vmap], ids=["checkpoint", "vmap"])
def test_other_transformations(wrap: Any) -> None:
    weights, memory, carry, xs = inputs()
    lengths = jnp.asarray(LENGTHS["unordered"])
    run = lambda bias: (scan_steps(step, weights | {"bias": bias}, memory, carry, xs, lengths)[0] ** 2).sum()  # noqa: E731
    if wrap is jax.vmap:
        biases = jnp.stack([weights["bias"], weights["bias"] + 1])
        np.testing.assert_allclose(
            jax.vmap(jax.grad(run))(biases), [jax.grad(run)(bias) for bias in biases], rtol=1e-3, atol=1e-3
        )
    else:
        np.testing.assert_allclose(jax.grad(wrap(run))(weights["bias"]), jax.grad(run)(weights["bias"]), rtol=1e-4)


def test_what_is_the_same_at_all_steps_is_kept_once() -> None:
    """In bfloat16 every step converts the weights. Copies per step would take T times the memory of the model."""
    decoder = UpDown(hidden_size=8, embedding_size=6, attention_size=5).build(
        9, V, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    memory, carry = decoder.start(jnp.ones((2, 3, 9)), 2, steps=T)
    graph, params = nnx.split(decoder)
    run = lambda params, memory, carry, token: nnx.merge(graph, params).step(carry, token, memory)  # noqa: E731
    traced = _TracedStep(run, params, memory, carry, jnp.ones((2, 2), jnp.int32))
    weights = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert not weights & {leaf.shape for leaf in traced.shapes.kept}
    assert len(traced.calls) == 6  # embedding, two cells, query, scores, weighted sum
    assert all(unused for unused, leaf in zip(traced.unused, jax.tree.leaves(params), strict=False) if leaf.ndim > 1)


def test_gradient_of_every_kernel_is_computed_after_the_scan(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a layer passes a copy of its weight to ``with_constants``, gradients are correct but slow."""
    name, decoder = decoder_case
    if name == "transformer":
        pytest.skip("the Transformer has no scan")
    seen: list[bool] = []
    call = constants.Recorder.call

    def watched(self: Any, function: Any, x: Any, of: Any) -> Any:
        seen.extend(id(constant) in self._indices for constant in of)
        return call(self, function, x, of)

    monkeypatch.setattr(constants.Recorder, "call", watched)
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
