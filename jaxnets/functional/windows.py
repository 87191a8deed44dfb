"""Sizes, strides and padding of windows over time, or over height and width; im2col and col2im."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: One value for every spatial axis, or one per axis.
Size: TypeAlias = int | Sequence[int]
#: "SAME", "VALID", one padding for both ends of every axis, or a (low, high) pair per axis, whose
#: negative values crop.
Padding: TypeAlias = str | int | Sequence[tuple[int, int]]

Axes: TypeAlias = tuple[int, ...]
Pairs: TypeAlias = tuple[tuple[int, int], ...]


class ConvSpec(NamedTuple):
    """The static arguments of a convolution, one value per spatial axis.

    Attributes:
        strides: step between the windows of neighboring outputs (`window_strides` of lax).
        padding: (low, high) of each axis; negative values crop.
        dilation: step between the inputs of one window (`rhs_dilation` of lax).
        groups: number of channel groups (`feature_group_count` of lax).
    """

    strides: Axes
    padding: Pairs
    dilation: Axes
    groups: int


def broadcast_to_axes(value: Size, num_axes: int, name: str) -> Axes:
    """Return one positive int per axis.

    Raises:
        ValueError: another number of values, or one below 1; the message calls them `name`.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * num_axes
    if len(values) != num_axes or not all(_is_integer(v) and v > 0 for v in values):
        raise ValueError(f"{name}={value} must be a positive int or {num_axes} of them")
    return values


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer))


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_integer, value))


def dilated_size(window: Sequence[int], dilation: Sequence[int]) -> Axes:
    """Return how many inputs a dilated window spans on each axis."""
    return tuple((w - 1) * d + 1 for w, d in zip(window, dilation, strict=True))


def output_size(input_size: Axes, kernel_size: Axes, spec: ConvSpec) -> Axes:
    """Return the spatial shape of the output of a convolution."""
    spans = dilated_size(kernel_size, spec.dilation)
    axes = zip(input_size, spec.padding, spans, spec.strides, strict=True)
    return tuple(
        max((size + low + high - span) // stride + 1, 0) for size, (low, high), span, stride in axes
    )


def transposed_padding(kernel_size: Axes, spec: ConvSpec) -> Pairs:
    """Return the padding of the convolution that transposes one of stride 1."""
    spans = dilated_size(kernel_size, spec.dilation)
    pairs = zip(spans, spec.padding, strict=True)
    return tuple((span - 1 - low, span - 1 - high) for span, (low, high) in pairs)


def padding_pairs(
    padding: Padding, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> Pairs:
    """Resolve padding to one (low, high) pair per axis.

    Raises:
        ValueError: unknown padding, a negative int, or a window that does not fit into the padded
            axis.
    """
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding={padding!r} must be 'SAME', 'VALID', an int or pairs")
        pairs = tuple((a, b) for a, b in lax.padtype_to_pads(sizes, window, strides, padding))
    else:
        given: Any = padding  # to mypy a sequence of pairs might be a string
        if isinstance(given, Sequence):
            fits = len(given) == len(sizes) and all(map(_is_pair, given))
        else:
            fits = _is_integer(given) and given >= 0
            given = ((given, given),) * len(sizes)
        if not fits:
            raise ValueError(
                f"padding={padding} must be 'SAME', 'VALID', an int of 0 or more, or {len(sizes)} "
                "(low, high) pairs"
            )
        pairs = tuple((low, high) for low, high in given)
    for size, (low, high), extent in zip(sizes, pairs, window, strict=True):
        if size + low + high < extent:
            raise ValueError(
                f"a window of {extent} does not fit into {size} + {low + high} padded elements "
                f"(spatial shape {tuple(sizes)}); use a larger input, more padding or fewer "
                "layers that reduce the size"
            )
    return pairs


def strided_slice(x: jax.Array, starts: Sequence[int], shape: Axes, strides: Axes) -> jax.Array:
    """Slice the spatial axes from `starts` on with `strides`, to the spatial part of `shape`."""
    spans = zip(starts, shape[1:-1], strides, strict=True)
    slices = (slice(a, a + (count - 1) * step + 1, step) for a, count, step in spans)
    return x[(slice(None), *slices)]


def kernel_offsets(kernel_size: Sequence[int]) -> list[Axes]:
    """List the positions in a kernel in row-major order."""
    return list(itertools.product(*map(range, kernel_size)))


def pad_spatial(x: jax.Array, spec: ConvSpec) -> jax.Array:
    """Pad the axes between the first and the last with zeros."""
    edges = [(low, high, 0) for low, high in spec.padding]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def im2col(
    offsets: Sequence[Axes], padded: jax.Array, output_size: Axes, spec: ConvSpec
) -> list[jax.Array]:
    """Slice the inputs that each kernel offset is multiplied with.

    Args:
        offsets: of the kernel; see `kernel_offsets`.
        padded: the padded input, [first, *padded size, last].
        output_size: spatial shape of the output.
        spec: static arguments of the convolution.

    Returns:
        [first, *output_size, last] for each offset.
    """
    shape = (padded.shape[0], *output_size, padded.shape[-1])
    return [
        strided_slice(
            padded,
            [o * d for o, d in zip(offset, spec.dilation, strict=True)],
            shape,
            spec.strides,
        )
        for offset in offsets
    ]


def col2im(columns: jax.Array, kernel_size: Axes, input_size: Axes, spec: ConvSpec) -> jax.Array:
    """Scatter-add the columns to the inputs that they were sliced from: the transpose of `im2col`.

    Args:
        columns: [offsets, first, *output_size, last], the offsets in the order of
            `kernel_offsets`.
        kernel_size: spatial shape of the kernel.
        input_size: spatial shape of the input, without padding.
        spec: static arguments of the convolution.

    Returns:
        [first, *input_size, last].
    """
    total = jnp.zeros((columns.shape[1], *input_size, columns.shape[-1]), columns.dtype)
    for column, offset in zip(columns, kernel_offsets(kernel_size), strict=True):
        axes = zip(offset, spec.dilation, spec.padding, strict=True)
        starts = [o * d - low for o, d, (low, _) in axes]
        total += _transpose_of_slice(column, starts, input_size, spec.strides)
    return total


def _transpose_of_slice(
    x: jax.Array, starts: Sequence[int], size: Axes, strides: Axes
) -> jax.Array:
    """Put the elements `strides` apart, from `starts` on, into zeros of spatial shape `size`.

    It is one `lax.pad` with interior padding, which aborts XLA's partitioner where height or width
    is sharded. Padding a new axis and merging it does not.
    """
    zero = jnp.zeros((), x.dtype)
    for axis, (start, extent, stride) in enumerate(zip(starts, size, strides, strict=True), 1):
        shape = x.shape
        gaps = [(0, 0, 0)] * (x.ndim + 1)
        gaps[axis + 1] = (0, stride - 1, 0)
        x = lax.pad(jnp.expand_dims(x, axis + 1), zero, gaps)  # [..., outputs, stride, ...]
        x = x.reshape(*shape[:axis], shape[axis] * stride, *shape[axis + 1 :])
        edges = [(0, 0, 0)] * x.ndim
        edges[axis] = (start, extent - start - shape[axis] * stride, 0)
        x = lax.pad(x, zero, edges)  # [..., extent, ...]
    return x
