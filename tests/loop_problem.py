"""A small problem with steps and batch sources, for the tests of the loop, hooks and writers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets.core import Mean, TrainState

OPTIMIZER = optax.adam(0.1)


def make_state(seed=0):
    rng = jax.random.key(seed)
    params = {"linear": {"kernel": jax.random.normal(rng, (3,))}}
    return TrainState(jnp.zeros((), jnp.int32), rng, params, {}, OPTIMIZER.init(params))


def plain_step(state, batch):
    def loss(params):
        residual = batch["inputs"] @ params["linear"]["kernel"] - batch["targets"]
        return jnp.sum(batch["weights"] * residual**2), residual

    (total, residual), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
    metrics = {
        "loss": Mean(total, jnp.sum(batch["weights"])),
        "residual": Mean.of(residual, batch["weights"]),
        "outer": Mean(jnp.outer(residual, residual), jnp.sum(batch["weights"])),
    }
    params = optax.apply_updates(state.params, updates)
    changed = {"step": state.step + 1, "params": params, "opt_state": opt_state}
    return dataclasses.replace(state, **changed), metrics


train_step = jax.jit(plain_step)


@jax.jit
def scanned_step(state, batches):
    state, metrics = jax.lax.scan(plain_step, state, batches)
    return state, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)


population = jax.jit(jax.vmap(plain_step, in_axes=(0, None)))


@jax.jit
def eval_step(state, batch):
    return plain_step(state, batch)[1]


def make_batch(step, size=4):
    rng = np.random.default_rng(step)
    weights = rng.integers(0, 2, size).astype(np.float32)
    weights[0] = 1.0
    return {
        "inputs": rng.normal(size=(size, 3)).astype(np.float32),
        "targets": rng.normal(size=size).astype(np.float32),
        "weights": weights,
    }


def source(first):
    step = first
    while True:
        yield make_batch(step)
        step += 1


class Chunked:
    def __init__(self, steps_per_batch):
        self.steps_per_batch = steps_per_batch

    def __call__(self, first):
        singles = source(first)
        while True:
            batches = [next(singles) for _ in range(self.steps_per_batch)]
            yield jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def reference_losses(num_steps, seed=0):
    """Return the last state and the loss (total, count) of every step, from a Python loop."""
    state, pairs = make_state(seed), []
    for step in range(num_steps):
        state, metrics = train_step(state, make_batch(step))
        pairs.append((float(metrics["loss"].total), float(metrics["loss"].count)))
    return state, pairs


def assert_bitwise_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
