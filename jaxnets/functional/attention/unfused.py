"""Softmax attention with materialized weights, tiled as `tiling` decides.

The softmax denominator is applied to the output, which is smaller than the weights.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.attention.scores import (
    SoftmaxStatistics,
    UnnormalizedSoftmax,
    batched_matmul,
    combine_masks,
    contract_queries,
    exponentials,
    group_heads,
    heads_before_time,
    scores,
    softmax,
    weights_matmul_values,
)
from jaxnets.functional.attention.tiling import (
    HeadGroup,
    Tile,
    Tiling,
    TilingPerPlatform,
    map_head_groups,
    merge_kv_heads,
    tilings,
)
from jaxnets.functional.lowering.layout import row_major

#: Saved for the backward pass, one a tile: the weights, or the statistics that recompute them.
_Residuals: TypeAlias = list[UnnormalizedSoftmax | SoftmaxStatistics]
#: Of query, key, value and bias.
_Gradients: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


class _Operands(NamedTuple):
    """The differentiable arguments, and the mask."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: jax.Array | None
    bias: jax.Array | None

    @property
    def may_hide_all(self) -> bool:
        """Whether a query may have all its keys hidden; a local mask leaves its own position."""
        return self.mask is not None or self.bias is not None

    def slice(self, group: HeadGroup) -> _Operands:
        """Slice to one head group; attention with a bias is not computed per head."""
        query, key, value = (group.slice(x, heads_axis=2) for x in self[:3])
        mask = None if self.mask is None else group.slice(self.mask, heads_axis=1)
        return _Operands(query, key, value, mask, None)


class _Settings(NamedTuple):
    """The static arguments.

    Attributes:
        scale: factor of the query-key products.
        local_mask: causal, window.
        softcap: bound of the scores, or None.
    """

    scale: float
    local_mask: LocalMask
    softcap: float | None

    def scores(self, tile: Tile, operands: _Operands) -> jax.Array:
        """Return the scores of a tile, [batch, heads, queries, keys]."""
        mask, bias = jax.tree.map(tile.slice_scores, operands[3:])  # None stays
        positions = (jnp.arange(*ends)[None] for ends in (tile[:2], tile[2:]))  # [1, time]
        visible = combine_masks(mask, self.local_mask.mask(*positions))
        query, key = tile.slice_queries(operands.query), tile.slice_keys(operands.key)
        return scores(query, key, visible, bias, self.scale, self.softcap)

    def through_softcap(self, dscores: jax.Array, tile: Tile, operands: _Operands) -> jax.Array:
        """Map the gradient of the capped scores of a tile to that of the scores."""
        if self.softcap is None:
            return dscores
        query, key = tile.slice_queries(operands.query), tile.slice_keys(operands.key)
        # Recomputed, because the saved weights also hold bias and mask.
        capped = jnp.tanh(scores(query, key, None, None, self.scale / self.softcap))
        return dscores * (1 - jnp.square(capped))

    def tilings(self, operands: _Operands) -> TilingPerPlatform:
        """Choose the tilings for all platforms."""
        # A bias already has the size of the weights, and so does its gradient.
        allow_per_head = operands.bias is None
        return tilings(operands.query, operands.key, self.local_mask, allow_per_head=allow_per_head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def unfused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
    softcap: float | None,
) -> jax.Array:
    """Compute `dot_product_attention`, which describes the arguments."""
    return _forward(query, key, value, mask, bias, scale, local_mask, softcap)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
    softcap: float | None,
) -> tuple[jax.Array, Any]:
    settings = _Settings(scale, local_mask, softcap)
    operands = _Operands(query, key, value, mask, bias)
    choice = settings.tilings(operands)

    def forward(tiling: Tiling, operands: _Operands) -> tuple[jax.Array, dict[Tiling, _Residuals]]:
        run = _forward_per_head if tiling.per_head else _forward_tiles
        output, residuals = run(settings, tiling, operands)
        # All platforms must return the same arrays. Nothing reads the residuals of the other
        # tilings, so a compiled program does not contain them.
        like = residuals[0].inverse_denominator
        unread = {each: _placeholders(each, like) for each in choice.distinct()}
        return output, unread | {tiling: residuals}

    output, residuals = choice.choose(forward, operands)
    return output, (operands, residuals, output)


def _backward(
    scale: float, local_mask: LocalMask, softcap: float | None, saved: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    settings, operands = _Settings(scale, local_mask, softcap), saved[0]

    def backward(
        tiling: Tiling, operands: _Operands, residuals: dict[Tiling, _Residuals], *rest: jax.Array
    ) -> _Gradients:
        run = _backward_per_head if tiling.per_head else _backward_tiles
        return run(settings, tiling, operands, residuals[tiling], *rest)

    gradients = settings.tilings(operands).choose(backward, *saved, cotangent)
    dquery, dkey, dvalue, dbias = gradients
    return dquery, dkey, dvalue, None, dbias


unfused_attention.defvjp(_forward, _backward)


def _placeholders(tiling: Tiling, like: jax.Array) -> _Residuals:
    """Make arrays of the shapes of a tiling's residuals.

    Args:
        tiling: another one than that of the platform.
        like: [batch, heads, ...], whose dtype and devices they take.
    """

    def filled(queries: int, size: int) -> jax.Array:
        shape = (*like.shape[:2], queries, size)
        return jnp.broadcast_to(like[:, :, :1, :1], shape)  # jnp.zeros would be on one device

    residuals: _Residuals = []
    for tile in tiling.tiles:
        inverse = filled(tile.num_queries, 1)
        weights = filled(tile.num_queries, tile.key_stop - tile.key_start)
        made = UnnormalizedSoftmax(weights, inverse)
        residuals.append(SoftmaxStatistics(inverse, inverse) if tiling.per_head else made)
    return residuals


def _forward_tiles(
    settings: _Settings, tiling: Tiling, operands: _Operands
) -> tuple[jax.Array, _Residuals]:
    outputs: list[jax.Array] = []
    residuals: _Residuals = []
    value = operands.value
    for tile in tiling.tiles:
        weights, statistics = softmax(
            settings.scores(tile, operands), may_hide_all=operands.may_hide_all
        )
        average = weights.inverse_denominator * weights_matmul_values(
            weights.exponentials, tile.slice_keys(value)
        )  # [batch, heads, queries of the tile, value_dim]
        outputs.append(jnp.swapaxes(average.astype(value.dtype), 1, 2))
        residuals.append(statistics if tiling.per_head else weights)
    # Row-major, for otherwise each of two loops that read the output would concatenate it.
    output = outputs[0] if len(outputs) == 1 else row_major(jnp.concatenate(outputs, axis=1))
    return output, residuals


def _forward_per_head(
    settings: _Settings, tiling: Tiling, operands: _Operands
) -> tuple[jax.Array, _Residuals]:
    def forward(group: HeadGroup) -> tuple[jax.Array, _Residuals]:
        return _forward_tiles(settings, tiling, operands.slice(group))

    batch, _, kv_heads, _ = operands.key.shape
    output, residuals = map_head_groups(forward, batch, kv_heads)
    merge_residuals = functools.partial(merge_kv_heads, heads_axis=1)
    return merge_kv_heads(output, heads_axis=2), jax.tree.map(merge_residuals, residuals)


def _backward_tiles(
    settings: _Settings,
    tiling: Tiling,
    operands: _Operands,
    residuals: _Residuals,
    output: jax.Array,
    cotangent: jax.Array,
) -> _Gradients:
    query, key, value, _, bias = operands
    batch, _, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    # The gradient of a softmax subtracts a sum over the keys; it equals this one over value_dim,
    # which does not need the weights.
    wide = residuals[0].inverse_denominator.dtype
    subtracted = jnp.sum(cotangent.astype(wide) * output.astype(wide), axis=-1)
    subtracted = jnp.swapaxes(subtracted, 1, 2)[..., None]  # [batch, heads, queries, 1]
    keys_axis = 3 if tiling.per_head else 2
    dquery: list[jax.Array] = []
    dkey: list[jax.Array] = []
    dvalue: list[jax.Array] = []
    dbias: list[jax.Array] = []
    for tile, saved in zip(tiling.tiles, residuals, strict=True):
        if isinstance(saved, UnnormalizedSoftmax):
            weights = saved.exponentials
        else:
            weights = exponentials(settings.scores(tile, operands), saved.maximum)
        # The denominator is applied to the cotangent, which is smaller than the weights.
        inverse = jnp.swapaxes(saved.inverse_denominator, 1, 2)  # [batch, queries, heads, 1]
        upstream = (tile.slice_queries(cotangent) * inverse).astype(cotangent.dtype)
        rows, upstream = (group_heads(x, kv_heads) for x in (tile.slice_queries(query), upstream))
        # The number of queries of the forward pass, so that its transposed copies are shared.
        keys, values = (
            heads_before_time(tile.slice_keys(x), tile.num_queries) for x in (key, value)
        )
        products = batched_matmul(row_major(upstream), values, transpose_rhs=True)
        products = products.reshape(weights.shape)  # [batch, heads, queries, keys]
        own_subtracted = subtracted[:, :, tile.query_start : tile.query_stop]
        dscores = weights * (products - saved.inverse_denominator * own_subtracted)
        if bias is not None:
            dbias.append(tile.pad_scores(_sum_to(dscores, tile.slice_scores(bias)), bias))
        dscores = settings.through_softcap(dscores, tile, operands)
        grouped = (batch, kv_heads, -1, weights.shape[3])  # [batch, kv_heads, rows, keys]
        weights = weights.astype(value.dtype).reshape(grouped)
        narrow = (settings.scale * dscores).astype(query.dtype).reshape(grouped)
        own_dquery = batched_matmul(narrow, keys).astype(query.dtype)
        own_dquery = own_dquery.reshape(batch, heads, -1, head_dim)
        dquery.append(jnp.swapaxes(own_dquery, 1, 2))  # [batch, queries, heads, head_dim]
        for parts, pair in ((dkey, (narrow, rows)), (dvalue, (weights, upstream))):
            part = contract_queries(*pair, keys_axis=keys_axis)
            parts.append(tile.pad_keys(part, num_keys, keys_axis))
    return (
        jnp.concatenate(dquery, axis=1),
        _keys_axis_first(_total(dkey), keys_axis).astype(key.dtype),
        _keys_axis_first(_total(dvalue), keys_axis).astype(value.dtype),
        None if bias is None else _total(dbias),
    )


def _backward_per_head(
    settings: _Settings,
    tiling: Tiling,
    operands: _Operands,
    residuals: _Residuals,
    output: jax.Array,
    cotangent: jax.Array,
) -> _Gradients:
    def backward(group: HeadGroup) -> _Gradients:
        own_residuals = jax.tree.map(functools.partial(group.slice, heads_axis=1), residuals)
        own_output, own_cotangent = (group.slice(x, heads_axis=2) for x in (output, cotangent))
        own = operands.slice(group)
        return _backward_tiles(settings, tiling, own, own_residuals, own_output, own_cotangent)

    batch, _, kv_heads, _ = operands.key.shape
    gradients = map_head_groups(backward, batch, kv_heads)
    merge = functools.partial(merge_kv_heads, heads_axis=2)
    return jax.tree.map(merge, gradients)  # there is no bias


def _keys_axis_first(x: jax.Array, keys_axis: int) -> jax.Array:
    """Move the axis of keys next to the batch: to [batch, keys, kv_heads, dim]."""
    # Row-major, so that the sum is computed in its own order before strided reads.
    return jnp.moveaxis(row_major(x) if keys_axis == 3 else x, keys_axis, 1)


def _total(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sum over the axes along which `like` was broadcast to the shape of `x`."""
    axes = tuple(a for a, size in enumerate(like.shape) if size < x.shape[a])
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)
