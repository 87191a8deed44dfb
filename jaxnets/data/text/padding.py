"""Sequences of token ids of unequal length in one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jaxnets.data.batches.windows import check_sizes
from jaxnets.data.text.vocabulary import PAD

Size = TypeVar("Size", int, np.ndarray)


def pad_sequences(
    sequences: Sequence[npt.ArrayLike],
    *,
    length: int | None = None,
    multiple: int = 1,
    truncate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Write sequences of token ids into one array, with `PAD` behind each.

    Args:
        sequences: integer [tokens], each with at least one token.
        length: of the rows; by default that of the longest sequence.
        multiple: round the default length up to a multiple, so that fewer shapes are compiled.
        truncate: cut what is longer than `length`, which is an error otherwise.

    Returns:
        int32 [sequences, length], and the number of tokens of each, int32 [sequences].

    Raises:
        ValueError: no sequences, an empty one, one that is longer than `length`, ids that are no
            integers or negative.

    Example:
        >>> pad_sequences([[5, 6, 7], [8]])
        (array([[5, 6, 7],
               [8, 0, 0]], dtype=int32), array([3, 1], dtype=int32))
    """
    if len(sequences) == 0:
        raise ValueError("sequences is empty; give at least one sequence of token ids")
    check_sizes(multiple=multiple, **({} if length is None else {"length": length}))
    arrays = [check_sequence(sequence, index) for index, sequence in enumerate(sequences)]
    lengths = np.array([len(array) for array in arrays], np.int32)
    longest = int(lengths.max())
    if length is None:
        length = round_up(longest, multiple)
    elif longest > length and not truncate:
        index = int(np.argmax(lengths))
        raise ValueError(
            f"sequence {index} has {longest} tokens, more than length={length}; raise the length, "
            "drop the sequence, or cut it with truncate=True"
        )
    lengths = np.minimum(lengths, length).astype(np.int32)
    padded = np.full((len(arrays), length), PAD, np.int32)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array[:length]
    return padded, lengths


def round_up(size: Size, multiple: int) -> Size:
    """Return the smallest multiple that is not below `size`, elementwise."""
    return -(-size // multiple) * multiple


def check_sequence(ids: npt.ArrayLike, index: int) -> np.ndarray:
    """Return token ids as an array.

    Args:
        ids: integer [tokens].
        index: number of the sequence, for errors.

    Returns:
        The ids as they are.

    Raises:
        ValueError: no tokens, more than one axis, or ids that are no integers or negative.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"sequence {index} has shape {array.shape}; give at least one token id, [tokens]"
        )
    if array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(
            f"sequence {index} starts with {array[:3].tolist()} of type {array.dtype}; give "
            "integer ids of 0 or more, such as tokenizer.encode(text)"
        )
    return array
