"""The loss, compared with PyTorch's and with the formula of the paper."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from imgcap_jax.errors import UserError
from imgcap_jax.special_tokens import BOS, EOS, PAD, UNK
from imgcap_jax.training import losses
from imgcap_jax.training.cross_entropy import CrossEntropy, _with_unknown
from imgcap_jax.training.losses import Distillation, RDrop, SmoothedCrossEntropy, caption_loss, log_normaliser

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
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    logits, tokens = batch
    weight = np.array([1, 1, 0], np.float32)
    targets = torch.tensor(tokens[:2, :, 1:].reshape(-1)).long()
    # The smoothed mass goes to every word except pad and bos.
    words = torch.ones(V)
    words[[PAD, BOS]] = 0
    wanted = (1 - smoothing) * torch.nn.functional.one_hot(targets, V) + smoothing * words / words.sum()
    sums = caption_loss(
        lambda x: x,
        jnp.asarray(logits),
        jnp.asarray(tokens),
        jnp.asarray(weight),
        word_loss=SmoothedCrossEntropy(smoothing),
    )
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:2].reshape(-1, V)),
        wanted * (targets != PAD)[:, None],
        reduction="sum",
    )
    np.testing.assert_allclose(sums.objective, expected, rtol=1e-5)
    assert sums.words == (tokens[:2, :, 1:] != PAD).sum()
    if smoothing == 0:
        np.testing.assert_allclose(sums.log_likelihood, -expected, rtol=1e-5)


def test_label_smoothing_gives_no_mass_to_words_that_cannot_occur() -> None:
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(1, V)), jnp.float32)
    loss = lambda x: SmoothedCrossEntropy(0.3)(x, jnp.array([UNK]))[0]  # noqa: E731
    # The gradient is softmax - wanted.
    wanted = jax.nn.softmax(logits) - jax.grad(loss)(logits)
    expected = np.full(V, 0.3 / (V - 2))
    expected[UNK] += 0.7
    expected[[PAD, BOS]] = 0
    np.testing.assert_allclose(wanted[0], expected, atol=1e-6)


def test_attention_penalty_is_equation_14_of_xu_over_steps_without_padding(
    batch: tuple[np.ndarray, np.ndarray],
) -> None:
    logits, tokens = batch
    weight = np.array([1, 0, 1], np.float32)
    attention = np.random.default_rng(1).dirichlet(np.ones(N), (B, M, T - 1)).astype(np.float32)
    arguments = [jnp.asarray(x) for x in (logits, tokens, weight)]
    without = caption_loss(lambda x: x, *arguments).objective
    penalised = caption_loss(lambda x: x, *arguments, attention=jnp.asarray(attention), attention_penalty=0.7).objective
    expected = 0.0
    for b in (0, 2):
        for m in range(M):
            steps = int((tokens[b, m, 1:] != PAD).sum())
            if steps:
                expected += 0.7 * ((1 - attention[b, m, :steps].sum(0)) ** 2).sum()
    np.testing.assert_allclose(penalised - without, expected, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_packed_and_unpacked_words_have_equal_gradients(
    batch: tuple[np.ndarray, np.ndarray], smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    hidden, tokens = (jnp.asarray(x) for x in batch)
    weight = jnp.array([1.0, 0.5, 0.0])
    rng = np.random.default_rng(2)
    kernel, bias = jnp.asarray(rng.normal(size=(V, V)), jnp.float32), jnp.asarray(rng.normal(size=V), jnp.float32)

    def packed(kernel: jax.Array, bias: jax.Array, hidden: jax.Array) -> jax.Array:
        score = lambda x: jnp.tanh(x) @ kernel + bias  # noqa: E731
        return 3.0 * caption_loss(score, hidden, tokens, weight, word_loss=SmoothedCrossEntropy(smoothing)).objective

    def plain(kernel: jax.Array, bias: jax.Array, hidden: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(jnp.tanh(hidden) @ kernel + bias)
        true = jnp.take_along_axis(log_probs, tokens[:, :, 1:, None], axis=-1)[..., 0]
        others = jnp.delete(log_probs, jnp.array([PAD, BOS]), axis=-1, assume_unique_indices=True)
        smoothed = (1 - smoothing) * true + smoothing * others.mean(-1)
        return -3.0 * (smoothed * (tokens[:, :, 1:] != PAD) * weight[:, None, None]).sum()

    np.testing.assert_allclose(packed(kernel, bias, hidden), plain(kernel, bias, hidden), rtol=1e-5)
    got = jax.jit(jax.grad(packed, argnums=(0, 1, 2)))(kernel, bias, hidden)
    expected = jax.grad(plain, argnums=(0, 1, 2))(kernel, bias, hidden)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@dataclass(frozen=True)
class Focal:
    """The focal loss of Lin et al. (2017), -(1 - p)^gamma log p, as a custom loss."""

    gamma: float = 2.0

    def __call__(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
        return -((1 - jnp.exp(log_p)) ** self.gamma) * log_p


@dataclass(frozen=True)
class Unlikelihood:
    """Cross-entropy plus -log(1 - p) of one word that must not occur (Welleck et al. 2020)."""

    word: int = 4

    def __call__(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits)
        wrong = jnp.where(targets == self.word, 0.0, jnp.log1p(-jnp.exp(log_probs[:, self.word])))
        return -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0] - wrong


@pytest.mark.parametrize("word_loss", [Focal(), Unlikelihood()])
def test_custom_loss_on_chunks_has_the_gradient_of_the_whole(
    batch: tuple[np.ndarray, np.ndarray], word_loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 4)
    hidden, tokens = (jnp.asarray(x) for x in batch)
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(V, V)), jnp.float32)
    weight = jnp.array([1.0, 0.5, 0.0])

    def packed(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
        return caption_loss(lambda x: x @ kernel, hidden, tokens, weight, word_loss=word_loss).objective

    def plain(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
        each = word_loss((hidden @ kernel).reshape(-1, V), tokens[:, :, 1:].reshape(-1)).reshape(B, M, T - 1)
        return (each * (tokens[:, :, 1:] != PAD) * weight[:, None, None]).sum()

    np.testing.assert_allclose(packed(kernel, hidden), plain(kernel, hidden), rtol=1e-5)
    got = jax.jit(jax.grad(packed, argnums=(0, 1)))(kernel, hidden)
    for ours, theirs in zip(got, jax.grad(plain, argnums=(0, 1))(kernel, hidden), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("wrong", [lambda logits, targets: logits[:, :1], lambda logits, targets: logits.sum()])
def test_a_loss_of_the_wrong_shape_is_refused(batch: tuple[np.ndarray, np.ndarray], wrong: Any) -> None:
    hidden, tokens = (jnp.asarray(x) for x in batch)
    with pytest.raises(UserError, match="one number per word"):
        caption_loss(lambda x: x, hidden, tokens, jnp.ones(B), word_loss=wrong)


def test_rows_that_fill_the_last_chunk_have_a_real_word(
    batch: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that cannot handle pad stays finite."""
    monkeypatch.setattr(losses, "CHUNK", 4)
    hidden, tokens = (jnp.asarray(x) for x in batch)

    def without_pad(logits: jax.Array, targets: jax.Array) -> jax.Array:
        logits = logits.at[:, PAD].set(-jnp.inf)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]

    def objective(hidden: jax.Array) -> jax.Array:
        return caption_loss(lambda x: x, hidden, tokens, jnp.ones(B), word_loss=without_pad).objective

    value, gradient = jax.value_and_grad(objective)(hidden)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("words", [1, 5, 8, 11, 14, 16, 27])
def test_scores_that_depend_on_the_number_of_rows_are_traced_for_each_chunk(
    words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 8, 6 and 2 rows: a first one, full ones, and the rest. Rows change places in halves."""
    monkeypatch.setattr(losses, "CHUNK", 8)
    rng = np.random.default_rng(6)
    weight, hidden = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, V), (27, 5)))
    targets = jnp.asarray(rng.integers(3, V, 27))
    counted = jnp.asarray(rng.permutation(np.arange(27) < words), jnp.float32)

    def packed(weight: jax.Array, hidden: jax.Array) -> jax.Array:
        def score(h: jax.Array) -> jax.Array:
            half = len(h) // 2
            return jnp.concatenate([h[:half] @ weight, h[half : 2 * half] @ weight, h[2 * half :] @ weight])

        return losses.packed_word_loss(score, hidden, targets, counted, losses.CROSS_ENTROPY)[1]

    def whole(weight: jax.Array, hidden: jax.Array) -> jax.Array:
        return (losses.CROSS_ENTROPY(hidden @ weight, targets) * counted).sum()

    value, got = jax.value_and_grad(packed, argnums=(0, 1))(weight, hidden)
    expected_value, expected = jax.value_and_grad(whole, argnums=(0, 1))(weight, hidden)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_log_normaliser_has_the_derivatives_of_logsumexp() -> None:
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(7, V)) * 20, jnp.float32)
    np.testing.assert_allclose(log_normaliser(logits), jax.nn.logsumexp(logits, axis=-1))
    check_grads(log_normaliser, (logits / 20,), order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)


def test_custom_loss_replaces_smoothed_cross_entropy() -> None:
    assert CrossEntropy(label_smoothing=0.0, word_loss=Focal(1.0)).title == "Focal(gamma=1.0)"
    with pytest.raises(UserError, match="label_smoothing belongs to cross-entropy"):
        CrossEntropy(word_loss=Focal())


def test_batch_of_padding_only_has_zero_loss_and_gradient() -> None:
    tokens = jnp.zeros((B, M, T), jnp.int32)

    def objective(hidden: jax.Array) -> jax.Array:
        return caption_loss(lambda x: x, hidden, tokens, jnp.ones(B)).objective

    value, gradient = jax.value_and_grad(objective)(jnp.ones((B, M, T - 1, V)))
    assert value == 0
    assert not np.any(gradient)


def test_scheduled_sampling_probability_rises_linearly() -> None:
    objective = CrossEntropy(sampling=0.4, sampling_start_epochs=2.0, sampling_ramp_epochs=4.0)
    shares = [float(objective.sampling_share(jnp.int32(10 * epoch), 10)) for epoch in (0, 2, 3, 4, 6, 9)]
    np.testing.assert_allclose(shares, [0, 0, 0.1, 0.2, 0.4, 0.4], rtol=1e-6)
    assert CrossEntropy().sampling_share(jnp.int32(5), 10) is None
    at_once = CrossEntropy(sampling=0.3, sampling_start_epochs=1.0, sampling_ramp_epochs=0.0)
    assert [float(at_once.sampling_share(jnp.int32(step), 10)) for step in (9, 10)] == [0, pytest.approx(0.3)]


def test_bfloat16_with_a_tied_layer_and_accumulated_gradients() -> None:
    """The output layer shares the embedding's matrix, and a scan accumulates gradients over microbatches."""
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.normal(size=(V, 5)), jnp.float32)
    tokens = jnp.asarray(rng.integers(1, V, (4, B, M, T)))

    def objective(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        hidden = jnp.tanh(table[tokens[..., :-1]]).astype(dtype)
        score = lambda x: jnp.matmul(x, table.astype(dtype).T, preferred_element_type=jnp.float32)  # noqa: E731
        return caption_loss(score, hidden, tokens, jnp.ones(B)).objective

    def summed(table: jax.Array, dtype: jnp.dtype) -> jax.Array:
        add = lambda total, part: (total + jax.grad(objective)(table, part, dtype), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros_like(table), tokens)[0]

    def plain(table: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(jnp.tanh(table[tokens[..., :-1]]) @ table.T)
        return -jnp.take_along_axis(log_probs, tokens[..., 1:, None], axis=-1).sum()

    expected = jax.grad(plain)(table)
    np.testing.assert_allclose(jax.jit(summed, static_argnums=1)(table, jnp.dtype("float32")), expected, atol=1e-4)
    rounded = jax.jit(summed, static_argnums=1)(table, jnp.dtype("bfloat16"))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, expected, atol=0.03 * np.abs(expected).max())


def test_r_drop_equals_the_formula_of_the_paper_in_torch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    rng = np.random.default_rng(5)
    logits, targets = rng.normal(size=(7, 2, V)).astype(np.float32), rng.integers(3, V, 7).astype(np.int32)
    given = torch.tensor(logits, requires_grad=True)
    logs = [torch.log_softmax(given[:, number], -1) for number in (0, 1)]
    true = [torch.nn.functional.nll_loss(log, torch.tensor(targets).long(), reduction="none") for log in logs]
    divergence = [
        torch.nn.functional.kl_div(logs[1 - number], logs[number], reduction="none", log_target=True).sum(-1)
        for number in (0, 1)
    ]
    expected = 0.5 * (true[0] + true[1] + 4.0 / 2 * (divergence[0] + divergence[1]))  # the paper's loss, halved
    loss = RDrop(4.0, SmoothedCrossEntropy())
    np.testing.assert_allclose(loss(jnp.asarray(logits), jnp.asarray(targets)), expected.detach(), rtol=1e-5)
    expected.sum().backward()
    gradient = jax.grad(lambda x: loss(x, jnp.asarray(targets)).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, given.grad, atol=1e-5)


def test_r_drop_of_one_distribution_is_the_loss_of_one_pass(batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Two passes with the same scores, through the packed chunks: the divergence is 0."""
    logits, tokens = map(jnp.asarray, batch)
    weight = jnp.ones(B)
    one = caption_loss(lambda x: x, logits, tokens, weight, word_loss=SmoothedCrossEntropy(0.1))
    two = caption_loss(
        lambda x: jnp.stack([x, x], axis=1), logits, tokens, weight, word_loss=RDrop(5.0, SmoothedCrossEntropy(0.1))
    )
    for name in ("objective", "log_likelihood", "words"):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-6)


def test_word_dropout_replaces_words_by_unk_and_nothing_else() -> None:
    rng = np.random.default_rng(6)
    tokens = np.zeros((64, 5, 12), np.int32)
    tokens[..., 0] = BOS
    for row in tokens.reshape(-1, 12):
        length = rng.integers(2, 10)
        row[1:length], row[length] = rng.integers(UNK + 1, 20, length - 1), EOS
    found = np.asarray(_with_unknown(jnp.asarray(tokens), 0.25, jax.random.split(jax.random.key(0), 64)))
    words = tokens > UNK
    np.testing.assert_array_equal(found[~words], tokens[~words])
    changed = found != tokens
    assert (found[changed] == UNK).all()
    assert 0.22 < changed[words].mean() < 0.28
    assert len({row.tobytes() for row in changed.reshape(64, -1)}) == 64  # each row has its own


def test_distillation_equals_the_formula_in_torch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    rng = np.random.default_rng(7)
    logits, targets = rng.normal(size=(7, 2, V)).astype(np.float32), rng.integers(3, V, 7).astype(np.int32)
    student = torch.tensor(logits[:, 0], requires_grad=True)
    taught = torch.nn.functional.cross_entropy(student, torch.tensor(logits[:, 1]).softmax(-1), reduction="sum")
    true = torch.nn.functional.cross_entropy(student, torch.tensor(targets).long(), reduction="sum")
    (0.7 * true + 0.3 * taught).backward()
    loss = Distillation(0.3, SmoothedCrossEntropy())
    value, gradient = jax.value_and_grad(lambda x: loss(x, jnp.asarray(targets)).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(value, (0.7 * true + 0.3 * taught).detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 0], student.grad, atol=1e-6)
    assert not gradient[:, 1].any()  # the teacher does not learn
