"""Images as sequences of square patches, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def split_patches(images: jax.Array, size: int) -> jax.Array:
    """Cut images into patches, row by row.

    Args:
        images: [batch, height, width, channels].
        size: height and width of a patch.

    Returns:
        [batch, patches, size * size * channels].

    Raises:
        ValueError: images that do not split into patches.

    Example:
        >>> split_patches(jnp.arange(8).reshape(1, 2, 4, 1), 2).tolist()
        [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    batch, height, width, channels = images.shape
    if height % size or width % size or not height * width:
        raise ValueError(
            f"images of {height} x {width} do not split into patches of {size} x {size}; resize "
            "them, or choose a patch_size that divides both"
        )
    grid = images.reshape(batch, height // size, size, width // size, size, channels)
    return jnp.swapaxes(grid, 2, 3).reshape(batch, -1, size * size * channels)


def join_patches(patches: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
    """Put patches together again: the inverse of `split_patches`.

    Args:
        patches: [batch, patches, size * size * channels].
        image_shape: (height, width, channels).

    Returns:
        [batch, height, width, channels].

    Raises:
        ValueError: patches that do not fill such an image.
    """
    height, width, channels = image_shape
    size = round((patches.shape[-1] / channels) ** 0.5)
    rows, columns = height // size, width // size
    if patches.shape[1:] != (rows * columns, size * size * channels) or (
        (rows * size, columns * size) != (height, width)
    ):
        raise ValueError(
            f"patches of shape {patches.shape} do not fill images of {image_shape}; give as many "
            "as split_patches returns"
        )
    grid = patches.reshape(-1, rows, columns, size, size, channels)
    return jnp.swapaxes(grid, 2, 3).reshape(-1, height, width, channels)
