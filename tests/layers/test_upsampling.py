"""Doubling the size of feature maps, each method against an independent one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_enlarging_repeats_every_pixel_and_depth_to_space_lays_out_channels():
    x = images(2, 2, 3, 4)
    np.testing.assert_array_equal(enlarge(x), x.repeat(2, axis=1).repeat(2, axis=2))
    wide = images(1, 2, 3, 8)
    found = depth_to_space(wide)
    for row, column in np.ndindex(4, 6):
        square = (2 * (row % 2) + column % 2) * 2
        expected = wide[0, row // 2, column // 2, square : square + 2]
        np.testing.assert_array_equal(found[0, row, column], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_convolution_of_repeated_pixels_needs_no_large_map(size):
    x, kernel = images(2, 3, 4, 5), images(size, size, 5, 6) - 0.5
    weights = images(2, 6, 8, 6)

    def plain(x, kernel):
        return jnp.sum(weights * functional.convolution(enlarge(x), kernel))

    def own(x, kernel):
        return jnp.sum(weights * enlarged_convolution(x, kernel))

    expected, found = (jax.value_and_grad(f, argnums=(0, 1))(x, kernel) for f in (plain, own))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
    np.testing.assert_allclose(
        enlarged_convolution(x, kernel), functional.convolution(enlarge(x), kernel), atol=1e-5
    )


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_transposed_upsampling_is_that_of_lax(kernel_size):
    x, layer = images(2, 3, 5, 4), Upsampling(6, "transposed", kernel_size)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    kernel = variables["params"]["conv"]["kernel"]
    expected = jax.lax.conv_transpose(
        x,
        jnp.swapaxes(kernel, 2, 3),
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=True,
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("init", "expected"),
    [(nn.initializers.lecun_normal(), 1.0), (nn.initializers.he_normal(), 2.0)],
)
@pytest.mark.parametrize(
    ("method", "kernel_size"),
    [("resize", 3), ("subpixel", 3), ("transposed", 3), ("transposed", 4)],
)
def test_every_method_starts_with_outputs_of_the_same_variance(method, kernel_size, init, expected):
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 32)).astype(np.float32)
    layer = Upsampling(64, method, kernel_size, kernel_init=init)
    y, _ = layer.init_with_output(jax.random.key(0), x)
    inner = np.asarray(y)[:, 2:-2, 2:-2]  # the kernel sees zeros at the border
    for row, column in np.ndindex(2, 2):  # and of each of the four pixels of a square
        assert inner[:, row::2, column::2].var() == pytest.approx(expected, rel=0.1)


def test_a_fixed_scale_is_that_of_the_taps_of_a_transposed_kernel():
    layer = Upsampling(32, "transposed", kernel_init=nn.initializers.normal(0.02))
    kernel = layer.init(jax.random.key(0), images(1, 2, 2, 16))["params"]["conv"]["kernel"]
    assert kernel.shape == (4, 4, 16, 32)
    assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
    assert len(np.unique(kernel)) > 0.99 * kernel.size


def test_a_kernel_of_one_pixel_has_no_transpose_that_doubles():
    with pytest.raises(ValueError, match="kernel_size is 1; a transposed convolution needs 2"):
        TransposedConvolution(4, kernel_size=1)
