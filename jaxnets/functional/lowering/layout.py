"""Materialization, memory layout and the innermost axis on CPU.

XLA's CPU compiler fuses an elementwise computation into every consumer and recomputes it there.
Its cost model takes window comparisons for cheap; materializing their result brings a step of a
small convolutional network down to 0.5 to 0.8 of the time.

It also folds a transpose into the matrix product that consumes it, which then reads one operand
through strides. In bfloat16 such a product misses the fast kernels and is converted to float32: a
layer of attention with its gradient takes up to twice the time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata

from jaxnets.functional.lowering.platforms import platform_dependent

# With 32 channels on both sides it takes up to 1.4 times as long.
_FEW = 16


def is_few(channels: int) -> bool:
    """Whether arrays of so many channels are computed with the batch innermost on CPU."""
    return channels <= _FEW


def swap_batch_and_channels(x: jax.Array) -> jax.Array:
    """Swap batch and channels: [batch, ..., channels] to [channels, ..., batch], and back."""
    return jnp.swapaxes(x, 0, -1)


def batch_innermost_if_few(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Apply a function for which the first and the last axis are alike.

    Args:
        function: of arrays [first, ..., last].
        arrays: [batch, ..., channels], all of the same channels.

    Returns:
        What `function` returns, computed with the batch innermost where the channels are few.
    """
    if not is_few(arrays[0].shape[-1]):
        return function(*arrays)
    return swap_batch_and_channels(function(*map(swap_batch_and_channels, arrays)))


@jax.jit
def _identity(x: jax.Array) -> jax.Array:
    # The barrier, which is an operation for JAX, keeps the call when it is differentiated: JAX
    # drops a function that returns its argument.
    return lax.optimization_barrier(x)


def materialize(x: jax.Array) -> jax.Array:
    """Write an array down once, for all loops that read it, instead of computing it in each.

    `lax.optimization_barrier` does not do that: the compiler drops it before it merges loops. A
    call that is not to be inlined stays, and an identity costs nothing. It is a hint: numbers,
    derivatives, batching and shardings are those of `x`. The cotangent is written down once, too.

    Args:
        x: of any shape.

    Returns:
        `x`.

    Example:
        >>> def double(x):
        ...     return materialize(x + x)
        >>> 'inlineable="false"' in jax.jit(double).lower(1.0).compile().as_text()
        True
    """
    with set_xla_metadata(inlineable="false"):
        return _identity(x)


def row_major(x: jax.Array) -> jax.Array:
    """On CPU, write an array down in the order of its axes before it is read.

    Args:
        x: of any shape, usually a transpose.

    Returns:
        `x`.
    """

    # A constraint of the layout gathers an array that is split over devices. A result that is
    # written down lies in that order, too, but is a copy more where a loop could write it.
    return platform_dependent(x, cpu=_row_by_row, default=_as_it_is, partitioned=materialize)


# Not inside of `row_major`: of one and the same function JAX remembers what it traced.
def _as_it_is(x: jax.Array) -> jax.Array:
    return x


def _row_by_row(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
