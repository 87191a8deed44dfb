"""Arrays that a step holds, such as frozen parameters, as arguments of the compiled program.

JAX 0.10 writes the arrays of a closure into the program as constants: 4 MB of parameters become
8 MB of program text, and are compiled again with every change. A step that holds arrays is a pytree
instead, and executors take it apart with `split_arrays`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def split_arrays(
    function: Function,
) -> tuple[list[Any], Callable[[Sequence[Any]], Function]]:
    """Split a callable pytree into its arrays and a function that puts arrays back.

    Args:
        function: a pytree, such as a step of `make_train_step`. A plain function is one without
            arrays; those of its closure are not found.

    Returns:
        The arrays on their device, and the function from arrays in that order to the callable.

    Example:
        >>> arrays, with_arrays = split_arrays(jax.tree_util.Partial(np.add, np.ones(2)))
        >>> with_arrays([2 * arrays[0]])(1).tolist()
        [3.0, 3.0]
    """
    leaves, structure = jax.tree.flatten(function)
    places = [
        place for place, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))
    ]
    held = jax.device_put([leaves[place] for place in places])  # once, not in every call
    for place in places:
        leaves[place] = None

    def with_arrays(arrays: Sequence[Any]) -> Function:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        rebuilt: Function = jax.tree.unflatten(structure, filled)
        return rebuilt

    return held, with_arrays
