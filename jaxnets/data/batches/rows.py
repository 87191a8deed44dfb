"""The rows of every batch that one process of several makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxnets.core import Batch, BatchSource, steps_per_batch
from jaxnets.data.batches.wrapping import AroundSource


@dataclasses.dataclass(frozen=True)
class Rows:
    """One of `count` equal, consecutive parts of the rows of every batch."""

    index: int = 0
    count: int = 1

    def part(self, index: int, count: int, batch_size: int) -> Rows:
        """Return a part of these rows.

        Raises:
            ValueError: there is no such part, or the batch size is not divisible.
        """
        if not 0 <= index < count:
            raise ValueError(f"part {index} of {count} does not exist; give 0 to {count - 1}")
        rows = Rows(self.index * count + index, self.count * count)
        check_divisible(batch_size, rows.count)
        return rows

    def of(self, batch_size: int) -> slice:
        """Return the rows of a batch of this size."""
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


#: All rows.
WHOLE = Rows()


@dataclasses.dataclass(frozen=True, eq=False)
class _PartOfWhole(AroundSource):
    """A part of the batches of a source that can only make whole ones."""

    rows: Rows

    def __call__(self, first_step: int) -> Iterator[Batch]:
        for batch in self.source(first_step):
            size = len(jax.tree.leaves(dict(batch))[0])
            rows = self.rows.of(check_divisible(size, self.rows.count))
            yield {name: np.asarray(array)[rows] for name, array in batch.items()}


def part_of(source: BatchSource, index: int, count: int) -> Any:
    """Return the source of one of `count` equal parts of the rows of every batch.

    Args:
        source: with batches of one step. If it has a method `part`, such as those of this library,
            only these rows are made; otherwise whole batches are made and cut.
        index: of the part, from 0.
        count: of the parts.

    Raises:
        ValueError: there is no such part, or a batch size is not divisible; of a source that makes
            whole batches, while iterating.
    """
    if count == 1:
        return source
    part: Callable[[int, int], Any] | None = getattr(source, "part", None)
    if part is not None:
        return part(index, count)
    if steps_per_batch(source) > 1:
        raise ValueError(
            f"{type(source).__name__} has several steps in a batch and no method part; give it "
            "one, or put data.chunked around a source of single steps"
        )
    return _PartOfWhole(source, WHOLE.part(index, count, count))


def check_divisible(batch_size: int, count: int) -> int:
    """Return a batch size that is divisible into equal parts.

    Raises:
        ValueError: it is not.
    """
    if batch_size % count:
        raise ValueError(
            f"batch size {batch_size} is not divisible into {count} parts; give a multiple of "
            f"{count}"
        )
    return batch_size
