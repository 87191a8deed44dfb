"""Attention by its weights, divided as `attention_blocks` says.

The sums by which weights are divided divide the output instead, which is smaller.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.attention.scores import (
    Normalizers,
    Softmax,
    both,
    exponentials,
    grouped_rows,
    heads_in_front,
    product,
    product_over_queries,
    scores,
    softmax,
    sum_values,
)
from jaxnets.functional.attention.tiling import (
    Head,
    Tile,
    Tiling,
    TilingPerPlatform,
    joined,
    of_each_head,
    tilings,
)
from jaxnets.functional.lowering.layout import row_major

#: Of each tile the weights, for their gradient, or what makes them again.
_Kept: TypeAlias = list[Softmax | Normalizers]


class _Operands(NamedTuple):
    """What is differentiated, and the mask."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: jax.Array | None
    bias: jax.Array | None

    def of(self, head: Head) -> _Operands:
        """Take the part of one head; there is no bias where heads are alone."""
        query, key, value = (head.of(x, axis=2) for x in self[:3])
        mask = None if self.mask is None else head.of(self.mask, axis=1)
        return _Operands(query, key, value, mask, None)


class _Formula(NamedTuple):
    """What a program is made for.

    Attributes:
        scale: factor of the products.
        local_mask: which keys a query may see by its place.
    """

    scale: float
    local_mask: LocalMask

    def scores(self, tile: Tile, operands: _Operands) -> tuple[jax.Array, jax.Array | None]:
        """Return those of a tile, and what it sees if there may be queries that see nothing."""
        mask, bias = jax.tree.map(tile.of_scores, operands[3:])  # None stays
        places = (jnp.arange(*ends)[None] for ends in (tile[:2], tile[2:]))
        visible = both(mask, self.local_mask.mask(*places))
        query, key = tile.of_queries(operands.query), tile.of_keys(operands.key)
        found = scores(query, key, visible, bias, self.scale)
        # Each query sees itself by its local_mask: only a mask can hide everything.
        return found, None if mask is None else visible

    def tilings(self, operands: _Operands) -> TilingPerPlatform:
        """Divide attention for all platforms."""
        # A bias has the size of the weights already, and so does its gradient.
        divisible = operands.bias is None
        return tilings(operands.query, operands.key, self.local_mask, divisible=divisible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def unfused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
) -> jax.Array:
    """Compute `dot_product_attention`, where the arguments are described."""
    return _forward(query, key, value, mask, bias, scale, local_mask)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
) -> tuple[jax.Array, Any]:
    formula, operands = _Formula(scale, local_mask), _Operands(query, key, value, mask, bias)
    divisions = formula.tilings(operands)

    def attend(tiling: Tiling, operands: _Operands) -> tuple[jax.Array, dict[Tiling, _Kept]]:
        output, kept = (_attend_per_head if tiling.per_head else _attend)(formula, tiling, operands)
        # Platforms return the same arrays. Nothing reads those of the other ones, so that none of
        # them is in a compiled program.
        unread = {each: _filled(each, kept[0].inverse) for each in divisions.distinct()}
        return output, unread | {tiling: kept}

    output, kept = divisions.choose(attend, operands)
    return output, (operands, kept, output)


def _backward(
    scale: float, local_mask: LocalMask, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    formula, operands = _Formula(scale, local_mask), residuals[0]

    def gradients(
        tiling: Tiling, operands: _Operands, kept: dict[Tiling, _Kept], *ends: Any
    ) -> Any:
        pull_back = _gradients_per_head if tiling.per_head else _gradients
        return pull_back(formula, tiling, operands, kept[tiling], *ends)

    found = formula.tilings(operands).choose(gradients, *residuals, cotangent)
    dquery, dkey, dvalue, dbias = found
    return dquery, dkey, dvalue, None, dbias


unfused_attention.defvjp(_forward, _backward)


def _filled(tiling: Tiling, like: jax.Array) -> _Kept:
    """Make what a tiling keeps, on the devices of [batch, heads, ...] of another one."""

    def filled(queries: int, size: int) -> jax.Array:
        shape = (*like.shape[:2], queries, size)
        return jnp.broadcast_to(like[:, :, :1, :1], shape)  # zeros would lie on one device

    kept: _Kept = []
    for tile in tiling.tiles:
        queries = tile.end - tile.begin
        inverse = filled(queries, 1)
        made = Softmax(filled(queries, tile.last - tile.first), inverse)
        kept.append(Normalizers(inverse, inverse) if tiling.per_head else made)
    return kept


def _attend(formula: _Formula, tiling: Tiling, operands: _Operands) -> tuple[jax.Array, _Kept]:
    outputs: list[jax.Array] = []
    kept: _Kept = []
    value = operands.value
    for tile in tiling.tiles:
        weights, normalizers = softmax(*formula.scores(tile, operands))
        summed = weights.inverse * sum_values(weights.exponentials, tile.of_keys(value))
        outputs.append(jnp.swapaxes(summed.astype(value.dtype), 1, 2))
        kept.append(normalizers if tiling.per_head else weights)
    # Laid out, for two loops that read the output would both join it.
    output = outputs[0] if len(outputs) == 1 else row_major(jnp.concatenate(outputs, axis=1))
    return output, kept


def _attend_per_head(
    formula: _Formula, tiling: Tiling, operands: _Operands
) -> tuple[jax.Array, _Kept]:
    def attend(head: Head) -> tuple[jax.Array, _Kept]:
        return _attend(formula, tiling, operands.of(head))

    batch, _, groups, _ = operands.key.shape
    output, kept = of_each_head(attend, batch, groups)
    return joined(output, axis=2), jax.tree.map(functools.partial(joined, axis=1), kept)


def _gradients(
    formula: _Formula,
    tiling: Tiling,
    operands: _Operands,
    kept: _Kept,
    output: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    query, key, value, _, bias = operands
    batch, _, heads, size = query.shape
    num_keys, groups = key.shape[1:3]
    # The sum over the keys that the gradient of a softmax subtracts, without the weights.
    wide = kept[0].inverse.dtype
    subtracted = jnp.sum(cotangent.astype(wide) * output.astype(wide), axis=-1)
    subtracted = jnp.swapaxes(subtracted, 1, 2)[..., None]
    keys_axis = 3 if tiling.per_head else 2
    dquery: list[jax.Array] = []
    dkey: list[jax.Array] = []
    dvalue: list[jax.Array] = []
    dbias: list[jax.Array] = []
    for tile, own in zip(tiling.tiles, kept, strict=True):
        if isinstance(own, Softmax):
            weights = own.exponentials
        else:
            found, visible = formula.scores(tile, operands)
            weights = exponentials(found, own.greatest, visible)
        # What the sums divide is the cotangent, instead of the weights.
        of_inverse = jnp.swapaxes(own.inverse, 1, 2)
        upstream = (tile.of_queries(cotangent) * of_inverse).astype(cotangent.dtype)
        rows, upstream = (grouped_rows(x, groups) for x in (tile.of_queries(query), upstream))
        queries = tile.end - tile.begin  # as the forward pass counts, whose copies serve here
        keys, values = (heads_in_front(tile.of_keys(x), queries) for x in (key, value))
        products = product(row_major(upstream), values, turned=True).reshape(weights.shape)
        dscores = weights * (products - own.inverse * subtracted[:, :, tile.begin : tile.end])
        if bias is not None:
            dbias.append(tile.among_scores(_sum_to(dscores, tile.of_scores(bias)), bias))
        grouped = (batch, groups, -1, weights.shape[3])
        weights = weights.astype(value.dtype).reshape(grouped)
        narrow = (formula.scale * dscores).astype(query.dtype).reshape(grouped)
        own_dquery = product(narrow, keys).astype(query.dtype).reshape(batch, heads, -1, size)
        dquery.append(jnp.swapaxes(own_dquery, 1, 2))
        for parts, pair in ((dkey, (narrow, rows)), (dvalue, (weights, upstream))):
            part = product_over_queries(*pair, keys_axis=keys_axis)
            parts.append(tile.among_keys(part, num_keys, keys_axis))
    return (
        jnp.concatenate(dquery, axis=1),
        _keys_in_front(_total(dkey), keys_axis).astype(key.dtype),
        _keys_in_front(_total(dvalue), keys_axis).astype(value.dtype),
        None if bias is None else _total(dbias),
    )


def _gradients_per_head(
    formula: _Formula,
    tiling: Tiling,
    operands: _Operands,
    kept: _Kept,
    output: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    def gradients(head: Head) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        own_kept = jax.tree.map(functools.partial(head.of, axis=1), kept)
        own_output, own_cotangent = (head.of(x, axis=2) for x in (output, cotangent))
        return _gradients(formula, tiling, operands.of(head), own_kept, own_output, own_cotangent)

    batch, _, groups, _ = operands.key.shape
    found = of_each_head(gradients, batch, groups)
    return jax.tree.map(functools.partial(joined, axis=2), found)  # there is no bias


def _keys_in_front(x: jax.Array, keys_axis: int) -> jax.Array:
    """Bring the axis of keys behind the batch."""
    # Where rows would be read as columns, they are added up first.
    return jnp.moveaxis(row_major(x) if keys_axis == 3 else x, keys_axis, 1)


def _total(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sum over the axes along which `like` was broadcast to the shape of `x`."""
    axes = tuple(a for a, size in enumerate(like.shape) if size < x.shape[a])
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)
