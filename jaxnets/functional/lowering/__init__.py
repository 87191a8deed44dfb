"""Control of lowering: a function for each platform, memory layout, chunks of a batch."""

from jaxnets.functional.lowering.chunks import map_chunks, sum_over_chunks
from jaxnets.functional.lowering.layout import (
    batch_innermost_if_few,
    is_few,
    materialize,
    row_major,
    swap_batch_and_channels,
)
from jaxnets.functional.lowering.platforms import platform_dependent, sizes_are_known

__all__ = [
    "batch_innermost_if_few",
    "is_few",
    "map_chunks",
    "materialize",
    "platform_dependent",
    "row_major",
    "sizes_are_known",
    "sum_over_chunks",
    "swap_batch_and_channels",
]
