"""How a tensor of a file and the arrays of a network are arranged, in both directions.

A layout maps the tensors of a file to arrays of this library, and back without a rounding (`Sum`
and `FromZeroCentered` aside). Layouts are applied one after the other; the set is closed, so that
a table of them is data.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

#: NumPy or JAX, as the caller has them: shapes are computed on abstract arrays.
Array = Any


class Layout(Protocol):
    """An arrangement of tensors, invertible.

    Both directions take NumPy or JAX arrays, or abstract ones, and return the same kind.
    """

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Map the tensors of a file to arrays of a network.

        Args:
            arrays: the tensors of one `Rule`, in the order of its sources.

        Returns:
            The arrays, in the order of its targets.

        Raises:
            ValueError: shapes or a number of tensors that do not fit.
        """

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Map arrays of a network to the tensors of a file, as the inverse of `from_file`.

        Args:
            arrays: in the order of the targets of a `Rule`.

        Returns:
            The tensors, in the order of its sources.

        Raises:
            ValueError: shapes or a number of arrays that do not fit.
        """


class AxisOrder(abc.ABC):
    """A layout that only permutes axes, so that a part of an array is a part of the tensor."""

    @abc.abstractmethod
    def axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axis of the file that each axis of the network is.

        Args:
            ndim: number of axes.

        Raises:
            ValueError: a number of axes that the layout does not have.
        """

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Permute the axes of each tensor."""
        return [array.transpose(self.axes(array.ndim)) for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Permute the axes of each array back."""
        return [
            array.transpose(tuple(int(axis) for axis in np.argsort(self.axes(array.ndim))))
            for array in arrays
        ]


@dataclasses.dataclass(frozen=True)
class Transpose(AxisOrder):
    """A dense kernel: [out, in] in the file, [in, out] here.

    Example:
        >>> Transpose().from_file([np.zeros((3, 5))])[0].shape
        (5, 3)
    """

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Return (1, 0).

        Raises:
            ValueError: not 2 axes.
        """
        _check_rank(ndim, 2)
        return (1, 0)


@dataclasses.dataclass(frozen=True)
class SplitHeads:
    """One axis of all heads in the file, two axes here: [heads, head_dim].

    Attributes:
        num_heads: number of heads.
        axis: of the tensor, from its start.

    Example:
        >>> SplitHeads(4, axis=1).from_file([np.zeros((5, 12))])[0].shape
        (5, 4, 3)
    """

    num_heads: int
    axis: int = 0

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Split the axis of each tensor."""
        return [self._split(array) for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Join both axes of each array."""
        return [self._join(array) for array in arrays]

    def _split(self, array: Array) -> Array:
        before, size, after = array.shape[: self.axis], array.shape[self.axis], self.axis + 1
        if size % self.num_heads:
            raise ValueError(f"axis {self.axis} of size {size} has no {self.num_heads} heads")
        heads = (self.num_heads, size // self.num_heads)
        return array.reshape(*before, *heads, *array.shape[after:])

    def _join(self, array: Array) -> Array:
        heads = array.shape[self.axis : self.axis + 2]
        if len(heads) < 2 or heads[0] != self.num_heads:
            raise ValueError(
                f"axes {self.axis} and {self.axis + 1} of {array.shape} are no {self.num_heads} "
                "heads"
            )
        before, after = array.shape[: self.axis], array.shape[self.axis + 2 :]
        return array.reshape(*before, math.prod(heads), *after)


@dataclasses.dataclass(frozen=True)
class JoinHeads:
    """Two axes of heads in the file, one axis here; the inverse of `SplitHeads`.

    Attributes:
        num_heads: number of heads.
        axis: of the heads, from the start.
    """

    num_heads: int
    axis: int = 0

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Join both axes of each tensor."""
        return SplitHeads(self.num_heads, self.axis).to_file(arrays)

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Split the axis of each array."""
        return SplitHeads(self.num_heads, self.axis).from_file(arrays)


@dataclasses.dataclass(frozen=True)
class Split:
    """One tensor of the file, several arrays here, such as joined queries, keys and values.

    Attributes:
        parts: number of equal parts, or their sizes.
        axis: of the tensor.

    Example:
        >>> [part.shape for part in Split((4, 2, 2)).from_file([np.zeros((8, 5))])]
        [(4, 5), (2, 5), (2, 5)]
    """

    parts: int | tuple[int, ...]
    axis: int = 0

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Split one tensor.

        Raises:
            ValueError: the axis does not have the size of the parts, or no equal ones.
        """
        (array,) = arrays
        size = array.shape[self.axis]
        sizes = self.parts
        if isinstance(sizes, int):
            if size % sizes:
                raise ValueError(f"axis {self.axis} of size {size} has no {sizes} equal parts")
            sizes = (size // sizes,) * sizes
        if sum(sizes) != size:
            raise ValueError(f"axis {self.axis} of size {size} has no parts of sizes {sizes}")
        ends = np.cumsum(sizes)
        index: list[slice] = [slice(None)] * array.ndim
        parts = []
        for end, part in zip(ends, sizes, strict=True):
            index[self.axis] = slice(int(end - part), int(end))
            parts.append(array[tuple(index)])
        return parts

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Concatenate the parts."""
        return [_concatenate(arrays, self.axis)]


@dataclasses.dataclass(frozen=True)
class Join:
    """Several tensors of the file, one array here; the inverse of `Split`.

    Attributes:
        parts: number of equal parts, or their sizes.
        axis: of the array.
    """

    parts: int | tuple[int, ...]
    axis: int = 0

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Concatenate the tensors."""
        return Split(self.parts, self.axis).to_file(arrays)

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Split the array.

        Raises:
            ValueError: the axis does not have the size of the parts, or no equal ones.
        """
        return Split(self.parts, self.axis).from_file(arrays)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Equal blocks along an axis in another order, such as the gates of an LSTM.

    Attributes:
        order: the block of the file that each block here is.
        axis: of the tensor.

    Example:
        Gates in the order 0, 2, 1 of the file:

        >>> Blocks((0, 2, 1)).from_file([np.arange(6)])[0].tolist()
        [0, 1, 4, 5, 2, 3]
    """

    order: tuple[int, ...]
    axis: int = 0

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Reorder the blocks of each tensor.

        Raises:
            ValueError: the axis has no equal blocks.
        """
        return [self._take(array, self.order) for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Bring the blocks of each array to the order of the file."""
        inverse = [self.order.index(block) for block in range(len(self.order))]
        return [self._take(array, inverse) for array in arrays]

    def _take(self, array: Array, order: Sequence[int]) -> Array:
        parts = Split(len(order), self.axis).from_file([array])
        return _concatenate([parts[block] for block in order], self.axis)


@dataclasses.dataclass(frozen=True)
class RotaryPairs:
    """Outputs of a projection that are rotated in pairs of neighbors in the file, of halves here.

    GGUF permutes the queries and keys of the LLaMA family so.

    Attributes:
        num_heads: number of heads.
        axis: of the outputs.

    Example:
        >>> RotaryPairs(1).from_file([np.arange(6)])[0].tolist()
        [0, 2, 4, 1, 3, 5]
    """

    num_heads: int
    axis: int = 0

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Bring each tensor to halves.

        Raises:
            ValueError: the axis has not an even number of outputs for each head.
        """
        return [self._swap(array, pairs_last=True) for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Bring each array to pairs of neighbors."""
        return [self._swap(array, pairs_last=False) for array in arrays]

    def _swap(self, array: Array, *, pairs_last: bool) -> Array:
        shape, axis = array.shape, self.axis
        if shape[axis] % (2 * self.num_heads):
            raise ValueError(
                f"axis {axis} of size {shape[axis]} has no {self.num_heads} heads of pairs"
            )
        half = shape[axis] // (2 * self.num_heads)
        split = (half, 2) if pairs_last else (2, half)
        pairs = array.reshape(*shape[:axis], self.num_heads, *split, *shape[axis + 1 :])
        return pairs.swapaxes(axis + 1, axis + 2).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Squeeze:
    """Axes of size 1 in the file that are none here.

    Attributes:
        removed: these axes of the tensor.

    Example:
        >>> Squeeze((0, 1)).from_file([np.zeros((1, 1, 5))])[0].shape
        (5,)
    """

    removed: tuple[int, ...]

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Remove the axes."""
        return [array.squeeze(self.removed) for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Add the axes."""
        results = []
        for array in arrays:
            shape = list(array.shape)
            for axis in sorted(self.removed):
                shape.insert(axis, 1)
            results.append(array.reshape(shape))
        return results


@dataclasses.dataclass(frozen=True)
class ChannelsFirstRows:
    """Rows of a dense kernel after a flatten: channels first in the file, channels last here.

    Attributes:
        size: of the flattened image here, (*window, channels).

    Example:
        Two channels of three pixels:

        >>> ChannelsFirstRows((3, 2)).from_file([np.arange(6)])[0].tolist()
        [0, 3, 1, 4, 2, 5]
    """

    size: tuple[int, ...]

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Reorder the first axis of each array.

        Raises:
            ValueError: it does not have the size of the image.
        """
        *window, channels = self.size
        return [self._swap(array, (channels, math.prod(window))) for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Reorder the first axis of each array back."""
        *window, channels = self.size
        return [self._swap(array, (math.prod(window), channels)) for array in arrays]

    def _swap(self, array: Array, size: tuple[int, int]) -> Array:
        if array.shape[0] != math.prod(size):
            raise ValueError(f"{array.shape[0]} rows are no flattened image of size {self.size}")
        return array.reshape(*size, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class UnusedRows:
    """Rows at the start of a tensor that no input selects, as of RoBERTa's positions.

    Attributes:
        count: number of rows. Written back, they are 0.

    Example:
        >>> UnusedRows(2).from_file([np.arange(5)])[0].tolist()
        [2, 3, 4]
    """

    count: int

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Remove the rows of each tensor."""
        return [array[self.count :] for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Add rows of 0."""
        return [_concatenate([array[:1] * 0] * self.count + [array], 0) for array in arrays]


@dataclasses.dataclass(frozen=True)
class Sum:
    """Several tensors of the file that are added to one array here, such as torch's two biases.

    Attributes:
        count: number of tensors. Written back, the first one is the array, the others are 0.
    """

    count: int = 2

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Add the tensors.

        Raises:
            ValueError: they differ in shape.
        """
        if len({array.shape for array in arrays}) != 1:
            raise ValueError(f"shapes {[array.shape for array in arrays]} cannot be added")
        return [sum(arrays[1:], start=arrays[0])]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the array and zeros."""
        (array,) = arrays
        return [array, *[array * 0] * (self.count - 1)]


@dataclasses.dataclass(frozen=True)
class FromZeroCentered:
    """A scale w of the file that multiplies by 1 + w, such as Gemma's; the factor 1 + w here.

    Example:
        >>> FromZeroCentered().from_file([np.zeros(2)])[0].tolist()
        [1.0, 1.0]
    """

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Add 1 to each tensor."""
        return [array + 1 for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Subtract 1 from each array, which is rounded."""
        return [array - 1 for array in arrays]


@dataclasses.dataclass(frozen=True)
class GRUBiases:
    """Two biases of torch's GRU, and those here: of all gates, and of the recurrent candidate.

    Written back, the second bias of the reset and update gates is 0.

    Example:
        >>> ones, twos = np.ones(3), np.full(3, 2.0)
        >>> [one.tolist() for one in GRUBiases().from_file([ones, twos])]
        [[3.0, 3.0, 1.0], [2.0]]
    """

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Add the biases of the reset and update gates."""
        bias, recurrent = arrays
        reset, update, candidate = Split(3).from_file([recurrent])
        return [bias + _concatenate([reset, update, candidate * 0], 0), candidate]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the bias, and the candidate's after zeros."""
        bias, candidate = arrays
        return [bias, _concatenate([candidate * 0, candidate * 0, candidate], 0)]


def _check_rank(ndim: int, wanted: int) -> None:
    if ndim != wanted:
        raise ValueError(f"{ndim} axes, not {wanted}")


def _concatenate(arrays: Sequence[Array], axis: int) -> Array:
    module: Any = jnp if any(isinstance(array, jax.Array) for array in arrays) else np
    return module.concatenate(arrays, axis=axis)
