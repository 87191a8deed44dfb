"""Scaled dot-product attention: its definition, and the function that picks an implementation.

Masks and biases broadcast against [batch, heads, queries, keys].
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.core import at_least_float32
from jaxnets.functional.attention import cudnn
from jaxnets.functional.attention.masks import LocalMask, causal_mask, window_mask
from jaxnets.functional.attention.ring import ambient_mesh, ring_attention
from jaxnets.functional.attention.scores import check_shapes, check_softcap, with_four_axes
from jaxnets.functional.attention.unfused import unfused_attention


def reference_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Compute `dot_product_attention` by its definition; every implementation equals this one.

    Arguments and result are those of `dot_product_attention`. It is for reading and for tests: it
    checks no shapes, copies shared key-value heads and materializes everything.
    """
    mask, bias = with_four_axes(mask), with_four_axes(bias)
    q, k, v = (at_least_float32(x) for x in (query, key, value))
    heads_per_kv_head = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, heads_per_kv_head, axis=2) for x in (k, v))  # [batch, keys, heads, ...]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k)  # [batch, heads, queries, keys]
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    visible = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
    visible = visible & causal_mask(q.shape[1]) if causal else visible
    visible = visible & window_mask(q.shape[1], window=window) if window is not None else visible
    visible = jnp.broadcast_to(visible, scores.shape)  # [batch, heads, queries, keys]
    scores = jnp.where(visible, scores, -jnp.inf)
    hidden = jnp.all(scores == -jnp.inf, axis=-1, keepdims=True)  # [batch, heads, queries, 1]
    weights = jnp.where(hidden, 0, jax.nn.softmax(jnp.where(hidden, 0, scores), axis=-1))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(value.dtype)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Average the values, weighted by the softmax of the query-key products.

    softmax(scale query key^T + bias) value, head by head, as `reference_attention` spells it out.
    With fewer key-value heads than heads, consecutive heads share one (grouped-query attention),
    without copies of it. Corresponds to `jax.nn.dot_product_attention` and to
    `torch.nn.functional.scaled_dot_product_attention`; differs in that a query whose keys are all
    hidden, by the mask or by a bias of -infinity, gives 0.

    The implementation depends on platform, dtype and size. On NVIDIA GPUs in 16 bits and without
    bias and softcap, cuDNN's flash attention: no weights are materialized. On CPU without a bias,
    on one device and for long contexts (queries times keys from 2^20, in 16 bits 2^22), one head at
    a time: weights are materialized for that head only and recomputed in the backward pass.
    Otherwise the weights are the only residual of their size.

    In a program traced inside `jax.set_mesh(mesh)`, where the mesh has an axis "sequence" of two or
    more devices, and axes of type Auto, ring attention: no device holds keys, values or weights of
    the whole sequence. That needs as many queries as keys, a number that the axis divides, no bias,
    and a mask that is the same for all queries, such as one of lengths. Any other call, and one
    inside `jax.shard_map`, is computed as above: XLA gathers the keys on every device, which is as
    right but saves no memory.

    Reverse-mode differentiable any number of times; forward mode is not supported.

    Args:
        query: floating [batch, queries, heads, head_dim].
        key: floating [batch, keys, kv_heads, head_dim], where kv_heads divides heads.
        value: floating [batch, keys, kv_heads, value_dim], finite even where masked.
        mask: bool, broadcasts to [batch, heads, queries, keys]; False hides a key.
        bias: floating, broadcasts to [batch, heads, queries, keys]; -infinity hides a key.
        scale: factor of the query-key products, by default 1 / sqrt(head_dim).
        softcap: bound the scores by it: softcap tanh(scale query key^T / softcap) + bias (Gemma 2,
            arXiv:2408.00118, section 2).
        causal: hide the keys after the query's own position. Same as `causal_mask` of the
            sequence, but no mask is read and hidden parts are not computed.
        window: hide the keys `window` or more positions away. Same as `window_mask` of the
            sequence; with `causal` the last `window` keys are left, the query's own included.

    Returns:
        [batch, queries, heads, value_dim], of the dtype of `value`; the softmax is float32 or
        wider.

    Raises:
        ValueError: shapes or types that do not fit, a window that is no integer of 1 or more, or
            a softcap that is not positive.

    Example:
        >>> x = jax.numpy.ones((2, 5, 4, 8))
        >>> dot_product_attention(x, x[:, :, :2], x[:, :, :2], causal=True).shape
        (2, 5, 4, 8)

    References:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Ainslie et al. 2023, arXiv:2305.13245
        (grouped queries); Dao et al. 2022, arXiv:2205.14135, appendix B.2 (the gradient);
        Liu, Zaharia and Abbeel 2023, arXiv:2310.01889 (the ring).
    """
    local_mask, mask, bias = LocalMask(causal, window), with_four_axes(mask), with_four_axes(bias)
    check_shapes(query, key, value, mask, bias, local_mask)
    check_softcap(softcap)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return _jitted_attention(query, key, value, mask, bias, scale, local_mask, softcap)


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
    softcap: float | None,
) -> jax.Array:
    def unfused(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        return unfused_attention(query, key, value, mask, bias, scale, local_mask, softcap)

    mesh = ambient_mesh(query, key, mask, bias)  # a cached trace is only of its own mesh
    if mesh is not None:
        return ring_attention(query, key, value, mask, scale, local_mask, softcap, mesh)
    has_kernel = bias is None and softcap is None  # neither of which the kernel computes
    if not has_kernel or not cudnn.is_eligible(query, key, value):
        return unfused(query, key, value, mask)
    fused = functools.partial(
        cudnn.cudnn_attention, scale=scale, local_mask=local_mask, unfused=unfused
    )
    # Not our own `platform_dependent`: its derivatives recompute the residuals that these two save.
    return lax.platform_dependent(query, key, value, mask, cuda=fused, default=unfused)


# Under jit all layers of one shape share one trace, that of the gradient included.
_jitted_attention = jax.jit(_attention, static_argnums=(5, 6, 7))
