"""Named tensors of files: what they are is known at once, their data is read when asked."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxnets.storage.byte_ranges import ByteRange, damaged

#: Slices of the leading axes.
Index = tuple[slice, ...]

_MOST_BYTES = 2**62
_MOST_AXES = 32


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a file is.

    Attributes:
        shape: of the array.
        dtype: of the array; those of `ml_dtypes` for bfloat16 and float8.
        stored: type in the file, in its own words, such as "BF16" or "Q4_K".
        path: the file.
        read: slices of the leading axes -> that part as an array; () reads all of it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: str
    path: Path
    read: Callable[[Index], np.ndarray] = dataclasses.field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return self.size * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file or folder by name; each access reads one of them.

    Attributes:
        path: the file or folder.
        specs: {name: shape, dtype and size}, without reading data.
        metadata: what else the file says: the text entries of safetensors, all fields of GGUF, the
            values of a torch file that are not tensors, by dotted paths.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(dict(specs))
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} tensors, {self.nbytes:,} bytes, in {self.path})"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in memory."""
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """Read one tensor, or a part of it.

        Of formats that store rows one after another (safetensors, torch, .npy, GGUF without
        quantization) only the bytes between the first and the last element are read. So
        `jax.make_array_from_callback(spec.shape, sharding, lambda index: tensors.read(name,
        index))` reads a sharded array shard by shard.

        Args:
            name: of the tensor.
            index: slices of the leading axes; by default the whole tensor.

        Returns:
            A new array. It is read-only where elements share memory, as in an expanded tensor.

        Raises:
            KeyError: no such tensor.
            ValueError: its data are damaged; the message names the file.
            OSError: the file cannot be read, or was changed since it was opened.
        """
        spec = self.specs[name]
        if len(index) > len(spec.shape):
            raise ValueError(f"{name} has shape {spec.shape}; give at most that many slices")
        return spec.read(tuple(index))


@dataclasses.dataclass(frozen=True)
class Strided:
    """Elements of a range of bytes, one every so many bytes along each axis.

    Attributes:
        data: the bytes.
        offset: bytes before the first element.
        shape: of the array.
        strides: bytes from one element to the next, of each axis; not negative.
        dtype: of an element.
        swap: whether the bytes of an element are in big-endian order.
        conjugate: whether the conjugate is meant.
        negate: whether the negative is meant.
    """

    data: ByteRange
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    swap: bool = False
    conjugate: bool = False
    negate: bool = False

    def check(self, name: str) -> None:
        """Check that every element lies within the bytes.

        Args:
            name: of the tensor, for the error.

        Raises:
            ValueError: one does not; the message names the tensor and the file.
        """
        path = self.data.path
        check_shape(path, name, self.shape, self.dtype.itemsize)
        bounded = all(0 <= stride < _MOST_BYTES for stride in self.strides)
        if self.offset < 0 or len(self.strides) != len(self.shape) or not bounded:
            raise damaged(path, f"{name!r} has offset {self.offset}, strides {self.strides}")
        _, end = _extent(self.offset, self.shape, self.strides, self.dtype.itemsize)
        if end > self.data.size:
            raise damaged(path, f"{name!r} ends at byte {end} of {self.data.size} that hold it")

    def spec(self, name: str, stored: str) -> TensorSpec:
        """Return the tensor, checked.

        Args:
            name: of the tensor, for errors.
            stored: its type in the file, see `TensorSpec`.

        Raises:
            ValueError: an element lies outside of the bytes.
        """
        self.check(name)
        return TensorSpec(self.shape, self.dtype, stored, self.data.path, self.read)

    def read(self, index: Index) -> np.ndarray:
        """Read some slices of the elements.

        Args:
            index: slices of the leading axes; () reads all.

        Returns:
            A new array in the byte order of this machine; read-only where elements share memory.

        Raises:
            ValueError: a boolean that is neither 0 nor 1, or damaged data.
            OSError: the file cannot be read, or was changed since it was opened.
        """
        shape, strides, offset = list(self.shape), list(self.strides), self.offset
        for axis, one in enumerate(index):
            start, stop, step = one.indices(self.shape[axis])
            shape[axis] = len(range(start, stop, step))
            offset += start * self.strides[axis]
            strides[axis] *= step
        if 0 in shape:
            return np.empty(shape, self.dtype)
        low, high = _extent(offset, shape, strides, self.dtype.itemsize)
        raw = self.data.read(low, high - low)
        self._convert(raw)
        array: np.ndarray = np.ndarray(
            tuple(shape), self.dtype, buffer=raw, offset=offset - low, strides=tuple(strides)
        )
        if high - low > array.nbytes:
            return array.copy()
        array.flags.writeable = high - low == array.nbytes
        return array

    def _convert(self, raw: np.ndarray) -> None:
        """Bring bytes to the order of this machine and to the values meant, in place."""
        values = raw.view(self.dtype)
        if self.swap:
            size = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
            raw.view(f"u{size}").byteswap(inplace=True)
        if self.dtype == np.bool_ and raw.max(initial=0) > 1:
            raise damaged(self.data.path, "a boolean is neither 0 nor 1")
        if self.conjugate:
            np.conjugate(values, out=values)
        if self.negate:
            np.negative(values, out=values)


def contiguous(
    data: ByteRange, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], **options: Any
) -> Strided:
    """Return elements that follow each other in row-major order.

    Args:
        data: the bytes.
        offset: bytes before the first element.
        shape: of the array.
        dtype: of an element.
        options: further fields of `Strided`.
    """
    return Strided(data, offset, shape, row_major(shape, dtype.itemsize), dtype, **options)


def row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides of the row-major order.

    Args:
        shape: of the array.
        itemsize: bytes of an element.

    Returns:
        Bytes from one element to the next, of each axis.

    Example:
        >>> row_major((2, 3, 5), itemsize=4)
        (60, 20, 4)
    """
    sizes = itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=itemsize)
    return tuple(sizes)[::-1][: len(shape)] if shape else ()


def check_shape(path: Path, name: str, shape: Sequence[int], itemsize: int) -> None:
    """Check that an array can have this shape.

    Args:
        path: the file, for the error.
        name: of the tensor, for the error.
        shape: of the array.
        itemsize: bytes of an element.

    Raises:
        ValueError: a negative size, more than 32 axes, or more than 2^62 bytes.
    """
    # As NumPy does, sizes of 0 do not make up for the others.
    product = math.prod(max(size, 1) for size in shape) if len(shape) <= _MOST_AXES else 0
    if not product or min(shape, default=0) < 0 or product * itemsize > _MOST_BYTES:
        text = str(tuple(shape))
        raise damaged(path, f"{name!r} has shape {text if len(text) < 80 else text[:80] + '...'}")


def _extent(
    offset: int, shape: Sequence[int], strides: Sequence[int], itemsize: int
) -> tuple[int, int]:
    """Return the first byte of the elements and the one after the last; 0 if there are none."""
    if 0 in shape:
        return 0, 0
    ends = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    low = offset + sum(end for end in ends if end < 0)
    return low, offset + sum(end for end in ends if end > 0) + itemsize


def whole(read: Callable[[], np.ndarray]) -> Callable[[Index], np.ndarray]:
    """Return the reader of slices of a tensor that is read whole.

    Args:
        read: returns the whole tensor.
    """
    return lambda index: read()[index] if index else read()


def flatten(
    path: Path, tree: Any, is_tensor: Callable[[Any], bool], most: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flatten nested dicts and lists by dotted paths.

    Args:
        path: the file, for errors. A tensor that is no member of anything has its stem for a name.
        tree: the content of the file.
        is_tensor: whether a leaf is a tensor.
        most: bound on the number of members.

    Returns:
        {path: tensor} and {path: other leaf}.

    Raises:
        ValueError: two leaves have the same path, or a member contains itself.
    """
    tensors: dict[str, Any] = {}
    others: dict[str, Any] = {}
    stack: list[tuple[str, Any, int]] = [("", tree, 0)]
    count = 0
    while stack:
        name, value, depth = stack.pop()
        count += 1
        if count > most or depth > 100:
            raise damaged(path, "its dicts and lists contain themselves or are nested too deeply")
        if isinstance(value, dict | list | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            below = [(f"{name}.{key}" if name else str(key), one, depth + 1) for key, one in pairs]
            stack += reversed(below)
            continue
        name = name or path.stem
        if name in tensors or name in others:
            raise damaged(
                path, f"two members are named {name!r}", "rename one of them where it was written"
            )
        (tensors if is_tensor(value) else others)[name] = value
    return tensors, others
