"""Convolution with 3x3 kernels by fewer multiplications: Winograd's minimal filtering F(2, 3).

Two neighboring outputs of a kernel of 3 take 6 multiplications. Of sums of their 4 inputs and of
the kernel's elements it takes 4: in two dimensions 16 instead of 36. The sums cost memory traffic,
so the batch is processed in chunks whose tiles stay in the cache between sums and multiplications.
In float32 the outputs differ from those of the direct formula by 1e-6 to 2e-6 of the largest.

In the paper's words: the inputs are cut into overlapping tiles of 4 (B^T d), the kernel becomes one
tile (G g), both are multiplied element by element, which is a matmul over the channels for each of
the 4 or 16 positions of a tile, and the products become tiles of 2 outputs (A^T m).

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
from jaxnets.functional.windows import Axes, ConvSpec, Pairs, transposed_padding

#: Position in a transformed tile, 0 to 3 on each axis -> array of that element of all tiles.
_Tiles: TypeAlias = dict[Axes, jax.Array]

KERNEL_SIZE = 3
_OUTPUT_TILE, _INPUT_TILE = 2, 4
# At most this many elements of a chunk's tiles stay in the cache between sums and multiplications,
# where the gradient reads both kinds of tiles, and the forward pass writes one of them.
_CACHED_FORWARD, _CACHED_GRADIENT = 2**22, 2**20


def _transform_input(inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """Return B^T d."""
    a, b, c, d = inputs
    return [a - c, b + c, c - b, b - d]


def _transform_output(products: Sequence[jax.Array]) -> list[jax.Array]:
    """Return A^T m."""
    a, b, c, d = products
    return [a + b + c, b - c - d]


def _transpose_transform_output(outputs: Sequence[jax.Array]) -> list[jax.Array]:
    """Return A dy: the cotangents of the products."""
    a, b = outputs
    return [a, a + b, a - b, -b]


def _transform_kernel(kernel: Sequence[jax.Array]) -> list[jax.Array]:
    """Return G g."""
    a, b, c = kernel
    outer = a + c
    return [a, (outer + b) / 2, (outer - b) / 2, c]


def _transpose_transform_kernel(tile: Sequence[jax.Array]) -> list[jax.Array]:
    """Return G^T, applied to the gradient of a transformed kernel."""
    a, b, c, d = tile
    inner = (b + c) / 2
    return [a + inner, (b - c) / 2, inner + d]


def multiplications_saved(size: Axes) -> float:
    """Return how many fewer multiplications there are per output and pair of channels.

    Args:
        size: spatial shape of the outputs. Tiles that hang over its edge are computed in full.
    """
    tiles = math.prod(map(_num_tiles, size))
    return KERNEL_SIZE ** len(size) - _INPUT_TILE ** len(size) * tiles / math.prod(size)


def convolve(x: jax.Array, kernel: jax.Array, *, output_size: Axes, spec: ConvSpec) -> jax.Array:
    """Convolve with a kernel of 3 on each axis, without strides, dilation and groups.

    Args:
        x: [batch, *input_size, channels].
        kernel: [3, ..., channels, features].
        output_size: spatial shape of the outputs.
        spec: static arguments of the convolution.

    Returns:
        [batch, *output_size, features].
    """
    return _convolve(x, _kernel_tiles(kernel), output_size, spec.padding)


def input_gradient(
    kernel: jax.Array, dy: jax.Array, *, input_size: Axes, spec: ConvSpec
) -> jax.Array:
    """Return the gradient [batch, *input_size, channels] of the input of `convolve`.

    It is the convolution with the flipped kernel, channels and features exchanged. The transform of
    a flipped kernel has the same sums, the first and the last exchanged.

    Args:
        kernel: [3, ..., channels, features].
        dy: cotangent of the outputs, [batch, *output_size, features].
        input_size: spatial shape of the inputs.
        spec: static arguments of the convolution.
    """
    flip = [3, 1, 2, 0]
    tiles = _kernel_tiles(kernel)
    flipped = {p: tiles[tuple(flip[i] for i in p)].T for p in tiles}
    kernel_size = (KERNEL_SIZE,) * len(input_size)
    return _convolve(dy, flipped, input_size, transposed_padding(kernel_size, spec))


def _convolve(x: jax.Array, kernels: _Tiles, output_size: Axes, padding: Pairs) -> jax.Array:
    width = sum(next(iter(kernels.values())).shape)

    def chunk(x: jax.Array) -> jax.Array:
        tiles = _input_tiles(x, output_size, padding)
        return _from_tiles({p: linear(tile, kernels[p]) for p, tile in tiles.items()}, output_size)

    elements = len(x) * _elements_of_tiles(output_size, width)
    return map_chunks(chunk, x, num_elements=elements, chunk_elements=_CACHED_FORWARD)


def kernel_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient [3, ..., channels, features] of the kernel of `convolve`.

    Args:
        x: [batch, *input_size, channels].
        dy: cotangent of the outputs, [batch, *output_size, features].
        kernel_size: 3 on each axis.
        spec: static arguments of the convolution.
    """
    output_size, channels, features = dy.shape[1:-1], x.shape[-1], dy.shape[-1]
    positions = _positions(len(kernel_size))

    def chunk(x: jax.Array, dy: jax.Array) -> jax.Array:
        inputs, cotangents = _input_tiles(x, output_size, spec.padding), _output_tiles(dy)
        rows = math.prod(inputs[positions[0]].shape[:-1])  # chunk * tiles
        pairs = [
            (inputs[p].reshape(rows, channels), cotangents[p].reshape(rows, features))
            for p in positions
        ]
        # [positions, channels, features]
        return jnp.stack([lax.dot_general(*pair, (((0,), (0,)), ((), ()))) for pair in pairs])

    elements = len(x) * _elements_of_tiles(output_size, channels + features)
    total = sum_over_chunks(chunk, x, dy, num_elements=elements, chunk_elements=_CACHED_GRADIENT)
    tiles = dict(zip(positions, total, strict=True))
    for axis in reversed(range(len(kernel_size))):
        columns = {
            p: _transpose_transform_kernel([tiles[*p, i] for i in range(_INPUT_TILE)])
            for p in _positions(axis)
        }
        tiles = {p: jnp.stack(column) for p, column in columns.items()}
    return tiles[()]


def _positions(num_axes: int, size: int = _INPUT_TILE) -> list[Axes]:
    return list(itertools.product(range(size), repeat=num_axes))


def _num_tiles(size: int) -> int:
    """Return how many tiles cover an axis of `size` outputs."""
    return -(-size // _OUTPUT_TILE)


def _elements_of_tiles(output_size: Axes, width: int) -> int:
    return math.prod(_INPUT_TILE * _num_tiles(size) for size in output_size) * width


def _kernel_tiles(kernel: jax.Array) -> _Tiles:
    """Transform the kernel, [channels, features] for each position."""
    # Materialized, or XLA would recompute the sums in every loop that copies them for a matmul.
    tiles: _Tiles = {(): kernel}
    for _ in range(kernel.ndim - 2):
        tiles = {
            (*p, i): materialize(element)
            for p, part in tiles.items()
            for i, element in enumerate(_transform_kernel(list(part)))
        }
    return tiles


def _input_tiles(x: jax.Array, output_size: Axes, padding: Pairs) -> _Tiles:
    """Transform the tiles of the inputs, [batch, *tiles, channels] for each position."""
    extents = [_OUTPUT_TILE * _num_tiles(size) + KERNEL_SIZE - 1 for size in output_size]
    tiles: _Tiles = {(): _pad(x, extents, [low for low, _ in padding])}
    for axis, size in enumerate(output_size, 1):
        slices = {p: _slices(t, axis, _num_tiles(size), _INPUT_TILE) for p, t in tiles.items()}
        tiles = {
            (*p, i): element
            for p, inputs in slices.items()
            for i, element in enumerate(_transform_input(inputs))
        }
    return tiles


def _output_tiles(dy: jax.Array) -> _Tiles:
    """Return the cotangents of the products, [batch, *tiles, features] for each position."""
    output_size = dy.shape[1:-1]
    extents = [_OUTPUT_TILE * _num_tiles(size) for size in output_size]
    tiles: _Tiles = {(): _pad(dy, extents, [0] * len(output_size))}
    for axis, size in enumerate(output_size, 1):
        slices = {p: _slices(t, axis, _num_tiles(size), _OUTPUT_TILE) for p, t in tiles.items()}
        tiles = {
            (*p, i): element
            for p, outputs in slices.items()
            for i, element in enumerate(_transpose_transform_output(outputs))
        }
    return tiles


def _pad(x: jax.Array, extents: Sequence[int], lows: Sequence[int]) -> jax.Array:
    # Materialized, or XLA would recompute the slice of the chunk in the loops of all sums.
    edges = [
        (low, extent - size - low, 0)
        for low, extent, size in zip(lows, extents, x.shape[1:-1], strict=True)
    ]
    return materialize(lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)]))


def _slices(x: jax.Array, axis: int, count: int, tile: int) -> list[jax.Array]:
    """Return element 0, 1, ... of each of `count` tiles along an axis."""
    return [
        lax.slice_in_dim(x, start, start + _OUTPUT_TILE * (count - 1) + 1, _OUTPUT_TILE, axis)
        for start in range(tile)
    ]


def _from_tiles(products: _Tiles, output_size: Axes) -> jax.Array:
    """Transform the products back and interleave the tiles to [batch, *output_size, features]."""
    num_axes = len(output_size)
    for axis in range(num_axes):
        transformed = {
            (*before, *after): _transform_output(
                [products[*before, i, *after] for i in range(_INPUT_TILE)]
            )
            for before in _positions(axis, _OUTPUT_TILE)
            for after in _positions(num_axes - axis - 1)
        }
        products = {
            (*rest[:axis], i, *rest[axis:]): output
            for rest, outputs in transformed.items()
            for i, output in enumerate(outputs)
        }
    for axis in reversed(range(num_axes)):
        products = {
            p: _interleave([products[*p, i] for i in range(_OUTPUT_TILE)], axis + 1)
            for p in _positions(axis, _OUTPUT_TILE)
        }
    return products[()][(slice(None), *map(slice, output_size))]


def _interleave(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """Merge arrays [..., tiles, ...] to [..., len(arrays) * tiles, ...]."""
    shape = arrays[0].shape
    merged = (*shape[:axis], _OUTPUT_TILE * shape[axis], *shape[axis + 1 :])
    return jnp.stack(arrays, axis + 1).reshape(merged)
