"""Attention masks by position: causal and sliding window.

Positions are integers [batch or 1, time], so that the same functions serve a whole sequence and a
key-value cache in which every example has its own position. In masks, which broadcast against
[batch, heads, queries, keys], True is visible.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.core import at_least_int32


class LocalMask(NamedTuple):
    """A mask by position, for queries and keys of the same sequence.

    Attributes:
        causal: hide the keys after the query.
        window: hide the keys at this distance or farther.
    """

    causal: bool = False
    window: int | None = None

    def mask(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """Return bool [batch or 1, 1, queries, keys] of positions, None if nothing is hidden."""
        if self.causal:
            return causal_mask(queries, keys, window=self.window)
        return None if self.window is None else window_mask(queries, keys, window=self.window)

    def key_range(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """Return start and stop of the keys that any of the queries [start, stop) attends to."""
        key_start, key_stop = 0, stop if self.causal else num_keys
        if self.window is not None:
            key_start = max(0, start - self.window + 1)
            key_stop = min(key_stop, stop + self.window - 1)
        return key_start, key_stop


def causal_mask(
    queries: int | jax.Array, keys: jax.Array | None = None, *, window: int | None = None
) -> jax.Array:
    """Let each position attend to itself and to earlier ones.

    Corresponds to `flax.linen.make_causal_mask`, with positions and a window in addition.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        window: attend only to the last `window` positions, its own included; by default to all.

    Returns:
        bool [batch or 1, 1, queries, keys].

    Raises:
        ValueError: positions of another shape or type, a window that is no integer of 1 or more.

    Example:
        >>> causal_mask(4, window=2)[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    visible = distances(queries, keys) >= 0
    return visible if window is None else visible & window_mask(queries, keys, window=window)


def window_mask(
    queries: int | jax.Array, keys: jax.Array | None = None, *, window: int
) -> jax.Array:
    """Let each position attend to those less than `window` away, in both directions.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        window: number of positions in each direction, its own included.

    Returns:
        bool [batch or 1, 1, queries, keys].

    Raises:
        ValueError: positions of another shape or type, a window that is no integer of 1 or more.

    References:
        Beltagy, Peters and Cohan 2020, arXiv:2004.05150, section 3.1.
    """
    check_sizes(window=window)
    return jnp.abs(distances(queries, keys)) < window


def distances(queries: int | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Return query position - key position: positive for earlier keys.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; None takes those of the queries.

    Returns:
        Integer [batch or 1, 1, queries, keys].

    Raises:
        ValueError: positions of another shape or type.

    Example:
        >>> distances(2, jnp.array([[0, 1, 2]]))[0, 0].tolist()
        [[0, -1, -2], [1, 0, -1]]
    """
    if isinstance(queries, (int, np.integer)):
        queries = jnp.arange(queries)[None]
    keys = queries if keys is None else keys
    query_positions, key_positions = check_positions(queries), check_positions(keys)
    if len({query_positions.shape[0], key_positions.shape[0]} - {1}) > 1:
        raise ValueError(
            f"positions of queries {query_positions.shape} and of keys {key_positions.shape} are "
            "of different batches; give [batch or 1, time]"
        )
    # [batch or 1, 1, queries, keys]
    return query_positions[:, None, :, None] - key_positions[:, None, None, :]


def check_positions(positions: jax.Array) -> jax.Array:
    """Return positions in a type in which their differences do not wrap.

    Args:
        positions: integer [batch or 1, time].

    Returns:
        The same, int32 or wider.

    Raises:
        ValueError: positions of another shape or type.
    """
    shape, dtype = jnp.shape(positions), jnp.result_type(positions)
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"positions have shape {shape} and type {dtype}; give integers [batch or 1, time]"
        )
    return jnp.asarray(at_least_int32(positions))
