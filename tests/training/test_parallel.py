"""Several devices, microbatches, ``pmap`` and ``shard_map``, compared with one device and with a plain loss."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from imgcap_jax.errors import UserError
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders.small_cnn import SmallCNN
from imgcap_jax.models.model import CaptionModel, split_trained
from imgcap_jax.special_tokens import BOS, PAD
from imgcap_jax.training.cross_entropy import CrossEntropy, cross_entropy_step
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.parallel import DataParallel, join_processes
from imgcap_jax.training.step import first_state

B, M, T, V, SIDE, STEPS = 8, 2, 9, 12, 16, 10
# Adam and clipping would hide a wrong factor of the gradient.
SGD = Optimizer("sgd", 0.5, schedule="constant", warmup_epochs=0, clip_norm=None)
OBJECTIVE = CrossEntropy(label_smoothing=0.1, attention_penalty=0.3)


def model() -> CaptionModel:
    rngs = nnx.Rngs(0)
    encoder = SmallCNN(widths=(8, 8), blocks=(0, 0)).build(SIDE, dtype=jnp.float32, rngs=rngs)
    decoder = ShowAttendTell(hidden_size=8, embedding_size=8, attention_size=4, region_size=None, dropout=0.5).build(
        encoder.region_size, V, dtype=jnp.float32, rngs=rngs
    )
    return CaptionModel(encoder, decoder)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    """Batches with long captions in the first half, short ones in the second half, and a padding row."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(STEPS):
        tokens = rng.integers(1, V, (B, M, T)).astype(np.int32)
        lengths = np.where(np.arange(B)[:, None] < B // 2, T, 3) - rng.integers(0, 2, (B, M))
        tokens[np.arange(T) >= lengths[..., None]] = PAD
        image = rng.integers(0, 256, (B, SIDE, SIDE, 3)).astype(np.uint8)
        weight = np.ones(B, np.float32)
        weight[-1] = 0
        result.append({"image": image, "tokens": tokens, "weight": weight, "row": np.arange(B, dtype=np.int32)})
    return result


def run(
    batches: list[dict[str, np.ndarray]],
    mode: Any,
    devices: int,
    accumulate: int = 1,
    objective: CrossEntropy = OBJECTIVE,
) -> Any:
    graph, params, frozen = split_trained(model())
    chain = SGD.build(1, STEPS)
    parallel = DataParallel(mode, jax.devices()[:devices])
    step = parallel.compile(
        cross_entropy_step(graph, objective, chain, key=jax.random.key(5), accumulate=accumulate, ema_decay=0.9)
    )
    state, frozen = parallel.replicate(first_state(params, chain, ema=True)), parallel.replicate(frozen)
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, parallel.put(batch))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def alone(batches: list[dict[str, np.ndarray]]) -> Any:
    return run(batches, "pmap", 1)


@pytest.mark.parametrize(
    ("mode", "devices", "accumulate"),
    [("pmap", 2, 1), ("pmap", 4, 1), ("pmap", 2, 2), ("shard_map", 1, 1), ("shard_map", 4, 1), ("shard_map", 2, 4)],
)
def test_parameters_do_not_depend_on_the_number_of_devices(
    batches: list[dict[str, np.ndarray]], alone: Any, mode: str, devices: int, accumulate: int
) -> None:
    expected, expected_losses = alone
    got, losses = run(batches, mode, devices, accumulate)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    for tree, other in ((got.params, expected.params), (got.ema, expected.ema)):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_first_step_follows_the_gradient_of_the_mean_over_all_words(batches: list[dict[str, np.ndarray]]) -> None:
    """The mean is computed here without sums over devices. Finite differences check its gradient."""
    graph, params, frozen = split_trained(model())
    batch = batches[0]
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), row))(
        jnp.asarray(batch["row"])
    )

    @jax.jit
    def mean(params: Any) -> Any:
        whole = nnx.merge(graph, params, frozen)
        outputs = whole.teacher_forced({name: jnp.asarray(leaf) for name, leaf in batch.items()}, keys)
        logits = whole.score_words(outputs.hidden)
        total, words = 0.0, 0
        for b in range(B - 1):
            for m in range(M):
                steps = int((batch["tokens"][b, m, 1:] != PAD).sum())
                targets = batch["tokens"][b, m, 1 : steps + 1]
                log_probs = jax.nn.log_softmax(logits[b, m, :steps])
                words_that_occur = (jnp.arange(V) != PAD) & (jnp.arange(V) != BOS)
                smooth = 0.9 * jax.nn.one_hot(targets, V) + 0.1 / (V - 2) * words_that_occur
                total -= (smooth * log_probs).sum()
                total += 0.3 * ((1 - outputs.attention[b, m, :steps].sum(0)) ** 2).sum()
                words += steps
        return total / words

    gradient = jax.grad(mean)(params)
    after, losses = run(batches[:1], "pmap", 4)
    np.testing.assert_allclose(losses[0], mean(params), rtol=1e-5)
    for new, old, slope in zip(*map(jax.tree.leaves, (after.params, params, gradient)), strict=True):
        np.testing.assert_allclose((np.asarray(old) - new) / 0.5, slope, atol=2e-5)
    leaves, tree = jax.tree.flatten(params)
    direction = jax.tree.unflatten(
        tree, [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    )

    def moved(size: float) -> Any:
        return mean(jax.tree.map(lambda p, d: p + size * d, params, direction))

    slope = sum((d * g).sum() for d, g in zip(jax.tree.leaves(direction), jax.tree.leaves(gradient), strict=True))
    np.testing.assert_allclose((moved(3e-3) - moved(-3e-3)) / 6e-3, slope, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_step_is_compiled_once_without_transfers_or_callbacks(
    batches: list[dict[str, np.ndarray]], mode: Any, compilations: list[str]
) -> None:
    graph, params, frozen = split_trained(model())
    chain = Optimizer().build(1, 1)
    one = cross_entropy_step(graph, OBJECTIVE, chain, key=jax.random.key(0), ema_decay=0.9)
    parallel = DataParallel(mode, jax.devices()[:2])
    step = parallel.compile(one)
    # The transfer guard does not detect callbacks on a CPU.
    whole = DataParallel("shard_map", jax.devices()[:2]).compile(one)
    assert "callback" not in str(jax.make_jaxpr(whole)(first_state(params, chain, ema=True), frozen, batches[0]))
    state, frozen = parallel.replicate(first_state(params, chain, ema=True)), parallel.replicate(frozen)
    on_devices = [parallel.put(batch) for batch in batches[:3]]
    compilations.clear()
    state, _ = step(state, frozen, on_devices[0])
    assert compilations  # the listener works
    compilations.clear()
    with jax.transfer_guard("disallow"):
        for batch in on_devices[1:]:
            state, _ = step(state, frozen, batch)
    assert not compilations


def test_indivisible_batch_size_is_an_error() -> None:
    with pytest.raises(UserError, match="choose a multiple of 8"):
        DataParallel("pmap", jax.devices()[:4]).check_batch_size(12, 2)


@pytest.mark.slow
def test_scheduled_sampling_does_not_depend_on_the_number_of_devices(batches: list[dict[str, np.ndarray]]) -> None:
    """Losses differ from those of teacher forcing, except at probability 0."""
    sampled = replace(OBJECTIVE, sampling=0.5, sampling_ramp_epochs=0.0)
    alone, losses = run(batches[:3], "pmap", 1, objective=sampled)
    for mode, devices, accumulate in (("pmap", 4, 1), ("shard_map", 2, 2)):
        state, _ = run(batches[:3], mode, devices, accumulate, sampled)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    _, forced_losses = run(batches[:3], "pmap", 1)
    assert np.all(np.isfinite(losses))
    assert not np.allclose(losses, forced_losses, rtol=1e-4)
    never = replace(OBJECTIVE, sampling=0.5, sampling_start_epochs=100.0)
    np.testing.assert_allclose(run(batches[:3], "pmap", 1, objective=never)[1], forced_losses, rtol=1e-5)


def test_any_error_of_a_process_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[np.ndarray] = []

    def gather(text: np.ndarray) -> np.ndarray:
        """Of process 0, here, and of process 1: what process 0 told before."""
        told.append(text)
        return np.stack([text, told[0]])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    parallel = DataParallel(devices=jax.devices()[:1])
    for error, text in (
        (OSError(5, "Input/output error", "a/b"), r"^process 0 has failed \(a/b: Input/output error\)$"),
        (MemoryError(), r"^process 0 has failed \(MemoryError\)$"),
        (UserError("no"), "^no$"),
        (UserError(""), "^UserError$"),
    ):
        told.clear()
        with pytest.raises(type(error)) as raised, parallel.failing_together():
            raise error
        assert raised.value is error or isinstance(error, UserError)
        with pytest.raises(UserError, match=text), parallel.failing_together():
            pass  # as process 1
    told[:] = [np.zeros_like(told[0])]
    with parallel.failing_together():
        pass


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("localhost:9988,2,2", "--distributed localhost:9988,2,2: INDEX is 2; with COUNT 2 it must be 0 or 1"),
        ("localhost:9988,4,7", "--distributed localhost:9988,4,7: INDEX is 7; with COUNT 4 it must be 0 to 3"),
        ("localhost:9988,0,0", "--distributed localhost:9988,0,0: COUNT is 0; it must be at least 1"),
        ("localhost,2,0", "--distributed 'localhost,2,0' is malformed; use HOST:PORT,COUNT,INDEX, for example 10.0"),
    ],
)
def test_wrong_places_of_processes_are_explained(where: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        join_processes(where)
    assert str(error.value).startswith(message)


def test_a_missing_cluster_is_one_line() -> None:
    clusters = ("SLURM", "OMPI", "KUBERNETES", "JAX", "TPU", "CLOUD", "MEGASCALE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    ended = subprocess.run(
        [sys.executable, "-m", "imgcap_jax.cli.main", "train", "scenes_demo", "--distributed"],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stderr == (
        "imgcap: --distributed: no cluster was recognised (Cloud TPU, Slurm, Open MPI, Kubernetes); use --distributed "
        "HOST:PORT,COUNT,INDEX\n"
    )
    assert ended.returncode == 2
