"""Pure array functions with a per-platform lowering: convolution, linear maps, pooling."""

from jaxnets.convolution import convolution
from jaxnets.linear import linear
from jaxnets.pooling import average_pool, global_average_pool, max_pool
from jaxnets.spatial import Extent, Padding

__all__ = [
    "Extent",
    "Padding",
    "average_pool",
    "convolution",
    "global_average_pool",
    "linear",
    "max_pool",
]
