"""Sums over all but the channels, and vectors along them, against the plain formulas."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal
from hypothesis import strategies as st

from jaxnets.functional.channels import along_channels, channel_sum

# Every example compiles for its own shapes; a fixed seed keeps the run repeatable and cached.
some = hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@some
@hypothesis.given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([1, 3, 700, 2100, 5000]),
)
def test_any_shape_equals_the_plain_formula(leading, channels):
    shape = (*leading, channels)
    x, vector = normal(shape, 0), normal((channels,), 1)

    def loss(x, vector):
        return jnp.sum(jnp.sin(channel_sum(x * along_channels(vector, x))))

    def plain(x, vector):
        product = x * vector.reshape((1,) * len(leading) + (channels,))
        return jnp.sum(jnp.sin(product.reshape(-1, channels).sum(0)))

    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, vector)
    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, vector)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


def test_it_can_be_differentiated_forwards_and_twice_and_mapped():
    x, vectors = normal((2, 4, 6, 3), 0), normal((5, 3), 1)

    def ours(vector):
        return jnp.sum(jnp.tanh(channel_sum(x * along_channels(vector, x))))

    def plain(vector):
        return jnp.sum(jnp.tanh((x * vector[None, None, None]).sum((0, 1, 2))))

    for transform in (jax.jacfwd, jax.hessian, lambda f: jax.jacrev(jax.jacfwd(f))):
        found, expected = (jax.vmap(transform(f))(vectors) for f in (ours, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(600, 3), (2, 10, 30, 3)])
def test_narrow_numbers_are_summed_wide(shape):
    ones = jnp.ones(shape, jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    (gradient,) = jax.vjp(lambda bias: along_channels(bias, ones), ones.reshape(-1, 3)[0])[1](ones)
    for total in (gradient, channel_sum(ones)):
        assert total.dtype == jnp.bfloat16
        np.testing.assert_array_equal(total.astype(jnp.float32), 600)


@pytest.mark.parametrize("leading", [(0, 4, 4), (3, 0), (2, 1, 1), (7,)])
def test_nothing_and_single_positions_are_summed_too(leading):
    x = jnp.ones((*leading, 2))
    assert channel_sum(x).tolist() == [np.prod(leading)] * 2
    assert along_channels(jnp.arange(2.0), x).shape == x.shape


def test_the_sum_has_two_steps_on_cpu_only():
    traced = jax.jit(channel_sum).trace(normal((4, 8, 8, 16), 0))

    def sums(platform):
        return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.reduce(")

    assert (sums("cpu"), sums("tpu")) == (2, 1)


def test_narrow_arrays_keep_their_dtype():
    x = jnp.ones((2, 4, 3), jnp.bfloat16)
    assert channel_sum(x).dtype == jnp.bfloat16
    assert along_channels(jnp.ones(3, jnp.float32), x).dtype == jnp.float32
