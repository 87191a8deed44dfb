import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.core import Update
from jaxnets.objectives.supervised import classification, regression
from jaxnets.training.diagnostics import find_learning_rate, overfit_one_batch


class Network(nn.Module):
    dead: bool = False

    @nn.compact
    def __call__(self, inputs, *, train=False):
        hidden = nn.relu(nn.Dense(32)(inputs))
        return nn.Dense(3)(hidden * 0 if self.dead else hidden)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(16, 6)).astype(np.float32)
    return {"inputs": inputs, "labels": rng.integers(0, 3, 16).astype(np.int32)}


@functools.cache
def initialize(module, *shape):
    return jax.jit(module.init)(jax.random.key(0), np.zeros(shape, np.float32))


def source(batch):
    return lambda first_step: itertools.repeat(batch)


def test_a_network_overfits_one_batch_unless_its_layer_is_dead(batch):
    for dead in (False, True):
        module = Network(dead)
        update = Update(classification(module), optax.adam(1e-2))
        variables = initialize(module, 16, 6)
        report = overfit_one_batch(update, variables, batch, rng=jax.random.key(0))
        assert report.passed is not dead
        assert ("does NOT overfit" in str(report)) is dead
        assert report.losses.shape == (200,)


def test_the_best_rate_is_that_of_solo_runs(batch):
    module = Network()
    variables = initialize(module, 16, 6)
    rates = [1e-4, 1e-2, 3.0, 1e3]
    found = find_learning_rate(
        classification(module),
        optax.sgd,
        variables,
        source(batch),
        rng=jax.random.key(0),
        learning_rates=rates,
        num_steps=20,
    )

    @jax.jit
    @jax.value_and_grad
    def value_and_gradients(variables):
        logits = module.apply(variables, batch["inputs"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.mean(losses)

    losses = []
    for rate in rates:
        params = variables
        for _ in range(20):
            loss, gradients = value_and_gradients(params)
            params = jax.tree.map(lambda w, g, rate=rate: w - rate * g, params, gradients)
            losses.append(float(loss))
    losses = np.reshape(losses, (4, 20)).T
    np.testing.assert_allclose(found.losses[:, :2], losses[:, :2], rtol=1e-4)
    losses = losses[-2:].mean(axis=0)
    assert found.best == rates[int(np.nanargmin(losses))]
    assert "<- best" in str(found)


def test_a_rate_that_diverges_does_not_hide_the_others():
    inputs = np.ones((4, 2), np.float32)
    batch = {"inputs": inputs, "labels": np.ones((4, 3), np.float32)}
    module = Network()
    variables = initialize(module, 4, 2)
    search = find_learning_rate(
        regression(module),
        optax.sgd,
        variables,
        source(batch),
        rng=jax.random.key(0),
        learning_rates=[1e-2, 1e6],
        num_steps=30,
    )
    assert search.best == pytest.approx(1e-2)
    assert not np.isfinite(search.losses[-1, 1])


def test_nan_inputs_and_impossible_rates_are_named(batch):
    module = Network()
    variables = initialize(module, 16, 6)
    bad = {**batch, "inputs": jnp.full_like(batch["inputs"], jnp.nan)}
    arguments = (classification(module), optax.sgd, variables)
    with pytest.raises(ValueError, match="not finite at any learning rate"):
        find_learning_rate(*arguments, source(bad), rng=jax.random.key(0), num_steps=2)
    with pytest.raises(ValueError, match="rates above 0"):
        find_learning_rate(
            *arguments, source(batch), rng=jax.random.key(0), learning_rates=[0.0, 0.1]
        )


def test_a_source_that_ends_early_and_no_steps_are_refused(batch):
    objective, variables = classification(Network()), initialize(Network(), 16, 6)
    search = functools.partial(
        find_learning_rate, objective, optax.sgd, variables, rng=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="source ended at step 2 of 5; use a source that repeats"):
        search(lambda first: iter([batch] * 2), num_steps=5, learning_rates=[0.1])
    with pytest.raises(ValueError, match="num_steps=0 must be a positive integer"):
        search(source(batch), num_steps=0)
    with pytest.raises(ValueError, match="num_steps=0 must be a positive integer"):
        update = Update(objective, optax.sgd(0.1))
        overfit_one_batch(update, variables, batch, rng=jax.random.key(0), num_steps=0)
    with pytest.raises(TypeError, match="batches is a list"):
        search([batch])
