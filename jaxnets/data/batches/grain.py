"""Grain pipelines for data larger than memory, with exact resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import numpy as np

from jaxnets.checks import check_first_step, check_sizes
from jaxnets.core import Batch
from jaxnets.data.arrays import check_seed
from jaxnets.data.batches.rows import WHOLE, Rows


class RandomAccessSource(Protocol):
    """A dataset with a length and random access by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class GrainBatches:
    """Batches of a Grain dataset; see `grain_batches`.

    Attributes:
        examples: an endless `grain.MapDataset` of examples, in the order of the steps.
        batch_size: examples per batch.
        num_threads: threads that read ahead; 0 reads on demand.
        rows: of every batch that are made.
    """

    endless: ClassVar[bool] = True

    examples: Any
    batch_size: int
    num_threads: int
    rows: Rows = WHOLE

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`; earlier batches are not read."""
        import grain

        check_first_step(first_step)
        options = grain.ReadOptions(
            num_threads=self.num_threads, prefetch_buffer_size=2 * self.num_threads
        )
        examples, rows = self.examples, self.rows.of(self.batch_size)
        if self.rows != WHOLE:
            examples = grain.MapDataset.source(_OwnRows(examples, self.batch_size, rows))
        batches = examples.batch(rows.stop - rows.start)
        return iter(batches[first_step:].to_iter_dataset(options))

    def part(self, index: int, count: int) -> GrainBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`.

        Only the examples of these rows are read.
        """
        return dataclasses.replace(self, rows=self.rows.part(index, count, self.batch_size))


@dataclasses.dataclass(frozen=True)
class _OwnRows:
    """The examples of some rows of every batch, one after the other."""

    examples: Any
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return len(self.examples) // self.batch_size * (self.rows.stop - self.rows.start)

    def __getitem__(self, index: int) -> Any:
        step, row = divmod(index, self.rows.stop - self.rows.start)
        return self.examples[step * self.batch_size + self.rows.start + row]


def grain_batches(
    source: RandomAccessSource,
    batch_size: int,
    *,
    seed: int,
    transform: Callable[[Any, np.random.Generator], Batch] | None = None,
    num_threads: int = 0,
) -> GrainBatches:
    """Yield endless shuffled batches of examples that are read by index.

    Only the examples of a batch are in memory. Each epoch has its own order and contains every
    example once; a batch may span two epochs. The order and the generators passed to `transform`
    are pure functions of the seed and the position, so a run resumes at any step.

    Args:
        source: random access to examples, dictionaries of arrays (or what `transform` takes).
        batch_size: examples per batch.
        seed: non-negative.
        transform: (example, generator) -> dictionary of arrays of equal shapes; decodes and
            augments. With threads it must be thread-safe.
        num_threads: threads that read and transform ahead, for slow storage.

    Returns:
        A source of {name: array [batch, ...]}.

    Raises:
        ValueError: an empty source, a batch size below 1, a negative seed or number of threads.
        ImportError: Grain is not installed.

    Example:
        >>> source = grain_batches([{"inputs": np.arange(3)}] * 10, 4, seed=0)
        >>> next(source(7))["inputs"].shape
        (4, 3)
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("this pipeline needs Grain; run `pip install grain`") from error
    if len(source) == 0:
        raise ValueError("the source holds no examples; give at least one")
    check_sizes(batch_size=batch_size)
    if num_threads < 0:
        raise ValueError(f"cannot read with {num_threads} threads; give 0 or more")
    check_seed(seed)
    # Grain adds the epoch to the seed. Without hashing, seed 1 would be seed 0 an epoch later.
    order_seed, transform_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    dataset = grain.MapDataset.source(source).shuffle(seed=order_seed)
    if transform is not None:
        dataset = dataset.random_map(transform, seed=transform_seed)
    return GrainBatches(dataset.repeat(), batch_size, num_threads)
