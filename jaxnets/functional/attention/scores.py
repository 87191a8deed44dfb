"""How much queries take from keys, and the products that attention is made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.lowering.layout import row_major

# With fewer queries, copies of keys and values cost more than they save.
_FEW_QUERIES = 4


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Return how much each query takes from each key; the arguments are those of `attention`.

    Returns:
        [batch, heads, queries, keys], float32 or wider; each row sums to 1, or is 0 where the
        query sees no key.

    Raises:
        ValueError: shapes that do not fit together, or a window below 1.
    """
    local_mask, mask, bias = LocalMask(causal, window), with_four_axes(mask), with_four_axes(bias)
    check_shapes(query, key, key, mask, bias, local_mask)
    own = local_mask.mask(*(jnp.arange(x.shape[1])[None] for x in (query, key)))
    visible = both(mask, own)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    weights = jax.nn.softmax(scores(query, key, visible, bias, scale), axis=-1)
    return weights if visible is None else _of_queries_that_see(visible, weights)


def apply_attention_weights(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sum the values with the weights of `attention_weights`.

    Args:
        weights: [batch, heads, queries, keys].
        value: [batch, keys, kv_heads, value_dim].

    Returns:
        [batch, queries, heads, value_dim], of the dtype of `value`.
    """
    return jnp.swapaxes(sum_values(weights, value).astype(value.dtype), 1, 2)


def with_four_axes(x: jax.Array | None) -> jax.Array | None:
    """Put axes of 1 in front of a mask or a bias of up to four axes, as broadcasting does."""
    return x if x is None else jnp.reshape(x, (1,) * (4 - jnp.ndim(x)) + jnp.shape(x))


def check_shapes(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    local_mask: LocalMask,
) -> None:
    """Refuse shapes that do not fit together.

    Raises:
        ValueError: such shapes, or other queries than keys where their places count.
    """
    (batch, queries, heads, size), (key_batch, keys, groups, key_size) = query.shape, key.shape
    if key_batch != batch or key_size != size or heads % groups:
        raise ValueError(
            f"queries of shape {query.shape} do not fit keys of shape {key.shape}; both are "
            "[batch, time, heads, head_dim], where the number of key heads divides that of queries"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"values of shape {value.shape} do not fit keys of shape {key.shape}; give one for "
            "each key, [batch, time, heads, any size]"
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
        if x is not None and any(
            own not in (1, size) for own, size in zip(x.shape, whole, strict=True)
        ):
            raise ValueError(
                f"a {name} of shape {x.shape} does not broadcast to [batch, heads, queries, keys], "
                f"which are {whole} here"
            )


def both(mask: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    """Join two masks that broadcast to each other; None hides nothing."""
    if mask is None or other is None:
        return mask if other is None else other
    return mask & other


def scores(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Return scale query key^T + bias, the smallest number where a key is hidden.

    The arguments are those of `dot_product_attention`, mask and bias with four axes.

    Returns:
        [batch, heads, queries, keys], float32 or wider.
    """
    (batch, queries, heads, _), (_, keys, groups, _) = query.shape, key.shape
    # The product of matrices of one head, heads in front, is the fastest form on CPU; the heads
    # that share a key follow each other as further rows.
    rows = row_major(grouped_rows(query, groups))
    products = product(rows, heads_in_front(key, queries), turned=True)
    found = scale * products.reshape(batch, heads, queries, keys)
    found = found if bias is None else found + bias.astype(found.dtype)
    return found if mask is None else jnp.where(mask, found, jnp.finfo(found.dtype).min)


class Normalizers(NamedTuple):
    """What makes weights of scores: exp(scores - greatest) inverse; [batch, heads, queries, 1]."""

    greatest: jax.Array
    inverse: jax.Array


class Softmax(NamedTuple):
    """Weights: `exponentials` [batch, heads, queries, keys], times `inverse` of their sums."""

    exponentials: jax.Array
    inverse: jax.Array


def softmax(scores: jax.Array, mask: jax.Array | None) -> tuple[Softmax, Normalizers]:
    """Return weights, 0 where a query sees no key by `mask`, and what makes them again.

    Args:
        scores: [batch, heads, queries, keys].
        mask: bool, broadcasts to the scores; needed only if there may be queries that see no key.
    """
    greatest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    found = exponentials(scores, greatest, mask)
    total = jnp.sum(found, axis=-1, keepdims=True)
    inverse = 1 / (total if mask is None else jnp.where(total == 0, 1, total))
    return Softmax(found, inverse), Normalizers(greatest, inverse)


def exponentials(scores: jax.Array, greatest: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return exp(scores - greatest), 0 where a query sees no key by `mask`.

    Args:
        scores: [batch, heads, queries, keys].
        greatest: [batch, heads, queries, 1].
        mask: as in `softmax`.
    """
    found = jnp.exp(scores - greatest)
    return found if mask is None else _of_queries_that_see(mask, found)


def _of_queries_that_see(mask: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, jnp.zeros((), weights.dtype))


def sum_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Multiply weights [batch, heads, queries, keys] with values [batch, keys, groups, value_dim].

    Returns:
        [batch, heads, queries, value_dim], float32 or wider.
    """
    batch, heads, queries, keys = weights.shape
    groups, size = value.shape[2:]
    rows = weights.astype(value.dtype).reshape(batch, groups, heads // groups * queries, keys)
    return product(rows, heads_in_front(value, queries)).reshape(batch, heads, queries, size)


def grouped_rows(x: jax.Array, groups: int) -> jax.Array:
    """Map [batch, queries, heads, size] to [batch, groups, heads of a group * queries, size]."""
    batch, queries, heads, size = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, groups, heads // groups * queries, size)


def heads_in_front(x: jax.Array, queries: int) -> jax.Array:
    """Bring keys or values [batch, keys, groups, size] to [batch, groups, keys, size]."""
    turned = jnp.swapaxes(x, 1, 2)
    return turned if queries < _FEW_QUERIES else row_major(turned)


def product(x: jax.Array, y: jax.Array, *, turned: bool = False) -> jax.Array:
    """Multiply matrices [batch, groups, ...], the second transposed if `turned`.

    The result is float32 or wider, of which the CPU's kernels for bfloat16 are fast.
    """
    axes = (((3,), (3 if turned else 2,)), ((0, 1), (0, 1)))
    dtype = jnp.promote_types(x.dtype, y.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return lax.dot_general(x.astype(dtype), y.astype(dtype), axes, preferred_element_type=wide)


def product_over_queries(scores: jax.Array, rows: jax.Array, *, keys_axis: int) -> jax.Array:
    """Multiply [batch, groups, queries, keys], transposed, with [batch, groups, queries, size].

    Returns:
        [batch, groups, keys, size] if `keys_axis` is 2, [batch, groups, size, keys] if it is 3.
        The one transposes the scores, the other the rows, which are fewer numbers; but where they
        are few the product is slower, by more than that.
    """
    if keys_axis == 3:
        return product(row_major(jnp.swapaxes(rows, 2, 3)), scores)
    turned = jnp.swapaxes(scores, 2, 3)
    # Read through strides as fast in float32; and nothing keeps a copy of the weights from being
    # made in the forward pass already, and held until it is read.
    return product(row_major(turned) if turned.dtype.itemsize < 4 else turned, row_major(rows))
