"""The geometry of windows over time, or over height and width: sizes, strides, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax
from jax import lax

#: One value for every spatial axis, or one per axis.
Extent: TypeAlias = int | Sequence[int]
#: "SAME", "VALID", one width for both ends of every axis, or a (low, high) pair per axis.
Padding: TypeAlias = str | int | Sequence[tuple[int, int]]

Axes: TypeAlias = tuple[int, ...]
Pairs: TypeAlias = tuple[tuple[int, int], ...]


def per_axis(value: Extent, num_axes: int, name: str) -> Axes:
    """Write a size as one positive int per axis; `name` stands in the ValueError of a bad one."""
    values = (value,) * num_axes if isinstance(value, int) else tuple(value)
    if len(values) != num_axes or any(v < 1 for v in values):
        raise ValueError(f"{name}={value} must be a positive int or {num_axes} of them")
    return values


def extent_of(window: Sequence[int], dilation: Sequence[int]) -> Axes:
    """Return how many inputs a dilated window spans on each axis."""
    return tuple((w - 1) * d + 1 for w, d in zip(window, dilation, strict=True))


def padding_pairs(
    padding: Padding, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> Pairs:
    """Resolve padding to one (low, high) pair per axis.

    Raises:
        ValueError: unknown padding, or a window that does not fit into the padded axis.
    """
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding={padding!r} must be 'SAME', 'VALID', an int or pairs")
        pairs = tuple((a, b) for a, b in lax.padtype_to_pads(sizes, window, strides, padding))
    elif isinstance(padding, int):
        pairs = ((padding, padding),) * len(sizes)
    else:
        pairs = tuple((low, high) for low, high in padding)
    if len(pairs) != len(sizes):
        raise ValueError(f"padding={padding} must have {len(sizes)} (low, high) pairs")
    for size, (low, high), extent in zip(sizes, pairs, window, strict=True):
        if size + low + high < extent:
            raise ValueError(
                f"a window of {extent} does not fit into {size} + {low + high} padded elements "
                f"(spatial shape {tuple(sizes)}); use a larger input, more padding or fewer "
                "layers that reduce the size"
            )
    return pairs


def strided(x: jax.Array, starts: Sequence[int], shape: Axes, strides: Axes) -> jax.Array:
    """Take every stride-th element from `starts` on, as many as `shape` has on its axes."""
    spans = zip(starts, shape[1:-1], strides, strict=True)
    slices = (slice(a, a + (count - 1) * step + 1, step) for a, count, step in spans)
    return x[(slice(None), *slices)]
