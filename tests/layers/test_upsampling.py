"""Upsampling of feature maps by 2, each method against an independent one."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_slow

from jaxnets import functional
from jaxnets.layers import (
    TransposedConvolution,
    Upsampling,
    depth_to_space,
    enlarge,
    enlarged_convolution,
)


def images(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def test_enlarging_repeats_every_pixel():
    x = images(2, 2, 3, 4)
    np.testing.assert_array_equal(enlarge(x), x.repeat(2, axis=1).repeat(2, axis=2))


def test_depth_to_space_rearranges_channels_into_squares():
    x = images(1, 2, 3, 8)
    y = np.asarray(depth_to_space(x))
    for row, column in np.ndindex(4, 6):
        first = (2 * (row % 2) + column % 2) * 2
        expected = x[0, row // 2, column // 2, first : first + 2]
        np.testing.assert_array_equal(y[0, row, column], expected)


@pytest.mark.parametrize("size", mostly_slow([1, 2, 3, 4, 5], [2, 3]))
def test_a_convolution_of_repeated_pixels_needs_no_large_map(size):
    x, kernel = images(2, 3, 4, 5), images(size, size, 5, 6) - 0.5
    dy = images(2, 6, 8, 6)

    @jax.jit
    def both(x, kernel):
        results = []
        for f in (enlarged_convolution, lambda x, k: functional.convolution(enlarge(x), k)):
            y, pull = jax.vjp(f, x, kernel)
            results.append((y, *pull(dy)))
        return results

    for ours, plain in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_transposed_upsampling_is_that_of_lax(kernel_size):
    x, layer = images(2, 3, 5, 4), Upsampling(6, "transposed", kernel_size)

    @jax.jit
    def both(x):
        y, variables = layer.init_with_output(jax.random.key(0), x)
        kernel = jnp.swapaxes(variables["params"]["conv"]["kernel"], 2, 3)
        names = ("NHWC", "HWIO", "NHWC")
        return y, jax.lax.conv_transpose(
            x, kernel, (2, 2), "SAME", dimension_numbers=names, transpose_kernel=True
        )

    y, expected = both(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


LECUN, HE = (nn.initializers.lecun_normal(), 1.0), (nn.initializers.he_normal(), 2.0)
METHODS = [("resize", 3), ("subpixel", 3), ("transposed", 3), ("transposed", 4)]


@pytest.mark.parametrize(
    ("method", "initializer"),
    mostly_slow(
        itertools.product(METHODS, (LECUN, HE)),
        [
            (METHODS[0], LECUN),
            (METHODS[1], LECUN),
            (METHODS[2], LECUN),
            (METHODS[3], LECUN),
        ],
    ),
)
def test_every_method_starts_with_outputs_of_the_same_variance(method, initializer):
    init, variance = initializer
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 32)).astype(np.float32)
    layer = Upsampling(64, *method, kernel_init=init)
    y = np.asarray(jax.jit(layer.init_with_output)(jax.random.key(0), x)[0])
    inner = y[:, 2:-2, 2:-2]  # the windows at the border reach into the padding
    for row, column in np.ndindex(2, 2):  # each of the four pixels of a square
        assert inner[:, row::2, column::2].var() == pytest.approx(variance, rel=0.1)


def test_a_fixed_scale_is_that_of_the_transposed_kernel():
    layer = Upsampling(32, "transposed", kernel_init=nn.initializers.normal(0.02))
    params = jax.jit(layer.init)(jax.random.key(0), images(1, 2, 2, 16))["params"]
    kernel = np.asarray(params["conv"]["kernel"])
    assert kernel.shape == (4, 4, 16, 32)
    assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
    assert len(np.unique(kernel)) > 0.99 * kernel.size


def test_a_kernel_of_one_pixel_has_no_transpose_that_doubles():
    with pytest.raises(ValueError, match="kernel_size is 1; a transposed convolution needs 2"):
        TransposedConvolution(4, kernel_size=1)
