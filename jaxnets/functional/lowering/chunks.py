"""Process a batch in chunks whose intermediate results fit in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# With fewer chunks the loop costs more than it saves.
_MIN_CHUNKS = 5


def sum_over_chunks(
    function: Callable[..., jax.Array], *arrays: jax.Array, num_elements: int, chunk_elements: int
) -> jax.Array:
    """Compute a function that is a sum over the batch, chunk by chunk.

    Args:
        function: of arrays [examples, ...]; returns an array whose shape does not depend on the
            number of examples.
        arrays: [batch, ...] each.
        num_elements: size of all intermediate results for the whole batch.
        chunk_elements: size of those of one chunk, which should fit in the cache.

    Returns:
        The sum over the batch, of the shape that `function` returns.
    """
    count, chunks = _split(arrays[0].shape[0], num_elements, chunk_elements)
    if chunks < _MIN_CHUNKS:
        return function(*arrays)
    chunk, remainder = _chunks(arrays, count, chunks)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + function(*chunk(index))

    result = jax.eval_shape(function, *arrays)
    total = lax.fori_loop(0, chunks, add, jnp.zeros(result.shape, result.dtype))
    return total + function(*remainder) if len(remainder[0]) else total


def map_chunks(
    function: Callable[[jax.Array], jax.Array],
    array: jax.Array,
    *,
    num_elements: int,
    chunk_elements: int,
) -> jax.Array:
    """Apply a function that treats each example independently, chunk by chunk.

    Args:
        function: [examples, ...] -> [examples, ...].
        array: [batch, ...].
        num_elements: size of all intermediate results for the whole batch.
        chunk_elements: size of those of one chunk, which should fit in the cache.

    Returns:
        The result of `function` for the whole batch.
    """
    count, chunks = _split(array.shape[0], num_elements, chunk_elements)
    if chunks < _MIN_CHUNKS:
        return function(array)
    chunk, (remainder,) = _chunks((array,), count, chunks)

    def update(index: jax.Array, results: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(results, function(*chunk(index)), index, 1)

    result = jax.eval_shape(function, array)
    results = jnp.zeros((count, chunks, *result.shape[1:]), result.dtype)
    results = lax.fori_loop(0, chunks, update, results)  # [count, chunks, ...]
    results = results.reshape(count * chunks, *result.shape[1:])  # [count * chunks, ...]
    return jnp.concatenate([results, function(remainder)]) if len(remainder) else results


def _split(batch: int, num_elements: int, chunk_elements: int) -> tuple[int, int]:
    """Return the number of examples in a chunk, and the number of whole chunks."""
    wanted = max(batch * chunk_elements / max(num_elements, 1), 1)
    # A remainder needs a second program and an extra slice, so prefer a divisor of the batch size.
    divisors = [count for count in range(1, batch + 1) if batch % count == 0]
    near = [count for count in divisors if wanted / 2 <= count <= 2 * wanted]
    count = min(near, key=lambda count: abs(math.log(count / wanted)), default=int(wanted))
    return count, batch // count


def _chunks(
    arrays: tuple[jax.Array, ...], count: int, chunks: int
) -> tuple[Callable[[jax.Array], list[jax.Array]], list[jax.Array]]:
    """Return a function from an index to a chunk of each array, and the remainder of each array.

    A chunk takes every `chunks`-th example, so that a batch that is partitioned over devices
    stays partitioned.
    """
    whole = count * chunks
    # [count, chunks, ...]
    stacked = [array[:whole].reshape(count, chunks, *array.shape[1:]) for array in arrays]

    def chunk(index: jax.Array) -> list[jax.Array]:
        return [lax.dynamic_index_in_dim(each, index, 1, keepdims=False) for each in stacked]

    return chunk, [array[whole:] for array in arrays]
