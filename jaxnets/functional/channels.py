"""Broadcasts of a vector of channels over arrays [..., channels], and the sums that transpose them.

XLA's CPU program for a sum over several leading axes is scalar as soon as a computation is fused
into it. The same sum in two steps, first over all but some neighboring positions, is vectorized: 3
to 4 times as fast in a batch norm.

Both functions are jitted, so that they and their gradients are traced once for all layers of a
shape: tracing the choice of a platform takes longer than tracing the rest of a layer.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxnets.core import at_least_float32
from jaxnets.functional.lowering import layout
from jaxnets.functional.lowering.platforms import platform_dependent, sizes_are_known

# At most this many columns are summed in the first step.
_COLUMNS = 4096


def channel_sum(x: jax.Array) -> jax.Array:
    """Sum over every axis but the last.

    Args:
        x: [..., channels], floating.

    Returns:
        [channels], of the dtype of `x`; accumulated in float32 or wider.
    """
    return _sum_positions(x)


def along_channels(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcast a vector to the shape of an array; its gradient is a `channel_sum`.

    Args:
        vector: [channels].
        like: [..., channels].

    Returns:
        An array of the shape of `like` and the dtype of `vector`.
    """
    return _repeat(vector, like.shape)


@jax.jit
def _sum_positions(x: jax.Array) -> jax.Array:
    return _wide_sum(at_least_float32(x)).astype(x.dtype)


def _wide_sum(x: jax.Array) -> jax.Array:
    neighbors = _num_neighbors(x.shape)
    if neighbors == 1:
        return _plain_sum(x)

    def in_two_steps(x: jax.Array) -> jax.Array:
        if _has_batch_innermost(x.shape):
            return jnp.sum(jnp.sum(x, axis=(1, 2)), axis=0)
        channels = x.shape[-1]
        # [positions / neighbors, neighbors * channels]
        rows = x.reshape(x.size // (neighbors * channels), neighbors * channels)
        return jnp.sum(jnp.sum(rows, axis=0).reshape(neighbors, channels), axis=0)

    def partitioned(x: jax.Array) -> jax.Array:
        if _has_batch_innermost(x.shape):
            return in_two_steps(x)
        # [positions / neighbors, neighbors, channels]: merging the last two axes would gather an
        # array whose channels are split over devices.
        return jnp.sum(jnp.sum(x.reshape(-1, neighbors, x.shape[-1]), axis=0), axis=0)

    return platform_dependent(x, cpu=in_two_steps, default=_plain_sum, partitioned=partitioned)


@functools.partial(jax.jit, static_argnames="shape")
def _repeat(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # In float32, so that the gradient accumulates in it: XLA's CPU loop that adds bfloat16 elements
    # takes 10 to 25 times as long, and rounds each sum.
    return _wide_repeat(at_least_float32(vector), shape).astype(vector.dtype)


def _wide_repeat(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    neighbors = _num_neighbors(shape)

    def plain(vector: jax.Array) -> jax.Array:
        return jnp.broadcast_to(vector.reshape((1,) * (len(shape) - 1) + vector.shape), shape)

    if neighbors == 1:
        return plain(vector)

    def in_two_steps(vector: jax.Array) -> jax.Array:
        if _has_batch_innermost(shape):
            rows = jnp.broadcast_to(vector, (shape[0], 1, 1, shape[-1]))
            return jnp.broadcast_to(rows, shape)
        # [1, neighbors * channels]
        row = jnp.broadcast_to(vector[None], (neighbors, vector.size)).reshape(1, -1)
        return jnp.broadcast_to(row, (math.prod(shape) // row.size, row.size)).reshape(shape)

    def partitioned(vector: jax.Array) -> jax.Array:
        if _has_batch_innermost(shape):
            return in_two_steps(vector)
        rows = jnp.broadcast_to(vector[None], (neighbors, vector.size))
        count = math.prod(shape) // rows.size
        # [positions / neighbors, neighbors, channels], as for the sum
        return jnp.broadcast_to(rows[None], (count, *rows.shape)).reshape(shape)

    return platform_dependent(vector, cpu=in_two_steps, default=plain, partitioned=partitioned)


def _has_batch_innermost(shape: tuple[int, ...]) -> bool:
    # Images only: other arrays of few channels come from matmuls, which write channels innermost.
    return len(shape) == 4 and layout.is_few(shape[-1])


def _plain_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)))


def _num_neighbors(shape: tuple[int, ...]) -> int:
    """Return how many neighboring positions are columns of the first sum; 1 for a plain sum."""
    if len(shape) < 3 or not sizes_are_known(shape) or 0 in shape:
        return 1
    width, channels = shape[-2:]
    divisors = [n for n in range(2, width + 1) if width % n == 0]
    fitting = [n for n in divisors if n * channels <= _COLUMNS]
    return max(fitting, default=min(divisors, default=1))
