"""A batch chunk by chunk, so that what is computed of a chunk stays in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Fewer chunks than this cost more than they gain.
_FEWEST_CHUNKS = 5


def sum_over_chunks(
    function: Callable[..., jax.Array], *arrays: jax.Array, num_elements: int, chunk_elements: int
) -> jax.Array:
    """Sum a function that adds up over the batch.

    Args:
        function: of arrays [examples, ...]; returns an array whose shape does not depend on how
            many examples there are.
        arrays: [batch, ...] each.
        num_elements: size of all intermediate results for the whole batch.
        chunk_elements: size of those of one chunk, which should fit in the cache.

    Returns:
        The sum, of the shape that `function` returns.
    """
    count, chunks = _split(arrays[0].shape[0], num_elements, chunk_elements)
    if chunks < _FEWEST_CHUNKS:
        return function(*arrays)
    taken, rest = _chunks(arrays, count, chunks)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + function(*taken(index))

    result = jax.eval_shape(function, *arrays)
    total = lax.fori_loop(0, chunks, add, jnp.zeros(result.shape, result.dtype))
    return total + function(*rest) if len(rest[0]) else total


def map_chunks(
    function: Callable[[jax.Array], jax.Array],
    array: jax.Array,
    *,
    num_elements: int,
    chunk_elements: int,
) -> jax.Array:
    """Apply a function that treats every example by itself.

    Args:
        function: [examples, ...] -> [examples, ...].
        array: [batch, ...].
        num_elements: size of all intermediate results for the whole batch.
        chunk_elements: size of those of one chunk, which should fit in the cache.

    Returns:
        What `function` returns for the whole batch.
    """
    count, chunks = _split(array.shape[0], num_elements, chunk_elements)
    if chunks < _FEWEST_CHUNKS:
        return function(array)
    taken, (rest,) = _chunks((array,), count, chunks)

    def put(index: jax.Array, results: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(results, function(*taken(index)), index, 1)

    result = jax.eval_shape(function, array)
    results = jnp.zeros((count, chunks, *result.shape[1:]), result.dtype)
    whole = lax.fori_loop(0, chunks, put, results).reshape(count * chunks, *result.shape[1:])
    return jnp.concatenate([whole, function(rest)]) if len(rest) else whole


def _split(batch: int, num_elements: int, chunk_elements: int) -> tuple[int, int]:
    """Return how many examples a chunk has, and how many whole chunks there are."""
    wanted = max(batch * chunk_elements / max(num_elements, 1), 1)
    # What the chunks leave behind would be a second program, and would be cut off by a copy.
    divisors = [count for count in range(1, batch + 1) if batch % count == 0]
    near = [count for count in divisors if wanted / 2 <= count <= 2 * wanted]
    count = min(near, key=lambda count: abs(math.log(count / wanted)), default=int(wanted))
    return count, batch // count


def _chunks(
    arrays: tuple[jax.Array, ...], count: int, chunks: int
) -> tuple[Callable[[jax.Array], list[jax.Array]], list[jax.Array]]:
    """Return a function that takes a chunk of each array, and what is left behind the last one.

    A chunk takes every so many-th example: a batch that is split over devices stays so.
    """
    whole = count * chunks
    several = [array[:whole].reshape(count, chunks, *array.shape[1:]) for array in arrays]

    def taken(index: jax.Array) -> list[jax.Array]:
        return [lax.dynamic_index_in_dim(each, index, 1, keepdims=False) for each in several]

    return taken, [array[whole:] for array in arrays]
