"""Winograd's minimal filtering against the definition of the convolution: values and gradients."""

import unittest.mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal
from direct_convolution import direct_convolution
from hypothesis import strategies as st

from jaxnets.functional.conv import winograd
from jaxnets.functional.windows import ConvSpec, output_size


@pytest.fixture(autouse=True)
def double_precision():
    """Compare in float64, where rounding cannot hide a wrong formula."""
    with jax.enable_x64(True):
        yield


def plain_spec(padding):
    ones = (1,) * len(padding)
    return ConvSpec(ones, tuple(padding), ones, 1)


def convolve(x, kernel, padding):
    spec = plain_spec(padding)
    size = output_size(x.shape[1:-1], kernel.shape[:-2], spec)
    return winograd.convolve(x, kernel, output_size=size, spec=spec)


def test_four_multiplications_make_two_outputs():
    # Inputs 1, 2, 4, 8 and kernel 3, 5, 7: 3 + 10 + 28 = 41 and 6 + 20 + 56 = 82.
    x, kernel = jnp.array([1.0, 2, 4, 8])[None, :, None], jnp.array([3.0, 5, 7])[:, None, None]
    # Cotangents 1 and 10: element k of the kernel's gradient is x[k] + 10 x[k + 1].
    dy = jnp.array([1.0, 10])[None, :, None]

    @jax.jit
    def results(x, kernel, dy):
        spec = plain_spec([(0, 0)])
        gradient = winograd.kernel_gradient(x, dy, kernel_size=(3,), spec=spec)
        return convolve(x, kernel, [(0, 0)]), gradient

    y, gradient = results(x, kernel, dy)
    assert y[0, :, 0].tolist() == [41, 82]
    assert gradient[:, 0, 0].tolist() == [21, 42, 84]


def test_multiplications_saved_are_counted():
    assert winograd.multiplications_saved((8,)) == 3 - 2
    assert winograd.multiplications_saved((8, 6)) == 9 - 4
    # 2 x 2 tiles of 16 multiplications for 9 outputs.
    assert winograd.multiplications_saved((3, 3)) == pytest.approx(9 - 64 / 9)


def check_against_the_definition(shape, features, padding, cached):
    """Compare the outputs and both gradients; a small cache splits the batch into chunks."""
    x, kernel = normal(shape, 0), normal((*(3,) * (len(shape) - 2), shape[-1], features), 1)
    ones, spec = (1,) * len(padding), plain_spec(padding)
    expected = direct_convolution(x, kernel, np.cos, strides=ones, padding=padding, dilation=ones)

    @jax.jit
    def results(x, kernel):
        y = convolve(x, kernel, padding)
        dy = jnp.cos(y)
        dx = winograd.input_gradient(kernel, dy, input_size=x.shape[1:-1], spec=spec)
        dkernel = winograd.kernel_gradient(x, dy, kernel_size=kernel.shape[:-2], spec=spec)
        return y, dx, dkernel

    constants = {
        name: cached or getattr(winograd, name) for name in ("_CACHED_FORWARD", "_CACHED_GRADIENT")
    }
    with unittest.mock.patch.multiple(winograd, **constants):
        found = results(x, kernel)
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "features", "padding", "cached"),
    [
        ((2, 7, 3), 2, [(1, 1)], None),
        ((2, 5, 6, 2), 3, [(1, 1), (2, 0)], None),
        ((7, 6, 2), 1, [(3, -1)], 1),
        ((7, 4, 3, 2), 2, [(0, 1), (1, 1)], 1),
        ((11, 5, 7, 3), 1, [(-1, 3), (1, -1)], 2000),
    ],
    ids=["time", "image", "cropped", "chunks of one example", "chunks and a remainder"],
)
def test_outputs_and_gradients_equal_the_definition(shape, features, padding, cached):
    check_against_the_definition(shape, features, padding, cached)


@st.composite
def cases(draw):
    num_axes = draw(st.integers(1, 2))
    sizes = [draw(st.integers(3, 8)) for _ in range(num_axes)]
    ends = st.integers(-1, 3)
    padding = []
    for size in sizes:
        low, high = draw(ends), draw(ends)
        padding.append((low, high) if size + low + high >= 3 else (1, 1))
    batch, cached = draw(st.sampled_from([(2, None), (7, 1), (11, 2000)]))
    return (batch, *sizes, draw(st.integers(1, 3))), draw(st.integers(1, 3)), padding, cached


@pytest.mark.slow
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(cases())
def test_any_padding_and_any_size_equal_the_definition(case):
    check_against_the_definition(*case)


def test_single_precision_loses_no_significant_digit():
    x, kernel, padding = normal((4, 9, 9, 64), 0), normal((3, 3, 64, 64), 1), [(1, 1)] * 2
    options = {"strides": (1, 1), "padding": padding, "dilation": (1, 1)}
    expected = direct_convolution(x, kernel, np.zeros_like, **options).y

    def error(found):
        return np.max(np.abs(np.asarray(found, np.float64) - expected)) / np.std(expected)

    def winograd_error(dtype):
        function = jax.jit(lambda x, kernel: convolve(x, kernel, padding))
        return error(function(x.astype(dtype), kernel.astype(dtype)))

    assert winograd_error(jnp.float32) < 5e-6
    # In bfloat16 it would: such convolutions select another algorithm.
    narrow = [each.astype(jnp.bfloat16) for each in (x, kernel)]
    rounded = direct_convolution(*narrow, np.zeros_like, **options).y.astype(jnp.bfloat16)
    assert winograd_error(jnp.bfloat16) > error(rounded)
