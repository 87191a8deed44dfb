"""Datasets as dictionaries of NumPy arrays with a common leading axis: checks, padding, splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxnets.core import Batch

Arrays: TypeAlias = dict[str, np.ndarray]  # {name: [examples, ...]}

_BLOCK_ELEMENTS = 1 << 24  # checked at a time, which bounds the memory of a check


def check_arrays(data: Mapping[str, np.ndarray], *, num_classes: int | None = None) -> Arrays:
    """Check that arrays can be used for training.

    Args:
        data: {name: array [examples, ...]}; NumPy arrays are not copied.
        num_classes: if given, `data["labels"]` must hold integers in [0, num_classes).

    Returns:
        The same arrays, as NumPy arrays.

    Raises:
        ValueError: no arrays, no examples, unequal lengths, an array of objects or text, a
            non-finite value, weights below 0, labels that are not integers or out of range. The
            message gives the array, the number of wrong values and the index of the first.

    Example:
        >>> check_arrays({"inputs": np.array([[1.0], [np.nan]])})
        Traceback (most recent call last):
        ...
        ValueError: 'inputs' holds 1 non-finite value, first nan at index (1, 0); drop or repair \
the examples
    """
    arrays = {name: np.asarray(array) for name, array in data.items()}
    if not arrays:
        raise ValueError("no arrays were given; pass for example {'inputs': ..., 'labels': ...}")
    for name, array in arrays.items():
        if array.dtype.kind in "OSUMm":
            raise ValueError(
                f"{name!r} has dtype {array.dtype}, which no device can hold; "
                "encode it as numbers of equal shape"
            )
        if array.ndim == 0:
            raise ValueError(f"{name!r} is a single value; give it a leading axis of examples")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arrays have unequal numbers of examples {lengths}; make them equal")
    if 0 in lengths.values():
        raise ValueError(f"arrays {list(arrays)} hold no examples; give at least one")
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact):
            _check_finite(name, array)
    if "weights" in arrays:
        _refuse("weights", arrays["weights"] < 0, arrays, "below 0; give 0 to ignore an example")
    if num_classes is not None:
        _check_labels(arrays, num_classes)
    return arrays


def _check_finite(name: str, array: np.ndarray) -> None:
    num_wrong, first = 0, None
    rows = max(1, _BLOCK_ELEMENTS // max(1, array[0].size))
    for start in range(0, len(array), rows):
        wrong = ~np.isfinite(array[start : start + rows])
        if wrong.any():
            num_wrong += int(np.count_nonzero(wrong))
            if first is None:
                row, *rest = np.unravel_index(np.argmax(wrong), wrong.shape)
                first = (start + int(row), *map(int, rest))
    if first is not None:
        values = "value" if num_wrong == 1 else "values"
        raise ValueError(
            f"{name!r} holds {num_wrong} non-finite {values}, first {array[first]} at index "
            f"{first}; drop or repair the examples"
        )


def _check_labels(arrays: Arrays, num_classes: int) -> None:
    if "labels" not in arrays:
        raise ValueError(f"no 'labels' among {list(arrays)}; add an integer array [examples]")
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels have dtype {labels.dtype}; give integer class indices")
    wrong = (labels < 0) | (labels >= num_classes)
    _refuse("labels", wrong, arrays, f"outside [0, {num_classes}); correct them or num_classes")


def _refuse(name: str, wrong: np.ndarray, arrays: Arrays, problem: str) -> None:
    if wrong.any():
        first = tuple(map(int, np.unravel_index(np.argmax(wrong), wrong.shape)))
        where, remedy = problem.split("; ")
        raise ValueError(
            f"{np.count_nonzero(wrong)} {name} are {where}, first {arrays[name][first]} at index "
            f"{first}; {remedy}"
        )


def pad_batch(batch: Batch, batch_size: int) -> Arrays:
    """Pad a short batch with examples of weight 0, so that nothing recompiles.

    Args:
        batch: {name: array [examples, ...]} with at most `batch_size` examples, with or without
            "weights".
        batch_size: examples after padding.

    Returns:
        The arrays [batch_size, ...], padded with zeros, and "weights" float32 [batch_size]: the
        given ones (default 1) for the examples and 0 for the padding.

    Raises:
        ValueError: the batch holds more than `batch_size` examples.

    Example:
        >>> pad_batch({"labels": np.array([7, 9])}, 3)
        {'labels': array([7, 9, 0]), 'weights': array([1., 1., 0.], dtype=float32)}
    """
    return pad_arrays(check_arrays(batch), batch_size)


def pad_arrays(arrays: Arrays, batch_size: int) -> Arrays:
    """Pad arrays that are checked already, see `pad_batch`.

    Args:
        arrays: [examples, ...].
        batch_size: number of examples afterwards.

    Returns:
        The arrays and float32 "weights", [batch_size], 0 for padding.

    Raises:
        ValueError: more examples than `batch_size`.
    """
    num_examples = len(next(iter(arrays.values())))
    if num_examples > batch_size:
        raise ValueError(
            f"a batch of {num_examples} examples does not fit batch size {batch_size}; "
            "raise batch_size or split the batch"
        )
    weights = arrays.get("weights", np.ones(num_examples))
    arrays = {**arrays, "weights": weights.astype(np.float32, copy=False)}
    missing = batch_size - num_examples
    if missing == 0:
        return arrays
    return {
        name: np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
        for name, array in arrays.items()
    }


def as_int32(values: npt.ArrayLike) -> np.ndarray:
    """Convert integers to int32.

    Args:
        values: integers [...] of any type.

    Returns:
        int32 [...]. Those that it cannot hold become the nearest ones that it can, so that they
        stay out of range.

    Example:
        >>> as_int32(np.array([3, 2**32 + 3])).tolist()
        [3, 2147483647]
    """
    array, limits = np.asarray(values), np.iinfo(np.int32)
    if array.dtype.itemsize >= 4 and array.dtype != np.int32:
        least = limits.min if array.dtype.kind == "i" else 0
        array = np.clip(array, array.dtype.type(least), array.dtype.type(limits.max))
    return array.astype(np.int32)


def check_seed(seed: int) -> None:
    """Check that a seed is not negative; NumPy's generators reject such seeds.

    Args:
        seed: an integer.

    Raises:
        ValueError: it is negative.
    """
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; give a seed of 0 or more")


def random_order(num_examples: int, seed: int, stream: int = 0) -> np.ndarray:
    """Permute 0 ... num_examples - 1 as a pure function of the arguments.

    Sorts the raw output of a Philox bit generator. NumPy guarantees that this stream never
    changes, unlike `Generator.permutation`, so a run resumes in the same order under another
    NumPy version.

    Args:
        num_examples: length of the permutation.
        seed: non-negative.
        stream: selects one of the independent permutations of the seed, for example the epoch.

    Returns:
        The permutation, int64 [num_examples].

    Raises:
        ValueError: negative seed.
    """
    check_seed(seed)
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream,)))
    return np.argsort(bits.random_raw(num_examples), kind="stable")


def split(
    data: Mapping[str, np.ndarray],
    parts: Sequence[int] | Sequence[float],
    *,
    seed: int,
    stratify: bool = False,
) -> tuple[Arrays, ...]:
    """Split examples at random into parts, reproducibly.

    Args:
        data: {name: array [examples, ...]}.
        parts: number of examples of each part, which sum to all examples; or fractions that sum
            to 1 (the sizes are rounded such that they sum to all examples).
        seed: non-negative; another seed gives another split.
        stratify: give every part the same class proportions of `data["labels"]`; with two parts
            the count of each class is off by less than one example.

    Returns:
        One dictionary of arrays per part; examples stay in their order within a part.

    Raises:
        ValueError: parts that do not sum to the whole, are negative or empty; no labels to
            stratify by.

    Example:
        >>> train, test = split({"labels": np.arange(10) % 2}, (0.8, 0.2), seed=0, stratify=True)
        >>> np.bincount(train["labels"]).tolist(), np.bincount(test["labels"]).tolist()
        ([4, 4], [1, 1])
    """
    arrays = check_arrays(data)
    num_examples = len(next(iter(arrays.values())))
    sizes = _part_sizes(parts, num_examples)
    remaining = random_order(num_examples, seed)
    if stratify:
        if "labels" not in arrays or arrays["labels"].ndim != 1:
            raise ValueError(
                f"cannot stratify {list(arrays)}: no 'labels' [examples]; set stratify=False"
            )
        remaining = remaining[np.argsort(arrays["labels"][remaining], kind="stable")]
    chosen = []
    for size in sizes:
        # Systematic sampling: evenly spaced picks, hence proportional for the sorted classes.
        quota = np.arange(len(remaining) + 1) * size // max(1, len(remaining))
        picked = np.diff(quota) > 0
        chosen.append(np.sort(remaining[picked]))
        remaining = remaining[~picked]
    return tuple({name: array[part] for name, array in arrays.items()} for part in chosen)


def _part_sizes(parts: Sequence[int] | Sequence[float], num_examples: int) -> list[int]:
    if all(isinstance(part, (int, np.integer)) for part in parts):
        sizes = [int(part) for part in parts]
    else:
        if abs(sum(parts) - 1) > 1e-6:
            raise ValueError(f"fractions {list(parts)} sum to {sum(parts)}; make them sum to 1")
        bounds = np.rint(np.cumsum([0.0, *parts]) * num_examples).astype(int)
        sizes = np.diff(bounds).tolist()
    if sum(sizes) != num_examples or min(sizes, default=0) < 1:
        raise ValueError(
            f"parts {list(parts)} of {num_examples} examples are {sizes} examples; every part "
            f"needs one at least and together they must be {num_examples}"
        )
    return sizes
