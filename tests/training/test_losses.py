"""The loss against PyTorch's and against the paper's formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from imgcap_jax.special_tokens import PAD
from imgcap_jax.training.losses import caption_loss

B, M, T, V, N = 3, 2, 6, 9, 4


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, V, (B, M, T)).astype(np.int32)
    for row, length in zip(tokens.reshape(-1, T), (6, 2, 4, 3, 5, 1), strict=True):
        row[length:] = PAD
    return rng.normal(size=(B, M, T - 1, V)).astype(np.float32), tokens


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch_cross_entropy(batch: tuple[np.ndarray, np.ndarray], smoothing: float) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle (extra: torch)")
    logits, tokens = batch
    weight = np.array([1, 1, 0], np.float32)
    sums = caption_loss(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(weight), label_smoothing=smoothing)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:2].reshape(-1, V)),
        torch.tensor(tokens[:2, :, 1:].reshape(-1)).long(),
        ignore_index=PAD,
        label_smoothing=smoothing,
        reduction="sum",
    )
    np.testing.assert_allclose(sums.objective, expected, rtol=1e-5)
    assert sums.words == (tokens[:2, :, 1:] != PAD).sum()
    if smoothing == 0:
        np.testing.assert_allclose(sums.log_likelihood, -expected, rtol=1e-5)


def test_attention_penalty_is_xu_equation_14_over_the_caption_s_own_steps(
    batch: tuple[np.ndarray, np.ndarray],
) -> None:
    logits, tokens = batch
    weight = np.array([1, 0, 1], np.float32)
    attention = np.random.default_rng(1).dirichlet(np.ones(N), (B, M, T - 1)).astype(np.float32)
    arguments = [jnp.asarray(x) for x in (logits, tokens, weight)]
    without = caption_loss(*arguments).objective
    penalised = caption_loss(*arguments, attention=jnp.asarray(attention), attention_penalty=0.7).objective
    expected = 0.0
    for b in (0, 2):
        for m in range(M):
            steps = int((tokens[b, m, 1:] != PAD).sum())
            if steps:
                expected += 0.7 * ((1 - attention[b, m, :steps].sum(0)) ** 2).sum()
    np.testing.assert_allclose(penalised - without, expected, rtol=1e-4)
