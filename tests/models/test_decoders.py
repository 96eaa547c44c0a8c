"""Decoders against transcriptions of their papers' equations in PyTorch, with the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.contract import Decoder
from imgcap_jax.models.decoders.show_tell import ShowTell

B, M, T, N, D, V = 3, 2, 7, 5, 6, 11

CONFIGS = {
    "show_tell": ShowTell(hidden_size=8, embedding_size=8, dropout=0.5),
    "show_tell_tied": ShowTell(hidden_size=8, embedding_size=8, tied_embedding=True),
    "attend": ShowAttendTell(hidden_size=8, embedding_size=4, attention_size=3, region_size=7),
    "attend_as_paper": ShowAttendTell(hidden_size=8, embedding_size=4, attention_size=3, region_size=None),
    "attend_tied": ShowAttendTell(
        hidden_size=8, embedding_size=4, attention_size=3, region_size=7, gate=False, tied_embedding=True
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> tuple[str, Decoder]:
    decoder = CONFIGS[request.param].build(D, V, dtype=jnp.float32, rngs=nnx.Rngs(0))
    # Fresh biases are 0 and would hide a forgotten one.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    state = nnx.state(decoder, nnx.Param)
    nnx.update(decoder, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state))
    return request.param, decoder


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, N, D)).astype(np.float32), rng.integers(1, V, (B, M, T)).astype(np.int32)


def log_probs(decoder: Decoder, regions: Any, tokens: Any, mask: Any = None) -> tuple[Any, Any]:
    memory, carry = decoder.start(jnp.asarray(regions), tokens.shape[1], region_mask=mask)
    outputs = decoder.unroll(jnp.asarray(tokens), memory, carry)
    return jax.nn.log_softmax(decoder.logits(outputs)), outputs.attention


def test_teacher_forced_log_probabilities_follow_the_papers_equations(
    case: tuple[str, Decoder], inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle (extra: torch)")
    name, decoder = case
    regions, tokens = inputs
    reference = _show_tell if name.startswith("show") else _attend
    expected, weights = reference(torch, decoder, regions, tokens)
    got, attention = log_probs(decoder, regions, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    if weights is not None:
        np.testing.assert_allclose(attention, weights, atol=1e-6)


def test_stepping_equals_teacher_forcing(case: tuple[str, Decoder], inputs: tuple[np.ndarray, np.ndarray]) -> None:
    _, decoder = case
    regions, tokens = inputs
    expected, _ = log_probs(decoder, regions, tokens)
    memory, carry = decoder.start(jnp.asarray(regions), M)
    for t in range(T):
        carry, output = decoder.step(carry, jnp.asarray(tokens[:, :, t]), memory)
        got = jax.nn.log_softmax(decoder.logits(output))
        np.testing.assert_allclose(got, expected[:, :, t], atol=1e-5)


def test_masked_regions_change_nothing(case: tuple[str, Decoder], inputs: tuple[np.ndarray, np.ndarray]) -> None:
    _, decoder = case
    regions, tokens = inputs
    expected, _ = log_probs(decoder, regions[:, :3], tokens)
    mask = jnp.broadcast_to(jnp.arange(N) < 3, (B, N))
    got, _ = log_probs(decoder, regions, tokens, mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_sequences_of_an_image_do_not_touch_each_other(
    case: tuple[str, Decoder], inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    _, decoder = case
    regions, tokens = inputs
    expected, _ = log_probs(decoder, regions, tokens)
    alone, _ = log_probs(decoder, regions[1:2], tokens[1:2, 1:])
    np.testing.assert_allclose(alone[0, 0], expected[1, 1], atol=1e-5)


def test_carry_leads_with_image_and_sequence(case: tuple[str, Decoder]) -> None:
    _, decoder = case
    memory, carry = decoder.start(jnp.zeros((B, N, D)), M)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(carry)} == {(B, M)}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(memory)} <= {B}


def test_dropout_belongs_to_the_row_and_has_the_stated_rate(
    inputs: tuple[np.ndarray, np.ndarray],
) -> None:
    decoder = CONFIGS["show_tell"].build(D, V, dtype=jnp.float32, rngs=nnx.Rngs(0))
    regions, tokens = inputs

    def hidden(rows: slice) -> Any:
        keys = jax.random.split(jax.random.key(3), B)[rows]
        memory, carry = decoder.start(jnp.asarray(regions[rows]), M, keys=keys)
        return decoder.unroll(jnp.asarray(tokens[rows]), memory, carry, keys=keys).hidden

    whole = hidden(slice(None))
    np.testing.assert_allclose(whole[2:], hidden(slice(2, None)), atol=1e-6)
    dropped = np.mean(np.asarray(whole) == 0)
    assert 0.35 < dropped < 0.65  # 336 units at rate 0.5: more than five standard deviations on either side
    assert not np.array_equal(np.asarray(whole[:, :, 0] == 0), np.asarray(whole[:, :, 1] == 0))


def test_tied_show_tell_of_unequal_sizes_is_told() -> None:
    with pytest.raises(UserError, match="tied_embedding needs hidden_size"):
        ShowTell(hidden_size=8, embedding_size=4, tied_embedding=True).build(D, V, dtype=jnp.float32, rngs=nnx.Rngs(0))


def _weights(torch: Any, decoder: Decoder) -> dict[str, Any]:
    flat = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))
    return {".".join(str(key.key) for key in path): torch.tensor(np.asarray(leaf)) for path, leaf in flat}


def _lstm(torch: Any, w: dict[str, Any], x: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """torch's own cell; its gates come in the order i, f, g, o, as ours."""
    kernel, size = w["lstm.gates.kernel"], h.shape[-1]
    cell = torch.nn.LSTMCell(x.shape[-1], size)
    with torch.no_grad():
        cell.weight_ih.copy_(kernel[: x.shape[-1]].T)
        cell.weight_hh.copy_(kernel[x.shape[-1] :].T)
        cell.bias_ih.copy_(w["lstm.gates.bias"])
        cell.bias_hh.zero_()
        return cell(x, (h, c))


def _vocabulary(w: dict[str, Any], hidden: Any) -> Any:
    kernel = w.get("words.kernel", w["embedding.embedding"].T)
    return (hidden @ kernel + w["words.bias"]).log_softmax(-1).numpy()


def _show_tell(torch: Any, decoder: Decoder, regions: np.ndarray, tokens: np.ndarray) -> tuple[Any, None]:
    """Vinyals et al. (2015), equations 10 to 12."""
    w = _weights(torch, decoder)
    result = np.zeros((B, M, T, V), np.float32)
    for b in range(B):
        for m in range(M):
            h = c = torch.zeros(1, 8)
            image = torch.tensor(regions[b]).mean(0, keepdim=True)
            h, c = _lstm(torch, w, image @ w["image.kernel"] + w["image.bias"], h, c)
            for t in range(T):
                h, c = _lstm(torch, w, w["embedding.embedding"][tokens[b, m, t]][None], h, c)
                result[b, m, t] = _vocabulary(w, h)[0]
    return result, None


def _attend(torch: Any, decoder: Decoder, regions: np.ndarray, tokens: np.ndarray) -> tuple[Any, Any]:
    """Xu et al. (2015), section 3.1.2 (LSTM, equations 1 to 7), 4.2 and 4.2.1 (soft attention, gate)."""
    w = _weights(torch, decoder)
    result, weights = np.zeros((B, M, T, V), np.float32), np.zeros((B, M, T, N), np.float32)
    for b in range(B):
        for m in range(M):
            a = torch.tensor(regions[b])
            if "project.kernel" in w:
                a = (a @ w["project.kernel"] + w["project.bias"]).relu()
            h, c = (a.mean(0, keepdim=True) @ w["first.kernel"] + w["first.bias"]).tanh().split(8, -1)
            for t in range(T):
                word = w["embedding.embedding"][tokens[b, m, t]][None]
                hidden = a @ w["attention.key.kernel"] + w["attention.key.bias"] + h @ w["attention.query.kernel"]
                alpha = (hidden.tanh() @ w["attention.score.kernel"]).softmax(0)
                z = (alpha * a).sum(0, keepdim=True)
                if "gate.kernel" in w:
                    z = z * (h @ w["gate.kernel"] + w["gate.bias"]).sigmoid()
                h, c = _lstm(torch, w, torch.cat([word, z], -1), h, c)
                deep = word + torch.cat([h, z], -1) @ w["deep_output.kernel"] + w["deep_output.bias"]
                result[b, m, t], weights[b, m, t] = _vocabulary(w, deep)[0], alpha[:, 0].numpy()
    return result, weights
