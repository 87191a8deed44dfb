"""Position encodings: sinusoidal, rotary (RoPE), ALiBi and relative position buckets.

Positions are integers [batch or 1, time]; biases broadcast against [batch, heads, queries, keys].
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.core import at_least_float32
from jaxnets.functional.attention.masks import check_positions, distances


def sinusoidal_positions(
    positions: jax.Array, features: int, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Encode each position as sines and cosines of decreasing frequency.

    sin(position / 10000^(2i / features)) at 2i, the cosine at 2i + 1.

    Args:
        positions: integer [...].
        features: size of an encoding, even.
        dtype: of the result, float32 or wider.

    Returns:
        [..., features].

    Raises:
        ValueError: a number of features that is odd or not above 0.

    Example:
        >>> sinusoidal_positions(jnp.arange(1), 4).tolist()
        [[0.0, 1.0, 0.0, 1.0]]

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    angles = _angles(positions, features, 10_000.0, dtype)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # [..., features / 2, 2]
    return pairs.reshape(*angles.shape[:-1], -1)  # [..., features]


def rotary(x: jax.Array, positions: jax.Array, *, theta: float = 10_000.0) -> jax.Array:
    """Rotate pairs of features by angles proportional to the position (RoPE).

    The dot product of two rotated vectors depends only on the distance of their positions. Feature
    i is paired with feature i + head_dim / 2, as in GPT-NeoX and the published LLaMA checkpoints.

    Args:
        x: queries or keys, [batch, time, heads, head_dim], head_dim even.
        positions: integer [batch or 1, time].
        theta: base of the frequencies; the slowest pair rotates by about 1 / theta a position.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: an odd head_dim, or shapes or types that do not fit.

    References:
        Su et al. 2021, arXiv:2104.09864, section 3.2 (which pairs neighbors).
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"queries or keys of shape {x.shape} and type {x.dtype} do not fit; give floats "
            "[batch, time, heads, head_dim]"
        )
    positions = check_positions(positions)
    if positions.shape not in ((1, x.shape[1]), x.shape[:2]):
        raise ValueError(
            f"positions of shape {positions.shape} do not fit queries or keys of shape {x.shape}; "
            "give [batch or 1, time]"
        )
    wide = at_least_float32(x)
    angles = _angles(positions, x.shape[-1], theta, wide.dtype)
    angles = angles[:, :, None]  # [batch or 1, time, 1, head_dim / 2]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the factor of the distance in `alibi_bias`, head by head.

    For a power of two the slopes are 2^(-8/n), 2^(-16/n), ..., 2^-8. Otherwise they are those
    of the next lower power of two, then every second slope of the next higher one.

    Args:
        num_heads: number of heads.

    Returns:
        One slope for each head.

    Raises:
        ValueError: a number of heads that is not above 0.

    Example:
        >>> alibi_slopes(2), alibi_slopes(3)
        ([0.0625, 0.00390625], [0.0625, 0.00390625, 0.25])

    References:
        Press, Smith and Lewis 2022, arXiv:2108.12409, section 3 and their published code.
    """
    check_sizes(num_heads=num_heads)
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
    """Penalize each key by its distance from the query, times the slope of the head.

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
    """Assign the distances from queries to keys to buckets, as T5 does.

    Half the buckets hold one distance each; the others widen logarithmically up to
    `max_distance`, and the last one holds all beyond. If bidirectional, earlier and later keys
    have half of the buckets each; otherwise a later key counts as distance 0.

    Args:
        queries: positions, integer [batch or 1, queries]; or the length of a sequence.
        keys: positions, integer [batch or 1, keys]; by default those of the queries.
        bidirectional: use other buckets for later keys than for earlier ones.
        num_buckets: number of buckets.
        max_distance: from this distance on all keys are in the last bucket.

    Returns:
        int32 [batch or 1, queries, keys] in [0, num_buckets).

    Example:
        >>> relative_buckets(3, bidirectional=True, num_buckets=8)[0].tolist()
        [[0, 5, 6], [1, 0, 5], [2, 1, 0]]

    References:
        Raffel et al. 2020, arXiv:1910.10683, section 2.1 and their published code.
    """
    distance = distances(queries, keys)[:, 0]  # [batch or 1, queries, keys]
    per_side = num_buckets // 2 if bidirectional else num_buckets
    table = jnp.asarray(_bucket_table(per_side, max_distance))
    magnitude = jnp.abs(distance) if bidirectional else jnp.maximum(distance, 0)
    buckets = table[jnp.minimum(magnitude, max_distance)]
    return buckets + jnp.where(distance < 0, per_side, 0).astype(jnp.int32) * bidirectional


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
    # Without the epsilon the distances where a bucket begins depend on rounding.
    wide = exact + np.floor(ratio * (num_buckets - exact) + 1e-9).astype(np.int32)
    table = np.where(distances < exact, distances, np.minimum(wide, num_buckets - 1))
    return table.astype(np.int32)


def _angles(
    positions: jax.Array, features: int, theta: float, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Return position / theta^(2i / features), [..., features / 2]."""
    check_sizes(features=features)
    if features % 2:
        raise ValueError(
            f"{features} features do not form pairs; sines and cosines need an even number"
        )
    frequencies = jnp.asarray(theta ** (-np.arange(0, features, 2) / features), dtype)
    positions = jnp.asarray(positions).astype(dtype)[..., None]
    return positions * frequencies.reshape((1,) * (positions.ndim - 1) + frequencies.shape)
