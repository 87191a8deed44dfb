"""Pooling and its gradients against a NumPy loop over windows."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal
from direct_convolution import resolve_padding
from hypothesis import strategies as st

from jaxnets import functional


@pytest.fixture(autouse=True)
def double_precision():
    """Compare in float64, where rounding cannot hide a wrong formula."""
    with jax.enable_x64(True):
        yield


def windows(x, window, strides, padding, fill):
    """Pad and cut into windows, [batch, *output size, channels, elements of a window]."""
    axes = tuple(range(1, x.ndim - 1))
    padded = np.pad(x, [(0, 0), *padding, (0, 0)], constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(padded, window, axis=axes)
    view = view[(slice(None), *(slice(None, None, stride) for stride in strides))]
    return view.reshape(*view.shape[: x.ndim], -1)


def direct_pools(x, dy, window, strides, padding):
    """Return maximum and mean of each window, and the gradients for the cotangents dy(y)."""
    x = np.asarray(x)
    sizes = x.shape[1:-1]
    pairs = resolve_padding(padding, sizes, window, strides, (1,) * len(sizes))
    # Where each element of a window comes from; -1 is padding.
    sources = windows(np.arange(x.size).reshape(x.shape), window, strides, pairs, -1)
    values = windows(x, window, strides, pairs, -np.inf)

    def scatter(indices, cotangents):
        dx = np.zeros(x.size + 1)  # the last one collects what belongs to padding
        np.add.at(dx, indices, cotangents)
        return dx[:-1].reshape(x.shape)

    first = np.argmax(values, -1, keepdims=True)
    maximum = np.take_along_axis(values, first, -1)[..., 0]
    to_first = scatter(np.take_along_axis(sources, first, -1)[..., 0], dy(maximum))
    count = np.sum(sources >= 0, -1)
    mean = np.sum(np.where(sources >= 0, values, 0), -1) / count
    shares = np.broadcast_to((dy(mean) / count)[..., None], sources.shape)
    return (maximum, to_first), (mean, scatter(sources, shares))


def check_against_the_loop(shape, window, strides, padding, ties=False):
    x = np.asarray(normal(shape, 0))
    x = np.round(x) if ties else x

    @jax.jit
    def pools(x):
        results = []
        for pool in (functional.max_pool, functional.average_pool):
            y, pull = jax.vjp(lambda x, pool=pool: pool(x, window, strides, padding), x)
            results.append((y, *pull(jnp.cos(y) + 0.5)))
        return results

    expected = direct_pools(x, lambda y: np.cos(y) + 0.5, window, strides or window, padding)
    for ours, exact in zip(pools(x), expected, strict=True):
        for found, wanted in zip(ours, exact, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "window", "strides", "padding"),
    [
        ((2, 7, 3), (2,), None, "VALID"),
        ((2, 7, 8, 2), (2, 3), None, "VALID"),
        ((2, 6, 5, 17), (3, 2), None, "VALID"),
        ((2, 8, 7, 2), (5, 4), None, "VALID"),
        ((2, 6, 7, 3), (3, 3), (2, 1), "SAME"),
        ((2, 8, 8, 2), (2, 1), (3, 2), "VALID"),
        ((2, 6, 5, 2), (2, 2), (2, 2), [(1, 1), (0, 1)]),
    ],
    ids=["time", "tiles", "many channels", "large tiles", "overlap", "gaps", "padding"],
)
def test_pools_and_their_gradients_equal_the_loop(shape, window, strides, padding):
    check_against_the_loop(shape, window, strides, padding)


@pytest.mark.parametrize("strides", [None, (1, 2)])
def test_the_first_of_equal_maxima_gets_the_gradient(strides):
    check_against_the_loop((2, 6, 5, 2), (3, 2), strides, "VALID", ties=True)


@st.composite
def pools(draw):
    spatial = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    window = each(1, 5)
    strides = window if draw(st.booleans()) else each(1, 3)
    channels, padding = draw(st.sampled_from([2, 17])), draw(st.sampled_from(["VALID", "SAME"]))
    return (2, *each(5, 8), channels), window, strides, padding, draw(st.booleans())


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(pools())
def test_any_pool_and_its_gradient_equal_the_loop(case):
    check_against_the_loop(*case)


@pytest.mark.parametrize("padding", ["VALID", "SAME", 1])
def test_average_pool_counts_only_elements_that_exist(padding):
    x = np.asarray(normal((1, 7, 1), 0))
    pooled = functional.average_pool(jnp.asarray(x), 3, 2, padding)
    starts = range(0, 5, 2) if padding == "VALID" else range(-1, 7, 2)
    expected = [x[0, max(start, 0) : start + 3, 0].mean() for start in starts]
    np.testing.assert_allclose(pooled[0, :, 0], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("pool", "window"),
    [
        (functional.max_pool, 2),
        (functional.max_pool, 5),
        (functional.average_pool, 5),
        pytest.param(functional.average_pool, 2, marks=pytest.mark.slow),
    ],
)
def test_a_remainder_after_a_matmul_does_no_harm(pool, window):
    # jaxlib 0.10.1 writes out of bounds in such a program, if a window leaves the remainder.
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


@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [((1, 8, 8, 1), (2, 2, 2), "window="), ((1, 8), 2, r"\(1, 8\)")],
)
def test_a_wrong_argument_is_refused_with_its_value(shape, window, message):
    with pytest.raises(ValueError, match=message):
        functional.max_pool(jnp.ones(shape), window)


@pytest.mark.parametrize("pool", [functional.max_pool, functional.average_pool])
def test_windows_that_hold_only_padding_are_refused(pool):
    with pytest.raises(ValueError, match="padding=2 makes windows"):
        pool(jnp.ones((1, 4, 4, 1)), 2, padding=2)
    with pytest.raises(ValueError, match="padding=-1 must be"):
        pool(jnp.ones((1, 4, 4, 1)), 2, padding=-1)


def test_nothing_to_average_is_refused():
    for shape in ((2, 3), (2, 0, 3)):
        with pytest.raises(ValueError, match="nothing to average"):
            functional.global_average_pool(jnp.ones(shape))
