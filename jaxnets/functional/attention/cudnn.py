"""Attention by cuDNN's kernel, which never writes the weights down.

For NVIDIA's GPUs, and numbers of 16 bits. Chosen in `attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxnets.functional.attention.masks import LocalMask, causal_mask, window_mask

#: Attention as a function of query, key, value and mask.
Formula = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

# From this compute capability on there is the kernel.
_AMPERE = (8, 0)
# Of fewer weights the reading and writing costs less than starting the kernel: 8 x 6 x 128 x 128
# take 60 us by XLA, forward and back, and 133 by the kernel; 256 x 6 x 64 x 64 take 250 and 197
# (H200). Nor does it pay for the single query of a new token.
_FEW_WEIGHTS, _FEW_QUERIES = 1 << 21, 16


def fits(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Tell whether the kernel can compute the attention of these arrays in this process.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim].
        value: [batch, keys, kv_heads, value_dim].

    Returns:
        True where every GPU of the process has the kernel, it takes the shapes and dtypes, and
        they are large enough for it.
    """
    dtypes = {query.dtype, key.dtype, value.dtype}
    batch, queries, heads, size = query.shape
    return (
        len(dtypes) == 1
        and dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
        and value.shape[3] == size
        and size % 8 == 0
        and size <= 128
        and queries >= _FEW_QUERIES
        and batch * heads * queries * key.shape[1] >= _FEW_WEIGHTS
        and _capability() >= _AMPERE
    )


@functools.cache
def _capability() -> tuple[int, ...]:
    """Return the compute capability of the oldest of NVIDIA's GPUs here, (0,) without one."""
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
    formula: Formula,
) -> jax.Array:
    """Compute `dot_product_attention`, without a bias, by the kernel.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim].
        value: [batch, keys, kv_heads, head_dim].
        mask: bool, broadcasts to [batch, heads, queries, keys].
        scale: factor of the products.
        local_mask: causal, window; the kernel gets a window as a mask.
        formula: computes the same, scale and local_mask included. Derivatives of the gradient are
            derivatives of this.

    Returns:
        [batch, queries, heads, head_dim].
    """
    compute = functools.partial(_even, scale=scale, causal=local_mask.causal)
    if local_mask.window is not None:
        own = window_mask(query.shape[1], window=local_mask.window)
        mask = own if mask is None else own & mask
    if mask is None:
        return _attention(query, key, value, None, compute, formula)
    visible = mask & causal_mask(query.shape[1]) if local_mask.causal else mask
    sees_any = jnp.swapaxes(jnp.any(visible, axis=-1), 1, 2)[..., None]
    # The kernel reads one number for each query and key, of one head or all, one example or all.
    shape = (*mask.shape[:2], query.shape[1], key.shape[1])
    output = _attention(query, key, value, jnp.broadcast_to(mask, shape), compute, formula)
    return jnp.where(sees_any, output, jnp.zeros((), output.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    compute: Formula,
    formula: Formula,
) -> jax.Array:
    def forward(*operands: Any) -> jax.Array:
        # As its gradient computes it again, so that XLA finds that the two are the same.
        return _pulled_back(compute, *operands)[0]

    return _joining(forward)(query, key, value, mask)


def _attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    compute: Formula,
    formula: Formula,
) -> tuple[jax.Array, Any]:
    operands = (query, key, value, mask)
    return _attention(*operands, compute, formula), operands


def _attention_backward(
    compute: Formula, formula: Formula, operands: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    return (*_gradient(*operands, cotangent, compute, formula), None)


_attention.defvjp(_attention_forward, _attention_backward)


def _pulled_back(
    function: Formula, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]]:
    return jax.vjp(lambda query, key, value: function(query, key, value, mask), query, key, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    cotangent: jax.Array,
    compute: Formula,
    formula: Formula,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def backward(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any, dy: Any) -> Any:
        return _pulled_back(compute, query, key, value, mask)[1](dy)

    return _joining(backward)(query, key, value, mask, cotangent)


def _gradient_forward(*arguments: Any) -> tuple[Any, Any]:
    return _gradient(*arguments), arguments[:5]


def _gradient_backward(
    compute: Formula, formula: Formula, operands: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array]:
    query, key, value, mask, cotangent = operands

    def plain(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> Any:
        return _pulled_back(formula, query, key, value, mask)[1](cotangent)

    *to_operands, to_cotangent = jax.vjp(plain, query, key, value, cotangent)[1](cotangents)
    return (*to_operands, None, to_cotangent)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _even(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    causal: bool,
) -> jax.Array:
    """Give the kernel even numbers of queries and keys; it trains with no others."""
    batch, (queries, keys) = query.shape[0], (query.shape[1], key.shape[1])
    lengths: dict[str, jax.Array] = {}
    if queries % 2 or keys % 2:
        query, key, value = (
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


def _joining(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a mapped axis join the batch, in front of which the kernel takes no other.

    Args:
        function: of arrays [batch, ...] and perhaps a mask with a batch of 1.

    Returns:
        The function, for `jax.vmap`.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def join(size: int, is_mapped: Any, *arguments: Any) -> tuple[Any, Any]:
        batch = arguments[0].shape[1 if is_mapped[0] else 0]

        def joined(x: jax.Array, mapped_here: bool) -> jax.Array:
            if not mapped_here:
                if len(x) < batch:
                    return x  # a mask for all
                x = jnp.broadcast_to(x, (size, *x.shape))
            elif x.shape[1] < batch:
                x = jnp.repeat(x, batch, axis=1)
            return x.reshape(size * batch, *x.shape[2:])

        results = _joining(function)(*jax.tree.map(joined, arguments, tuple(is_mapped)))
        apart = jax.tree.map(lambda y: y.reshape(size, batch, *y.shape[1:]), results)
        return apart, jax.tree.map(lambda _: True, results)

    return mapped
