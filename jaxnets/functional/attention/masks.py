"""Attention masks by position: causal and sliding window.

Positions are integers [batch or 1, time], so that the same functions serve a whole sequence and a
key-value cache in which every example has its own position. In masks, which broadcast against
[batch, heads, queries, keys], True is visible.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
        ValueError: a window below 1.

    References:
        Beltagy, Peters and Cohan 2020, arXiv:2004.05150, section 3.1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; a position attends to itself, so give at least 1")
    return jnp.abs(distances(queries, keys)) < window


def distances(queries: int | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Return query position - key position: positive for earlier keys.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; None takes those of the queries.

    Returns:
        Integer [batch or 1, 1, queries, keys].

    Example:
        >>> distances(2, jnp.array([[0, 1, 2]]))[0, 0].tolist()
        [[0, -1, -2], [1, 0, -1]]
    """
    queries = jnp.arange(queries)[None] if isinstance(queries, int) else jnp.asarray(queries)
    keys = queries if keys is None else jnp.asarray(keys)
    return queries[:, None, :, None] - keys[:, None, None, :]  # [batch or 1, 1, queries, keys]
