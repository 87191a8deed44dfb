"""Schedules and optimizers of the experiments against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness.optimizers import make_optimizer
from experiments.harness.options import Options


def norms(tree):
    return {name: float(jnp.linalg.norm(array.ravel())) for name, array in tree.items()}


def changes(options, num_steps, params, gradients, steps):
    """Return the updates and parameters of several steps on the same gradients."""
    optimizer = make_optimizer(options, num_steps)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradients, state, params)
        return updates, optax.apply_updates(params, updates), state

    state, history = optimizer.init(params), []
    for _ in range(steps):
        updates, params, state = step(params, state)
        history.append((updates, params))
    return history


@pytest.mark.parametrize(
    ("schedule", "final", "expected"),
    [
        ("linear", 0.0, [0, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0.5, [0, 1, 0.875, 0.75, 0.625, 0.5]),
        ("constant", 0.0, [0, 1, 1, 1, 1, 1]),
        ("cosine", 0.0, [0, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, final, expected):
    options = Options(
        optimizer="nesterov",
        learning_rate=1.0,
        warmup=0.2,
        weight_decay=0.0,
        schedule=schedule,
        final_rate=final,
    )
    params = gradients = {"bias": jnp.ones(1)}
    history = changes(options, 5, params, gradients, 6)
    # Nesterov momentum of a constant gradient: 1 + 0.9 + ... + 0.9^(t + 1).
    momentum = np.cumsum(0.9 ** np.arange(7))[1:]
    rates = [-float(updates["bias"][0]) for updates, _ in history] / momentum
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


def test_relative_muon_updates_are_relative_to_the_norm_and_nearly_orthogonal():
    options = Options(
        optimizer="relative_muon",
        learning_rate=0.1,
        adam_share=0.2,
        warmup=0.0,
        schedule="linear",
    )
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = {"kernel": draw(3, 3, 4, 8), "head": draw(8, 2), "bias": draw(8)}
    gradients = {name: draw(*array.shape) for name, array in params.items()}
    (_, before), (updates, _) = changes(options, 10, params, gradients, 2)
    sizes, moved = norms(before), norms(updates)
    assert moved["kernel"] == pytest.approx(0.1 * sizes["kernel"], rel=1e-4)
    # The singular values of the update are nearly equal, whatever those of the gradient.
    singular = np.linalg.svd(np.asarray(updates["kernel"]).reshape(36, 8))[1]
    assert singular.max() / singular.min() < 2
    # Adam's update for a constant gradient is the learning rate, also for the head's matrix.
    for name in ("head", "bias"):
        np.testing.assert_allclose(jnp.abs(updates[name]), 0.1 * 0.2, rtol=1e-3)


def test_relative_muon_does_not_depend_on_the_scale_of_kernel_and_gradient():
    options = Options(optimizer="relative_muon", learning_rate=0.1, warmup=0.0)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
    gradient = jax.random.normal(jax.random.key(1), kernel.shape)

    def after(scale):
        params, gradients = {"kernel": scale * kernel}, {"kernel": gradient / scale}
        return changes(options, 10, params, gradients, 3)[-1][1]["kernel"]

    np.testing.assert_allclose(after(100.0), 100 * after(1.0), rtol=1e-3, atol=1e-2)
