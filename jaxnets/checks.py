"""Checks of arguments that name the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import numpy as np


def check_first_step(first_step: int) -> None:
    """Refuse a negative first step.

    Raises:
        ValueError: the step.
    """
    if first_step < 0:
        raise ValueError(f"first step {first_step} is negative; steps count from 0")


def check_same_shape(**arrays: Any) -> None:
    """Refuse arrays of different shapes.

    Args:
        arrays: {name: array}; broadcasting is not allowed.

    Raises:
        ValueError: the names and shapes.

    Example:
        >>> import numpy as np
        >>> check_same_shape(predictions=np.ones((4, 1)), labels=np.ones(4))
        Traceback (most recent call last):
        ...
        ValueError: predictions (4, 1), labels (4,) differ in shape; give all the same shape
    """
    try:
        chex.assert_equal_shape(list(arrays.values()))
    except AssertionError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{shapes} differ in shape; give all the same shape") from None


def check_rank(inputs: Any, caller: object, *, layouts: Sequence[str]) -> None:
    """Refuse inputs whose number of axes fits none of the layouts.

    Args:
        inputs: the array that the caller got.
        caller: a model, whose class is named in the message, or the name of a function.
        layouts: such as "[batch, height, width, channels]"; each comma adds an axis.

    Raises:
        ValueError: the shape, the layouts that fit, and what to do.
    """
    if inputs.ndim not in [layout.count(",") + 1 for layout in layouts]:
        name = caller if isinstance(caller, str) else type(caller).__name__
        raise ValueError(
            f"{name} got inputs of shape {inputs.shape}; give "
            f"{' or '.join(layouts)}. Add a missing batch axis with inputs[None], a missing "
            "channel axis with inputs[..., None]"
        )


#: Layouts of a network whose kernels take their rank from the input.
IMAGES_OR_AUDIO = ("[batch, height, width, channels]", "[batch, time, channels]")
IMAGES = IMAGES_OR_AUDIO[:1]


def check_rate(rate: float) -> None:
    """Refuse a dropout rate outside of [0, 1).

    Raises:
        ValueError: the rate is not a probability below 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate {rate} must be at least 0 and below 1")


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Refuse sizes that are not positive integers.

    Args:
        sizes: {name: a size or several}, Python's or NumPy's integers.

    Raises:
        ValueError: the name and value of the first bad one.

    Example:
        >>> check_sizes(strides=(2, np.int64(1)), batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: batch_size=0 must be a positive integer
    """
    for name, size in sizes.items():
        values = size if isinstance(size, Sequence) else (size,)
        if not all(isinstance(value, (int, np.integer)) and value > 0 for value in values):
            kind = "made of positive integers" if values is size else "a positive integer"
            raise ValueError(f"{name}={size} must be {kind}")
