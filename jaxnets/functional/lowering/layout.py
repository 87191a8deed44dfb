"""Materialization and memory layout on CPU.

XLA's CPU compiler fuses an elementwise computation into every consumer and recomputes it there.
Its cost model takes window comparisons for cheap; materializing their result reduces a training
step of a small convolutional network to 0.5 to 0.8 of the time.

It also folds a transpose into the matmul that consumes it, which then reads one operand with
strides. In bfloat16 such a matmul misses the fast kernels and is computed in float32: an attention
layer with its gradient takes up to twice the time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata

from jaxnets.functional.lowering.platforms import platform_dependent

# With 32 input and output channels the batch innermost takes up to 1.4 times as long.
_FEW = 16


def is_few(channels: int) -> bool:
    """Whether arrays with this number of channels are computed with the batch innermost on CPU."""
    return channels <= _FEW


def swap_batch_and_channels(x: jax.Array) -> jax.Array:
    """Swap batch and channels: [batch, ..., channels] to [channels, ..., batch], or back."""
    return jnp.swapaxes(x, 0, -1)


def batch_innermost_if_few(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Apply a function that treats the first and the last axis alike, with the batch innermost.

    Args:
        function: of arrays [first, ..., last].
        arrays: [batch, ..., channels], all with the same number of channels.

    Returns:
        The result of `function`, computed with the batch innermost if the channels are few.
    """
    if not is_few(arrays[0].shape[-1]):
        return function(*arrays)
    return swap_batch_and_channels(function(*map(swap_batch_and_channels, arrays)))


@jax.jit
def _identity(x: jax.Array) -> jax.Array:
    # Without an operation JAX drops the call when it differentiates it; the barrier is one.
    return lax.optimization_barrier(x)


def materialize(x: jax.Array) -> jax.Array:
    """Materialize an array once, instead of recomputing it in every loop that reads it.

    `lax.optimization_barrier` does not do that: the compiler removes it before it fuses loops. A
    call that must not be inlined stays, and that of an identity costs nothing. It is only a hint:
    values, derivatives, batching and sharding are those of `x`. The cotangent is materialized, too.

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
    """On CPU, materialize an array in row-major layout.

    Args:
        x: of any shape, usually a transpose.

    Returns:
        `x`.
    """

    # A layout constraint gathers an array that is partitioned over devices. `materialize` results
    # in a row-major layout too, but with an extra copy if a loop could write the array directly.
    return platform_dependent(x, cpu=_constrained, default=_unchanged, partitioned=materialize)


# At module level, because JAX caches traces by function identity.
def _unchanged(x: jax.Array) -> jax.Array:
    return x


def _constrained(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
