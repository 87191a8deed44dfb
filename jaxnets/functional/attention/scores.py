"""Attention scores and weights, and the matrix products that attention consists of."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.checks import check_sizes
from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.lowering.layout import row_major
from jaxnets.functional.lowering.platforms import sizes_are_known

# With fewer queries, transposed copies of keys and values cost more than they save.
_MIN_QUERIES_TO_COPY = 4


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Return the attention weights, softmax(scale query key^T + bias), of every query and key.

    The whole array of weights is materialized, on every platform; `dot_product_attention` avoids
    that where it can. The arguments are those of `dot_product_attention`.

    Returns:
        [batch, heads, queries, keys], float32 or wider; each row sums to 1, or is 0 where all
        keys are hidden.

    Raises:
        ValueError: as in `dot_product_attention`.
    """
    local_mask, mask, bias = LocalMask(causal, window), with_four_axes(mask), with_four_axes(bias)
    check_shapes(query, key, key, mask, bias, local_mask)
    check_softcap(softcap)
    positions = (jnp.arange(x.shape[1])[None] for x in (query, key))  # [1, queries], [1, keys]
    visible = combine_masks(mask, local_mask.mask(*positions))
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    logits = scores(query, key, visible, bias, scale, softcap)
    if mask is None and bias is None:
        return jax.nn.softmax(logits, axis=-1)
    hidden = jnp.max(logits, axis=-1, keepdims=True) == -jnp.inf  # [batch, heads, queries, 1]
    weights = jax.nn.softmax(jnp.where(hidden, 0, logits), axis=-1)
    return jnp.where(hidden, jnp.zeros((), weights.dtype), weights)


def apply_attention_weights(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Average the values with the weights of `attention_weights`.

    Args:
        weights: [batch, heads, queries, keys].
        value: [batch, keys, kv_heads, value_dim].

    Returns:
        [batch, queries, heads, value_dim], of the dtype of `value`.
    """
    return jnp.swapaxes(weights_matmul_values(weights, value).astype(value.dtype), 1, 2)


def with_four_axes(x: jax.Array | None) -> jax.Array | None:
    """Prepend axes of size 1 to a mask or bias of fewer than four axes, as broadcasting does."""
    return x if x is None else jnp.reshape(x, (1,) * (4 - jnp.ndim(x)) + jnp.shape(x))


def check_shapes(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    local_mask: LocalMask,
) -> None:
    """Check that the shapes of all arguments fit together.

    Raises:
        ValueError: they do not, operands that are not floating, a mask that is not bool, a window
            that is no positive integer, or a local mask with different numbers of queries and keys.
    """
    for name, array in (("queries", query), ("keys", key), ("values", value)):
        if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} of shape {array.shape} and type {array.dtype} do not fit; give floats "
                "[batch, time, heads, head_dim]"
            )
    if local_mask.window is not None:
        check_sizes(window=local_mask.window)
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"the bias has dtype {bias.dtype}; give floats, which are added to the scores, and a "
            "mask of visible keys as mask="
        )
    if mask is not None and mask.dtype != bool:
        raise ValueError(
            f"the mask has dtype {mask.dtype}; give bool, True where a key is visible, and values "
            "that are added to the scores as bias="
        )
    (batch, queries, heads, head_dim), (key_batch, keys, kv_heads, key_dim) = query.shape, key.shape
    empty = 0 in (keys, kv_heads, head_dim)
    if empty or key_batch != batch or key_dim != head_dim or heads % kv_heads:
        raise ValueError(
            f"queries of shape {query.shape} do not fit keys of shape {key.shape}; both are "
            "[batch, time, heads, head_dim], with at least one key, and the number of key heads "
            "divides the other one"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"values of shape {value.shape} do not fit keys of shape {key.shape}; give one for "
            "each key, [batch, time, heads, value_dim]"
        )
    if local_mask != LocalMask() and keys != queries:
        kind, mask_name = (
            ("causal", "causal_mask") if local_mask.causal else ("window", "window_mask")
        )
        raise ValueError(
            f"{kind} attention has as many queries as keys, not {queries} and {keys}; give "
            f"mask={mask_name}(positions of the queries, positions of the keys, ...) instead"
        )
    whole = (batch, heads, queries, keys)
    for name, x in (("mask", mask), ("bias", bias)):
        if x is None:
            continue
        fits = x.ndim == 4 and all(
            own in (1, size) for own, size in zip(x.shape, whole, strict=True)
        )
        if not fits:
            raise ValueError(
                f"a {name} of shape {x.shape} does not broadcast to [batch, heads, queries, keys], "
                f"which are {whole} here"
            )


def check_softcap(softcap: float | None) -> None:
    """Check that a bound of the scores is a positive number.

    Raises:
        ValueError: it is not.
    """
    if softcap is not None and not 0 < softcap < math.inf:  # NaN too
        raise ValueError(f"softcap is {softcap}; give a positive number, or None for no bound")


def combine_masks(mask: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    """Return the conjunction of two masks that broadcast to each other; None masks nothing."""
    if mask is None or other is None:
        return mask if other is None else other
    return mask & other


def scores(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Return scale query key^T, soft-capped, + bias, -infinity where a key is masked.

    The arguments are those of `dot_product_attention`, mask and bias with four axes.

    Returns:
        [batch, heads, queries, keys], float32 or wider.
    """
    (batch, queries, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    # On CPU one matrix product for each key-value head, with the heads axis before time, is the
    # fastest form. The query heads that share a key-value head contribute further rows.
    rows = row_major(group_heads(query, kv_heads))  # [batch, kv_heads, rows, head_dim]
    products = batched_matmul(rows, heads_before_time(key, queries), transpose_rhs=True)
    result = scale * products.reshape(batch, heads, queries, keys)
    result = result if softcap is None else softcap * jnp.tanh(result / softcap)
    result = result if bias is None else result + bias.astype(result.dtype)
    return result if mask is None else jnp.where(mask, result, -jnp.inf)


class SoftmaxStatistics(NamedTuple):
    """What recomputes weights from scores: exp(scores - maximum) / denominator.

    Attributes:
        maximum: greatest score of each query, [batch, heads, queries, 1].
        inverse_denominator: [batch, heads, queries, 1].
    """

    maximum: jax.Array
    inverse_denominator: jax.Array


class UnnormalizedSoftmax(NamedTuple):
    """Softmax weights as the product of two factors.

    Attributes:
        exponentials: [batch, heads, queries, keys].
        inverse_denominator: [batch, heads, queries, 1].
    """

    exponentials: jax.Array
    inverse_denominator: jax.Array


def softmax(
    scores: jax.Array, *, may_hide_all: bool
) -> tuple[UnnormalizedSoftmax, SoftmaxStatistics]:
    """Return the weights, 0 for queries whose keys are all hidden, and their statistics.

    Args:
        scores: [batch, heads, queries, keys], -infinity where a key is hidden.
        may_hide_all: whether a query may have all its keys hidden.
    """
    maximum = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    if may_hide_all:  # a finite maximum, so that the exponentials are 0
        maximum = jnp.where(maximum == -jnp.inf, 0, maximum)
    weights = exponentials(scores, maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)  # [batch, heads, queries, 1]
    inverse = 1 / (jnp.where(total == 0, 1, total) if may_hide_all else total)
    return UnnormalizedSoftmax(weights, inverse), SoftmaxStatistics(maximum, inverse)


def exponentials(scores: jax.Array, maximum: jax.Array) -> jax.Array:
    """Return exp(scores - maximum).

    Args:
        scores: [batch, heads, queries, keys].
        maximum: [batch, heads, queries, 1].
    """
    return jnp.exp(scores - maximum)


def weights_matmul_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Multiply weights [batch, heads, queries, keys] by values [batch, keys, kv_heads, value_dim].

    Returns:
        [batch, heads, queries, value_dim], float32 or wider.
    """
    batch, heads, queries, keys = weights.shape
    kv_heads, value_dim = value.shape[2:]
    rows = weights.astype(value.dtype).reshape(batch, kv_heads, heads // kv_heads * queries, keys)
    result = batched_matmul(rows, heads_before_time(value, queries))
    return result.reshape(batch, heads, queries, value_dim)


def group_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """Map [batch, queries, heads, dim] to [batch, kv_heads, heads per kv_head * queries, dim]."""
    batch, queries, heads, dim = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, kv_heads, heads // kv_heads * queries, dim)


def heads_before_time(x: jax.Array, queries: int) -> jax.Array:
    """Transpose keys or values [batch, keys, kv_heads, dim] to [batch, kv_heads, keys, dim]."""
    transposed = jnp.swapaxes(x, 1, 2)
    if not sizes_are_known((queries,)) or queries < _MIN_QUERIES_TO_COPY:
        return transposed
    return row_major(transposed)


def batched_matmul(x: jax.Array, y: jax.Array, *, transpose_rhs: bool = False) -> jax.Array:
    """Multiply matrices, the second one transposed if `transpose_rhs`.

    Args:
        x: [batch, kv_heads, rows, inner].
        y: [batch, kv_heads, inner, columns], or [batch, kv_heads, columns, inner] if transposed.
        transpose_rhs: transpose `y`.

    Returns:
        [batch, kv_heads, rows, columns], float32 or wider: the CPU kernels for bfloat16 operands
        are fast only then.
    """
    axes = (((3,), (3 if transpose_rhs else 2,)), ((0, 1), (0, 1)))
    dtype = jnp.promote_types(x.dtype, y.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return lax.dot_general(x.astype(dtype), y.astype(dtype), axes, preferred_element_type=wide)


def contract_queries(scores: jax.Array, rows: jax.Array, *, keys_axis: int) -> jax.Array:
    """Contract scores and rows over the queries: scores^T rows, matrix by matrix.

    Args:
        scores: [batch, kv_heads, queries, keys].
        rows: [batch, kv_heads, queries, dim].
        keys_axis: of the result, 2 or 3.

    Returns:
        [batch, kv_heads, keys, dim] if `keys_axis` is 2, [batch, kv_heads, dim, keys] if it is 3.
        The first transposes the scores, the second the rows, which are smaller. With few queries
        the second product is slower by more than that saves.
    """
    if keys_axis == 3:
        transposed_rows = row_major(jnp.swapaxes(rows, 2, 3))  # [batch, kv_heads, dim, queries]
        return batched_matmul(transposed_rows, scores)
    transposed = jnp.swapaxes(scores, 2, 3)  # [batch, kv_heads, keys, queries]
    # In float32 a strided operand is as fast, and a row-major copy of the weights could be hoisted
    # into the forward pass and occupy memory until the backward pass.
    transposed = row_major(transposed) if transposed.dtype.itemsize < 4 else transposed
    return batched_matmul(transposed, row_major(rows))
