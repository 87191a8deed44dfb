"""Convolutions of 3 taps by fewer products: Winograd's minimal filtering F(2, 3).

Two neighboring outputs of 3 taps are 6 products. Sums of the 4 inputs that they see, and of the
taps, need 4 products for the same: in two dimensions 16 instead of 36. Summing costs memory
traffic, so the tiles of a chunk of the batch stay in the cache between their sums and products.
In float32 the outputs differ from those of the plain formula by 1e-6 to 2e-6 of the largest.

References:
    Winograd 1980, "Arithmetic Complexity of Computations"; Lavin and Gray 2016, arXiv:1509.09308,
    section 4 (two dimensions; the same tiles for the gradients).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering.chunks import map_chunks, sum_over_chunks
from jaxnets.functional.lowering.layout import materialize
from jaxnets.functional.matmul import linear
from jaxnets.functional.windows import Axes, Pairs

#: Place in a transformed tile, 0 to 3 on each axis -> array.
_Tiles: TypeAlias = dict[Axes, jax.Array]

TAPS = 3
_OUTPUTS, _INPUTS = 2, 4
# So many numbers of a chunk's tiles stay in the cache between their sums and products, where both
# kinds of tiles are read for the gradient, and one is written forward.
_CACHED_FORWARD, _CACHED_GRADIENT = 2**22, 2**20


def _input_sums(seen: Sequence[jax.Array]) -> list[jax.Array]:
    a, b, c, d = seen
    return [a - c, b + c, c - b, b - d]


def _output_sums(products: Sequence[jax.Array]) -> list[jax.Array]:
    a, b, c, d = products
    return [a + b + c, b - c - d]


def _output_shares(outputs: Sequence[jax.Array]) -> list[jax.Array]:
    """Transpose `_output_sums`: what each of the products gets of the outputs' cotangents."""
    a, b = outputs
    return [a, a + b, a - b, -b]


def _tap_sums(taps: Sequence[jax.Array]) -> list[jax.Array]:
    """Return what each of the 4 products has of the 3 taps."""
    a, b, c = taps
    outer = a + c
    return [a, (outer + b) / 2, (outer - b) / 2, c]


def _tap_shares(products: Sequence[jax.Array]) -> list[jax.Array]:
    """Transpose `_tap_sums`."""
    a, b, c, d = products
    inner = (b + c) / 2
    return [a + inner, (b - c) / 2, inner + d]


def products_saved(outputs: Axes) -> float:
    """Return by how many products for each output and pair of channels this is cheaper."""
    tiles = math.prod(map(_count, outputs))
    return TAPS ** len(outputs) - _INPUTS ** len(outputs) * tiles / math.prod(outputs)


def convolve(x: jax.Array, kernel: jax.Array, *, padding: Pairs) -> jax.Array:
    """Convolve with 3 taps on each axis, without strides, dilation and groups.

    Args:
        x: [batch, *inputs, channels].
        kernel: [3, ..., channels, features].
        padding: (low, high) of each axis; negative ones cut.

    Returns:
        [batch, *outputs, features].
    """
    return _convolve(x, _kernel_tiles(kernel), padding)


def input_gradient(kernel: jax.Array, dy: jax.Array, *, padding: Pairs) -> jax.Array:
    """Return the gradient [batch, *inputs, channels] of the input of `convolve`.

    It is the convolution with the taps in reverse order, channels and features exchanged. In that
    order the sums of the taps are the same, the first and the last exchanged.

    Args:
        kernel: [3, ..., channels, features].
        dy: cotangent of the outputs, [batch, *outputs, features].
        padding: of the convolution.
    """
    reverse = [3, 1, 2, 0]
    tiles = _kernel_tiles(kernel)
    reversed_tiles = {place: tiles[tuple(reverse[i] for i in place)].T for place in tiles}
    edges = tuple((TAPS - 1 - low, TAPS - 1 - high) for low, high in padding)
    return _convolve(dy, reversed_tiles, edges)


def _convolve(x: jax.Array, kernels: _Tiles, padding: Pairs) -> jax.Array:
    sizes = _output_sizes(x.shape[1:-1], padding)
    width = sum(next(iter(kernels.values())).shape)

    def chunk(x: jax.Array) -> jax.Array:
        tiles = _input_tiles(x, sizes, padding)
        return _joined({p: linear(tile, kernels[p]) for p, tile in tiles.items()}, sizes)

    numbers = len(x) * _tile_numbers(sizes, width)
    return map_chunks(chunk, x, num_elements=numbers, chunk_elements=_CACHED_FORWARD)


def kernel_gradient(x: jax.Array, dy: jax.Array, *, padding: Pairs) -> jax.Array:
    """Return the gradient [3, ..., channels, features] of the kernel of `convolve`.

    Args:
        x: [batch, *inputs, channels].
        dy: cotangent of the outputs, [batch, *outputs, features].
        padding: (low, high) of each axis; negative ones cut.
    """
    sizes, channels, features = dy.shape[1:-1], x.shape[-1], dy.shape[-1]
    places = _places(len(sizes))

    def chunk(x: jax.Array, dy: jax.Array) -> jax.Array:
        inputs, shares = _input_tiles(x, sizes, padding), _output_tiles(dy)
        rows = math.prod(inputs[places[0]].shape[:-1])
        pairs = [
            (inputs[p].reshape(rows, channels), shares[p].reshape(rows, features)) for p in places
        ]
        return jnp.stack([lax.dot_general(*pair, (((0,), (0,)), ((), ()))) for pair in pairs])

    numbers = len(x) * _tile_numbers(sizes, channels + features)
    total = sum_over_chunks(chunk, x, dy, num_elements=numbers, chunk_elements=_CACHED_GRADIENT)
    shares = dict(zip(places, total, strict=True))
    for _ in sizes:  # the last axis first
        before = _places(len(next(iter(shares))) - 1)
        joined = {p: _tap_shares([shares[*p, i] for i in range(_INPUTS)]) for p in before}
        shares = {p: jnp.stack(taps) for p, taps in joined.items()}
    return shares[()]


def _places(num_axes: int, size: int = _INPUTS) -> list[Axes]:
    return list(itertools.product(range(size), repeat=num_axes))


def _count(size: int) -> int:
    """Return how many tiles there are along an axis with so many outputs."""
    return -(-size // _OUTPUTS)


def _tile_numbers(sizes: Axes, width: int) -> int:
    return math.prod(_INPUTS * _count(size) for size in sizes) * width


def _kernel_tiles(kernel: jax.Array) -> _Tiles:
    """Return the sums of the taps, [channels, features] for each place."""
    # Written down, where XLA would sum again in every loop that copies them for a product.
    tiles: _Tiles = {(): kernel}
    for _ in range(kernel.ndim - 2):
        tiles = {
            (*p, i): materialize(s)
            for p, taps in tiles.items()
            for i, s in enumerate(_tap_sums(list(taps)))
        }
    return tiles


def _input_tiles(x: jax.Array, sizes: Axes, padding: Pairs) -> _Tiles:
    """Return the sums of the inputs, [batch, *tiles, channels] for each place."""
    extents = [_OUTPUTS * _count(size) + TAPS - 1 for size in sizes]
    tiles: _Tiles = {(): _pad(x, extents, [low for low, _ in padding])}
    for axis, size in enumerate(sizes, 1):
        seen = {
            place: _every_second(tile, axis, _count(size), _INPUTS) for place, tile in tiles.items()
        }
        tiles = {
            (*p, i): s for p, inputs in seen.items() for i, s in enumerate(_input_sums(inputs))
        }
    return tiles


def _output_tiles(dy: jax.Array) -> _Tiles:
    """Return the shares of the cotangents, [batch, *tiles, features] for each place."""
    sizes = dy.shape[1:-1]
    extents = [_OUTPUTS * _count(size) for size in sizes]
    tiles: _Tiles = {(): _pad(dy, extents, [0] * len(sizes))}
    for axis, size in enumerate(sizes, 1):
        seen = {p: _every_second(tile, axis, _count(size), _OUTPUTS) for p, tile in tiles.items()}
        tiles = {(*p, i): s for p, pair in seen.items() for i, s in enumerate(_output_shares(pair))}
    return tiles


def _pad(x: jax.Array, extents: Sequence[int], lows: Sequence[int]) -> jax.Array:
    # Written down, where XLA would look for a chunk's place again in the loops of all sums.
    edges = [
        (low, extent - size - low, 0)
        for low, extent, size in zip(lows, extents, x.shape[1:-1], strict=True)
    ]
    return materialize(lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)]))


def _every_second(x: jax.Array, axis: int, count: int, starts: int) -> list[jax.Array]:
    """Take `count` elements from each start on, one for each tile."""
    return [
        lax.slice_in_dim(x, start, start + _OUTPUTS * (count - 1) + 1, _OUTPUTS, axis)
        for start in range(starts)
    ]


def _joined(products: _Tiles, sizes: Axes) -> jax.Array:
    """Sum the products to the outputs, [batch, *sizes, features]."""
    num_axes = len(sizes)
    for axis in range(num_axes):
        several = {
            (*before, *after): _output_sums([products[*before, i, *after] for i in range(_INPUTS)])
            for before in _places(axis, _OUTPUTS)
            for after in _places(num_axes - axis - 1)
        }
        products = {
            (*rest[:axis], i, *rest[axis:]): output
            for rest, outputs in several.items()
            for i, output in enumerate(outputs)
        }
    for axis in reversed(range(num_axes)):
        products = {
            place: _interleaved([products[*place, i] for i in range(_OUTPUTS)], axis + 1)
            for place in _places(axis, _OUTPUTS)
        }
    return products[()][(slice(None), *map(slice, sizes))]


def _interleaved(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    shape = arrays[0].shape
    joined = (*shape[:axis], _OUTPUTS * shape[axis], *shape[axis + 1 :])
    return jnp.stack(arrays, axis + 1).reshape(joined)


def _output_sizes(inputs: Axes, padding: Pairs) -> Axes:
    spans = zip(inputs, padding, strict=True)
    return tuple(size + low + high - TAPS + 1 for size, (low, high) in spans)
