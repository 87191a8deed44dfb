"""Grain pipelines for data that does not fit in memory, with exact resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from jaxnets.core import Batch
from jaxnets.data.arrays import check_seed


class RandomAccessSource(Protocol):
    """Anything with a length whose examples are read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class GrainBatches:
    """Batches of a Grain data set; see `grain_batches`.

    Attributes:
        dataset: an endless `grain.MapDataset` whose element s is the batch of step s.
        num_threads: threads that read ahead; 0 reads when asked.
    """

    dataset: Any
    num_threads: int

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Iterate from `first_step` on, without end and without reading what comes before."""
        import grain

        if first_step < 0:
            raise ValueError(f"first step {first_step} is negative; steps count from 0")
        options = grain.ReadOptions(
            num_threads=self.num_threads, prefetch_buffer_size=2 * self.num_threads
        )
        return iter(self.dataset[first_step:].to_iter_dataset(options))


def grain_batches(
    source: RandomAccessSource,
    batch_size: int,
    *,
    seed: int,
    transform: Callable[[Any, np.random.Generator], Batch] | None = None,
    num_threads: int = 0,
) -> GrainBatches:
    """Yield shuffled batches of examples that are read one by one, without end.

    Only the examples of a batch are in memory. Each epoch has its own order and holds every
    example once; a batch may span two epochs. The order, and the generators that `transform`
    gets, are pure functions of the seed and the position, so a run resumes at any step.

    Args:
        source: read by index; examples are dictionaries of arrays (or what `transform` takes).
        batch_size: examples per batch.
        seed: non-negative.
        transform: (example, generator) -> dictionary of arrays of equal shapes; decodes and
            augments. With threads it must be thread-safe.
        num_threads: threads that read and transform ahead; worth it for slow storage.

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
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is below 1; give at least 1")
    if num_threads < 0:
        raise ValueError(f"cannot read with {num_threads} threads; give 0 or more")
    check_seed(seed)
    # Grain adds the epoch to the seed: spread, or seed 1 would be seed 0 an epoch later.
    order_seed, transform_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    dataset = grain.MapDataset.source(source).shuffle(seed=order_seed)
    if transform is not None:
        dataset = dataset.random_map(transform, seed=transform_seed)
    return GrainBatches(dataset.repeat().batch(batch_size), num_threads)
