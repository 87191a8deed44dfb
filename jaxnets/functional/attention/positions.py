"""What tells positions apart: sines, rotations, and biases that grow with the distance.

Positions are integers [batch or 1, time]; biases broadcast against [batch, heads, queries, keys].
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import at_least_float32
from jaxnets.functional.attention.masks import distances


def sinusoidal_positions(
    positions: jax.Array, features: int, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Write each position as sines and cosines of falling frequency.

    sin(position / 10000^(2i / features)) at 2i, the cosine at 2i + 1.

    Args:
        positions: integer [...].
        features: size of a vector, even.
        dtype: of the result, float32 or wider.

    Returns:
        [..., features].

    Raises:
        ValueError: an odd number of features.

    Example:
        >>> sinusoidal_positions(jnp.arange(1), 4).tolist()
        [[0.0, 1.0, 0.0, 1.0]]

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    angles = _angles(positions, features, 10_000.0, dtype)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*angles.shape[:-1], -1)


def rotary(x: jax.Array, positions: jax.Array, *, theta: float = 10_000.0) -> jax.Array:
    """Turn pairs of features by angles that grow with the position.

    The product of two vectors so turned depends on the distance of their positions only. Feature i
    is paired with feature i + size / 2, as in GPT-NeoX and the published LLaMA checkpoints.

    Args:
        x: queries or keys, [batch, time, heads, head_dim], size even.
        positions: integer [batch or 1, time].
        theta: the slowest pair turns by about 1 / theta a position.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: an odd size.

    References:
        Su et al. 2021, arXiv:2104.09864, section 3.2 (which pairs neighbors).
    """
    wide = at_least_float32(x)
    angles = _angles(positions, x.shape[-1], theta, wide.dtype)[:, :, None]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return how fast attention falls with the distance, head by head.

    For a power of two the slopes are 2^(-8/n), 2^(-16/n), ..., 2^-8. Otherwise those of the power
    of two below, and in between them every second slope of the power of two above.

    Args:
        num_heads: number of heads.

    Returns:
        One slope for each head.

    Example:
        >>> alibi_slopes(2), alibi_slopes(3)
        ([0.0625, 0.00390625], [0.0625, 0.00390625, 0.25])

    References:
        Press, Smith and Lewis 2022, arXiv:2108.12409, section 3 and their published code.
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (index + 1) / below) for index in range(below)]
    between = [2.0 ** (-4 * (2 * index + 1) / below) for index in range(num_heads - below)]
    return slopes + between


def alibi_bias(
    num_heads: int,
    queries: int | jax.Array,
    keys: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Penalise each key by its distance from the query, times the slope of the head.

    Args:
        num_heads: number of heads.
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        dtype: of the result, float32 or wider.

    Returns:
        [batch or 1, heads, queries, keys]: -slope |query - key|.

    Example:
        >>> alibi_bias(2, 3)[0, 0].tolist()[2][:2]
        [-0.125, -0.0625]
    """
    slopes = jnp.asarray(alibi_slopes(num_heads), dtype)[None, :, None, None]
    return -slopes * jnp.abs(distances(queries, keys)).astype(dtype)


def relative_buckets(
    queries: int | jax.Array,
    keys: jax.Array | None = None,
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> jax.Array:
    """Sort the distances from queries to keys into buckets that widen with the distance.

    Half the buckets hold one distance each; the others widen logarithmically up to
    `max_distance`, and the last one holds all beyond. In both directions, keys behind and keys
    ahead have half of the buckets each; otherwise a key ahead counts as distance 0.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        bidirectional: tell keys ahead from keys behind.
        num_buckets: number of buckets.
        max_distance: where the last bucket begins at the latest.

    Returns:
        int32 [batch or 1, queries, keys] in [0, num_buckets).

    Example:
        >>> relative_buckets(3, bidirectional=True, num_buckets=8)[0].tolist()
        [[0, 5, 6], [1, 0, 5], [2, 1, 0]]

    References:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1 and their published code.
    """
    behind = distances(queries, keys)[:, 0]
    per_side = num_buckets // 2 if bidirectional else num_buckets
    table = jnp.asarray(_bucket_table(per_side, max_distance))
    distance = jnp.abs(behind) if bidirectional else jnp.maximum(behind, 0)
    buckets = table[jnp.minimum(distance, max_distance)]
    return buckets + jnp.where(behind < 0, per_side, 0).astype(jnp.int32) * bidirectional


@functools.cache
def _bucket_table(num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance in [0, max_distance]."""
    exact = num_buckets // 2
    if not 0 < exact < max_distance:
        raise ValueError(
            f"{num_buckets} buckets do not fit distances up to {max_distance}; give at least 2 "
            "buckets in each direction, and fewer than twice the greatest distance"
        )
    distances = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distances, exact) / exact) / np.log(max_distance / exact)
    # Without the little extra the distances where a bucket begins depend on rounding.
    wide = exact + np.floor(ratio * (num_buckets - exact) + 1e-9).astype(np.int32)
    table = np.where(distances < exact, distances, np.minimum(wide, num_buckets - 1))
    return table.astype(np.int32)


def _angles(positions: jax.Array, size: int, base: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return position / base^(2i / size), [..., size / 2]."""
    if size % 2:
        raise ValueError(
            f"{size} features do not form pairs; sines and cosines need an even number"
        )
    frequencies = jnp.asarray(base ** (-np.arange(0, size, 2) / size), dtype)
    positions = jnp.asarray(positions).astype(dtype)[..., None]
    return positions * frequencies.reshape((1,) * (positions.ndim - 1) + frequencies.shape)
