"""Tiling of attention: blocks of queries, each with the range of keys that it may attend to.

On CPU a tile is multiplied with those keys only. That saves nearly half of the multiplications and
of the weights of causal attention, and most of them if the window is narrow; and the scores of a
tile are still in the cache when the softmax reads them. Long contexts are computed one example and
one key-value head at a time, and the weights are recomputed in the backward pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.lowering.platforms import platform_dependent, sizes_are_known

# Smaller tiles make slower matrix products; more tiles, longer programs. Without a local mask
# tiling saves no multiplications, and pays only where the scores of all queries exceed the cache.
_TILE_QUERIES, _LARGE_TILE_QUERIES, _LONG_SEQUENCE, _MAX_TILES = 64, 128, 512, 8
_MANY_KEYS = 1024

# Weights of one head. Above this size recomputing costs no more than the memory traffic (in 16
# bits, where exponentials count for more, a tenth less). Below, the matrix products of a single
# head are too small.
_RECOMPUTED_WEIGHTS, _RECOMPUTED_WEIGHTS_16_BIT = 1 << 20, 1 << 22


class Tile(NamedTuple):
    """Queries [query_start, query_stop) with their keys [key_start, key_stop)."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return self.query_stop - self.query_start

    def slice_queries(self, x: jax.Array) -> jax.Array:
        """Slice [batch, queries, ...]."""
        return x[:, self.query_start : self.query_stop]

    def slice_keys(self, x: jax.Array) -> jax.Array:
        """Slice [batch, keys, ...]."""
        return x[:, self.key_start : self.key_stop]

    def slice_scores(self, x: jax.Array) -> jax.Array:
        """Slice an array that broadcasts against [batch, heads, queries, keys]."""
        x = x if x.shape[2] == 1 else x[:, :, self.query_start : self.query_stop]
        return x if x.shape[3] == 1 else x[..., self.key_start : self.key_stop]

    def pad_keys(self, x: jax.Array, num_keys: int, axis: int) -> jax.Array:
        """Pad the tile's keys on the given axis to `num_keys` with zeros."""
        outside = (self.key_start, num_keys - self.key_stop)
        return jnp.pad(x, [outside if each == axis else (0, 0) for each in range(x.ndim)])

    def pad_scores(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """Pad a slice to the shape of `like` with zeros: the transpose of `slice_scores`."""
        rows = (self.query_start, like.shape[2] - self.query_stop)
        columns = (self.key_start, like.shape[3] - self.key_stop)
        rows = rows if like.shape[2] > 1 else (0, 0)
        columns = columns if like.shape[3] > 1 else (0, 0)
        return jnp.pad(x, [(0, 0), (0, 0), rows, columns])


class Tiling(NamedTuple):
    """A partition of the queries into tiles.

    Attributes:
        tiles: consecutive in their queries.
        per_head: whether a loop computes one example and one key-value head at a time, and the
            weights are recomputed in the backward pass.
    """

    tiles: tuple[Tile, ...]
    per_head: bool = False


class TilingPerPlatform(NamedTuple):
    """One tiling for each kind of program, named as in `platform_dependent`."""

    cpu: Tiling
    default: Tiling
    partitioned: Tiling | None

    def distinct(self) -> set[Tiling]:
        """Return the tilings without duplicates."""
        return {each for each in self if each is not None}

    def choose(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Apply a function of a tiling and the operands, with the tiling of the platform."""
        if len(self.distinct()) == 1:
            return function(self.default, *operands)
        branches = {
            name: each and functools.partial(function, each)
            for name, each in self._asdict().items()
        }
        return platform_dependent(*operands, **branches)


def tilings(
    query: jax.Array, key: jax.Array, local_mask: LocalMask, *, allow_per_head: bool
) -> TilingPerPlatform:
    """Choose the tilings of one attention.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim].
        local_mask: causal, window.
        allow_per_head: whether examples and heads may be computed one at a time.
    """
    queries, keys = query.shape[1], key.shape[1]
    if not sizes_are_known((queries, keys)):
        one = Tiling((Tile(0, queries, 0, keys),))
        return TilingPerPlatform(cpu=one, default=one, partitioned=None)
    local = local_mask != LocalMask()
    rows = _TILE_QUERIES if local and queries < _LONG_SEQUENCE else _LARGE_TILE_QUERIES
    several = local or keys >= _MANY_KEYS
    count = max(1, min(_MAX_TILES, queries // rows)) if several else 1
    bounds = itertools.pairwise(queries * index // count for index in range(count + 1))
    tiles = tuple(Tile(*each, *local_mask.key_range(*each, keys)) for each in bounds)
    many = _RECOMPUTED_WEIGHTS if query.dtype.itemsize >= 4 else _RECOMPUTED_WEIGHTS_16_BIT
    # An array that is partitioned by its type (explicit sharding) cannot be sliced by a loop.
    whole = not any(axis for x in (query, key) for axis in jax.typeof(x).sharding.spec)
    per_head = allow_per_head and whole and queries * keys >= many
    return TilingPerPlatform(
        cpu=Tiling(tiles, per_head),
        default=Tiling((Tile(0, queries, 0, keys),)),
        # A loop over examples or heads would gather the axis that is partitioned over devices.
        partitioned=Tiling(tiles) if per_head else None,
    )


class HeadGroup(NamedTuple):
    """One example of the batch, and one key-value head with the query heads that share it."""

    example: jax.Array
    kv_head: jax.Array
    num_kv_heads: int

    def slice(self, x: jax.Array, *, heads_axis: int) -> jax.Array:
        """Slice [batch, ...] to this example and these heads; axes of size 1 broadcast."""
        count = max(1, x.shape[heads_axis] // self.num_kv_heads)
        start = self.kv_head * count if x.shape[heads_axis] > 1 else 0
        example = lax.dynamic_slice_in_dim(x, self.example if len(x) > 1 else 0, 1)  # [1, ...]
        return lax.dynamic_slice_in_dim(example, start, count, heads_axis)


def map_head_groups(function: Callable[[HeadGroup], Any], batch: int, num_kv_heads: int) -> Any:
    """Apply a function to one head group after the other.

    Args:
        function: returns a pytree of arrays [1, ...].
        batch: number of examples.
        num_kv_heads: number of key-value heads.

    Returns:
        The pytree, of arrays [batch, kv_heads, ...].
    """

    def one(index: jax.Array) -> Any:
        return function(HeadGroup(index // num_kv_heads, index % num_kv_heads, num_kv_heads))

    results = lax.map(one, jnp.arange(batch * num_kv_heads))  # [batch * kv_heads, 1, ...]
    return jax.tree.map(lambda x: x.reshape(batch, num_kv_heads, *x.shape[2:]), results)


def merge_kv_heads(x: jax.Array, *, heads_axis: int) -> jax.Array:
    """Merge the second axis of [batch, kv_heads, ...] into the axis of heads of the result."""
    moved = jnp.moveaxis(x, 1, heads_axis)  # [..., kv_heads, heads per kv_head, ...]
    return moved.reshape(*moved.shape[:heads_axis], -1, *moved.shape[heads_axis + 2 :])
