"""The geometry of windows over time, or over height and width: sizes, strides, padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

#: One value for every spatial axis, or one per axis.
Size: TypeAlias = int | Sequence[int]
#: "SAME", "VALID", one width for both ends of every axis, or a (low, high) pair per axis.
Padding: TypeAlias = str | int | Sequence[tuple[int, int]]

Axes: TypeAlias = tuple[int, ...]
Pairs: TypeAlias = tuple[tuple[int, int], ...]


class ConvSpec(NamedTuple):
    """What a convolution does along the spatial axes, and in how many groups of channels.

    Attributes:
        strides: step between outputs.
        padding: (low, high) of each axis; negative ones cut.
        dilation: step between the inputs that one output sees.
        groups: number of channel groups convolved apart.
    """

    strides: Axes
    padding: Pairs
    dilation: Axes
    groups: int


def per_axis(value: Size, num_axes: int, name: str) -> Axes:
    """Write a size as one positive int per axis; `name` stands in the ValueError of a bad one."""
    values = (value,) * num_axes if isinstance(value, int) else tuple(value)
    if len(values) != num_axes or any(v < 1 for v in values):
        raise ValueError(f"{name}={value} must be a positive int or {num_axes} of them")
    return values


def dilated_size(window: Sequence[int], dilation: Sequence[int]) -> Axes:
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


def offsets_of(taps: Sequence[int]) -> list[Axes]:
    """List the places in a kernel, in the order of its elements."""
    return list(itertools.product(*map(range, taps)))


def padded(x: jax.Array, spec: ConvSpec) -> jax.Array:
    """Put zeros around the axes between the first and the last."""
    edges = [(low, high, 0) for low, high in spec.padding]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def im2col(
    offsets: Sequence[Axes], padded: jax.Array, outputs: Axes, spec: ConvSpec
) -> list[jax.Array]:
    """Return what each kernel offset sees of a padded array, [first, *outputs, last] each."""
    shape = (padded.shape[0], *outputs, padded.shape[-1])
    return [
        strided(
            padded,
            [o * d for o, d in zip(offset, spec.dilation, strict=True)],
            shape,
            spec.strides,
        )
        for offset in offsets
    ]


def col2im(shares: jax.Array, taps: Axes, inputs: Axes, spec: ConvSpec) -> jax.Array:
    """Sum at each input what the kernel's places send to it: the transpose of `im2col`.

    Args:
        shares: [places, first, *outputs, last], the places in the order of `offsets_of`.
        taps: of the kernel.
        inputs: sizes.
        spec: of the convolution.

    Returns:
        [first, *inputs, last].
    """
    total = jnp.zeros((shares.shape[1], *inputs, shares.shape[-1]), shares.dtype)
    for share, offset in zip(shares, offsets_of(taps), strict=True):
        places = zip(offset, spec.dilation, spec.padding, strict=True)
        starts = [o * d - low for o, d, (low, _) in places]
        total += _spread(share, starts, inputs, spec.strides)
    return total


def _spread(x: jax.Array, starts: Sequence[int], sizes: Axes, strides: Axes) -> jax.Array:
    """Place the elements stride apart, from `starts` on, in zeros of `sizes`.

    It is one `lax.pad` with interior padding, which aborts XLA's partitioner where a sharding has
    reached height or width. A new axis that is padded and joined does not.
    """
    zero = jnp.zeros((), x.dtype)
    for axis, (start, extent, stride) in enumerate(zip(starts, sizes, strides, strict=True), 1):
        shape = x.shape
        gaps = [(0, 0, 0)] * (x.ndim + 1)
        gaps[axis + 1] = (0, stride - 1, 0)
        x = lax.pad(jnp.expand_dims(x, axis + 1), zero, gaps)
        x = x.reshape(*shape[:axis], shape[axis] * stride, *shape[axis + 1 :])
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (start, extent - start - shape[axis] * stride, 0)
        x = lax.pad(x, zero, edges)
    return x
