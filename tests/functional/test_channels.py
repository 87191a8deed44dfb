"""Sums over all axes but the channels, and broadcasts of channels, against the plain formulas."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal
from hypothesis import strategies as st

from jaxnets.functional.channels import along_channels, channel_sum


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def check_against_the_formula(leading, channels):
    """Compare the gradients of sum(sin(s)), where s is the channel sum of x * vector."""
    x, vector = normal((*leading, channels), 0), normal((channels,), 1)

    @jax.jit
    def gradients(x, vector):
        def loss(x, vector):
            total = channel_sum(x * along_channels(vector, x))
            return jnp.sum(jnp.sin(total)), total

        return jax.grad(loss, (0, 1), has_aux=True)(x, vector)

    (dx, dvector), total = gradients(x, vector)
    sums, vector = np.asarray(x).reshape(-1, channels).sum(0), np.asarray(vector)
    close = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(total, sums * vector, **close)
    np.testing.assert_allclose(dvector, np.cos(sums * vector) * sums, **close)
    row = np.cos(sums * vector) * vector
    np.testing.assert_allclose(dx, np.broadcast_to(row, x.shape), **close)


@pytest.mark.parametrize(
    ("leading", "channels"),
    [((5,), 3), ((3, 6), 700), ((2, 4), 5000), ((2, 3, 6), 3), ((2, 3, 1), 3), ((2, 2, 5, 4), 3)],
    ids=["plain", "neighbors", "wide", "batch innermost", "single column", "five axes"],
)
def test_sums_and_gradients_equal_the_formula(leading, channels):
    check_against_the_formula(leading, channels)


@pytest.mark.slow
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([1, 3, 700, 2100, 5000]),
)
def test_any_shape_equals_the_formula(leading, channels):
    check_against_the_formula(leading, channels)


def test_it_can_be_differentiated_forwards_and_twice_and_mapped():
    x, vectors = normal((2, 4, 6, 3), 0), normal((5, 3), 1)

    def ours(vector):
        return jnp.sum(jnp.tanh(channel_sum(x * along_channels(vector, x))))

    @jax.jit
    def derivatives(vectors):
        transforms = (jax.jacfwd, jax.hessian, lambda f: jax.jacrev(jax.jacfwd(f)))
        return [jax.vmap(transform(ours))(vectors) for transform in transforms]

    first, *second = derivatives(vectors)
    # The derivatives of sum(tanh(sums * vector)).
    sums = np.asarray(x).sum((0, 1, 2))
    tanh = np.tanh(sums * np.asarray(vectors))
    np.testing.assert_allclose(first, sums * (1 - tanh**2), rtol=1e-11, atol=1e-11)
    diagonal = -2 * sums**2 * tanh * (1 - tanh**2)
    for hessians in second:
        np.testing.assert_allclose(
            hessians, diagonal[:, :, None] * np.eye(3), rtol=1e-10, atol=1e-11
        )


@pytest.mark.parametrize("shape", [(600, 3), (2, 10, 30, 3)])
def test_bfloat16_is_accumulated_in_float32(shape):
    ones = jnp.ones(shape, jnp.bfloat16)  # 256 + 1 is 256 in bfloat16

    @jax.jit
    def totals(ones):
        (gradient,) = jax.vjp(lambda bias: along_channels(bias, ones), jnp.ones(3, ones.dtype))[1](
            ones
        )
        return gradient, channel_sum(ones)

    for total in totals(ones):
        assert total.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(total, np.float32), 600)


@pytest.mark.parametrize("leading", [(0, 4, 4), (3, 0), (2, 1, 1), (7,)])
def test_empty_arrays_and_single_positions_are_summed_too(leading):
    x = np.ones((*leading, 2))
    assert channel_sum(x).tolist() == [np.prod(leading)] * 2
    np.testing.assert_array_equal(
        along_channels(np.arange(2.0), x), np.broadcast_to([0.0, 1.0], x.shape)
    )


@pytest.mark.lowering
def test_the_sum_has_two_steps_on_cpu_only():
    traced = jax.jit(channel_sum).trace(jax.ShapeDtypeStruct((4, 8, 8, 16), jnp.float64))

    def sums(platform):
        return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.reduce(")

    assert (sums("cpu"), sums("tpu")) == (2, 1)


def test_dtypes_are_those_of_the_operands():
    x, vector = (jax.ShapeDtypeStruct(*a) for a in (((2, 4, 3), jnp.bfloat16), ((3,), jnp.float32)))
    assert jax.eval_shape(channel_sum, x).dtype == jnp.bfloat16
    assert jax.eval_shape(along_channels, vector, x).dtype == jnp.float32
