"""Arrays that XLA's CPU program materializes once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxnets as jn
from jaxnets.functional.lowering.layout import materialize

X = jnp.linspace(-2.0, 3.0, 24).reshape(2, 3, 4)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def two_readers(transform):
    def function(x):
        largest = transform(jnp.maximum(x, jnp.flip(x, 1)))
        return largest[:, :, 0] + 1, jnp.flip(largest, 1) * 2

    return function


@pytest.mark.lowering
def test_two_loops_read_an_array_that_is_computed_once():
    assert compiled(two_readers(lambda x: x), X).count(" maximum(") == 2  # as XLA does it
    assert compiled(two_readers(materialize), X).count(" maximum(") == 1


def test_values_and_two_derivatives_are_those_of_the_array():
    def cubes(transform):
        return lambda x: jnp.sum(transform(transform(x) ** 3))

    for derivative in (cubes, lambda f: jax.grad(cubes(f))):
        found, expected = (jax.jit(derivative(each))(X) for each in (materialize, lambda x: x))
        np.testing.assert_array_equal(found, expected)
    second = jax.jit(jax.vmap(jax.vmap(jax.grad(jax.grad(lambda x: materialize(x**3))))))
    np.testing.assert_allclose(second(X[0]), 6 * X[0], rtol=1e-6)


def test_it_is_batched_by_vmap_and_by_map():
    expected = jnp.exp(X) * 2
    one = jax.jit(lambda x: materialize(jnp.exp(x)) * 2)
    np.testing.assert_allclose(jax.vmap(one)(X), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.lax.map(one, X), expected, rtol=1e-6)


@pytest.mark.lowering
def test_it_preserves_the_sharding():
    sharding = NamedSharding(jn.data_mesh(jax.devices()[:2]), PartitionSpec("data"))
    placed = jax.device_put(X, sharding)
    function = two_readers(materialize)
    assert "all-gather" not in compiled(function, placed)
    assert jax.jit(function)(placed)[1].sharding.is_equivalent_to(sharding, 3)


@pytest.mark.lowering
def test_a_network_with_pooling_compares_each_window_once(on_cpu):
    module = jn.ConvNet(num_outputs=3, features=(4,), hidden_features=())
    batch = {"inputs": jnp.ones((2, 8, 8, 1)), "labels": jnp.zeros(2, int)}
    update = jn.Update(jn.classification(module), optax.sgd(0.1))

    def initialize():
        variables = module.init(jax.random.key(0), batch["inputs"])
        return jn.create_train_state(variables, update, rng=jax.random.key(1))

    state = jax.eval_shape(initialize)
    text = compiled(jn.make_train_step(update), state, batch)
    # The four elements of a window are compared with its maximum, then with the selected offset.
    maps = re.findall(r"pred\[4,4,[\d,]*2\]\S* compare\(.*direction=EQ", text)
    assert len(maps) == 4 + 1
