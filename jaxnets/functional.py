"""Pure array functions with a per-platform lowering: convolution and pooling, channels last.

Each means the plain XLA operation. Only gradients differ, and only where XLA's own is slow: inside
a `lax.scan` on CPU the plain kernel gradient of a convolution is 20 to 150 times slower than
outside. Which gradient runs is chosen when the program is compiled for its platform.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

#: One value for every spatial axis, or one per axis.
Extent: TypeAlias = int | Sequence[int]
#: "SAME", "VALID", one width for both ends of every axis, or a (low, high) pair per axis.
Padding: TypeAlias = str | int | Sequence[tuple[int, int]]

# Below this many channels one matrix product over all kernel offsets beats one product for each.
_JOIN_OFFSETS_BELOW = 16
# Above this many elements a window's own gradient is unrolled too often to be worth compiling.
_MAX_UNROLLED_WINDOW = 16


_Axes: TypeAlias = tuple[int, ...]
_Pairs: TypeAlias = tuple[tuple[int, int], ...]


class _Geometry(NamedTuple):
    strides: _Axes
    padding: _Pairs
    dilation: _Axes
    groups: int


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Extent = 1,
    padding: Padding = "SAME",
    dilation: Extent = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolve over time, or over height and width.

    Reverse-mode differentiable any number of times; forward mode is not supported.

    Args:
        x: [batch, time, channels] or [batch, height, width, channels].
        kernel: [time, channels / groups, features] or [height, width, channels / groups,
            features], of the dtype of `x`.
        strides: step between outputs.
        padding: "SAME", "VALID", a width, or (low, high) pairs.
        dilation: step between the inputs that one output sees.
        groups: number of channel groups convolved apart; the number of channels is depthwise.

    Returns:
        [batch, ..., features], of the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or no 1-D or 2-D input.

    Example:
        >>> image, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
        >>> convolution(image, kernel, padding="VALID").shape
        (1, 2, 2, 2)
    """
    spatial = x.ndim - 2
    if spatial not in (1, 2) or kernel.ndim != x.ndim:
        raise ValueError(
            f"convolution got x of shape {x.shape} and a kernel of shape {kernel.shape}; give "
            "[batch, time, channels] with a rank 3 kernel, or [batch, height, width, channels] "
            "with a rank 4 kernel"
        )
    channels, features = x.shape[-1], kernel.shape[-1]
    if groups < 1 or channels != kernel.shape[-2] * groups or features % groups:
        raise ValueError(
            f"{channels} channels in {groups} groups do not fit a kernel of shape {kernel.shape}; "
            "kernel.shape[-2] must be channels / groups and groups must divide the features"
        )
    steps = _per_axis(strides, spatial, "strides")
    gaps = _per_axis(dilation, spatial, "dilation")
    pairs = _padding_pairs(padding, x.shape[1:-1], _extent(kernel.shape[:-2], gaps), steps)
    if groups == 1 and math.prod(kernel.shape[:-2]) == 1 and not any(map(any, pairs)):
        every = tuple(slice(None, None, step) for step in steps)
        return linear(x[(slice(None), *every)], kernel.reshape(channels, features))
    return _convolution(x, kernel, _Geometry(steps, pairs, gaps, groups))


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply the last axis by a matrix, as one product of two matrices.

    Args:
        x: [..., channels].
        kernel: [channels, features].

    Returns:
        [..., features].
    """
    # On CPU the gradient of a product with more leading axes copies both operands transposed.
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def max_pool(
    x: jax.Array, window: Extent, strides: Extent | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """Take the maximum of each window; where several are equal the first gets the gradient.

    Args:
        x: [batch, time, channels] or [batch, height, width, channels].
        window: size of the window.
        strides: step between windows; by default the window, so that windows do not overlap.
        padding: "SAME", "VALID", a width, or (low, high) pairs; padding is never the maximum.

    Returns:
        [batch, ..., channels], of the dtype of `x`.

    Example:
        >>> max_pool(jnp.arange(6.0).reshape(1, 6, 1), 2)[0, :, 0].tolist()
        [1.0, 3.0, 5.0]
    """
    sizes, steps, pairs = _pool_geometry(x, window, strides, padding)
    if (
        sizes == steps
        and not any(map(any, pairs))
        and math.prod(sizes) <= _MAX_UNROLLED_WINDOW
        and jnp.issubdtype(x.dtype, jnp.floating)
    ):
        return _tile_max(x, sizes)
    return _reduce_max(x, sizes, steps, pairs)


def average_pool(
    x: jax.Array, window: Extent, strides: Extent | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """Average each window over the elements that are not padding.

    Args:
        x: [batch, time, channels] or [batch, height, width, channels], floating.
        window: size of the window.
        strides: step between windows; by default the window, so that windows do not overlap.
        padding: "SAME", "VALID", a width, or (low, high) pairs.

    Returns:
        [batch, ..., channels], of the dtype of `x`; summed in float32 or wider.
    """
    sizes, steps, pairs = _pool_geometry(x, window, strides, padding)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    ones = jnp.ones((1, *x.shape[1:-1], 1), wide.dtype)
    total, count = (_reduce_window(v, 0.0, lax.add, sizes, steps, pairs) for v in (wide, ones))
    return (total / count).astype(x.dtype)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Average over time, or over height and width.

    Args:
        x: [batch, ..., channels].

    Returns:
        [batch, channels], of the dtype of `x`; summed in float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=wide).astype(x.dtype)


def _plain_convolution(x: jax.Array, kernel: jax.Array, geometry: _Geometry) -> jax.Array:
    axes = "HW"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=geometry.strides,
        padding=geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=geometry.groups,
    )


_convolution = jax.custom_vjp(_plain_convolution, nondiff_argnums=(2,))


def _convolution_forward(
    x: jax.Array, kernel: jax.Array, geometry: _Geometry
) -> tuple[jax.Array, Any]:
    return _plain_convolution(x, kernel, geometry), (x, kernel)


def _convolution_backward(
    geometry: _Geometry, residuals: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals

    def plain_dx(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda v: _plain_convolution(v, kernel, geometry), x)(dy)[0]

    def plain_dkernel(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda v: _plain_convolution(x, v, geometry), kernel)(dy)[0]

    own_dx = functools.partial(_input_gradient, size=x.shape[1:-1], geometry=geometry)
    own_dkernel = functools.partial(_kernel_gradient, size=kernel.shape[:-2], geometry=geometry)
    # Two choices, so that the compiler can drop the input gradient that nobody asks for.
    dx = lax.platform_dependent(kernel, dy, cpu=own_dx, default=plain_dx)
    dkernel = lax.platform_dependent(x, dy, cpu=own_dkernel, default=plain_dkernel)
    return dx, dkernel


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _input_gradient(
    kernel: jax.Array, dy: jax.Array, *, size: _Axes, geometry: _Geometry
) -> jax.Array:
    """Return the gradient [batch, *size, channels] of the input of a convolution."""
    strides, padding, dilation, groups = geometry
    taps, (width, features) = kernel.shape[:-2], kernel.shape[-2:]
    if all(stride == 1 for stride in strides):
        # The transpose of a convolution of stride 1 is the convolution with the flipped kernel.
        spatial = tuple(range(len(taps)))
        flipped = jnp.flip(kernel, spatial).reshape(*taps, width, groups, features // groups)
        flipped = jnp.swapaxes(flipped, -1, -3).reshape(*taps, features // groups, groups * width)
        reach = _extent(taps, dilation)
        spans = zip(reach, padding, strict=True)
        pairs = tuple((r - 1 - low, r - 1 - high) for r, (low, high) in spans)
        return _convolution(dy, flipped, _Geometry(strides, pairs, dilation, groups))
    if groups > 1:
        ungrouped = geometry._replace(groups=1)
        single = functools.partial(_input_gradient, size=size, geometry=ungrouped)
        return _per_group(single, groups, kernel, dy)
    # Every output sends its share to every input it saw: one product, then a strided sum.
    shares = lax.dot_general(
        dy.reshape(-1, features),
        kernel.reshape(-1, features),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.promote_types(dy.dtype, jnp.float32),
    ).reshape(*dy.shape[:-1], math.prod(taps), width)
    zero = jnp.zeros((), shares.dtype)
    total = jnp.zeros((dy.shape[0], *size, width), shares.dtype)
    for index, offset in enumerate(itertools.product(*map(range, taps))):
        low = [o * d - p[0] for o, d, p in zip(offset, dilation, padding, strict=True)]
        edges = [
            (start, extent - start - (count - 1) * stride - 1, stride - 1)
            for start, extent, count, stride in zip(low, size, dy.shape[1:-1], strides, strict=True)
        ]
        total += lax.pad(shares[..., index, :], zero, [(0, 0, 0), *edges, (0, 0, 0)])
    return total.astype(dy.dtype)


def _kernel_gradient(x: jax.Array, dy: jax.Array, *, size: _Axes, geometry: _Geometry) -> jax.Array:
    """Return the gradient [*size, channels / groups, features] of the kernel of a convolution."""
    strides, padding, dilation, groups = geometry
    channels, features = x.shape[-1], dy.shape[-1]
    if 1 < groups < channels:
        ungrouped = geometry._replace(groups=1)
        single = functools.partial(_kernel_gradient, size=size, geometry=ungrouped)
        return _per_group(single, groups, x, dy)
    edges = [(low, high, 0) for low, high in padding]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    patches = [  # what each kernel offset sees, each [batch, *outputs, channels]
        _strided(padded, [o * d for o, d in zip(offset, dilation, strict=True)], dy.shape, strides)
        for offset in itertools.product(*map(range, size))
    ]
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def product(patch: jax.Array) -> jax.Array:
        rows, gradients = patch.reshape(-1, patch.shape[-1]), dy.reshape(-1, features)
        contract_rows = (((0,), (0,)), ((), ()))
        return lax.dot_general(rows, gradients, contract_rows, preferred_element_type=wide)

    if groups > 1:  # depthwise: each feature sees one channel
        outputs = _split_last(dy, channels)  # [batch, *outputs, channels, features / channels]
        summed = tuple(range(dy.ndim - 1))
        dkernel = jnp.stack([jnp.sum(p[..., None] * outputs, summed, wide) for p in patches])
    elif channels < _JOIN_OFFSETS_BELOW:
        dkernel = product(jnp.concatenate(patches, axis=-1))
    else:
        dkernel = jnp.stack([product(patch) for patch in patches])
    return dkernel.reshape(*size, channels // groups, features).astype(x.dtype)


def _per_group(function: Any, groups: int, first: jax.Array, second: jax.Array) -> jax.Array:
    """Apply `function` to each group of the last axes and join what it returns along its last."""
    arrays = (_split_last(first, groups), _split_last(second, groups))
    joined = jax.vmap(function, in_axes=-2, out_axes=-2)(*arrays)
    return joined.reshape(*joined.shape[:-2], groups * joined.shape[-1])


def _strided(x: jax.Array, starts: Sequence[int], shape: _Axes, strides: _Axes) -> jax.Array:
    """Take every stride-th element from `starts` on, as many as `shape` has on its axes."""
    spans = zip(starts, shape[1:-1], strides, strict=True)
    slices = (slice(a, a + (count - 1) * step + 1, step) for a, count, step in spans)
    return x[(slice(None), *slices)]


def _split_last(array: jax.Array, groups: int) -> jax.Array:
    return array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)


def _reduce_window(
    x: jax.Array, initial: Any, function: Any, sizes: _Axes, steps: _Axes, pairs: _Pairs
) -> jax.Array:
    padding = ((0, 0), *pairs, (0, 0))
    return lax.reduce_window(x, initial, function, (1, *sizes, 1), (1, *steps, 1), padding)


def _reduce_max(x: jax.Array, sizes: _Axes, steps: _Axes, pairs: _Pairs) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    lowest = -jnp.inf if floating else jnp.iinfo(x.dtype).min
    return _reduce_window(x, lowest, lax.max, sizes, steps, pairs)


def _plain_tile_max(x: jax.Array, window: _Axes) -> jax.Array:
    return _reduce_max(x, window, window, ((0, 0),) * len(window))


_tile_max = jax.custom_vjp(_plain_tile_max, nondiff_argnums=(1,))


def _tile_max_forward(x: jax.Array, window: _Axes) -> tuple[jax.Array, Any]:
    y = _plain_tile_max(x, window)
    return y, (x, y)


def _tile_max_backward(window: _Axes, residuals: Any, dy: jax.Array) -> tuple[jax.Array]:
    def plain(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda v: _plain_tile_max(v, window), x)[1](dy)[0]

    own = functools.partial(_tile_max_gradient, window=window)
    return (lax.platform_dependent(*residuals, dy, cpu=own, default=plain),)


_tile_max.defvjp(_tile_max_forward, _tile_max_backward)


def _tile_max_gradient(x: jax.Array, y: jax.Array, dy: jax.Array, *, window: _Axes) -> jax.Array:
    """Send `dy` to the first maximum of each tile: comparisons instead of XLA's scatter."""
    winner = jnp.full(y.shape, -1, jnp.int8)
    offsets = list(itertools.product(*map(range, window)))
    for index, offset in reversed(list(enumerate(offsets))):  # backwards: the first match stays
        winner = jnp.where(_strided(x, offset, y.shape, window) == y, jnp.int8(index), winner)
    within = tuple(range(2, 2 + 2 * len(window), 2))  # [batch, rows, in row, columns, in column, c]
    per_tile = [n for w in window for n in (1, w)]
    positions = jnp.arange(len(offsets), dtype=jnp.int8).reshape(1, *per_tile, 1)
    chosen = jnp.expand_dims(winner, within) == positions
    dx = jnp.where(chosen, jnp.expand_dims(dy, within), jnp.zeros((), dy.dtype))
    tiled = [size - size % w for size, w in zip(x.shape[1:-1], window, strict=True)]
    rest = [(0, size % w) for size, w in zip(x.shape[1:-1], window, strict=True)]
    return jnp.pad(dx.reshape(x.shape[0], *tiled, x.shape[-1]), [(0, 0), *rest, (0, 0)])


def _per_axis(value: Extent, num_axes: int, name: str) -> _Axes:
    values = (value,) * num_axes if isinstance(value, int) else tuple(value)
    if len(values) != num_axes or any(v < 1 for v in values):
        raise ValueError(f"{name}={value} must be a positive int or {num_axes} of them")
    return values


def _extent(window: Sequence[int], dilation: Sequence[int]) -> _Axes:
    return tuple((w - 1) * d + 1 for w, d in zip(window, dilation, strict=True))


def _padding_pairs(
    padding: Padding, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> _Pairs:
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


def _pool_geometry(
    x: jax.Array, window: Extent, strides: Extent | None, padding: Padding
) -> tuple[_Axes, _Axes, _Pairs]:
    spatial = x.ndim - 2
    if spatial < 1:
        raise ValueError(f"pooling got shape {x.shape}; give [batch, ..., channels]")
    sizes = _per_axis(window, spatial, "window")
    steps = sizes if strides is None else _per_axis(strides, spatial, "strides")
    return sizes, steps, _padding_pairs(padding, x.shape[1:-1], sizes, steps)
