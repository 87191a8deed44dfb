"""How attention is divided: in tiles of queries, each with the keys that it may see.

On CPU a tile is multiplied with those keys only, which spares nearly half of the products and of
the weights of causal attention, and most of them where a window is narrow; and the scores of a
tile are still in the cache when they become weights. Of long contexts each row of the batch and
each key head is computed by itself, and the weights are computed again for the gradient.
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
from jaxnets.functional.lowering.platforms import platform_dependent

# Fewer queries a tile make slower products; more tiles, longer programs. Where every query
# sees every key nothing is spared, and tiles pay only where the scores of all queries leave the
# cache.
_BLOCK, _LARGE_BLOCK, _LONG, _MOST_BLOCKS = 64, 128, 512, 8
_MANY_KEYS = 1024

# Weights of one head. To write down so many and read them again takes as long as to compute them
# again, of 16 bits, where exponentials count for more, a tenth less; of fewer, the products of one
# head at a time are too small.
_MANY_WEIGHTS, _MANY_NARROW_WEIGHTS = 1 << 20, 1 << 22


class Tile(NamedTuple):
    """Queries from `begin` up to `end`, and the keys from `first` up to `last` for them."""

    begin: int
    end: int
    first: int
    last: int

    def of_queries(self, x: jax.Array) -> jax.Array:
        """Take the part of [batch, queries, ...]."""
        return x[:, self.begin : self.end]

    def of_keys(self, x: jax.Array) -> jax.Array:
        """Take the part of [batch, keys, ...]."""
        return x[:, self.first : self.last]

    def of_scores(self, x: jax.Array) -> jax.Array:
        """Take the part of what broadcasts against [batch, heads, queries, keys]."""
        x = x if x.shape[2] == 1 else x[:, :, self.begin : self.end]
        return x if x.shape[3] == 1 else x[..., self.first : self.last]

    def among_keys(self, x: jax.Array, keys: int, axis: int) -> jax.Array:
        """Put a part of an array, whose axis of keys is given, into zeros."""
        outside = (self.first, keys - self.last)
        return jnp.pad(x, [outside if each == axis else (0, 0) for each in range(x.ndim)])

    def among_scores(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """Put a part into zeros; transposes `of_scores`."""
        rows = (self.begin, like.shape[2] - self.end) if like.shape[2] > 1 else (0, 0)
        columns = (self.first, like.shape[3] - self.last) if like.shape[3] > 1 else (0, 0)
        return jnp.pad(x, [(0, 0), (0, 0), rows, columns])


class Tiling(NamedTuple):
    """All queries in tiles.

    Attributes:
        tiles: whose queries follow each other.
        per_head: whether each row of the batch and each key head is computed by itself, in a loop,
            and the weights again for the gradient.
    """

    tiles: tuple[Tile, ...]
    per_head: bool = False


class TilingPerPlatform(NamedTuple):
    """One tiling for each kind of program, named as by `platform_dependent`."""

    cpu: Tiling
    default: Tiling
    partitioned: Tiling | None

    def distinct(self) -> set[Tiling]:
        """Return the plans."""
        return {each for each in self if each is not None}

    def choose(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Apply a function of a tiling and of the operands with the tiling of the platform."""
        if len(self.distinct()) == 1:
            return function(self.default, *operands)
        of_plans = {
            name: each and functools.partial(function, each)
            for name, each in self._asdict().items()
        }
        return platform_dependent(*operands, **of_plans)


def tilings(
    query: jax.Array, key: jax.Array, local_mask: LocalMask, *, divisible: bool
) -> TilingPerPlatform:
    """Divide attention for all platforms.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, kv_heads, head_dim].
        local_mask: which of the keys a query may see.
        divisible: whether rows and heads may be computed by themselves, in a loop.
    """
    queries, keys = query.shape[1], key.shape[1]
    narrow = local_mask != LocalMask()
    rows = _BLOCK if narrow and queries < _LONG else _LARGE_BLOCK
    several = narrow or keys >= _MANY_KEYS
    count = max(1, min(_MOST_BLOCKS, queries // rows)) if several else 1
    bounds = itertools.pairwise(queries * number // count for number in range(count + 1))
    tiles = tuple(Tile(*each, *local_mask.keys_of(*each, keys)) for each in bounds)
    many = _MANY_WEIGHTS if query.dtype.itemsize >= 4 else _MANY_NARROW_WEIGHTS
    # What is split over devices by its type cannot be taken apart.
    whole = not any(axis for x in (query, key) for axis in jax.typeof(x).sharding.spec)
    per_head = divisible and whole and queries * keys >= many
    return TilingPerPlatform(
        cpu=Tiling(tiles, per_head),
        default=Tiling((Tile(0, queries, 0, keys),)),
        # A loop over rows or heads would gather a batch or heads that are split over devices.
        partitioned=Tiling(tiles) if per_head else None,
    )


class Head(NamedTuple):
    """One row of the batch, and one key head with the heads that share it."""

    row: jax.Array
    group: jax.Array
    groups: int

    def of(self, x: jax.Array, axis: int) -> jax.Array:
        """Take the part of an array, whose axis of heads is given; axes of 1 stay."""
        count = max(1, x.shape[axis] // self.groups)
        start = self.group * count if x.shape[axis] > 1 else 0
        row = lax.dynamic_slice_in_dim(x, self.row if len(x) > 1 else 0, 1)
        return lax.dynamic_slice_in_dim(row, start, count, axis)


def of_each_head(function: Callable[[Head], Any], batch: int, groups: int) -> Any:
    """Apply a function to one head after the other.

    Args:
        function: returns a tree of arrays [1, ...].
        batch: rows.
        groups: key heads.

    Returns:
        The tree, of arrays [batch, groups, ...].
    """

    def one(index: jax.Array) -> Any:
        return function(Head(index // groups, index % groups, groups))

    found = lax.map(one, jnp.arange(batch * groups))
    return jax.tree.map(lambda x: x.reshape(batch, groups, *x.shape[2:]), found)


def joined(x: jax.Array, axis: int) -> jax.Array:
    """Put the groups of [batch, groups, ...] in front of the heads on an axis of the rest."""
    moved = jnp.moveaxis(x, 1, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
