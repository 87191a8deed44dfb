"""Padding of token sequences of unequal length to one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jaxnets.checks import check_sizes
from jaxnets.core import at_least_int32
from jaxnets.data.arrays import as_int32
from jaxnets.data.text.vocabulary import PAD

Lengths = TypeVar("Lengths", int, np.ndarray)


def pad_sequences(
    sequences: Sequence[npt.ArrayLike],
    *,
    length: int | None = None,
    multiple: int = 1,
    truncate: bool = False,
    pad: int = PAD,
) -> tuple[np.ndarray, np.ndarray]:
    """Pad sequences of token ids to one length on the right.

    Corresponds to `torch.nn.utils.rnn.pad_sequence(batch_first=True)`.

    Args:
        sequences: integer [tokens], each with at least one token.
        length: of each row; by default that of the longest sequence.
        multiple: the default length is rounded up to a multiple, so that fewer shapes compile.
        truncate: cut sequences longer than `length`, which otherwise are an error.
        pad: the id of the padding.

    Returns:
        int32 [sequences, length], and the length of each sequence, int32 [sequences].

    Raises:
        ValueError: no sequences, an empty one, one longer than `length`, ids that are not
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
    padded = np.full((len(arrays), length), pad, np.int32)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = as_int32(array[:length])
    return padded, lengths


def round_up(lengths: Lengths, multiple: int) -> Lengths:
    """Round lengths up to a multiple, elementwise."""
    return -(-at_least_int32(lengths) // multiple) * multiple


def check_sequence(ids: npt.ArrayLike, index: int) -> np.ndarray:
    """Check one sequence and return it as an array.

    Args:
        ids: integer [tokens].
        index: of the sequence, for errors.

    Returns:
        The ids, not converted.

    Raises:
        ValueError: no tokens, more than one axis, or ids that are not integers or negative.
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
