"""Recurrence: the scan over time, its cells, and linear recurrences parallel in time."""

from jaxnets.functional.recurrence.associative import (
    MinGRUCell,
    MinLSTMCell,
    ParallelCell,
    linear_recurrence,
)
from jaxnets.functional.recurrence.cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.functional.recurrence.scan import (
    Carry,
    Cell,
    Gates,
    Initializer,
    Products,
    Tree,
    Weights,
    mask_padding,
    recurrent_scan,
    split_gates,
)

__all__ = [
    "Carry",
    "Cell",
    "ElmanCell",
    "GRUCell",
    "Gates",
    "Initializer",
    "LSTMCell",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "ParallelCell",
    "Products",
    "Tree",
    "Weights",
    "linear_recurrence",
    "mask_padding",
    "recurrent_scan",
    "split_gates",
]
