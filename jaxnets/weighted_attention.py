"""Attention by its weights, on CPU in blocks of queries.

Of causal attention a block of queries is multiplied with the keys up to its last query only, which
spares nearly half of the products and of the weights; and the scores of a block are still in the
cache when they become weights. The sums by which weights are divided divide the output instead,
which is smaller.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.attention_masks import causal_mask
from jaxnets.layouts import laid_out
from jaxnets.platforms import by_platform

# With fewer queries, copies of keys and values cost more than they save.
_FEW_QUERIES = 4

# Fewer queries a block make slower products; more blocks, longer programs. Without causality
# nothing is spared, and blocks pay only where the scores of all queries leave the cache.
_BLOCK, _LARGE_BLOCK, _LONG, _MOST_BLOCKS = 64, 128, 512, 8
_MANY_KEYS = 1024


class _Softmax(NamedTuple):
    """Weights: `exponentials` [batch, heads, queries, keys], times `inverse` of their sums."""

    exponentials: jax.Array
    inverse: jax.Array


class _Block(NamedTuple):
    """Queries from `begin` up to `end`, and how many keys in front they may see."""

    begin: int
    end: int
    keys: int

    def of_queries(self, x: jax.Array) -> jax.Array:
        return x[:, self.begin : self.end]

    def of_keys(self, x: jax.Array) -> jax.Array:
        return x[:, : self.keys]

    def of_scores(self, x: jax.Array) -> jax.Array:
        """Take the part of what broadcasts against the scores."""
        x = x if x.shape[2] == 1 else x[:, :, self.begin : self.end]
        return x if x.shape[3] == 1 else x[..., : self.keys]

    def among_scores(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """Put a part into zeros; transposes `of_scores`."""
        rows = (self.begin, like.shape[2] - self.end) if like.shape[2] > 1 else (0, 0)
        columns = (0, like.shape[3] - self.keys) if like.shape[3] > 1 else (0, 0)
        return jnp.pad(x, [(0, 0), (0, 0), rows, columns])

    def filled(self, like: _Softmax) -> _Softmax:
        """Make arrays of the shapes of this block, on the devices of those of another one."""

        def resized(x: jax.Array, size: int) -> jax.Array:
            shape = (*x.shape[:2], self.end - self.begin, size)
            return jnp.broadcast_to(x[:, :, :1, :1], shape)  # zeros would lie on one device

        return _Softmax(resized(like.exponentials, self.keys), resized(like.inverse, 1))


#: All queries, in parts.
_Division = tuple[_Block, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def weighted_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    causal: bool,
) -> jax.Array:
    """Compute `attention.attention`, where the arguments are described."""
    return _forward(query, key, value, mask, bias, scale, causal)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, Any]:
    _check_shapes(query, key, causal)
    divisions = _divisions(query.shape[1], key.shape[1], causal)

    def attend(taken: _Division, *operands: Any) -> tuple[jax.Array, Any]:
        query, key, value, mask, bias = operands
        outputs, kept = [], []
        for block in taken:
            visible, biases = jax.tree.map(block.of_scores, (mask, bias))  # None stays
            if causal:
                rows, columns = jnp.arange(block.begin, block.end), jnp.arange(block.keys)
                own = causal_mask(rows[None], columns[None])
                visible = own if visible is None else own & visible
            ours = block.of_queries(query), block.of_keys(key)
            scores = _scores(*ours, visible, biases, scale)
            # Causal queries see themselves: only a mask can hide everything.
            kept.append(_softmax(scores, None if mask is None else visible))
            summed = kept[-1].inverse * _sum_values(kept[-1].exponentials, block.of_keys(value))
            outputs.append(jnp.swapaxes(summed.astype(value.dtype), 1, 2))
        # Platforms return the same arrays. Nothing reads those of the other ones, so that none of
        # them is in a compiled program.
        unread = {each: [block.filled(like=kept[0]) for block in each] for each in divisions}
        # Laid out, for two loops that read the output would both join it.
        joined = outputs[0] if len(taken) == 1 else laid_out(jnp.concatenate(outputs, axis=1))
        return joined, {**unread, taken: kept}

    output, kept = _divided(attend, divisions, query, key, value, mask, bias)
    return output, (query, key, value, bias, kept, output)


def _backward(
    scale: float, causal: bool, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    query, key, *_ = residuals
    divisions = _divisions(query.shape[1], key.shape[1], causal)
    gradients = functools.partial(_gradients, scale)
    dquery, dkey, dvalue, dbias = _divided(gradients, divisions, *residuals, cotangent)
    return dquery, dkey, dvalue, None, dbias


weighted_attention.defvjp(_forward, _backward)


def _gradients(
    scale: float,
    taken: _Division,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    kept: Mapping[_Division, list[_Softmax]],
    output: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    batch, _, heads, size = query.shape
    groups, num_keys = key.shape[2], key.shape[1]
    # The sum over the keys that the gradient of a softmax subtracts, without the weights.
    wide = kept[taken][0].inverse.dtype
    subtracted = jnp.sum(cotangent.astype(wide) * output.astype(wide), axis=-1)
    subtracted = jnp.swapaxes(subtracted, 1, 2)[..., None]
    dquery, dkey, dvalue, dbias = [], [], [], []
    for block, softmax in zip(taken, kept[taken], strict=True):
        # What the sums divide is the cotangent, instead of the weights.
        of_inverse = jnp.swapaxes(softmax.inverse, 1, 2)
        upstream = (block.of_queries(cotangent) * of_inverse).astype(cotangent.dtype)
        rows, upstream = (_grouped_rows(x, groups) for x in (block.of_queries(query), upstream))
        queries = block.end - block.begin  # as the forward pass counts, whose copies serve here
        keys, values = (_heads_in_front(block.of_keys(x), queries) for x in (key, value))
        products = _product(laid_out(upstream), values, turned=True)
        own = softmax.inverse * subtracted[:, :, block.begin : block.end]
        scores = softmax.exponentials * (products.reshape(softmax.exponentials.shape) - own)
        if bias is not None:
            dbias.append(block.among_scores(_sum_to(scores, block.of_scores(bias)), bias))
        grouped = (batch, groups, -1, block.keys)
        weights = softmax.exponentials.astype(value.dtype).reshape(grouped)
        narrow = (scale * scores).astype(query.dtype).reshape(grouped)
        own_dquery = _product(narrow, keys).astype(query.dtype).reshape(batch, heads, -1, size)
        dquery.append(jnp.swapaxes(own_dquery, 1, 2))
        hidden = [(0, 0), (0, 0), (0, num_keys - block.keys), (0, 0)]
        dkey.append(jnp.pad(_product_over_queries(narrow, rows), hidden))
        dvalue.append(jnp.pad(_product_over_queries(weights, upstream), hidden))
    return (
        jnp.concatenate(dquery, axis=1),
        jnp.swapaxes(_total(dkey), 1, 2).astype(key.dtype),
        jnp.swapaxes(_total(dvalue), 1, 2).astype(value.dtype),
        None if bias is None else _total(dbias),
    )


def _divisions(queries: int, keys: int, causal: bool) -> tuple[_Division, _Division]:
    """Return all queries as one block, and in the blocks that the CPU takes."""
    rows = _BLOCK if causal and queries < _LONG else _LARGE_BLOCK
    several = causal or keys >= _MANY_KEYS
    count = max(1, min(_MOST_BLOCKS, queries // rows)) if several else 1
    bounds = itertools.pairwise(queries * number // count for number in range(count + 1))
    blocks = tuple(_Block(begin, end, end if causal else keys) for begin, end in bounds)
    return (_Block(0, queries, keys),), blocks


def _divided(
    function: Callable[..., Any], divisions: tuple[_Division, _Division], *operands: Any
) -> Any:
    """Apply a function of a division and of the operands, on CPU to the blocks."""
    whole, blocks = divisions
    if whole == blocks:
        return function(whole, *operands)
    on_cpu, elsewhere = (functools.partial(function, each) for each in (blocks, whole))
    return by_platform(*operands, cpu=on_cpu, default=elsewhere)


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
    _check_shapes(query, key, causal)
    queries, size = query.shape[1], query.shape[3]
    if causal:
        mask = causal_mask(queries) if mask is None else mask & causal_mask(queries)
    scores = _scores(query, key, mask, bias, 1 / math.sqrt(size) if scale is None else scale)
    weights = jax.nn.softmax(scores, axis=-1)
    return weights if mask is None else _of_queries_that_see(mask, weights)


def weighted_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sum the values with the weights of `attention_weights`.

    Args:
        weights: [batch, heads, queries, keys].
        value: [batch, keys, key_value_heads, value_size].

    Returns:
        [batch, queries, heads, value_size], of the dtype of `value`.
    """
    return jnp.swapaxes(_sum_values(weights, value).astype(value.dtype), 1, 2)


def _check_shapes(query: jax.Array, key: jax.Array, causal: bool) -> None:
    (batch, queries, heads, size), (key_batch, keys, groups, key_size) = query.shape, key.shape
    if key_batch != batch or key_size != size or heads % groups:
        raise ValueError(
            f"queries of shape {query.shape} do not fit keys of shape {key.shape}; both are "
            "[batch, time, heads, size], where the number of key heads divides that of queries"
        )
    if causal and keys != queries:
        raise ValueError(
            f"causal attention has as many queries as keys, not {queries} and {keys}; give "
            "mask=causal_mask(positions of the queries, positions of the keys) instead"
        )


def _scores(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Return [batch, heads, queries, keys], the smallest number where a key is hidden."""
    (batch, queries, heads, _), (_, keys, groups, _) = query.shape, key.shape
    # The product of matrices of one head, heads in front, is the fastest form on CPU; the heads
    # that share a key follow each other as further rows.
    rows = laid_out(_grouped_rows(query, groups))
    product = _product(rows, _heads_in_front(key, queries), turned=True)
    scores = scale * product.reshape(batch, heads, queries, keys)
    scores = scores if bias is None else scores + bias.astype(scores.dtype)
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def _softmax(scores: jax.Array, mask: jax.Array | None) -> _Softmax:
    greatest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    exponentials = jnp.exp(scores - greatest)
    if mask is not None:
        exponentials = _of_queries_that_see(mask, exponentials)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return _Softmax(exponentials, 1 / (total if mask is None else jnp.where(total == 0, 1, total)))


def _of_queries_that_see(mask: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.where(jnp.any(mask, axis=-1, keepdims=True), weights, jnp.zeros((), weights.dtype))


def _sum_values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Return [batch, heads, queries, value_size], float32 or wider."""
    batch, heads, queries, keys = weights.shape
    groups, size = value.shape[2:]
    rows = weights.astype(value.dtype).reshape(batch, groups, heads // groups * queries, keys)
    summed = _product(rows, _heads_in_front(value, queries))
    return summed.reshape(batch, heads, queries, size)


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


def _product_over_queries(scores: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiply [batch, groups, queries, keys], transposed, with [batch, groups, queries, size]."""
    turned = jnp.swapaxes(scores, 2, 3)
    # Read through strides as fast in float32; and nothing keeps a copy of the weights from being
    # made in the forward pass already, and held until it is read.
    return _product(laid_out(turned) if turned.dtype.itemsize < 4 else turned, laid_out(rows))


def _total(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sum over the axes along which `like` was broadcast to the shape of `x`."""
    axes = tuple(a for a, size in enumerate(like.shape) if size < x.shape[a])
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)
