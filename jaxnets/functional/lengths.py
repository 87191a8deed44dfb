"""Padded sequences: checks of their lengths, masks and clearing of the padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import at_least_float32, at_least_int32, known_values


def check_lengths(lengths: Any, *, rows: int, most: int, least: int = 0) -> jax.Array:
    """Refuse lengths of a wrong shape or dtype or, where they are concrete, out of range.

    Args:
        lengths: integer [rows], number of valid steps of each row.
        rows: number of rows of the padded array.
        most: number of its steps.
        least: smallest valid length.

    Returns:
        bool [rows], False for a length out of range that is known only at run time; the caller
        turns it into NaN.

    Raises:
        ValueError: naming the shape and type, or the first length that is out of range.

    Example:
        >>> check_lengths(jnp.array([3, 5]), rows=2, most=5).tolist()
        [True, True]
    """
    known = known_values(lengths)
    lengths = lengths if known is None else known
    if lengths.shape != (rows,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths of shape {lengths.shape} and type {lengths.dtype} do not fit {rows} rows; "
            f"give one integer for each, shape ({rows},)"
        )
    lengths = at_least_int32(lengths)
    inside = (lengths >= least) & (lengths <= most)
    if known is not None and not np.all(inside):
        wrong = lengths[~inside][0]
        raise ValueError(
            f"length {wrong} is not in [{least}, {most}]; lengths count the valid steps of each "
            f"row, which has {most}"
        )
    return jnp.asarray(inside)


def padding_mask(lengths: Any, shape: Sequence[int]) -> jax.Array:
    """Return which steps of each sequence are valid, not padding.

    Args:
        lengths: integer [batch] in [0, time].
        shape: (batch, time) of the array.

    Returns:
        bool [batch, time], True for a valid step; index it with [:, None, None] to mask keys. All
        steps are valid where a length known only at run time is out of range; see `clear_padding`.

    Raises:
        ValueError: lengths of another shape or type, or known to be out of range.

    Example:
        >>> padding_mask(jnp.array([2, 0]), (2, 3)).astype(int).tolist()
        [[1, 1, 0], [0, 0, 0]]
    """
    batch, time = shape
    inside = check_lengths(lengths, rows=batch, most=time)
    lengths = at_least_int32(jnp.asarray(lengths))
    return (jnp.arange(time)[None] < lengths[:, None]) | ~inside[:, None]


def clear_tokens(tokens: Any, lengths: Any) -> Any:
    """Set the ids beyond each length to 0, a token of every vocabulary.

    Args:
        tokens: integer [batch, time].
        lengths: integer [batch] in [0, time]; None means that all steps are valid.

    Returns:
        `tokens` with 0 beyond each length.

    Raises:
        ValueError: lengths of another shape or type, or known to be out of range.

    Example:
        >>> clear_tokens(jnp.array([[5, -1], [7, 8]]), jnp.array([1, 2])).tolist()
        [[5, 0], [7, 8]]
    """
    if lengths is None:
        return tokens
    return jnp.where(padding_mask(lengths, tokens.shape), at_least_int32(tokens), 0)


def clear_padding(x: jax.Array, lengths: Any) -> tuple[jax.Array, jax.Array]:
    """Set the padding beyond each length to 0.

    Args:
        x: [batch, time, ...], floating.
        lengths: integer [batch] in [0, time]; None means that all steps are valid.

    Returns:
        `x` with 0 beyond each length, also where it was NaN, and the valid steps, bool
        [batch, time]. Where a length that is known only at run time is out of range, the whole
        sequence is NaN, so that training stops instead of truncating it silently.

    Raises:
        ValueError: lengths of another shape or type, or known to be out of range.

    Example:
        >>> cleared, valid = clear_padding(jnp.ones((2, 3)), jnp.array([1, 3]))
        >>> cleared.tolist()
        [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    batch, time = x.shape[:2]
    if lengths is None:
        return x, jnp.ones((batch, time), bool)
    inside = check_lengths(lengths, rows=batch, most=time)
    valid = padding_mask(lengths, (batch, time))
    ones = (1,) * (x.ndim - 2)
    x = jnp.where(inside.reshape(batch, 1, *ones), x, jnp.asarray(jnp.nan, x.dtype))
    return jnp.where(valid.reshape(batch, time, *ones), x, jnp.zeros((), x.dtype)), valid


def last_step(x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Return the last valid step of each sequence.

    Args:
        x: [batch, time, ...].
        lengths: integer [batch] in [0, time]; by default all steps are valid.

    Returns:
        [batch, ...]; the first step of an empty sequence.

    Example:
        >>> last_step(jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([3, 1])).tolist()
        [3, 4]
    """
    if lengths is None:
        return x[:, -1]
    # Clipped, because a length known only at run time may be out of range.
    index = jnp.clip(at_least_int32(jnp.asarray(lengths)) - 1, 0, x.shape[1] - 1)  # [batch]
    index = index.reshape(-1, *(1,) * (x.ndim - 1))  # [batch, 1, ...]
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


def mean_over_time(x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Average the steps of each sequence.

    Args:
        x: [batch, time, features], 0 beyond the lengths.
        lengths: integer [batch]; by default all steps are valid.

    Returns:
        [batch, features], float32 or wider; 0 for an empty sequence. NaN where a length known only
        at run time is out of range.

    Raises:
        ValueError: lengths of another shape or type, or known to be out of range.

    Example:
        >>> mean_over_time(jnp.array([[[1.0], [3.0], [0.0]]]), jnp.array([2])).tolist()
        [[2.0]]
    """
    total = jnp.sum(at_least_float32(x), axis=1)
    if lengths is None:
        return total / x.shape[1]
    inside = check_lengths(lengths, rows=x.shape[0], most=x.shape[1])
    divisor = jnp.where(inside, jnp.maximum(jnp.asarray(lengths), 1), jnp.nan)
    return total / divisor.astype(total.dtype)[:, None]


def max_over_time(x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Return the largest value of each feature among the steps of each sequence.

    Args:
        x: [batch, time, features], 0 beyond the lengths.
        lengths: integer [batch]; by default all steps are valid.

    Returns:
        [batch, features]; 0 for an empty sequence. NaN where a length known only at run time is out
        of range, if `x` is NaN there, as `clear_padding` makes it.

    Example:
        >>> max_over_time(jnp.array([[[-3.0], [-1.0], [0.0]]]), jnp.array([2])).tolist()
        [[-1.0]]
    """
    if lengths is None:
        return jnp.max(x, axis=1)
    lengths = jnp.asarray(lengths)[:, None]
    valid = jnp.arange(x.shape[1])[None] < lengths
    maximum = jnp.max(jnp.where(valid[..., None], x, -jnp.inf), axis=1)
    # Length 0 gives the 0 of the padding, a negative length the NaN that marks it as out of range.
    return jnp.where(lengths > 0, maximum, x[:, 0])
