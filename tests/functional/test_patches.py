"""Patches of images: what does not split into them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.patches import interpolate_positions, patchify, unpatchify


def test_patches_assemble_to_the_image_they_were_cut_from():
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    patches = patchify(jnp.asarray(images, jnp.float32), 2)
    np.testing.assert_array_equal(patches[1, 1], images[1, :2, 2:4].reshape(-1).astype(np.float32))
    np.testing.assert_array_equal(unpatchify(patches, (4, 6, 3)), images.astype(np.float32))


@pytest.mark.parametrize("size", [0, -2, 2.0, (2, 2)])
def test_a_size_that_is_no_positive_integer_is_refused(size):
    with pytest.raises(ValueError, match="must be made of positive integers"):
        patchify(jnp.ones((1, 4, 4, 1)), size)


@pytest.mark.parametrize("shape", [(4, 4, 0), (4, 4), (4, 4, 7)])
def test_patches_that_do_not_fill_the_image_are_refused(shape):
    with pytest.raises(ValueError, match=r"image_shape|fill images"):
        unpatchify(jnp.ones((1, 4, 4)), shape)


def test_a_missing_batch_axis_is_named():
    with pytest.raises(ValueError, match=r"patchify got inputs of shape \(4, 4, 1\)"):
        patchify(jnp.ones((4, 4, 1)), 2)


def cubic(distance):
    """The cubic convolution kernel of Keys 1981 with a = -3/4."""
    x = abs(distance)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0


def resampled(grid, new_size):
    """Resample the first axis from its definition: far beyond the edge is the edge."""
    size = len(grid)
    rows = []
    for i in range(new_size):
        center = (i + 0.5) * size / new_size - 0.5
        reach = range(-3, size + 3)
        rows.append(sum(cubic(center - j) * grid[min(max(j, 0), size - 1)] for j in reach))
    return np.stack(rows)


@pytest.mark.parametrize("new_grid", [(3, 4), (6, 8), (5, 3), (1, 1), (2, 9)])
def test_interpolated_positions_are_the_sum_over_the_cubic_kernel(new_grid):
    table = np.random.default_rng(0).normal(size=(2 + 12, 5)).astype(np.float32)
    new = interpolate_positions(jnp.asarray(table), (3, 4), new_grid, num_tokens=2)
    grid = resampled(table[2:].astype(np.float64).reshape(3, 4, 5), new_grid[0])
    grid = resampled(grid.swapaxes(0, 1), new_grid[1]).swapaxes(0, 1)
    np.testing.assert_allclose(new[2:], grid.reshape(-1, 5), atol=1e-5)
    np.testing.assert_array_equal(new[:2], table[:2])


def test_positions_of_the_same_grid_stay_and_keep_their_dtype():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)), jnp.bfloat16)
    new = interpolate_positions(table, (2, 3), (2, 3))
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new, table)
    assert interpolate_positions(table, (2, 3), (4, 4)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("grid", "new_grid", "num_tokens", "message"),
    [
        ((2, 2), (2, 2), 0, "0 tokens and 2 x 2 patches"),
        ((2, 2), (0, 2), 1, r"new_grid=\(0, 2\)"),
        ((3, 2), (2, 2), -1, "-1 tokens"),
    ],
)
def test_a_table_that_does_not_fit_its_grid_is_refused(grid, new_grid, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        interpolate_positions(jnp.ones((5, 3)), grid, new_grid, num_tokens=num_tokens)
