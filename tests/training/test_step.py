"""The moving average of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.step import average_decay, first_state, train_step


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
