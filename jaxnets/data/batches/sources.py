"""Batch sources that are pure functions of (seed, step), so that any run resumes exactly.

A source maps the first step to an iterator over the batches from that step on. The order of the
examples is a function of the step, never the state of an iterator: batch `s` is the same whether
the run started at step 0 or resumed at `s`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from jaxnets.checks import check_first_step, check_sizes, check_source
from jaxnets.core import Batch, BatchSource, is_endless
from jaxnets.data.arrays import Arrays, check_arrays, check_seed, pad_arrays, random_order
from jaxnets.data.batches.rows import WHOLE, Rows, part_of
from jaxnets.data.batches.wrapping import AroundSource


@dataclasses.dataclass(frozen=True)
class IndexBatches:
    """Endless batches of example indices, shuffled in each epoch; see `index_batches`."""

    endless: ClassVar[bool] = True

    num_examples: int
    batch_size: int
    seed: int
    rows: Rows = WHOLE

    def __post_init__(self) -> None:
        check_sizes(batch_size=self.batch_size)
        if self.batch_size > self.num_examples:
            raise ValueError(
                f"batch size {self.batch_size} is larger than the {self.num_examples} examples; "
                f"use a batch size of at most {self.num_examples}"
            )
        check_seed(self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch; the remaining `num_examples % batch_size` examples are dropped."""
        return self.num_examples // self.batch_size

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`: {"indices": int32 [batch]}."""
        check_first_step(first_step)
        first_epoch, position = divmod(first_step, self.steps_per_epoch)
        rows = self.rows.of(self.batch_size)
        for epoch in itertools.count(first_epoch):
            order = random_order(self.num_examples, self.seed, epoch).astype(np.int32)
            for step in range(position, self.steps_per_epoch):
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield {"indices": batch[rows]}
            position = 0

    def part(self, index: int, count: int) -> IndexBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, rows=self.rows.part(index, count, self.batch_size))


@dataclasses.dataclass(frozen=True, eq=False)
class ShuffledBatches:
    """Endless shuffled batches of arrays in memory; see `shuffled_batches`."""

    endless: ClassVar[bool] = True

    data: Arrays
    order: IndexBatches

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        return self.order.steps_per_epoch

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`: {name: array [batch, ...]}."""
        for batch in self.order(first_step):
            indices = batch["indices"]
            yield {name: np.take(array, indices, axis=0) for name, array in self.data.items()}

    def part(self, index: int, count: int) -> ShuffledBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, order=self.order.part(index, count))


@dataclasses.dataclass(frozen=True, eq=False)
class EpochBatches:
    """Batches with the number of their epoch; see `with_epochs`."""

    endless: ClassVar[bool] = True

    source: IndexBatches | ShuffledBatches

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        return self.source.steps_per_epoch

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate endlessly from `first_step`: the batches of the source with "epochs"."""
        for step, batch in enumerate(self.source(first_step), first_step):
            size = len(next(iter(batch.values())))
            yield {**batch, "epochs": np.full(size, step // self.steps_per_epoch, np.int32)}

    def part(self, index: int, count: int) -> EpochBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return EpochBatches(self.source.part(index, count))


@dataclasses.dataclass(frozen=True, eq=False)
class SequentialBatches:
    """One pass in order, the last batch padded; see `sequential_batches`."""

    data: Arrays
    batch_size: int
    rows: Rows = WHOLE

    @property
    def num_examples(self) -> int:
        """Examples in the pass, without padding."""
        return len(next(iter(self.data.values())))

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from batch `first_step` to the last: arrays with "weights" [batch]."""
        check_first_step(first_step)
        rows = self.rows.of(self.batch_size)
        for start in range(first_step * self.batch_size, self.num_examples, self.batch_size):
            first, stop = start + rows.start, start + rows.stop
            batch = {name: array[first:stop] for name, array in self.data.items()}
            yield pad_arrays(batch, rows.stop - rows.start)

    def part(self, index: int, count: int) -> SequentialBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return dataclasses.replace(self, rows=self.rows.part(index, count, self.batch_size))


@dataclasses.dataclass(frozen=True, eq=False)
class MemberBatches:
    """Batches of several sources, stacked; see `member_batches`."""

    sources: tuple[BatchSource, ...]

    @property
    def endless(self) -> bool:
        """Whether none of the sources ends."""
        return all(map(is_endless, self.sources))

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from `first_step`: {name: array [members, batch, ...]}."""
        for batches in zip(*(source(first_step) for source in self.sources), strict=False):
            yield {name: np.stack([b[name] for b in batches]) for name in batches[0]}

    def part(self, index: int, count: int) -> MemberBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return MemberBatches(tuple(part_of(source, index, count) for source in self.sources))


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkedBatches(AroundSource):
    """Batches of several steps, stacked on a new leading axis; see `chunked`.

    Attributes:
        source: the source of the batches.
        num_steps: steps per stacked batch.
    """

    num_steps: int

    @property
    def steps_per_batch(self) -> int:
        """Steps per stacked batch."""
        return self.num_steps

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate over chunks; the first starts at `first_step`, which need not be a multiple."""
        batches = iter(self.source(first_step))
        while chunk := list(itertools.islice(batches, self.num_steps)):
            if len(chunk) < self.num_steps:
                raise ValueError(
                    f"the source ended after {len(chunk)} batches of a chunk of "
                    f"{self.num_steps}; use an endless source or a num_steps that divides it"
                )
            yield {name: np.stack([batch[name] for batch in chunk]) for name in chunk[0]}

    def part(self, index: int, count: int) -> ChunkedBatches:
        """Return the source of one of `count` equal parts of every batch, as `sharded_batches`."""
        return ChunkedBatches(part_of(self.source, index, count), self.num_steps)


def index_batches(num_examples: int, batch_size: int, *, seed: int) -> IndexBatches:
    """Yield the example indices of `shuffled_batches`, for data that is on the device.

    Args:
        num_examples: examples in the dataset.
        batch_size: examples per batch.
        seed: non-negative; the same seed gives the order of `shuffled_batches`.

    Returns:
        A source of {"indices": int32 [batch]}, with the property `steps_per_epoch`.

    Raises:
        ValueError: a batch size below 1 or above `num_examples`, a negative seed.

    Example:
        >>> source = index_batches(5, 2, seed=0)
        >>> [batch["indices"].shape for batch, _ in zip(source(0), range(3))]
        [(2,), (2,), (2,)]
    """
    return IndexBatches(num_examples, batch_size, seed)


def shuffled_batches(
    data: Mapping[str, np.ndarray], batch_size: int, *, seed: int
) -> ShuffledBatches:
    """Yield endless shuffled batches, for training.

    Step s belongs to epoch s // steps_per_epoch, whose permutation is a pure function of the seed
    and the epoch. The remainder of an epoch (examples % batch_size) is dropped, other examples in
    each epoch, so every batch is full. Corresponds to `torch.utils.data.DataLoader` with
    `shuffle=True, drop_last=True`, but the order is a function of the step.

    Args:
        data: {name: array [examples, ...]}, not converted (images may stay uint8).
        batch_size: examples per batch.
        seed: non-negative.

    Returns:
        A source of {name: array [batch, ...]}, with the property `steps_per_epoch`.

    Raises:
        ValueError: data that `check_arrays` refuses, a batch size below 1 or above the number of
            examples, a negative seed.

    Example:
        >>> source = shuffled_batches({"inputs": np.arange(6.0)}, 3, seed=0)
        >>> epoch = [batch["inputs"] for batch, _ in zip(source(0), range(2))]
        >>> sorted(np.concatenate(epoch).tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    arrays = check_arrays(data)
    num_examples = len(next(iter(arrays.values())))
    return ShuffledBatches(arrays, IndexBatches(num_examples, batch_size, seed))


def with_epochs(source: IndexBatches | ShuffledBatches) -> EpochBatches:
    """Add the epoch to each batch, for augmentation that depends on it (`alternating_flip`).

    Args:
        source: made by `index_batches` or `shuffled_batches`.

    Returns:
        A source of the same batches with "epochs": int32 [batch], the epoch counted from 0.

    Example:
        >>> source = with_epochs(index_batches(4, 2, seed=0))
        >>> [batch["epochs"].tolist() for batch, _ in zip(source(1), range(2))]
        [[0, 0], [1, 1]]
    """
    return EpochBatches(source)


def sequential_batches(data: Mapping[str, np.ndarray], batch_size: int) -> SequentialBatches:
    """Yield every example once and in order, for evaluation.

    The last batch is padded with examples of weight 0, and every batch has "weights", so one
    compiled program serves all batches and weighted sums are exact.

    Args:
        data: {name: array [examples, ...]}.
        batch_size: examples per batch.

    Returns:
        A source of {name: array [batch, ...]} with "weights" float32 [batch]. It is finite:
        `source(0)` is the whole pass.

    Raises:
        ValueError: data that `check_arrays` refuses, or a batch size below 1.

    Example:
        >>> source = sequential_batches({"inputs": np.arange(3.0)}, 2)
        >>> [batch["weights"].tolist() for batch in source(0)]
        [[1.0, 1.0], [1.0, 0.0]]
    """
    check_sizes(batch_size=batch_size)
    return SequentialBatches(check_arrays(data), batch_size)


def member_batches(sources: Sequence[BatchSource]) -> MemberBatches:
    """Give every member of a population its own batches, each from its own source.

    Args:
        sources: one per member, with batches of equal shapes.

    Returns:
        A source of {name: array [members, batch, ...]}, for `population_step` with
        `shared_batch=False`. It ends with the shortest source.

    Raises:
        ValueError: there is no source.
        TypeError: one is no source, such as a list of batches.

    Example:
        >>> source = member_batches([index_batches(8, 2, seed=s) for s in range(3)])
        >>> next(source(0))["indices"].shape
        (3, 2)
    """
    if not sources:
        raise ValueError("sources is empty; give one source per member")
    for source in sources:
        check_source(source)
    return MemberBatches(tuple(sources))


def chunked(source: BatchSource, num_steps: int) -> ChunkedBatches:
    """Stack the batches of several steps, for `scan_steps`.

    Args:
        source: any batch source; put `prefetch` around the result, not inside it.
        num_steps: steps per chunk.

    Returns:
        A source of {name: array [num_steps, batch, ...]} with `steps_per_batch` = num_steps. The
        first chunk starts at the first step, which need not be a multiple of num_steps.

    Raises:
        ValueError: `num_steps` is no positive integer; while iterating, a source that ends within
            a chunk.
        TypeError: `source` is no source, such as a list of batches.

    Example:
        >>> source = chunked(index_batches(8, 2, seed=0), 3)
        >>> next(source(1))["indices"].shape, source.steps_per_batch
        ((3, 2), 3)
    """
    check_source(source)
    check_sizes(num_steps=num_steps)
    return ChunkedBatches(source, num_steps)
