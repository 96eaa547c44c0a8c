"""Decoders against transcriptions of their papers' equations, one word at a time, with the same weights.

Show and Tell and soft attention are transcribed in PyTorch (optional), the others in NumPy in double precision.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.models.decoders.contract import Decoder

B, M, T, N, V = 3, 2, 7, 5, 11


def test_teacher_forced_log_probabilities_follow_the_papers_equations(
    decoder_case: tuple[str, Decoder], decoder_inputs: tuple[np.ndarray, np.ndarray]
) -> None:
    name, decoder = decoder_case
    regions, tokens = decoder_inputs
    if name.startswith(("show", "attend")):
        torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
        expected, weights = (_show_tell if name.startswith("show") else _attend)(torch, decoder, regions, tokens)
    else:
        w = _arrays(decoder)
        transcription = {"att2in": _att2in, "adaptive": _adaptive, "up": _up_down, "aoa": _aoa}.get(
            name.split("_")[0], _transformer
        )
        expected, weights = np.zeros((B, M, T, V)), np.zeros((B, M, T, N))
        for b in range(B):
            for m in range(M):
                for t, (hidden, attention) in enumerate(transcription(w, regions[b], tokens[b, m])):
                    kernel = w.get("words.kernel", w["embedding.embedding"].T)
                    expected[b, m, t] = log_softmax(hidden @ kernel + w["words.bias"])
                    weights[b, m, t] = attention
    memory, carry = decoder.start(jnp.asarray(regions), M, steps=tokens.shape[2])
    outputs = decoder.unroll(jnp.asarray(tokens), memory, carry)
    np.testing.assert_allclose(jax.nn.log_softmax(decoder.logits(outputs)), expected, atol=1e-5)
    if weights is not None:
        np.testing.assert_allclose(outputs.attention, weights, atol=1e-5)


def _arrays(decoder: Decoder) -> dict[str, np.ndarray]:
    flat = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))
    return {".".join(str(key.key) for key in path): np.asarray(leaf, np.float64) for path, leaf in flat}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.kernel"] + w.get(f"{name}.bias", 0)


def layer_norm(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * w[f"{name}.scale"] + w[f"{name}.bias"]


def lstm(w: dict[str, np.ndarray], name: str, x: np.ndarray, h: np.ndarray, c: np.ndarray, extra: Any = 0) -> Any:
    i, f, g, o = np.split(np.concatenate([x, h]) @ w[f"{name}.gates.kernel"] + w[f"{name}.gates.bias"] + extra, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def additive_scores(w: dict[str, np.ndarray], v: np.ndarray, h: np.ndarray) -> np.ndarray:
    """w^T tanh(W_v v_i + W_h h), one number per region."""
    hidden = np.tanh(linear(w, "attention.key", v) + h @ w["attention.query.kernel"])
    return (hidden @ w["attention.score.kernel"])[:, 0]


def heads_attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """One query [H] over keys and values [S,H]: result [H], mean weights [S]."""
    results, weights = [], []
    for part in np.split(np.arange(len(query)), heads):
        alpha = softmax(keys[:, part] @ query[part] / np.sqrt(len(part)))
        results.append(alpha @ values[:, part])
        weights.append(alpha)
    return np.concatenate(results), np.mean(weights, axis=0)


def _att2in(w: dict[str, np.ndarray], regions: np.ndarray, tokens: np.ndarray) -> Any:
    """Rennie et al. (2017), section 2.2."""
    image = relu(linear(w, "project", regions))
    h = c = np.zeros(8)
    for token in tokens:
        x = w["embedding.embedding"][token]
        alpha = softmax(additive_scores(w, image, h))
        attended = alpha @ image
        i, f, o, z1, z2 = np.split(linear(w, "gates", np.concatenate([x, h])), 5)
        a1, a2 = np.split(attended @ w["attended.kernel"], 2)
        c = sigmoid(i) * np.maximum(z1 + a1, z2 + a2) + sigmoid(f) * c
        h = sigmoid(o) * np.tanh(c)
        yield h, alpha


def _adaptive(w: dict[str, np.ndarray], regions: np.ndarray, tokens: np.ndarray) -> Any:
    """Lu et al. (2017), equations 6 to 16."""
    v, v_g = relu(linear(w, "project", regions)), relu(linear(w, "project_mean", regions.mean(0)))
    h = m = np.zeros(8)
    for token in tokens:
        x = np.concatenate([w["embedding.embedding"][token], v_g])
        gate = sigmoid(linear(w, "sentinel_gate", np.concatenate([x, h])))
        h, m = lstm(w, "lstm", x, h, m)
        sentinel = gate * np.tanh(m)
        z = additive_scores(w, v, h)
        z_s = np.tanh(linear(w, "sentinel_key", sentinel) + h @ w["attention.query.kernel"])
        alpha_hat = softmax(np.append(z, z_s @ w["attention.score.kernel"]))
        beta = alpha_hat[-1]
        c = softmax(z) @ v
        yield (beta * sentinel + (1 - beta) * c) + h, alpha_hat[:-1]


def _up_down(w: dict[str, np.ndarray], regions: np.ndarray, tokens: np.ndarray) -> Any:
    """Anderson et al. (2018), equations 1 to 7. The mean region has a separate matrix in the first LSTM."""
    v = relu(linear(w, "project", regions)) if "project.kernel" in w else regions
    h1 = c1 = h2 = c2 = np.zeros(8)
    for token in tokens:
        x1 = np.concatenate([h2, w["embedding.embedding"][token]])
        h1, c1 = lstm(w, "attention_lstm", x1, h1, c1, v.mean(0) @ w["mean_gates.kernel"])
        alpha = softmax(additive_scores(w, v, h1))
        h2, c2 = lstm(w, "language_lstm", np.concatenate([alpha @ v, h1]), h2, c2)
        yield h2, alpha


def _on_attention(w: dict[str, np.ndarray], name: str, query: np.ndarray, attended: np.ndarray) -> np.ndarray:
    """Huang et al. (2019), equation 3."""
    size = len(query)
    kernel, bias = w[f"{name}.both.kernel"], w[f"{name}.both.bias"]
    gate = sigmoid(query @ kernel[:size, :size] + attended @ kernel[size:, :size] + bias[:size])
    return gate * (query @ kernel[:size, size:] + attended @ kernel[size:, size:] + bias[size:])


def _aoa(w: dict[str, np.ndarray], regions: np.ndarray, tokens: np.ndarray) -> Any:
    """Huang et al. (2019), equations 7 to 12."""
    a = relu(linear(w, "project", regions))
    heads, layers = (2, 2) if "refining.0.norm.scale" in w else (4, 0)
    for number in range(layers):
        name = f"refining.{number}"
        q, k, v = np.split(linear(w, f"{name}.projections", a), 3, axis=-1)
        attended = [heads_attend(q[n], k, v, heads)[0] for n in range(N)]
        refined = [_on_attention(w, f"{name}.attended", q[n], attended[n]) for n in range(N)]
        a = layer_norm(w, f"{name}.norm", a + np.array(refined))
    k, v = np.split(linear(w, "keys_values", a), 2, axis=-1)
    h = m = c = np.zeros(8)
    for token in tokens:
        x = np.concatenate([w["embedding.embedding"][token], a.mean(0) + c])
        h, m = lstm(w, "lstm", x, h, m)
        query = linear(w, "query", h)
        attended, alpha = heads_attend(query, k, v, heads)
        c = _on_attention(w, "attended", query, attended)
        yield c, alpha


def _transformer(w: dict[str, np.ndarray], regions: np.ndarray, tokens: np.ndarray) -> Any:
    """Vaswani et al. (2017), section 3, with pre-layer normalisation, and without a cache of keys and values."""
    memory = layer_norm(w, "project_norm", relu(linear(w, "project", regions)))
    for length in range(1, len(tokens) + 1):
        positions, i = np.arange(length)[:, None], np.arange(4)
        angles = positions / 10000 ** (2 * i / 8)
        codes = np.zeros((length, 8))
        codes[:, 0::2], codes[:, 1::2] = np.sin(angles), np.cos(angles)
        x = w["embedding.embedding"][tokens[:length]] * np.sqrt(8) + codes
        for number in range(2):
            name = f"layers.{number}"
            q, k, v = np.split(linear(w, f"{name}.self_projections", layer_norm(w, f"{name}.self_norm", x)), 3, axis=-1)
            seen = np.array([heads_attend(q[t], k[: t + 1], v[: t + 1], 2)[0] for t in range(length)])
            x = x + linear(w, f"{name}.self_out", seen)
            q = linear(w, f"{name}.cross_query", layer_norm(w, f"{name}.cross_norm", x))
            k, v = np.split(linear(w, f"{name}.cross_keys_values", memory), 2, axis=-1)
            pairs = [heads_attend(q[t], k, v, 2) for t in range(length)]
            x = x + linear(w, f"{name}.cross_out", np.array([seen for seen, _ in pairs]))
            inner = relu(linear(w, f"{name}.forward_in", layer_norm(w, f"{name}.forward_norm", x)))
            x = x + linear(w, f"{name}.forward_out", inner)
        yield layer_norm(w, "norm", x[-1]), pairs[-1][1]


def _weights(torch: Any, decoder: Decoder) -> dict[str, Any]:
    flat = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))
    return {".".join(str(key.key) for key in path): torch.tensor(np.asarray(leaf)) for path, leaf in flat}


def _lstm(torch: Any, w: dict[str, Any], x: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """``torch.nn.LSTMCell``, whose gates have the same order i, f, g, o."""
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
