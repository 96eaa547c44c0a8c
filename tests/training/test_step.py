"""The moving average of the parameters, and the keys of steps."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from imgcap_jax.experiment import Experiment
from imgcap_jax.train import train
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.objective import StepSetup
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.step import average_decay, first_state, keys_of_rows, step_stream, train_step


@pytest.mark.parametrize("initialised", [True, False])
def test_average_warms_up_only_from_random_parameters(initialised: bool) -> None:
    """Parameters fall by 1 per step, from 10. The average is compared with a loop."""

    def loss(params: Any, constants: Any, batch: Any, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        return params["x"], jnp.ones(())

    decay = average_decay(0.5, initialised=initialised)
    step = train_step(loss, lambda sums: (sums, {"loss": sums}), optax.sgd(1.0), ema_decay=decay)
    parallel = DataParallel("pmap", jax.devices()[:1])
    compiled = parallel.compile(step)
    state = parallel.replicate(first_state({"x": jnp.array(10.0)}, optax.sgd(1.0), ema=True))
    expected = 10.0
    for t in range(12):
        state, _ = compiled(state, None, parallel.put({"row": np.zeros(1, np.int32)}))
        kept = 0.5 if initialised else min(0.5, (1 + t) / (10 + t))
        expected = kept * expected + (1 - kept) * (9.0 - t)
        np.testing.assert_allclose(state.best_guess["x"], expected, rtol=1e-6)


def test_decay_during_warm_up() -> None:
    schedule = average_decay(0.999, initialised=False)
    assert callable(schedule)
    found = [float(schedule(jnp.float32(step))) for step in (0, 890, 8990, 9100)]
    np.testing.assert_allclose(found, [0.1, 0.99, 0.999, 0.999], rtol=1e-5)
    assert average_decay(0.0, initialised=False) == 0
    assert average_decay(0.999, initialised=True) == 0.999


@pytest.mark.parametrize("seed", [0, 7])
def test_keys_of_steps_are_none_of_the_parameters(seed: int) -> None:
    """Neither the keys of rows nor those of whole steps are among the keys that ``nnx.Rngs`` gives to parameters."""

    def data(keys: Any) -> set[tuple[int, ...]]:
        return {tuple(map(int, pair)) for pair in np.asarray(jax.random.key_data(keys)).reshape(-1, 2)}

    rngs = nnx.Rngs(seed)
    parameters = data(rngs.default.key[...]) | {one for _ in range(300) for one in data(rngs.params())}
    key, steps = step_stream(seed), jnp.arange(300)
    of_steps = data(key) | data(jax.vmap(lambda step: jax.random.fold_in(key, step))(steps))
    of_rows = data(jax.vmap(lambda step: keys_of_rows(key, step, jnp.arange(16)))(steps))
    assert len(parameters) == len(of_steps) == 301
    assert len(of_rows) == 4800
    assert not parameters & of_steps
    assert not parameters & of_rows
    # Without the constant they are the same.
    shared = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(seed), step))(steps)
    assert data(shared) <= parameters


def test_training_uses_the_stream_of_steps(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def make_step(self: CrossEntropy, setup: StepSetup) -> Any:
        raise Seen(jax.random.key_data(setup.key))

    monkeypatch.setattr(CrossEntropy, "make_step", make_step)
    with pytest.raises(Seen) as seen:
        train(tiny, tmp_path / "run", cache=tmp_path / "cache", show=lambda line: None)
    np.testing.assert_array_equal(seen.value.args[0], jax.random.key_data(step_stream(tiny.training.seed)))
