"""Attention as pure functions: the softmax over keys, and the masks that hide some.

Positions are integers [batch or 1, time], so that the same functions serve a whole sequence and a
history to which each row of a batch appends at its own place. Masks and biases broadcast against
[batch, heads, queries, keys].
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets import fused_attention
from jaxnets.layouts import laid_out

# With fewer queries, copies of keys and values cost more than they save.
_FEW_QUERIES = 4


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> jax.Array:
    """Average the values, each weighted by how well its key fits the query.

    softmax(scale query key^T + bias) value, head by head. With fewer key-value heads than heads,
    consecutive heads share one (grouped-query attention), without copies of it. For its gradient
    nothing of the size of the weights is kept but the weights, and not even they on NVIDIA's GPUs,
    where cuDNN's kernel computes with numbers of 16 bits and no bias. Reverse-mode differentiable
    any number of times; forward mode is not supported.

    Args:
        query: [batch, queries, heads, size].
        key: [batch, keys, key_value_heads, size], where key_value_heads divides heads.
        value: [batch, keys, key_value_heads, value_size], finite even where masked.
        mask: bool, broadcasts to [batch, heads, queries, keys]; False hides a key. A query that
            sees no key gives 0.
        bias: floating, broadcasts to [batch, heads, queries, keys].
        scale: factor of the products, by default 1 / sqrt(size).
        causal: each query sees the keys up to its own place only; the same as `causal_mask` of
            the time, which a kernel then need not read, nor compute what it hides.

    Returns:
        [batch, queries, heads, value_size], of the dtype of `value`; the softmax is float32 or
        wider.

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> x = jnp.ones((2, 5, 4, 8))
        >>> attention(x, x[:, :, :2], x[:, :, :2], causal=True).shape
        (2, 5, 4, 8)

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Ainslie et al. 2023, arXiv:2305.13245
        (grouped queries); Dao et al. 2022, arXiv:2205.14135, appendix B.2 (the gradient).
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _shared_attention(query, key, value, mask, bias, scale, causal)


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    causal: bool,
) -> jax.Array:
    def by_weights(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        return _weighted_attention(query, key, value, mask, bias, scale, causal)

    if bias is not None or not fused_attention.fits(query, key, value):
        return by_weights(query, key, value, mask)
    fused = functools.partial(
        fused_attention.fused_attention, scale=scale, causal=causal, formula=by_weights
    )
    # Not `by_platform`, whose derivatives compute again what these two save for their gradients.
    return lax.platform_dependent(query, key, value, mask, cuda=fused, default=by_weights)


# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_attention = jax.jit(_attention, static_argnums=(5, 6))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _weighted_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    causal: bool,
) -> jax.Array:
    return _attention_forward(query, key, value, mask, bias, scale, causal)[0]


def _attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, Any]:
    weights = attention_weights(query, key, mask=mask, bias=bias, scale=scale, causal=causal)
    output = weighted_values(weights, value)
    return output, (query, key, value, bias, weights, output)


def _attention_backward(
    scale: float, causal: bool, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    query, key, value, bias, weights, output = residuals
    batch, queries, heads, size = query.shape
    wide, groups = weights.dtype, key.shape[2]
    rows, upstream = (laid_out(_grouped_rows(x, groups)) for x in (query, cotangent))
    keys, values = _heads_in_front(key, queries), _heads_in_front(value, queries)
    shared = weights.reshape(*upstream.shape[:-1], key.shape[1])
    # The sum over the keys that the gradient of a softmax subtracts, without the weights.
    summed = upstream.astype(wide) * _grouped_rows(output, groups)
    subtracted = jnp.sum(summed, axis=-1, keepdims=True)
    scores = shared * (_product(upstream, values, turned=True) - subtracted)
    dvalue = _product(laid_out(jnp.swapaxes(shared.astype(value.dtype), 2, 3)), upstream)
    narrow = scores.astype(query.dtype)
    dquery = (scale * _product(narrow, keys)).astype(query.dtype)
    dkey = scale * _product(laid_out(jnp.swapaxes(narrow, 2, 3)), rows)
    return (
        jnp.swapaxes(dquery.reshape(batch, heads, queries, size), 1, 2),
        jnp.swapaxes(dkey, 1, 2).astype(key.dtype),
        jnp.swapaxes(dvalue, 1, 2).astype(value.dtype),
        None,
        None if bias is None else _sum_to(scores.reshape(weights.shape), bias),
    )


_weighted_attention.defvjp(_attention_forward, _attention_backward)


def _grouped_rows(x: jax.Array, groups: int) -> jax.Array:
    """Bring [batch, queries, heads, size] to [batch, groups, heads of a group * queries, size]."""
    batch, queries, heads, size = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, groups, heads // groups * queries, size)


def _heads_in_front(x: jax.Array, queries: int) -> jax.Array:
    """Bring keys or values [batch, keys, groups, size] to [batch, groups, keys, size]."""
    turned = jnp.swapaxes(x, 1, 2)
    return turned if queries < _FEW_QUERIES else laid_out(turned)


def _product(x: jax.Array, y: jax.Array, *, turned: bool = False) -> jax.Array:
    """Multiply matrices [batch, groups, ...], the second transposed if `turned`.

    The result is float32 or wider, of which the CPU's kernels for bfloat16 are fast.
    """
    axes = (((3,), (3 if turned else 2,)), ((0, 1), (0, 1)))
    dtype = jnp.promote_types(x.dtype, y.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return lax.dot_general(x.astype(dtype), y.astype(dtype), axes, preferred_element_type=wide)


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sum over the axes along which `like` was broadcast to the shape of `x`."""
    shape = (1,) * (x.ndim - like.ndim) + like.shape
    axes = tuple(
        a for a, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have > want
    )
    return jnp.sum(x, axis=axes, keepdims=True).reshape(like.shape).astype(like.dtype)


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> jax.Array:
    """Return how much each query takes from each key; the arguments are those of `attention`.

    Returns:
        [batch, heads, queries, keys], float32 or wider; each row sums to 1, or is 0 where the
        query sees no key.

    Raises:
        ValueError: shapes that do not fit together.
    """
    batch, queries, heads, size = query.shape
    keys, groups = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != size or heads % groups:
        raise ValueError(
            f"queries of shape {query.shape} do not fit keys of shape {key.shape}; both are "
            "[batch, time, heads, size], where the number of key heads divides that of queries"
        )
    if causal:
        if keys != queries:
            raise ValueError(
                f"causal attention has as many queries as keys, not {queries} and {keys}; give "
                "mask=causal_mask(positions of the queries, positions of the keys) instead"
            )
        mask = causal_mask(queries) if mask is None else mask & causal_mask(queries)
    query = query * (1 / math.sqrt(size) if scale is None else scale)
    # The product of matrices of one head, heads in front, is the fastest form on CPU; the heads
    # that share a key follow each other as further rows.
    rows = laid_out(_grouped_rows(query, groups))
    scores = _product(rows, _heads_in_front(key, queries), turned=True)
    scores, wide = scores.reshape(batch, heads, queries, keys), scores.dtype
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
    summed = _product(rows, _heads_in_front(value, queries)).astype(value.dtype)
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
