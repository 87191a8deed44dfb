"""Ring attention: one sequence over several devices, each with a chunk of queries, keys and values.

The keys and values travel round the ring of devices, and every device folds each chunk that passes
into an online softmax of its own queries. The backward pass is a second ring, which recomputes the
weights; the gradients of keys and values travel with them. A device holds its own chunk, the one
that arrives, and the weights of its queries for one block of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxnets.core import DATA_AXIS, FSDP_AXIS, SEQUENCE_AXIS, TENSOR_AXIS
from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.attention.scores import (
    SoftmaxStatistics,
    batched_matmul,
    combine_masks,
    contract_queries,
    exponentials,
    group_heads,
    heads_before_time,
    scores,
    weights_matmul_values,
)
from jaxnets.functional.lowering.platforms import sizes_are_known

# In this order: with "data" first XLA exchanges rows of products whose columns are over "tensor".
_BATCH_AXES = (FSDP_AXIS, DATA_AXIS)

# A chunk that this number divides is folded in blocks of so many keys, others at once.
_BLOCK_KEYS = 512

#: Keys, values and the mask of keys, or the gradients of the first two: what travels.
_Chunk: TypeAlias = tuple[Any, ...]
#: What keys are folded into: what stays on a device, and what travels with the keys.
_Folded: TypeAlias = tuple[Any, Any]
_Function: TypeAlias = Callable[..., Any]


def ambient_mesh(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: jax.Array | None
) -> AbstractMesh | None:
    """Return the mesh of `jax.set_mesh` if `ring_attention` can compute these operands on it.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim].
        mask: bool, four axes.
        bias: four axes.

    Returns:
        None without an axis "sequence" of two or more devices, inside `jax.shard_map`, with axes
        of type Explicit, for a mask that differs from query to query, a bias, symbolic sizes,
        another number of keys than of queries, or one that does not divide by the axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape.get(SEQUENCE_AXIS, 1) if not mesh.empty else 1
    if size == 1 or any(each != AxisType.Auto for each in mesh.axis_types):
        return None
    by_query = bias is not None or (mask is not None and mask.shape[2] > 1)
    if by_query or not sizes_are_known(query.shape, key.shape):
        return None
    queries, keys = query.shape[1], key.shape[1]
    return mesh if queries == keys and queries % size == 0 else None


class _Specs(NamedTuple):
    """Layouts on the mesh.

    Attributes:
        operand: of [batch, time, heads, dim].
        statistic: of [batch, heads, time, 1].
        mask: of a mask that broadcasts to [batch, heads, 1, time].
    """

    operand: PartitionSpec
    statistic: PartitionSpec
    mask: PartitionSpec


class _Ring(NamedTuple):
    """The static arguments.

    Attributes:
        scale: factor of the query-key products.
        local_mask: causal, window.
        softcap: bound of the scores, or None.
        mesh: has an axis "sequence".
    """

    scale: float
    local_mask: LocalMask
    softcap: float | None
    mesh: AbstractMesh

    @property
    def size(self) -> int:
        """Number of devices, which is the number of chunks."""
        return self.mesh.shape[SEQUENCE_AXIS]

    def num_chunks(self, time: int) -> int:
        """Return how many chunks, its own included, pass a device that has `time` positions."""
        causal, window = self.local_mask
        if not causal or window is None:
            return self.size
        # The last key of the chunk `n` before the own one is n time - (time - 1) away or farther.
        return min(self.size, (window + time - 2) // time + 1)

    def pass_on(self, chunk: _Chunk, distance: int = 1) -> _Chunk:
        """Send a chunk to the device `distance` further; receive that of the one as far before."""
        to = [(i, (i + distance) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE_AXIS, to), chunk)

    def start(self, time: int, step: jax.Array | int = 0) -> jax.Array:
        """Return the position of the first of the `time` keys that are here after `step` steps."""
        return (lax.axis_index(SEQUENCE_AXIS) - step) % self.size * time

    def if_visible(
        self, first_key: jax.Array, num_keys: int, time: int, update: _Function, folded: Any
    ) -> Any:
        """Apply an update unless none of the `time` queries here sees any of the keys."""
        causal, window = self.local_mask
        first = first_key - self.start(time)  # from the first query
        visible = []
        if causal:
            visible.append(first < time)
        if window is not None:
            visible += [first - (time - 1) < window, -(first + num_keys - 1) < window]
        if not visible:
            return update(folded)
        # The branches contain no collective, so devices may differ in the one they take.
        return lax.cond(functools.reduce(jnp.logical_and, visible), update, lambda x: x, folded)

    def scores(
        self, first_key: jax.Array, query: jax.Array, key: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the scores of a block of keys without and with masks.

        Returns:
            Two of [batch, heads, queries, keys]; the second is -infinity where a key is hidden.
        """
        starts = ((query, self.start(query.shape[1])), (key, first_key))
        positions = (start + jnp.arange(x.shape[1])[None] for x, start in starts)  # [1, time]
        visible = combine_masks(mask, self.local_mask.mask(*positions))
        unmasked = scores(query, key, None, None, self.scale, self.softcap)
        return unmasked, unmasked if visible is None else jnp.where(visible, unmasked, -jnp.inf)

    def specs(self, query: jax.Array, key: jax.Array, mask: jax.Array | None) -> _Specs:
        """Return the layouts; an axis that does not divide batch or heads computes copies."""
        batch, rest = [], query.shape[0]
        for name in _BATCH_AXES:
            if name in self.mesh.shape and rest % self.mesh.shape[name] == 0:
                batch.append(name)
                rest //= self.mesh.shape[name]
        size = self.mesh.shape.get(TENSOR_AXIS, 1)
        divides = size > 1 and query.shape[2] % size == key.shape[2] % size == 0
        rows, heads = tuple(batch) or None, TENSOR_AXIS if divides else None
        of_mask = (rows, heads, None, SEQUENCE_AXIS)
        sizes = (1, 1, 1, 1) if mask is None else mask.shape
        return _Specs(
            PartitionSpec(rows, SEQUENCE_AXIS, heads),
            PartitionSpec(rows, heads, SEQUENCE_AXIS),
            PartitionSpec(
                *(axes if n > 1 else None for axes, n in zip(of_mask, sizes, strict=True))
            ),
        )

    def over_devices(self, function: _Function, in_specs: Any, out_specs: Any) -> _Function:
        """Apply a function of this ring and of chunks on every device of the mesh."""
        of_chunks = functools.partial(function, self)
        # Copies, on axes that divide nothing, are equal without a check.
        return jax.shard_map(
            of_chunks, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def ring_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
    softcap: float | None,
    mesh: AbstractMesh,
) -> jax.Array:
    """Compute `dot_product_attention` with the sequence split over the mesh axis "sequence".

    The batch is split over "fsdp" and "data" and the heads over "tensor", where the mesh has these
    axes and their sizes divide. Blocks that a local mask hides are not computed, and with a causal
    window those out of reach are not sent. Reverse-mode differentiable any number of times, of
    which only the first saves memory.

    Args:
        query: floating [batch, time, heads, head_dim].
        key: floating [batch, time, kv_heads, head_dim].
        value: floating [batch, time, kv_heads, value_dim].
        mask: bool [batch or 1, heads or 1, 1, time or 1], which travels with the keys.
        scale: factor of the query-key products.
        local_mask: causal, window.
        softcap: bound of the scores, or None.
        mesh: the result of `ambient_mesh`.

    Returns:
        [batch, time, heads, value_dim], of the dtype of `value`; the softmax is float32 or wider.

    References:
        Liu, Zaharia and Abbeel 2023, arXiv:2310.01889, section 3.
    """
    return _forward(query, key, value, mask, scale, local_mask, softcap, mesh)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale: float,
    local_mask: LocalMask,
    softcap: float | None,
    mesh: AbstractMesh,
) -> tuple[jax.Array, Any]:
    ring = _Ring(scale, local_mask, softcap, mesh)
    specs = ring.specs(query, key, mask)
    operands = (query, key, value, mask)
    in_specs = (*3 * [specs.operand], specs.mask)
    outputs = (specs.operand, specs.statistic)  # of both statistics
    output, statistics = ring.over_devices(_forward_chunk, in_specs, outputs)(*operands)
    return output, (*operands, output, statistics)


def _backward(
    scale: float,
    local_mask: LocalMask,
    softcap: float | None,
    mesh: AbstractMesh,
    saved: Any,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, _, mask, *_ = saved
    ring = _Ring(scale, local_mask, softcap, mesh)
    specs = ring.specs(query, key, mask)
    in_specs = (*3 * [specs.operand], specs.mask, specs.operand, specs.statistic, specs.operand)
    outputs = (specs.operand,) * 3
    return *ring.over_devices(_backward_chunk, in_specs, outputs)(*saved, cotangent), None


ring_attention.defvjp(_forward, _backward)


def _fold_ring(
    ring: _Ring, keys: _Chunk, update: Callable[..., _Folded], initial: _Folded
) -> _Folded:
    """Fold all keys into arrays, block by block: the own chunk first, then each that arrives.

    Args:
        ring: the devices.
        keys: the own keys, values and mask.
        update: function of the position of the first key of a block, its keys, values and mask,
            and what they are folded into.
        initial: the arrays that stay here, and those [batch, kv_heads, keys, dim] that travel
            with the keys and are home at the end.
    """
    time = keys[0].shape[1]
    size = _BLOCK_KEYS if time % _BLOCK_KEYS == 0 else time

    def fold(step: jax.Array | int, chunk: _Chunk, folded: _Folded) -> _Folded:
        key, value, mask = chunk

        def fold_block(folded: _Folded, start: jax.Array) -> tuple[_Folded, None]:
            def slice_keys(x: jax.Array, axis: int) -> jax.Array:
                return lax.dynamic_slice_in_dim(x, start, size, axis)

            first_key = ring.start(time, step) + start
            whole = mask is None or mask.shape[3] == 1
            block = (
                slice_keys(key, 1),
                slice_keys(value, 1),
                mask if whole else slice_keys(mask, 3),
            )
            stay, travel = folded
            own = (stay, jax.tree.map(lambda x: slice_keys(x, 2), travel))
            of_block = functools.partial(update, first_key, *block)
            stay, own_travel = ring.if_visible(first_key, size, time, of_block, own)

            def put(x: jax.Array, block: jax.Array) -> jax.Array:
                return lax.dynamic_update_slice_in_dim(x, block, start, 2)

            return (stay, jax.tree.map(put, travel, own_travel)), None

        starts = jnp.arange(0, time, size, dtype=jnp.int32)
        (stay, travel), _ = lax.scan(fold_block, folded, starts)
        return stay, ring.pass_on(travel)

    def step(i: jax.Array, carry: tuple[_Chunk, _Folded]) -> tuple[_Chunk, _Folded]:
        chunk, folded = carry
        return ring.pass_on(chunk), fold(i, chunk, folded)  # the two may overlap in time

    num_chunks = ring.num_chunks(time)
    chunk, folded = lax.fori_loop(0, num_chunks - 1, step, (keys, initial))
    stay, travel = fold(num_chunks - 1, chunk, folded)
    way_home = ring.size - num_chunks
    return stay, ring.pass_on(travel, way_home) if way_home else travel


def _forward_chunk(
    ring: _Ring, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, SoftmaxStatistics]:
    batch, time, heads, _ = query.shape
    wide = jnp.result_type(query, key, value, jnp.float32)

    def update(
        first_key: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        folded: _Folded,
    ) -> _Folded:
        (maximum, denominator, total), travel = folded
        logits = ring.scores(first_key, query, key, mask)[1].astype(wide)
        new = jnp.maximum(maximum, jnp.max(logits, axis=-1, keepdims=True))
        new = lax.stop_gradient(new)  # it cancels in the output
        # A finite maximum, so that the exponentials of queries without a key are 0.
        finite = jnp.where(new == -jnp.inf, 0, new)
        weights, rescaled = exponentials(logits, finite), exponentials(maximum, finite)
        average = weights_matmul_values(weights, value).astype(wide)
        denominator = rescaled * denominator + jnp.sum(weights, axis=-1, keepdims=True)
        return (new, denominator, rescaled * total + average), travel

    statistic = jnp.zeros((batch, heads, time, 1), wide)
    total = jnp.zeros((batch, heads, time, value.shape[3]), wide)
    initial = ((statistic - jnp.inf, statistic, total), ())
    (maximum, denominator, total), _ = _fold_ring(ring, (key, value, mask), update, initial)
    maximum = jnp.where(maximum == -jnp.inf, 0, maximum)
    inverse = 1 / jnp.where(denominator == 0, 1, denominator)
    output = jnp.swapaxes((inverse * total).astype(value.dtype), 1, 2)
    return output, SoftmaxStatistics(maximum, inverse)


def _backward_chunk(
    ring: _Ring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    output: jax.Array,
    statistics: SoftmaxStatistics,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    (batch, time, heads, head_dim), kv_heads = query.shape, key.shape[2]
    maximum, inverse = statistics
    wide = maximum.dtype
    # The gradient of a softmax subtracts a sum over all keys; it equals this one over value_dim.
    subtracted = jnp.sum(cotangent.astype(wide) * output.astype(wide), axis=-1)
    subtracted = jnp.swapaxes(subtracted, 1, 2)[..., None]  # [batch, heads, queries, 1]
    rows, upstream = (group_heads(x, kv_heads) for x in (query, cotangent))

    def update(
        first_key: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        folded: _Folded,
    ) -> _Folded:
        dquery, (dkey, dvalue) = folded
        unmasked, logits = ring.scores(first_key, query, key, mask)
        weights = inverse * exponentials(logits, maximum)  # [batch, heads, queries, keys]
        values = heads_before_time(value, time)
        products = batched_matmul(upstream, values, transpose_rhs=True).reshape(weights.shape)
        dscores = weights * (products - subtracted)
        if ring.softcap is not None:
            dscores *= 1 - jnp.square(unmasked / ring.softcap)
        grouped = (batch, kv_heads, -1, key.shape[1])  # [batch, kv_heads, rows, keys]
        weights = weights.astype(value.dtype).reshape(grouped)
        dscores = (ring.scale * dscores).astype(query.dtype).reshape(grouped)
        own = batched_matmul(dscores, heads_before_time(key, time))
        dquery += own.reshape(dquery.shape).astype(wide)
        dkey += contract_queries(dscores, rows, keys_axis=2).astype(wide)
        dvalue += contract_queries(weights, upstream, keys_axis=2).astype(wide)
        return dquery, (dkey, dvalue)

    dquery = jnp.zeros((batch, heads, time, head_dim), wide)
    of_keys = [jnp.zeros((batch, kv_heads, time, x.shape[3]), wide) for x in (key, value)]
    initial = (dquery, tuple(of_keys))
    dquery, (dkey, dvalue) = _fold_ring(ring, (key, value, mask), update, initial)
    gradients = ((dquery, query), (dkey, key), (dvalue, value))
    dquery, dkey, dvalue = (jnp.swapaxes(d, 1, 2).astype(x.dtype) for d, x in gradients)
    return dquery, dkey, dvalue
