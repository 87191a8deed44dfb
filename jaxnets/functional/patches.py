"""Images as sequences of square patches, and back."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import IMAGES, check_rank, check_sizes
from jaxnets.core import at_least_float32


class NormalizedPatches(NamedTuple):
    """What `normalize_patches` returns: patches = mean + scale * normalized patches.

    Attributes:
        patches: normalized, [batch, patches, elements].
        mean: of each patch, [batch, patches, 1].
        scale: of each patch, [batch, patches, 1].
    """

    patches: jax.Array
    mean: jax.Array
    scale: jax.Array


def patchify(images: jax.Array, size: int) -> jax.Array:
    """Cut images into patches, in row-major order.

    Args:
        images: [batch, height, width, channels].
        size: height and width of a patch.

    Returns:
        [batch, patches, size * size * channels].

    Raises:
        ValueError: images that do not split into patches, or a size that is no integer above 0.

    Example:
        >>> patchify(jnp.arange(8).reshape(1, 2, 4, 1), 2).tolist()
        [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    check_rank(images, "patchify", layouts=IMAGES)
    check_sizes(size=(size,))
    batch, height, width, channels = images.shape
    if height % size or width % size or not height * width:
        raise ValueError(
            f"images of {height} x {width} do not split into patches of {size} x {size}; resize "
            "them, or choose a patch_size that divides both"
        )
    # [batch, rows, size, columns, size, channels]
    grid = images.reshape(batch, height // size, size, width // size, size, channels)
    grid = jnp.swapaxes(grid, 2, 3)  # [batch, rows, columns, size, size, channels]
    return grid.reshape(batch, -1, size * size * channels)


def unpatchify(patches: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
    """Assemble images from patches: the inverse of `patchify`.

    Args:
        patches: [batch, patches, size * size * channels].
        image_shape: (height, width, channels).

    Returns:
        [batch, height, width, channels].

    Raises:
        ValueError: patches that do not fill such an image.
    """
    if len(image_shape) != 3 or patches.ndim != 3:
        raise ValueError(
            f"patches of shape {patches.shape} and image_shape={image_shape} do not fit; give "
            "[batch, patches, elements] and (height, width, channels)"
        )
    check_sizes(image_shape=image_shape)
    height, width, channels = image_shape
    size = round((patches.shape[-1] / channels) ** 0.5)
    rows, columns = height // size, width // size
    if patches.shape[1:] != (rows * columns, size * size * channels) or (
        (rows * size, columns * size) != (height, width)
    ):
        raise ValueError(
            f"patches of shape {patches.shape} do not fill images of {image_shape}; give as many "
            "as patchify returns"
        )
    # [batch, rows, columns, size, size, channels]
    grid = patches.reshape(-1, rows, columns, size, size, channels)
    grid = jnp.swapaxes(grid, 2, 3)  # [batch, rows, size, columns, size, channels]
    return grid.reshape(-1, height, width, channels)


def normalize_patches(patches: jax.Array) -> NormalizedPatches:
    """Normalize every patch to mean 0 and variance 1: (patch - mean) / sqrt(variance + 1e-6).

    Args:
        patches: [batch, patches, elements].

    Returns:
        NormalizedPatches.
    """
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    scale = jnp.sqrt(jnp.var(patches, axis=-1, keepdims=True) + 1e-6)
    return NormalizedPatches((patches - mean) / scale, mean, scale)


def interpolate_positions(
    table: jax.Array,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    num_tokens: int = 1,
) -> jax.Array:
    """Interpolate learned positions of patches, for images of another size than in training.

    Bicubic: row i of the new grid lies at (i + 1/2) rows / new_rows - 1/2 of the old one, and is
    the sum of the four nearest rows, weighted by the cubic convolution kernel with a = -3/4 (Keys
    1981, equation 4, which has a = -1/2 there); columns likewise. Beyond the edge the outermost row
    or column is repeated. There is no antialiasing. This is `torch.nn.functional.interpolate` with
    mode="bicubic" and align_corners=False, as most vision transformers were fine-tuned.

    Args:
        table: [num_tokens + rows * columns, features], such as
            `params["position"]["embedding"]` of a `VisionTransformer`.
        grid: (rows, columns) of the patches in training.
        new_grid: (rows, columns) of the patches of the new images.
        num_tokens: learned tokens in front of the patches; their positions stay.

    Returns:
        [num_tokens + new_rows * new_columns, features], in the dtype of the table.

    Raises:
        ValueError: sizes below 1, or a table that does not fit the grid.

    Example:
        >>> table = jnp.arange(5.0)[:, None]  # one token, 2 x 2 patches
        >>> interpolate_positions(table, (2, 2), (1, 1)).ravel().tolist()
        [0.0, 2.5]

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2.
    """
    check_sizes(grid=grid, new_grid=new_grid)
    if table.ndim != 2 or num_tokens < 0 or table.shape[0] != num_tokens + grid[0] * grid[1]:
        raise ValueError(
            f"a table of shape {table.shape} does not hold {num_tokens} tokens and {grid[0]} x "
            f"{grid[1]} patches; give [num_tokens + rows * columns, features]"
        )
    tokens, patches = table[:num_tokens], at_least_float32(table[num_tokens:])
    patches = patches.reshape(*grid, -1)  # [rows, columns, features]
    rows, columns = (
        jnp.asarray(_bicubic_weights(old, new), patches.dtype)
        for old, new in zip(grid, new_grid, strict=True)
    )
    patches = jnp.einsum("ir,jc,rcf->ijf", rows, columns, patches, precision="highest")
    patches = patches.reshape(-1, table.shape[1]).astype(table.dtype)
    return jnp.concatenate([tokens, patches])


def _bicubic_weights(size: int, new_size: int) -> np.ndarray:
    """Return the weights [new_size, size] of bicubic interpolation along one axis."""
    a = -0.75
    center = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(center).astype(int) - 1
    weights = np.zeros((new_size, size))
    for neighbor in range(4):
        distance = np.abs(center - first - neighbor)
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        index = np.clip(first + neighbor, 0, size - 1)
        np.add.at(weights, (np.arange(new_size), index), np.where(distance <= 1, near, far))
    return weights
