"""Initialization equals a compiled init, under every transformation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.training.initialization import initialize


def close(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


class Streams(nn.Module):
    """A module with a flag, an optional input, two streams and a collection."""

    scale: object = 1.0

    @nn.compact
    def __call__(self, x, lengths=None, *, train=False):
        if train:  # a constant of the program
            x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        noise = self.variable("noise", "values", lambda: jax.random.normal(self.make_rng("latent")))
        return nn.Dense(3, name="train" if lengths is None else "padded")(x) + noise.value


def test_initialized_variables_are_those_of_a_compiled_init():
    x, key = jnp.ones((2, 4)), jax.random.key(3)
    for rngs in (key, {"params": key, "latent": jax.random.key(5)}):
        for inputs, train in (((x,), False), ((x, jnp.array([1, 2])), True), ((x, None), True)):
            expected = jax.jit(functools.partial(Streams().init, train=train))(rngs, *inputs)
            close(initialize(Streams(), rngs, *inputs, train=train), expected)
    shapes = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    close(initialize(Streams(), key, shapes), initialize(Streams(), key, x))


def test_initialization_runs_nothing_of_the_network_and_compiles_equal_modules_once():
    calls = []

    class Costly(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls.append(x)
            return nn.Dense(2)(x)

    x = jnp.ones((1, 3))
    first = initialize(Costly(), jax.random.key(0), x)
    second = initialize(Costly(), jax.random.key(1), x)
    assert len(calls) == 1 and isinstance(calls[0], jax.core.Tracer)
    kernels = [variables["params"]["Dense_0"]["kernel"] for variables in (first, second)]
    assert not np.array_equal(*kernels)


def test_initialization_works_under_every_transformation_and_for_modules_that_have_no_hash():
    x, keys = jnp.ones((1, 4)), jax.random.split(jax.random.key(0), 3)
    create = functools.partial(initialize, Streams())
    rows = [create(key, x) for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    of_members = jax.vmap(lambda key: create(key, x))
    close(of_members(keys), stacked)
    close(jax.jit(of_members)(keys), stacked)
    close(jax.jit(lambda: create(jax.random.key(7), x))(), create(jax.random.key(7), x))
    shapes = jax.eval_shape(create, keys[0], x)
    assert shapes["params"]["train"]["kernel"].shape == (4, 3)
    with_array = Streams(scale=np.ones(2))
    close(initialize(with_array, keys[0], x), rows[0])
