"""Images as sequences of square patches, and back."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank, check_sizes


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
