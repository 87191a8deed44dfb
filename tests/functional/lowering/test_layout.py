"""Arrays that XLA's CPU program computes once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jaxnets as jn
from jaxnets.functional.lowering.layout import materialize

X = jnp.linspace(-2.0, 3.0, 24).reshape(2, 3, 4)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def two_readers(mark):
    def function(x):
        largest = mark(jnp.maximum(x, jnp.flip(x, 1)))
        return largest[:, :, 0] + 1, jnp.flip(largest, 1) * 2

    return function


def test_two_loops_read_what_one_has_computed():
    assert compiled(two_readers(lambda x: x), X).count(" maximum(") == 2  # as XLA does it
    assert compiled(two_readers(materialize), X).count(" maximum(") == 1


def test_numbers_and_two_derivatives_are_those_of_the_array():
    def cubes(mark):
        return lambda x: jnp.sum(mark(mark(x) ** 3))

    for derivative in (cubes, lambda f: jax.grad(cubes(f))):
        np.testing.assert_array_equal(derivative(materialize)(X), derivative(lambda x: x)(X))
    second = jax.vmap(jax.vmap(jax.grad(jax.grad(lambda x: materialize(x**3)))))
    np.testing.assert_allclose(second(X[0]), 6 * X[0], rtol=1e-6)


def test_it_is_batched_and_looped_over():
    expected = jnp.exp(X) * 2
    one = jax.jit(lambda x: materialize(jnp.exp(x)) * 2)
    np.testing.assert_allclose(jax.vmap(one)(X), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.lax.map(one, X), expected, rtol=1e-6)


def test_a_sharding_passes_through():
    sharding = NamedSharding(jn.data_mesh(jax.devices()[:2]), PartitionSpec("data"))
    placed = jax.device_put(X, sharding)
    function = two_readers(materialize)
    assert "all-gather" not in compiled(function, placed)
    assert jax.jit(function)(placed)[1].sharding.is_equivalent_to(sharding, 3)


def test_a_pooled_network_looks_for_each_maximum_once(on_cpu):
    module = jn.ConvNet(num_outputs=3, features=(4,), hidden_features=())
    batch = {"inputs": jnp.ones((2, 8, 8, 1)), "labels": jnp.zeros(2, int)}
    update = jn.Update(jn.classification(module), optax.sgd(0.1))
    state = jn.create_train_state(
        module.init(jax.random.key(0), batch["inputs"]), update, rng=jax.random.key(1)
    )
    text = compiled(jn.make_train_step(update), state, batch)
    # Four places of a window are compared with its maximum, and then with the number of the place.
    maps = re.findall(r"pred\[4,4,[\d,]*2\]\S* compare\(.*direction=EQ", text)
    assert len(maps) == 4 + 1
