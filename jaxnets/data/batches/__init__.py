"""Batch sources: pure functions of seed and step."""

from jaxnets.data.batches.bucketing import bucketed_batches, bucketed_pass
from jaxnets.data.batches.grain import grain_batches
from jaxnets.data.batches.prefetching import prefetch
from jaxnets.data.batches.sharding import process_part, sharded_batches
from jaxnets.data.batches.sources import (
    chunked,
    index_batches,
    member_batches,
    sequential_batches,
    shuffled_batches,
    with_epochs,
)
from jaxnets.data.batches.windows import sequential_windows, token_streams, token_windows

__all__ = [
    "bucketed_batches",
    "bucketed_pass",
    "chunked",
    "grain_batches",
    "index_batches",
    "member_batches",
    "prefetch",
    "process_part",
    "sequential_batches",
    "sequential_windows",
    "sharded_batches",
    "shuffled_batches",
    "token_streams",
    "token_windows",
    "with_epochs",
]
