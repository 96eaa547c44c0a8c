"""Schedules and optimizers, compared with values computed by hand and with PyTorch."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgcap_jax.training.optimizer import Optimizer, learning_rate_of, steps_of


def test_warmup_then_cosine() -> None:
    rate = Optimizer(learning_rate=1.0, warmup_epochs=1.0, final_fraction=0.1).rate(4, 12)
    values = [float(rate(step)) for step in range(13)]
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(values[8], 0.1 + 0.9 * 0.5, rtol=1e-6)  # half-way through the cosine
    np.testing.assert_allclose(values[12], 0.1, rtol=1e-6)


def test_step_decay_counts_epochs() -> None:
    rate = Optimizer(learning_rate=1.0, schedule="step", warmup_epochs=0, decay_every_epochs=3, decay_factor=0.8).rate(
        10, 1000
    )
    np.testing.assert_allclose([rate(0), rate(29), rate(30), rate(60)], [1, 1, 0.8, 0.64], rtol=1e-6)


def test_weight_decay_excludes_biases_and_norms() -> None:
    chain = Optimizer(learning_rate=0.1, warmup_epochs=0, weight_decay=0.5, schedule="constant").build(1, 1)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}
    updates, _ = chain.update({"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros((2,))}, chain.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], 0.0)


def test_encoder_factor_scales_the_updates_of_the_encoder() -> None:
    params = {"encoder": {"kernel": jnp.ones((2, 2))}, "decoder": {"kernel": jnp.ones((2, 2))}}
    for algorithm in ("sgd", "adamw"):  # Adam would cancel a factor on the gradient
        optimizer = Optimizer(algorithm, 0.1, warmup_epochs=0, schedule="constant", clip_norm=None, encoder_factor=0.25)
        chain = optimizer.build(1, 1)
        updates, _ = chain.update(params, chain.init(params), params)
        np.testing.assert_allclose(updates["encoder"]["kernel"], 0.25 * updates["decoder"]["kernel"], rtol=1e-6)
        assert (updates["decoder"]["kernel"] < 0).all()


def test_encoder_start_epochs_delays_the_encoder() -> None:
    params = {"encoder": {"kernel": jnp.ones((2, 2))}, "decoder": {"kernel": jnp.ones((2, 2))}}
    chain = Optimizer(warmup_epochs=0, encoder_factor=0.5, encoder_start_epochs=1.5).build(2, 10)
    state, moved = chain.init(params), []
    for _ in range(5):
        updates, state = chain.update(params, state, params)
        moved.append(bool((updates["encoder"]["kernel"] != 0).all()))
        assert (updates["decoder"]["kernel"] != 0).all()
    assert moved == [False, False, False, True, True]


def test_step_schedule_equals_torch_adam_with_clipped_values() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    classic = Optimizer(
        "adam", 4e-4, schedule="step", warmup_epochs=0, clip_norm=None, clip_value=0.1, decay_every_epochs=1
    )
    chain = classic.build(steps_per_epoch=3, total_steps=9)
    start = np.array([[0.3, -2.0], [1.0, 0.1]], np.float32)
    ours, theirs = jnp.asarray(start), torch.nn.Parameter(torch.tensor(start))
    state = chain.init(ours)
    adam = torch.optim.Adam([theirs], lr=4e-4)
    decay = torch.optim.lr_scheduler.StepLR(adam, 3, 0.8)
    for step in range(7):
        gradient = np.sin(np.arange(4.0) + step).reshape(2, 2).astype(np.float32)
        updates, state = chain.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_value_([theirs], 0.1)
        adam.step()
        decay.step()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_logged_learning_rates_are_those_of_the_updates(schedule: str) -> None:
    settings = Optimizer("sgd", 0.5, schedule, warmup_epochs=1.0, decay_every_epochs=1.0, clip_norm=None)  # type: ignore[arg-type]
    chain, params = settings.build(3, 10), jnp.zeros(())
    state, updates = chain.init(params), []
    for _ in range(10):
        update, state = chain.update(jnp.ones(()), state, params)
        updates.append(-float(update))
    rate = learning_rate_of(settings, 3, 10)
    assert rate is not None
    np.testing.assert_allclose([rate(step) for step in range(10)], updates, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_any_number_of_epochs_has_a_schedule(schedule: str) -> None:
    """Steps are counted in int32, and the learning rates of all steps would not fit into memory."""
    long: dict[str, Any] = dict.fromkeys(("warmup_epochs", "decay_every_epochs", "encoder_start_epochs"), 1e300)
    settings, steps = Optimizer("sgd", 0.5, schedule, **long), steps_of(1e300, 1000)  # type: ignore[arg-type]
    rate = learning_rate_of(settings, 1000, steps)
    assert rate is not None
    assert 0 <= rate(0) <= rate(1000) < 0.5
    short = learning_rate_of(Optimizer("sgd", 0.5, schedule, warmup_epochs=0), 1000, steps)  # type: ignore[arg-type]
    assert short is not None
    np.testing.assert_allclose(short(1), 0.5)
    chain, params = settings.build(1000, steps), {"encoder": {"kernel": jnp.ones((2, 2))}}
    updates, _ = chain.update(params, chain.init(params), params)
    np.testing.assert_array_equal(updates["encoder"]["kernel"], 0.0)
    assert (steps_of(1e9, 750), steps_of(2.5, 3), steps_of(0.5, 4)) == (2**31 - 1, 8, 2)


def test_optimizer_without_a_schedule_has_no_logged_rates() -> None:
    class Plain:
        accumulate = 1
        rate = 0.1  # a number, not a schedule

        def build(self, steps_per_epoch: int, total_steps: int) -> optax.GradientTransformation:
            return optax.sgd(self.rate)

    assert learning_rate_of(Plain(), 3, 10) is None
