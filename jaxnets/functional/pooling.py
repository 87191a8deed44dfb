"""Pooling over windows of time, or of height and width, channels last."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering import layout
from jaxnets.functional.lowering.layout import materialize
from jaxnets.functional.lowering.platforms import platform_dependent
from jaxnets.functional.windows import (
    Axes,
    Padding,
    Pairs,
    Size,
    broadcast_to_axes,
    kernel_offsets,
    padding_pairs,
    strided_slice,
)

# Windows of at most this many elements are unrolled; larger ones take too long to compile.
_MAX_UNROLLED_WINDOW = 16


def max_pool(
    x: jax.Array, window: Size, strides: Size | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """Take the maximum of each window; of equal maxima the first gets the gradient.

    Corresponds to `flax.linen.max_pool` and `torch.nn.functional.max_pool2d`. Differs from Flax in
    the default strides, which are 1 there.

    Args:
        x: [batch, time, channels] or [batch, height, width, channels].
        window: size of the window.
        strides: step between windows; by default the window, so that windows do not overlap.
        padding: "SAME", "VALID", one padding for all ends, or (low, high) pairs; padding is never
            the maximum.

    Returns:
        [batch, ..., channels], of the dtype of `x`.

    Raises:
        ValueError: another rank, a window or strides that do not fit it, or padding that leaves
            windows without an element of `x`.

    Example:
        >>> max_pool(jnp.arange(6.0).reshape(1, 6, 1), 2)[0, :, 0].tolist()
        [1.0, 3.0, 5.0]
    """
    sizes, steps, pairs = _pool_spec(x, window, strides, padding)
    if _are_small_tiles(sizes, steps, pairs) and jnp.issubdtype(x.dtype, jnp.floating):
        return _shared_tile_max(x, sizes)
    return _reduce_max(x, sizes, steps, pairs)


def average_pool(
    x: jax.Array, window: Size, strides: Size | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """Average each window over the elements that are not padding.

    Corresponds to `flax.linen.avg_pool` and `torch.nn.functional.avg_pool2d` with
    `count_include_pad=False`. Both count padding by default; Flax's default strides are 1.

    Args:
        x: [batch, time, channels] or [batch, height, width, channels], floating.
        window: size of the window.
        strides: step between windows; by default the window, so that windows do not overlap.
        padding: "SAME", "VALID", one padding for all ends, or (low, high) pairs.

    Returns:
        [batch, ..., channels], of the dtype of `x`; accumulated in float32 or wider.

    Raises:
        ValueError: another rank, a window or strides that do not fit it, or padding that leaves
            windows without an element of `x`.
    """
    sizes, steps, pairs = _pool_spec(x, window, strides, padding)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    sums = functools.partial(
        _reduce_window, initial=0.0, function=lax.add, sizes=sizes, steps=steps, pairs=pairs
    )
    if _are_small_tiles(sizes, steps, pairs):
        tiles = functools.partial(_reduce_tiles, window=sizes, function=lax.add)
        own = functools.partial(layout.batch_innermost_if_few, tiles)
        total = platform_dependent(wide, cpu=own, default=sums)
        return (total / math.prod(sizes)).astype(x.dtype)
    count = sums(jnp.ones((1, *x.shape[1:-1], 1), wide.dtype))
    return (sums(wide) / count).astype(x.dtype)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Average over time, or over height and width.

    Args:
        x: [batch, ..., channels].

    Returns:
        [batch, channels], of the dtype of `x`; accumulated in float32 or wider.

    Raises:
        ValueError: no axis to average over, or an empty one.
    """
    if x.ndim < 3 or 0 in x.shape[1:-1]:
        raise ValueError(
            f"inputs of shape {x.shape} have nothing to average; give [batch, ..., channels]"
        )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=wide).astype(x.dtype)


def _reduce_window(
    x: jax.Array, initial: Any, function: Any, sizes: Axes, steps: Axes, pairs: Pairs
) -> jax.Array:
    if sizes == steps and not any(map(any, pairs)):
        # The remainder that fills no tile is sliced off explicitly: jaxlib 0.10.1 writes out of
        # bounds on CPU where a matmul is followed by a window that leaves one.
        whole = (n - n % w for n, w in zip(x.shape[1:-1], sizes, strict=True))
        x = x[(slice(None), *map(slice, whole))]
    padding = ((0, 0), *pairs, (0, 0))
    return lax.reduce_window(x, initial, function, (1, *sizes, 1), (1, *steps, 1), padding)


def _reduce_max(x: jax.Array, sizes: Axes, steps: Axes, pairs: Pairs) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    lowest = -jnp.inf if floating else jnp.iinfo(x.dtype).min
    return _reduce_window(x, lowest, lax.max, sizes, steps, pairs)


def _are_small_tiles(sizes: Axes, steps: Axes, pairs: Pairs) -> bool:
    """Whether windows are tiles, without overlap, gaps and padding, that can be unrolled."""
    small = math.prod(sizes) <= _MAX_UNROLLED_WINDOW
    return small and sizes == steps and not any(map(any, pairs))


def _reduce_tiles(x: jax.Array, window: Axes, function: Callable[..., jax.Array]) -> jax.Array:
    """Reduce each tile by a function of two arrays, over strided slices of `x`."""
    counts = [n // w for n, w in zip(x.shape[1:-1], window, strict=True)]
    offsets = kernel_offsets(window)
    shape = (x.shape[0], *counts, x.shape[-1])  # [batch, *tiles, channels]
    slices = (strided_slice(x, offset, shape, window) for offset in offsets)
    return materialize(functools.reduce(function, slices))


def _plain_tile_max(x: jax.Array, window: Axes) -> jax.Array:
    return _reduce_max(x, window, window, ((0, 0),) * len(window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tile_max(x: jax.Array, window: Axes) -> jax.Array:
    tiles = functools.partial(_reduce_tiles, window=window, function=lax.max)
    own = functools.partial(layout.batch_innermost_if_few, tiles)
    plain = functools.partial(_plain_tile_max, window=window)
    return platform_dependent(x, cpu=own, default=plain)


def _tile_max_forward(x: jax.Array, window: Axes) -> tuple[jax.Array, Any]:
    y = _tile_max(x, window)
    return y, (x, y)


def _tile_max_backward(window: Axes, residuals: Any, dy: jax.Array) -> tuple[jax.Array]:
    def plain(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda v: _plain_tile_max(v, window), x)[1](dy)[0]

    tiles = functools.partial(_tile_max_gradient, window=window)
    own = functools.partial(layout.batch_innermost_if_few, tiles)
    return (platform_dependent(*residuals, dy, cpu=own, default=plain),)


_tile_max.defvjp(_tile_max_forward, _tile_max_backward)
# Jitted, so that all layers of a shape, and their gradients, are traced once.
_shared_tile_max = jax.jit(_tile_max, static_argnums=1)


def _tile_max_gradient(x: jax.Array, y: jax.Array, dy: jax.Array, *, window: Axes) -> jax.Array:
    """Give `dy` to the first maximum of each tile: comparisons instead of XLA's scatter."""
    offsets = kernel_offsets(window)
    # Indices in x's dtype, because loops of one dtype are vectorized better.
    argmax = jnp.full(y.shape, -1, x.dtype)
    for index, offset in reversed(list(enumerate(offsets))):  # in reverse, so that the first wins
        candidate = strided_slice(x, offset, y.shape, window)
        argmax = jnp.where(candidate == y, jnp.asarray(index, x.dtype), argmax)
    argmax = materialize(argmax)
    in_tile = tuple(range(2, 2 + 2 * len(window), 2))  # new axes of size 1
    per_tile = [n for w in window for n in (1, w)]
    indices = jnp.arange(len(offsets), dtype=x.dtype).reshape(1, *per_tile, 1)
    chosen = jnp.expand_dims(argmax, in_tile) == indices
    # [batch, tile rows, rows in tile, tile columns, columns in tile, channels]
    dx = jnp.where(chosen, jnp.expand_dims(dy, in_tile), jnp.zeros((), dy.dtype))
    tiled = [count * w for count, w in zip(y.shape[1:-1], window, strict=True)]
    remainder = [(0, size % w) for size, w in zip(x.shape[1:-1], window, strict=True)]
    dx = dx.reshape(x.shape[0], *tiled, x.shape[-1])  # [batch, height, width, channels]
    return materialize(jnp.pad(dx, [(0, 0), *remainder, (0, 0)]))


def _pool_spec(
    x: jax.Array, window: Size, strides: Size | None, padding: Padding
) -> tuple[Axes, Axes, Pairs]:
    spatial = x.ndim - 2
    if spatial < 1:
        raise ValueError(f"pooling got shape {x.shape}; give [batch, ..., channels]")
    sizes = broadcast_to_axes(window, spatial, "window")
    steps = sizes if strides is None else broadcast_to_axes(strides, spatial, "strides")
    pairs = padding_pairs(padding, x.shape[1:-1], sizes, steps)
    for size, pair in zip(sizes, pairs, strict=True):
        if max(pair) >= size:
            raise ValueError(
                f"padding={padding} makes windows of {sizes} that hold no element of the input; "
                "give less padding than the window is wide"
            )
    return sizes, steps, pairs
