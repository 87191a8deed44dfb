"""Batches on a device mesh, of which each process makes only its own rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnets.checks import check_source
from jaxnets.core import Batch, BatchSource
from jaxnets.data.batches.rows import check_divisible, part_of
from jaxnets.data.batches.wrapping import AroundSource
from jaxnets.training.sharding import batch_partition, leading_part, mesh_axes


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedBatches(AroundSource):
    """Batches of a source on a mesh; see `sharded_batches`.

    Attributes:
        source: makes the rows of this process.
        sharding: of every array.
        axis: of the rows.
        own_part: (index, count) of the rows of this process.
    """

    sharding: NamedSharding
    axis: int
    own_part: tuple[int, int]

    @property
    def num_shards(self) -> int:
        """Parts of the rows, of all devices."""
        names = mesh_axes(self.sharding.spec[self.axis])
        return math.prod(self.sharding.mesh.shape[name] for name in names)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from `first_step`: arrays of the whole batch on the mesh."""
        for batch in self.source(first_step):
            yield {name: self._place(np.asarray(array)) for name, array in batch.items()}

    def _place(self, own: np.ndarray) -> jax.Array:
        index, count = self.own_part
        check_divisible(own.shape[self.axis] * count, self.num_shards)
        first = index * own.shape[self.axis]
        shape = list(own.shape)
        shape[self.axis] *= count

        def rows(where: tuple[slice, ...] | None) -> np.ndarray:
            assert where is not None  # as for every array with an axis
            start, stop, _ = where[self.axis].indices(shape[self.axis])
            local = slice(start - first, stop - first)
            return own[(*where[: self.axis], local, *where[self.axis + 1 :])]

        mesh, spec = self.sharding.mesh, leading_part(self.sharding.spec, own.ndim)
        return jax.make_array_from_callback(tuple(shape), NamedSharding(mesh, spec), rows)


def sharded_batches(
    source: BatchSource,
    mesh: Mesh,
    *,
    batch_spec: PartitionSpec | None = None,
    part: tuple[int, int] | None = None,
) -> ShardedBatches:
    """Place batches on a mesh; with several processes each makes only its own rows.

    The batches are those of the source, whatever the number of processes: together they see every
    example as often as one process would, and the curve of a run stays the same. Put `prefetch`
    around the result with `device_put=lambda batch: batch`.

    Args:
        source: with whole batches. The sources of this library, and others with a method
            `part(index, count)` that returns the source of these rows, make only the rows of this
            process; others make whole batches, which are cut.
        mesh: as for `sharded_step`.
        batch_spec: as for `sharded_step`: the axis of the rows is the first that it splits.
        part: (index, count), if the batches of `source` have only these rows: the `index`-th of
            `count` equal, consecutive parts. Such a source of your own reads
            `process_part(mesh)` for it.

    Returns:
        A source for `sharded_step` and for compiled evaluation steps, {name: array of the whole
        batch, split over the mesh}.

    Raises:
        ValueError: `part` is not that of this process, the batch size is not divisible, or the
            spec splits no axis.
        TypeError: `source` is no source, such as a list of batches.

    Example:
        >>> from jaxnets.data.batches.sources import index_batches
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> source = sharded_batches(index_batches(8, 4, seed=0), mesh)
        >>> next(source(0))["indices"].sharding.spec == PartitionSpec("data")
        True
    """
    check_source(source)
    spec = batch_partition(mesh) if batch_spec is None else batch_spec
    axis = next((axis for axis, names in enumerate(spec) if names), None)
    if axis is None:
        raise ValueError(f"batch_spec={spec} splits no axis; name the mesh axis of the rows in it")
    own = process_part(mesh, batch_spec=spec)
    if part is not None and tuple(part) != own:
        raise ValueError(
            f"part={part} are not the rows of this process, which has part {own[0]} of {own[1]}; "
            "give process_part(mesh)"
        )
    if part is None:
        source = part_of(source, *own)
    return ShardedBatches(source, NamedSharding(mesh, spec), axis, own)


def process_part(mesh: Mesh, *, batch_spec: PartitionSpec | None = None) -> tuple[int, int]:
    """Return which rows of every batch belong to the devices of this process.

    Args:
        mesh: as for `sharded_step`.
        batch_spec: as for `sharded_step`.

    Returns:
        (index, count): the rows are the `index`-th of `count` equal, consecutive parts. (0, 1), all
        rows, where this process has no such part of its own: with one process, where only other
        axes of the mesh lie across processes, and where its devices are scattered over the axis.

    Example:
        >>> process_part(jax.make_mesh((1,), ("data",)))
        (0, 1)
    """
    spec = batch_partition(mesh) if batch_spec is None else batch_spec
    names = mesh_axes(next((names for names in spec if names), ()))
    shards = math.prod(mesh.shape[name] for name in names)
    rows = NamedSharding(mesh, PartitionSpec(names))
    places = rows.addressable_devices_indices_map((shards,)).values()
    own = sorted({index[0].indices(shards)[0] for index in places if index})
    consecutive = own and own == list(range(own[0], own[0] + len(own)))
    if not consecutive or shards % len(own) or own[0] % len(own):
        return 0, 1
    return own[0] // len(own), shards // len(own)
