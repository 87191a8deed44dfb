"""What JAX's internals need, in one place: platforms, layouts, chunks of a batch."""

from jaxnets.functional.lowering.chunks import map_chunks, sum_over_chunks
from jaxnets.functional.lowering.layout import (
    are_few,
    computed_once,
    laid_out,
    turned,
    turned_where_few,
)
from jaxnets.functional.lowering.platforms import by_platform

__all__ = [
    "are_few",
    "by_platform",
    "computed_once",
    "laid_out",
    "map_chunks",
    "sum_over_chunks",
    "turned",
    "turned_where_few",
]
