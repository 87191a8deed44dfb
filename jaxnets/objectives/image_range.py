"""Check of the pixel range of images, at the entry of objectives."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import known_values

#: Minimum and maximum of a pixel; None allows any finite value.
ImageRange: TypeAlias = tuple[float, float] | None

# Tolerance for rounding, such as of a division by 127.5.
_ROUNDING = 1e-4


def check_images(images: jax.Array, image_range: ImageRange) -> tuple[jax.Array, jax.Array]:
    """Refuse images that are not floating point or, unless traced, outside of their range.

    Args:
        images: [batch, ...].
        image_range: minimum and maximum of a pixel; None allows any finite value.

    Returns:
        The images, and bool [batch], True for images in the range. Traced images are checked when
        the program runs: those out of range become zeros, and their entry False. The caller turns
        their losses into NaN; because of the zeros gradients stay finite where such an image has
        weight 0.

    Raises:
        ValueError: naming the type, or the value that is furthest outside.

    Example:
        >>> check_images(np.full((1, 2, 2, 1), 255.0), (0.0, 1.0))
        Traceback (most recent call last):
            ...
        ValueError: images hold 255, outside of [0, 1]; divide gray levels by 255, or take a \
likelihood or image_range that fits them
    """
    refuse_images(images, image_range)
    least, greatest = _limits(image_range)
    fits = (images >= least - _ROUNDING) & (images <= greatest + _ROUNDING) & jnp.isfinite(images)
    inside = jnp.all(fits, axis=tuple(range(1, images.ndim)))
    expanded = jnp.expand_dims(inside, tuple(range(1, images.ndim)))  # [batch, 1, ...]
    return jnp.where(expanded, images, 0), inside


def refuse_images(images: jax.Array, image_range: ImageRange) -> None:
    """Refuse images that are not floating point or known to be outside of their range.

    Args:
        images: [batch, ...].
        image_range: minimum and maximum of a pixel; None allows any finite value.

    Raises:
        ValueError: naming the type, or the value that is furthest outside.
    """
    least, greatest = _limits(image_range)
    dtype = jnp.result_type(images)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images have type {dtype}; give floats: {_remedy(least)}")
    known = known_values(images)
    if known is None or not known.size:
        return
    known = known.astype(np.float64)
    excess = np.where(np.isfinite(known), np.maximum(known - greatest, least - known), np.inf)
    if np.max(excess) > _ROUNDING:
        wrong = known.flat[np.argmax(excess)]
        raise ValueError(
            f"images hold {wrong:g}, outside of [{least:g}, {greatest:g}]; {_remedy(least)}"
        )


def _limits(image_range: ImageRange) -> tuple[float, float]:
    return (-np.inf, np.inf) if image_range is None else image_range


def _remedy(least: float) -> str:
    if least < 0:
        return "divide gray levels by 127.5 and subtract 1"
    return "divide gray levels by 255, or take a likelihood or image_range that fits them"
