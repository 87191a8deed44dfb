"""A state with every kind of leaf, for the tests of checkpoints and of `resume`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets.core import Mean, TrainState

OPTIMIZER = optax.inject_hyperparams(optax.adamw)(learning_rate=0.05)


def make_state(seed=0, size=8):
    rng = jax.random.key(seed)
    params = {"linear": {"kernel": jax.random.normal(rng, (size, 2)), "bias": jnp.zeros(2)}}
    model_state = {
        "mixed": {
            "half": jnp.arange(3, dtype=jnp.bfloat16) / 7,
            "flags": jnp.array([True, False]),
            "empty": jnp.zeros((0, 3)),
            "keys": jax.random.split(rng, 3),
            "fast": jax.random.key(seed, impl="rbg"),
        }
    }
    return TrainState(jnp.zeros((), jnp.int32), rng, params, model_state, OPTIMIZER.init(params))


@jax.jit
def train_step(state, batch):
    def loss(params):
        noise = jax.random.normal(jax.random.fold_in(state.rng, state.step), (2,))
        outputs = batch["inputs"] @ params["linear"]["kernel"] + params["linear"]["bias"][None]
        return jnp.sum((outputs - noise[None]) ** 2)

    total, gradients = jax.value_and_grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    changed = {"step": state.step + 1, "params": params, "opt_state": opt_state}
    return dataclasses.replace(state, **changed), {"loss": Mean(total, jnp.float32(4))}


def source(first):
    while True:
        yield {"inputs": np.random.default_rng(first).normal(size=(4, 8)).astype(np.float32)}
        first += 1


def at_step(step, seed=0):
    return dataclasses.replace(make_state(seed), step=jnp.int32(step))


def raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_bitwise_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert raw(one).tobytes() == raw(two).tobytes()


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
