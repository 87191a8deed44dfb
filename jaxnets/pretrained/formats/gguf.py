"""GGUF files, the format of llama.cpp: typed metadata, then tensors, most of them quantized.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.pretrained.formats.dequantization import BLOCKS, dequantize
from jaxnets.storage.byte_ranges import Cursor, FileRange, damaged
from jaxnets.storage.safetensors import DTYPES
from jaxnets.storage.tensors import (
    Tensors,
    TensorSpec,
    check_shape,
    contiguous,
    whole,
)

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_AXES = 4
_MOST_NESTING = 8
#: Types of metadata by number, as those of the module `struct`.
_NUMBERS = ["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "text", "array", "<Q", "<q", "<d"]
_TEXT, _ARRAY = _NUMBERS.index("text"), _NUMBERS.index("array")
#: Types of tensors by number; those in `BLOCKS` are quantized, those in `DTYPES` are not.
_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


@dataclasses.dataclass(frozen=True)
class _Info:
    """A tensor as the header has it: its sizes from the last axis to the first."""

    name: str
    sizes: tuple[int, ...]
    stored: str
    offset: int


def read_gguf(path: Path) -> Tensors:
    """Open a GGUF file; quantized tensors are read as float32.

    Args:
        path: the file.

    Returns:
        The tensors, their axes from the slowest to the fastest; all fields as metadata.

    Raises:
        ValueError: damaged, or a type or version that is not read; the message names the file.
        OSError: it cannot be read.
    """
    file = FileRange.of(path)
    cursor = Cursor(file, path)
    if cursor.take(4) != b"GGUF":
        raise damaged(path, "it is no GGUF file")
    version = cursor.unpack("<I")
    if version not in _VERSIONS:
        big = version & 0xFFFF == 0
        reason = "it is in big-endian order" if big else f"its GGUF version is {version}"
        raise damaged(path, reason, "convert it to little-endian GGUF of version 2 or 3")
    num_tensors, num_fields = cursor.unpack("<Q"), cursor.unpack("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.text(cursor.unpack("<Q"))
        if key in metadata:
            raise damaged(path, f"the field {key[:200]!r} occurs twice")
        metadata[key] = _value(cursor, path, cursor.unpack("<I"), _MOST_NESTING)
    if metadata.get("split.count", 0) not in (0, 1):
        raise damaged(
            path,
            f"it is one of {metadata['split.count']} parts",
            "merge them with llama-gguf-split --merge",
        )
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"its alignment is {alignment!s:.80}, no power of 2")
    infos = [_info(cursor, path) for _ in range(num_tensors)]
    start = -(-cursor.position // alignment) * alignment
    specs: dict[str, TensorSpec] = {}
    ranges: list[tuple[int, int, str]] = []
    for info in infos:
        if info.name in specs:
            raise damaged(path, f"the tensor {info.name!r} occurs twice")
        size = _num_bytes(path, info)
        specs[info.name] = _spec(file.part(start + info.offset, size), info)
        if info.offset % alignment:
            raise damaged(path, f"the data of {info.name!r} are not aligned")
        ranges.append((info.offset, info.offset + size, info.name))
    ranges.sort()
    for (_, end, before), (begin, _, name) in itertools.pairwise(ranges):
        if begin < end:
            raise damaged(path, f"the data of {name!r} and {before!r} overlap")
    return Tensors(path, specs, metadata)


def _value(cursor: Cursor, path: Path, kind: int, depth: int) -> Any:
    """Read a value of the metadata."""
    if kind >= len(_NUMBERS) or not depth:
        raise damaged(path, f"its metadata have the type {kind}, or are nested too deeply")
    if kind == _TEXT:
        # Tokens may be parts of characters.
        return cursor.take(cursor.unpack("<Q")).decode(errors="surrogateescape")
    if kind != _ARRAY:
        if kind == _NUMBERS.index("<?"):
            return bool(cursor.unpack("<B"))
        return cursor.unpack(_NUMBERS[kind])
    inner, count = cursor.unpack("<I"), cursor.unpack("<Q")
    if inner >= len(_NUMBERS) or count > cursor.size - cursor.position:
        raise damaged(path, f"its metadata have an array of {count} values of type {inner}")
    if inner in (_TEXT, _ARRAY):
        return [_value(cursor, path, inner, depth - 1) for _ in range(count)]
    dtype = np.dtype(_NUMBERS[inner].replace("Q", "u8").replace("q", "i8"))
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype).tolist()


def _info(cursor: Cursor, path: Path) -> _Info:
    name = cursor.text(cursor.unpack("<Q"))
    num_axes = cursor.unpack("<I")
    if num_axes > _MOST_AXES:
        raise damaged(path, f"{name[:200]!r} has {num_axes} axes")
    sizes = tuple(cursor.unpack("<Q") for _ in range(num_axes))
    kind, offset = cursor.unpack("<I"), cursor.unpack("<Q")
    stored = _TYPES.get(kind, f"number {kind}")
    if stored not in DTYPES and stored not in BLOCKS:
        known = [one for one in _TYPES.values() if one in DTYPES or one in BLOCKS]
        raise damaged(
            path,
            f"{name[:200]!r} has the type {stored}, which is not read",
            f"convert it with llama-quantize to one of {', '.join(known)}",
        )
    check_shape(path, name[:200], sizes, 8)
    return _Info(name, sizes, stored, offset)


def _num_bytes(path: Path, info: _Info) -> int:
    elements = math.prod(info.sizes)
    if info.stored in DTYPES:
        return elements * DTYPES[info.stored].itemsize
    num_elements, num_bytes = BLOCKS[info.stored]
    if not info.sizes or info.sizes[0] % num_elements:
        raise damaged(path, f"the rows of {info.name!r} are no blocks of {num_elements} elements")
    return elements // num_elements * num_bytes


def _spec(data: FileRange, info: _Info) -> TensorSpec:
    shape = info.sizes[::-1]
    if info.stored in DTYPES:
        return contiguous(data, 0, shape, DTYPES[info.stored]).spec(info.name, info.stored)
    read: Callable[[], np.ndarray] = lambda: dequantize(data, info.stored, shape)  # noqa: E731
    return TensorSpec(shape, np.dtype(np.float32), info.stored, data.path, whole(read))
