"""Pools against XLA's own operations: values and gradients."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import loss_and_gradients, normal
from hypothesis import strategies as st
from jax import lax

from jaxnets import functional

# Every example compiles for its own shapes; a fixed seed keeps the run repeatable and cached.
some = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def double_precision():
    """Compare in float64, where rounding cannot hide a wrong formula."""
    with jax.enable_x64(True):
        yield


@st.composite
def pools(draw):
    spatial = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    window = each(1, 5)
    strides = window if draw(st.booleans()) else each(1, 3)
    channels = draw(st.sampled_from([2, 17]))
    return (2, *each(5, 8), channels), window, strides, draw(st.sampled_from(["VALID", "SAME"]))


@some
@hypothesis.given(pools(), st.booleans())
def test_max_pool_and_its_gradient_equal_xla_with_ties_too(case, ties):
    shape, window, strides, padding = case
    x = normal(shape, 0)
    x = jnp.round(x) if ties else x

    def ours(x):
        return functional.max_pool(x, window, strides, padding)

    def theirs(x):
        full, steps = (1, *window, 1), (1, *strides, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, full, steps, padding)

    value, (gradient,) = loss_and_gradients(ours, x)
    expected, (expected_gradient,) = loss_and_gradients(theirs, x)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["VALID", "SAME", 1])
def test_average_pool_counts_only_elements_that_exist(padding):
    x = np.asarray(normal((1, 7, 1), 0))
    pooled = functional.average_pool(jnp.asarray(x), 3, 2, padding)
    starts = range(0, 5, 2) if padding == "VALID" else range(-1, 7, 2)
    expected = [x[0, max(start, 0) : start + 3, 0].mean() for start in starts]
    np.testing.assert_allclose(pooled[0, :, 0], expected, rtol=1e-12)


@some
@hypothesis.given(pools())
def test_average_pool_and_its_gradient_equal_xla(case):
    shape, window, strides, padding = case
    x = normal(shape, 0)

    def theirs(x):
        full, steps = (1, *window, 1), (1, *strides, 1)
        sums = [
            lax.reduce_window(v, 0.0, lax.add, full, steps, padding) for v in (x, jnp.ones_like(x))
        ]
        return sums[0] / sums[1]

    value, gradients = loss_and_gradients(
        lambda x: functional.average_pool(x, window, strides, padding), x
    )
    expected, expected_gradients = loss_and_gradients(theirs, x)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients[0], expected_gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("pool", [functional.max_pool, functional.average_pool])
def test_a_rest_that_fits_no_window_does_no_harm_behind_a_matrix_product(pool, window):
    # jaxlib 0.10.1 overwrites foreign memory in such a program, if it is written with a window.
    x = np.random.default_rng(0).normal(size=(36, 7, 7, 128)).astype("f4")
    kernel = np.random.default_rng(1).normal(size=(128, 256)).astype("f4") / 16
    pooled = jax.jit(lambda x, kernel: pool(functional.linear(x, kernel), window))(x, kernel)
    count = 7 // window
    y = (x @ kernel)[:, : count * window, : count * window]
    tiles = y.reshape(36, count, window, count, window, 256)
    expected = tiles.max((2, 4)) if pool is functional.max_pool else tiles.mean((2, 4))
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-5)


def test_global_average_pool_is_the_mean_over_every_position():
    x = normal((2, 3, 5, 4), 0)
    np.testing.assert_allclose(
        functional.global_average_pool(x), np.asarray(x).mean((1, 2)), rtol=1e-12
    )


def test_integers_can_be_pooled():
    pooled = functional.max_pool(jnp.arange(6).reshape(1, 6, 1), 3, padding=1)
    assert pooled[0, :, 0].tolist() == [1, 4]
