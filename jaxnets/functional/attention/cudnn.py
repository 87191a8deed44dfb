"""Attention by cuDNN's flash attention, which does not materialize the weights.

For NVIDIA GPUs and 16-bit dtypes. `dot_product_attention` chooses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxnets.functional.attention.masks import LocalMask, causal_mask, window_mask
from jaxnets.functional.lowering.platforms import sizes_are_known

#: Attention as a function of query, key, value and mask.
AttentionFunction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

# The first compute capability with the kernel.
_AMPERE = (8, 0)
# With fewer weights the memory traffic costs less than launching the kernel: 8 x 6 x 128 x 128
# take 60 us in XLA, forward and backward, and 133 in the kernel; 256 x 6 x 64 x 64 take 250 and
# 197 (H200). Nor does it pay for the single query of a new token.
_MIN_WEIGHTS, _MIN_QUERIES = 1 << 21, 16


def is_eligible(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Tell whether the kernel supports these arrays in this process, and pays for them.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim].
        value: [batch, keys, kv_heads, value_dim].

    Returns:
        True if every GPU of the process has the kernel, it supports the shapes and dtypes, and
        they are large enough. False with symbolic sizes: no exported program holds the kernel.
    """
    dtypes = {query.dtype, key.dtype, value.dtype}
    batch, queries, heads, head_dim = query.shape
    return (
        sizes_are_known(query.shape, key.shape)
        and len(dtypes) == 1
        and dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
        and value.shape[3] == head_dim
        and head_dim % 8 == 0
        and head_dim <= 128
        and queries >= _MIN_QUERIES
        and batch * heads * queries * key.shape[1] >= _MIN_WEIGHTS
        and _capability() >= _AMPERE
    )


@functools.cache
def _capability() -> tuple[int, ...]:
    """Return the compute capability of the oldest NVIDIA GPU of this process, (0,) without one."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return (0,)
    return min(tuple(map(int, str(each.compute_capability).split("."))) for each in devices)


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    local_mask: LocalMask,
    unfused: AttentionFunction,
) -> jax.Array:
    """Compute `dot_product_attention`, without a bias, by the kernel.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim].
        value: [batch, keys, kv_heads, head_dim].
        mask: bool, broadcasts to [batch, heads, queries, keys].
        scale: factor of the query-key products.
        local_mask: causal, window; the kernel gets a window as a mask.
        unfused: computes the same, scale and local_mask included; second derivatives are those of
            this function.

    Returns:
        [batch, queries, heads, head_dim].
    """
    compute = functools.partial(_pad_to_even_lengths, scale=scale, causal=local_mask.causal)
    if local_mask.window is not None:
        inside = window_mask(query.shape[1], window=local_mask.window)
        mask = inside if mask is None else inside & mask
    if mask is None:
        return _attention(query, key, value, None, compute, unfused)
    visible = mask & causal_mask(query.shape[1]) if local_mask.causal else mask
    any_visible = jnp.swapaxes(jnp.any(visible, axis=-1), 1, 2)  # [batch, queries, heads]
    any_visible = any_visible[..., None]
    # The kernel reads a whole matrix of queries and keys; heads and examples may broadcast.
    shape = (*mask.shape[:2], query.shape[1], key.shape[1])
    output = _attention(query, key, value, jnp.broadcast_to(mask, shape), compute, unfused)
    return jnp.where(any_visible, output, jnp.zeros((), output.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    compute: AttentionFunction,
    unfused: AttentionFunction,
) -> jax.Array:
    def forward(*operands: Any) -> jax.Array:
        # The same forward pass as that of the gradient, so that XLA merges the two.
        return _vjp(compute, *operands)[0]

    return _vmap_into_batch(forward)(query, key, value, mask)


def _attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    compute: AttentionFunction,
    unfused: AttentionFunction,
) -> tuple[jax.Array, Any]:
    operands = (query, key, value, mask)
    return _attention(*operands, compute, unfused), operands


def _attention_backward(
    compute: AttentionFunction, unfused: AttentionFunction, operands: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    return (*_gradient(*operands, cotangent, compute, unfused), None)


_attention.defvjp(_attention_forward, _attention_backward)


def _vjp(
    function: AttentionFunction,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    return jax.vjp(lambda query, key, value: function(query, key, value, mask), query, key, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    cotangent: jax.Array,
    compute: AttentionFunction,
    unfused: AttentionFunction,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def backward(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any, dy: Any) -> Any:
        return _vjp(compute, query, key, value, mask)[1](dy)

    return _vmap_into_batch(backward)(query, key, value, mask, cotangent)


def _gradient_forward(*arguments: Any) -> tuple[Any, Any]:
    return _gradient(*arguments), arguments[:5]


def _gradient_backward(
    compute: AttentionFunction, unfused: AttentionFunction, operands: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array]:
    query, key, value, mask, cotangent = operands

    def plain(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> Any:
        return _vjp(unfused, query, key, value, mask)[1](cotangent)

    *to_operands, to_cotangent = jax.vjp(plain, query, key, value, cotangent)[1](cotangents)
    return (*to_operands, None, to_cotangent)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _pad_to_even_lengths(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    causal: bool,
) -> jax.Array:
    """Pad queries and keys to even lengths: the kernel has no gradient for odd ones."""
    batch, (queries, keys) = query.shape[0], (query.shape[1], key.shape[1])
    lengths: dict[str, jax.Array] = {}
    if queries % 2 or keys % 2:
        query, key, value = (  # [batch, even length, heads, head_dim]
            jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value)
        )
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, queries % 2), (0, keys % 2)))
        lengths = {
            "query_seq_lengths": jnp.full(batch, queries, jnp.int32),
            "key_value_seq_lengths": jnp.full(batch, keys, jnp.int32),
        }
    output = _kernel(query, key, value, mask=mask, scale=scale, is_causal=causal, **lengths)
    return output[:, :queries]


def _kernel(*operands: jax.Array, **options: Any) -> jax.Array:
    return jax.nn.dot_product_attention(*operands, implementation="cudnn", **options)


def _vmap_into_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `jax.vmap` merge the mapped axis into the batch, the only leading axis of the kernel.

    Args:
        function: of arrays [batch, ...] and perhaps a mask with a batch of 1.

    Returns:
        The same function, with that batching rule.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def merge(size: int, is_mapped: Any, *arguments: Any) -> tuple[Any, Any]:
        batch = arguments[0].shape[1 if is_mapped[0] else 0]

        def merged(x: jax.Array, x_is_mapped: bool) -> jax.Array:
            if not x_is_mapped:
                if len(x) < batch:
                    return x  # one mask, which broadcasts
                x = jnp.broadcast_to(x, (size, *x.shape))
            elif x.shape[1] < batch:
                x = jnp.repeat(x, batch, axis=1)
            return x.reshape(size * batch, *x.shape[2:])  # [size * batch, ...]

        results = _vmap_into_batch(function)(*jax.tree.map(merged, arguments, tuple(is_mapped)))
        split = jax.tree.map(lambda y: y.reshape(size, batch, *y.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return mapped
