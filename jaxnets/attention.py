"""Attention as pure functions: the softmax over keys, masks, and what tells positions apart.

Positions are integers [batch or 1, time], so that the same functions serve a whole sequence and a
history to which each row of a batch appends at its own place. Masks and biases broadcast against
[batch, heads, queries, keys].
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import at_least_float32


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Average the values, each weighted by how well its key fits the query.

    softmax(scale query key^T + bias) value, head by head. With fewer key-value heads than heads,
    consecutive heads share one (grouped-query attention), without copies of it.

    Args:
        query: [batch, queries, heads, size].
        key: [batch, keys, key_value_heads, size], where key_value_heads divides heads.
        value: [batch, keys, key_value_heads, value_size], finite even where masked.
        mask: bool, broadcasts to [batch, heads, queries, keys]; False hides a key. A query that
            sees no key gives 0.
        bias: floating, broadcasts to [batch, heads, queries, keys].
        scale: factor of the products, by default 1 / sqrt(size).

    Returns:
        [batch, queries, heads, value_size], of the dtype of `value`; the softmax is float32 or
        wider.

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> x = jnp.ones((2, 5, 4, 8))
        >>> attention(x, x[:, :, :2], x[:, :, :2], mask=causal_mask(5)).shape
        (2, 5, 4, 8)

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Ainslie et al. 2023, arXiv:2305.13245
        (grouped queries).
    """
    weights = attention_weights(query, key, mask=mask, bias=bias, scale=scale)
    return weighted_values(weights, value)


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Return how much each query takes from each key; the arguments are those of `attention`.

    Returns:
        [batch, heads, queries, keys], float32 or wider; each row sums to 1, or is 0 where the
        query sees no key.
    """
    batch, queries, heads, size = query.shape
    keys, groups = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != size or heads % groups:
        raise ValueError(
            f"queries of shape {query.shape} do not fit keys of shape {key.shape}; both are "
            "[batch, time, heads, size], where the number of key heads divides that of queries"
        )
    query = query * (1 / math.sqrt(size) if scale is None else scale)
    # The product of matrices of one head, heads in front, is the fastest form on CPU; the heads
    # that share a key follow each other as further rows.
    rows = jnp.swapaxes(query, 1, 2).reshape(batch, groups, heads // groups * queries, size)
    columns = jnp.transpose(key, (0, 2, 3, 1))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.matmul(rows, columns, preferred_element_type=wide)
    scores = scores.reshape(batch, heads, queries, keys)
    if bias is not None:
        scores = scores + bias.astype(wide)
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1)
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, jnp.zeros((), wide))


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sum the values with the weights of `attention_weights`.

    Args:
        weights: [batch, heads, queries, keys].
        value: [batch, keys, key_value_heads, value_size].

    Returns:
        [batch, queries, heads, value_size], of the dtype of `value`.
    """
    batch, heads, queries, keys = weights.shape
    groups, size = value.shape[2:]
    rows = weights.astype(value.dtype).reshape(batch, groups, heads // groups * queries, keys)
    summed = rows @ jnp.swapaxes(value, 1, 2)
    return jnp.swapaxes(summed.reshape(batch, heads, queries, size), 1, 2)


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
    behind = _distances(queries, keys)
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
    return jnp.abs(_distances(queries, keys)) < window


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


def rotary(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    """Turn pairs of features by angles that grow with the position.

    The product of two vectors so turned depends on the distance of their positions only. Feature i
    is paired with feature i + size / 2, as in GPT-NeoX and the published LLaMA checkpoints.

    Args:
        x: queries or keys, [batch, time, heads, size], size even.
        positions: integer [batch or 1, time].
        base: the slowest pair turns by about 1 / base a position.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: an odd size.

    References:
        Su et al. 2021, arXiv:2104.09864, section 3.2 (which pairs neighbours).
    """
    wide = at_least_float32(x)
    angles = _angles(positions, x.shape[-1], base, wide.dtype)[:, :, None]
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
    return -slopes * jnp.abs(_distances(queries, keys)).astype(dtype)


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
    behind = _distances(queries, keys)[:, 0]
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


def _distances(queries: int | jax.Array, keys: jax.Array | None) -> jax.Array:
    """Return how far each key lies behind each query, integer [batch or 1, 1, queries, keys]."""
    where = jnp.arange(queries)[None] if isinstance(queries, int) else jnp.asarray(queries)
    keys = where if keys is None else jnp.asarray(keys)
    return where[:, None, :, None] - keys[:, None, None, :]


def _angles(positions: jax.Array, size: int, base: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return position / base^(2i / size), [..., size / 2]."""
    if size % 2:
        raise ValueError(
            f"{size} features do not form pairs; sines and cosines need an even number"
        )
    frequencies = jnp.asarray(base ** (-np.arange(0, size, 2) / size), dtype)
    positions = jnp.asarray(positions).astype(dtype)[..., None]
    return positions * frequencies.reshape((1,) * (positions.ndim - 1) + frequencies.shape)
