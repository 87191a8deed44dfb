"""Which keys a query sees, as masks that attention takes.

Positions are integers [batch or 1, time], so that the same functions serve a whole sequence and a
history to which each row of a batch appends at its own place. Masks broadcast against
[batch, heads, queries, keys].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LocalMask(NamedTuple):
    """Which keys a query may see by its place, where queries and keys are of the same sequence.

    Attributes:
        causal: those up to its own place only.
        window: those less than so far away only.
    """

    causal: bool = False
    window: int | None = None

    def mask(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """Return bool [batch or 1, 1, queries, keys] of positions, None where all are seen."""
        if self.causal:
            return causal_mask(queries, keys, window=self.window)
        return None if self.window is None else window_mask(queries, keys, window=self.window)

    def keys_of(self, begin: int, end: int, keys: int) -> tuple[int, int]:
        """Return from and up to which key the queries from `begin` up to `end` see any."""
        first, last = 0, end if self.causal else keys
        if self.window is not None:
            first, last = max(0, begin - self.window + 1), min(last, end + self.window - 1)
        return first, last


def causal_mask(
    queries: int | jax.Array, keys: jax.Array | None = None, *, window: int | None = None
) -> jax.Array:
    """Let each position see itself and what came before it.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        window: see only the last `window` positions, the own one included; by default all.

    Returns:
        bool [batch or 1, 1, queries, keys].

    Example:
        >>> causal_mask(4, window=2)[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    behind = distances(queries, keys)
    visible = behind >= 0
    return visible if window is None else visible & window_mask(queries, keys, window=window)


def window_mask(
    queries: int | jax.Array, keys: jax.Array | None = None, *, window: int
) -> jax.Array:
    """Let each position see those less than `window` away, in both directions.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        window: number of positions seen in each direction, the own one included.

    Returns:
        bool [batch or 1, 1, queries, keys].

    Raises:
        ValueError: a window below 1.

    References:
        Beltagy, Peters and Cohan 2020, arXiv:2004.05150, section 3.1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; a position sees itself, so give at least 1")
    return jnp.abs(distances(queries, keys)) < window


def distances(queries: int | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Return how far each key lies behind each query.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; None takes those of the queries.

    Returns:
        Integer [batch or 1, 1, queries, keys].

    Example:
        >>> distances(2, jnp.array([[0, 1, 2]]))[0, 0].tolist()
        [[0, -1, -2], [1, 0, -1]]
    """
    where = jnp.arange(queries)[None] if isinstance(queries, int) else jnp.asarray(queries)
    keys = where if keys is None else jnp.asarray(keys)
    return where[:, None, :, None] - keys[:, None, None, :]
