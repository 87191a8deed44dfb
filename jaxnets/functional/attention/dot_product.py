"""Attention as a pure function: by its weights, or by a kernel that never writes them down.

Masks and biases broadcast against [batch, heads, queries, keys].
"""

from __future__ import annotations

import functools
import math

import jax
from jax import lax

from jaxnets.functional.attention import cudnn
from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.attention.scores import check_shapes, with_four_axes
from jaxnets.functional.attention.unfused import unfused_attention


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Average the values, each weighted by how well its key fits the query.

    softmax(scale query key^T + bias) value, head by head. With fewer key-value heads than heads,
    consecutive heads share one (grouped-query attention), without copies of it. For its gradient
    nothing of the size of the weights is kept but the weights; and without a bias not even they on
    CPU, where one device has long contexts (queries times keys from 2^20, in 16 bits 2^22), nor on
    NVIDIA's GPUs, where cuDNN's kernel computes with numbers of 16 bits. Reverse-mode
    differentiable any number of times; forward mode is not supported.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim], where kv_heads divides heads.
        value: [batch, keys, kv_heads, value_dim], finite even where masked.
        mask: bool, broadcasts to [batch, heads, queries, keys]; False hides a key. A query that
            sees no key gives 0.
        bias: floating, broadcasts to [batch, heads, queries, keys].
        scale: factor of the products, by default 1 / sqrt(size).
        causal: each query sees the keys up to its own place only; the same as `causal_mask` of
            the time, which a kernel then need not read, nor compute what it hides.
        window: each query sees the keys less than so many places away only, the same as
            `window_mask` of the time; with `causal` the last `window` ones, its own included.

    Returns:
        [batch, queries, heads, value_dim], of the dtype of `value`; the softmax is float32 or
        wider.

    Raises:
        ValueError: shapes that do not fit together, or a window below 1.

    Example:
        >>> x = jax.numpy.ones((2, 5, 4, 8))
        >>> dot_product_attention(x, x[:, :, :2], x[:, :, :2], causal=True).shape
        (2, 5, 4, 8)

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Ainslie et al. 2023, arXiv:2305.13245
        (grouped queries); Dao et al. 2022, arXiv:2205.14135, appendix B.2 (the gradient).
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    local_mask, mask, bias = LocalMask(causal, window), with_four_axes(mask), with_four_axes(bias)
    check_shapes(query, key, value, mask, bias, local_mask)
    return _shared_attention(query, key, value, mask, bias, scale, local_mask)


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
) -> jax.Array:
    def by_weights(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        return unfused_attention(query, key, value, mask, bias, scale, local_mask)

    if bias is not None or not cudnn.fits(query, key, value):
        return by_weights(query, key, value, mask)
    fused = functools.partial(
        cudnn.cudnn_attention, scale=scale, local_mask=local_mask, formula=by_weights
    )
    # Not our own `platform_dependent`: its derivatives recompute the residuals that these two save.
    return lax.platform_dependent(query, key, value, mask, cuda=fused, default=by_weights)


# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_attention = jax.jit(_attention, static_argnums=(5, 6))
