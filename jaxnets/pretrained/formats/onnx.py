"""Initializers of ONNX files, by name, without the onnx package.

An ONNX file is one protocol buffer. The fields of its messages, whose numbers are below, are those
of onnx.proto; only the ones on the way to the initializers of the main graph are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxnets.storage.byte_ranges import Cursor, FileRange, damaged
from jaxnets.storage.safetensors import DTYPES
from jaxnets.storage.tensors import (
    Tensors,
    TensorSpec,
    check_shape,
    contiguous,
    whole,
)

# ModelProto.graph and GraphProto.initializer.
_GRAPH, _INITIALIZER = 7, 5
# TensorProto.
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14
_FLOATS, _INTS, _LONGS, _DOUBLES, _UNSIGNED = 4, 5, 7, 10, 11
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

#: TensorProto.DataType.
_TYPES = {
    1: DTYPES["F32"],
    2: DTYPES["U8"],
    3: DTYPES["I8"],
    4: DTYPES["U16"],
    5: DTYPES["I16"],
    6: DTYPES["I32"],
    7: DTYPES["I64"],
    9: DTYPES["BOOL"],
    10: DTYPES["F16"],
    11: DTYPES["F64"],
    12: DTYPES["U32"],
    13: DTYPES["U64"],
    14: DTYPES["C64"],
    15: np.dtype(np.complex128),
    16: DTYPES["BF16"],
    17: DTYPES["F8_E4M3"],
    18: DTYPES["F8_E4M3FNUZ"],
    19: DTYPES["F8_E5M2"],
    20: DTYPES["F8_E5M2FNUZ"],
    24: DTYPES["F8_E8M0"],
}


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of a message: its number, and either an integer or a range of bytes."""

    number: int
    wire: int
    value: int
    start: int = 0


def read_onnx(path: Path) -> Tensors:
    """Open an ONNX file.

    Args:
        path: the file.

    Returns:
        The initializers of the graph by name.

    Raises:
        ValueError: damaged, or its data are in other files; the message names the file.
        OSError: it cannot be read.
    """
    file = FileRange.of(path)
    specs: dict[str, TensorSpec] = {}
    graphs = [f for f in _fields(file) if f.number == _GRAPH and f.wire == _BYTES]
    if len(graphs) != 1:
        raise damaged(path, "it is no ONNX file: it has not one graph")
    graph = file.part(graphs[0].start, graphs[0].value)
    for field in _fields(graph):
        if field.number == _INITIALIZER and field.wire == _BYTES:
            name, spec = _tensor(graph.part(field.start, field.value))
            if name in specs:
                raise damaged(path, f"the initializer {name!r} occurs twice")
            specs[name] = spec
    return Tensors(path, specs)


def _fields(data: FileRange) -> Iterator[_Field]:
    """Iterate over the fields of a message, skipping their content."""
    position = 0
    cursor = Cursor(data, data.path)
    while position < data.size:
        cursor.position = position
        key = _varint(cursor, data.path)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            yield _Field(number, wire, _varint(cursor, data.path))
            position = cursor.position
            continue
        if wire not in (_BYTES, _FIXED64, _FIXED32):
            raise damaged(data.path, f"it is no ONNX file: a field has the wire type {wire}")
        size = _varint(cursor, data.path) if wire == _BYTES else 8 if wire == _FIXED64 else 4
        yield _Field(number, wire, size, cursor.position)
        position = cursor.position + size
    if position != data.size:
        raise damaged(data.path, "it is no ONNX file, or ends early")


def _varint(cursor: Cursor, path: Path) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = cursor.unpack("<B")
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1)
    raise damaged(path, "it is no ONNX file: an integer has too many bytes")


def _tensor(data: FileRange) -> tuple[str, TensorSpec]:
    """Return name and content of a TensorProto."""
    path, name, kind, external = data.path, "", 0, False
    dims: list[int] = []
    raw: FileRange | None = None
    values: list[_Field] = []
    for field in _fields(data):
        content = data.part(field.start, field.value) if field.wire == _BYTES else None
        if field.number == _NAME and content:
            name = Cursor(content, path).text(content.size)
        elif field.number == _TYPE:
            kind = field.value
        elif field.number == _DIMS:
            dims += [field.value] if content is None else _varints(content)
        elif field.number == _RAW and content is not None:
            raw = content
        elif field.number in (_FLOATS, _INTS, _LONGS, _DOUBLES, _UNSIGNED):
            values.append(field)
        elif field.number == _EXTERNAL or (field.number == _LOCATION and field.value):
            external = True
    if external:
        raise damaged(
            path,
            f"the data of {name!r} lie in another file",
            "save it as one file with onnx.save_model(..., save_as_external_data=False)",
        )
    if kind not in _TYPES:
        raise damaged(
            path,
            f"{name!r} has the ONNX type {kind}, which is not read",
            "convert it to numbers of at least 8 bits",
        )
    dtype, shape = _TYPES[kind], tuple(dims)
    check_shape(path, name, shape, dtype.itemsize)
    stored = dtype.name
    if raw is not None:
        spec = contiguous(raw, 0, shape, dtype).spec(name, stored)
        if raw.size != spec.nbytes or values:
            raise damaged(path, f"{name!r} has {raw.size} bytes instead of {spec.nbytes}")
        return name, spec
    size = sum(field.value if field.wire == _BYTES else 1 for field in values)
    if math.prod(shape) > 2 * size:
        raise damaged(path, f"{name!r} has fewer elements than its shape {shape}")

    def read() -> np.ndarray:
        return _elements(data, name, values, dtype, shape)

    return name, TensorSpec(shape, dtype, stored, path, whole(read))


def _varints(data: FileRange) -> list[int]:
    cursor, values = Cursor(data, data.path), []
    while cursor.position < data.size:
        values.append(_varint(cursor, data.path))
    return values


def _elements(
    data: FileRange, name: str, fields: list[_Field], dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """Return elements that are stored as numbers in fields of their own, not as raw bytes."""
    numbers: list[np.ndarray] = []
    for field in fields:
        if field.number in (_FLOATS, _DOUBLES):
            start, size = field.start, field.value
            if field.wire == _VARINT:
                raise damaged(data.path, f"{name!r} has integers for floating point")
            kind = "<f4" if field.number == _FLOATS else "<f8"
            if size % np.dtype(kind).itemsize:
                raise damaged(data.path, f"{name!r} has a part of a number")
            numbers.append(data.read(start, size).view(kind))
        elif field.wire == _BYTES:
            numbers.append(np.array(_varints(data.part(field.start, field.value)), np.uint64))
        else:
            numbers.append(np.array([field.value], np.uint64))
    if len({array.dtype for array in numbers}) > 1:
        raise damaged(data.path, f"{name!r} has elements of two types")
    array = np.concatenate(numbers) if numbers else np.zeros(0, dtype)
    if array.dtype.kind == "f" and dtype.kind == "c":
        array = array[: array.size // 2 * 2].view(f"c{2 * array.itemsize}")
    elif array.dtype == np.uint64 and dtype.kind == "b":
        array = array != 0
    elif array.dtype == np.uint64 and (dtype.kind in "iu" or dtype.itemsize <= 2):
        # Integers are widened, and small floating point is stored by its bits.
        array = array.astype(f"u{dtype.itemsize}").view(dtype)
    if array.dtype != dtype:
        raise damaged(data.path, f"{name!r} has {array.dtype} for {dtype}")
    if array.size != math.prod(shape):
        raise damaged(data.path, f"{name!r} has {array.size} elements, not the shape {shape}")
    return array.reshape(shape)
