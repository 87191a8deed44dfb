"""Checks of the arrays of a batch, at the entry of every objective."""

from __future__ import annotations

from jaxnets.core import Batch


def check_batch(batch: Batch, names: set[str]) -> None:
    """Refuse a batch that lacks an array, or whose arrays differ in their number of examples.

    Args:
        batch: {name: array [batch, ...]}.
        names: the arrays that it must have.

    Raises:
        ValueError: the missing names, those of arrays without an axis, or the number of examples
            of each array.
    """
    missing = names - set(batch)
    if missing:
        raise ValueError(
            f"the batch has {sorted(batch)} and lacks {sorted(missing)}; "
            f"name its arrays {sorted(names)} and optionally 'weights'"
        )
    scalars = sorted(name for name, array in batch.items() if not array.shape)
    if scalars:
        raise ValueError(
            f"{scalars} of the batch have no axis of examples; give arrays [batch, ...]"
        )
    sizes = {name: array.shape[0] for name, array in batch.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the arrays of the batch differ in their number of examples: {sizes}")
