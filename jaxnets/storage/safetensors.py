"""Safetensors files: a header in JSON, then the data.

The format: https://huggingface.co/docs/safetensors. Its package scrambles arrays that are not
contiguous, and has no float8 for NumPy (0.8.0), so this is a writer and a reader of its own.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from jaxnets.storage.atomic import atomic_file
from jaxnets.storage.byte_ranges import Cursor, FileRange, damaged
from jaxnets.storage.tensors import Tensors, TensorSpec, contiguous

#: Types of safetensors, whose names other formats use as well.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
    }
)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The header is padded, so that data in a mapped file start where every type may.
_ALIGNMENT = 64
# The bound of the safetensors package.
_MOST_HEADER_BYTES = 100_000_000


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays to a safetensors file, atomically.

    Arrays of any strides and byte order are stored row-major and little-endian. One at a time is
    copied to the host. Wide types come first, so that every array is aligned.

    Args:
        path: of the file, replaced if it exists.
        arrays: {name: NumPy or JAX array}.
        metadata: texts by name.

    Raises:
        TypeError: an array of a type that the format does not have, or metadata that are no texts.
        ValueError: a name that the format reserves.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> write_safetensors(path, {"kernel": np.ones((2, 3), np.float32)})
        >>> path.stat().st_size
        152
    """
    names = sorted(arrays, key=lambda name: (-np.dtype(_dtype(name, arrays)).itemsize, name))
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise TypeError(f"metadata {dict(metadata)} hold no texts; give {{text: text}}")
        header["__metadata__"] = dict(metadata)
    position = 0
    for name in names:
        array, dtype = arrays[name], _dtype(name, arrays)
        end = position + array.size * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_file(Path(path)) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            values = np.asarray(arrays[name])
            # [bytes]
            stream.write(values.astype(_dtype(name, arrays), "C").reshape(-1).view(np.uint8).data)


def _dtype(name: str, arrays: Mapping[str, Any]) -> np.dtype[Any]:
    """Return the type of an array in the byte order of the file, checked."""
    if name == "__metadata__" or not isinstance(name, str):
        raise ValueError(f"an array is named {name!r}; rename it, by a text")
    array = arrays[name]
    try:
        dtype = np.dtype(array.dtype).newbyteorder("=")
    except (AttributeError, TypeError):
        dtype = None
    if dtype not in _NAMES:
        what = getattr(array, "dtype", type(array).__name__)
        raise TypeError(
            f"{name!r} has the type {what}; convert it to an array of one of "
            f"{', '.join(map(str, _NAMES))}, such as a random key by jax.random.key_data"
        )
    return dtype


def read_safetensors(path: Path) -> Tensors:
    """Open a safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors, whose data are read when asked, and the texts of the header as metadata.

    Raises:
        ValueError: damaged, or a type that is not read; the message names the file.
        OSError: it cannot be read.
    """
    file = FileRange.of(path)
    cursor = Cursor(file, path)
    size = cursor.unpack("<Q")
    if size > _MOST_HEADER_BYTES:
        raise damaged(path, f"it is no safetensors file: its header has {size} bytes")
    header = _parse(path, cursor.text(size))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its __metadata__ is no object of texts")
    data = file.part(8 + size, file.size - 8 - size)
    specs: dict[str, TensorSpec] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        stored, shape, (start, end) = _entry(path, name, entry)
        tensor = contiguous(data.part(start, end - start), 0, shape, DTYPES[stored])
        specs[name] = tensor.spec(name, stored)
        if specs[name].nbytes != end - start:
            raise damaged(path, f"{name!r} has {end - start} bytes instead of {specs[name].nbytes}")
        ranges.append((start, end, name))
    _check_order(path, ranges, data.size)
    return Tensors(path, specs, metadata)


def _parse(path: Path, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise damaged(path, f"{name!r} occurs twice in its header")
            content[name] = value
        return content

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    return header


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return type, shape and range of a tensor from its entry in the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"the entry of {name!r} has not dtype, shape and data_offsets")
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(stored, str) or stored not in DTYPES:
        raise damaged(
            path,
            f"{name!r} has the type {str(stored)[:40]!r}, which is not read",
            f"convert it to one of {', '.join(DTYPES)}",
        )
    for values in (shape, offsets):
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise damaged(path, f"{name!r} has shape {shape!s:.80}, data_offsets {offsets!s:.80}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{name!r} has data_offsets {offsets!s:.80}")
    return stored, tuple(shape), (offsets[0], offsets[1])


def _check_order(path: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    """Check that the data of the tensors follow each other and fill the file."""
    position, before = 0, ""
    for start, end, name in sorted(ranges):
        if start < position:
            raise damaged(path, f"the data of {name!r} and {before!r} overlap")
        if start > position:
            raise damaged(path, f"bytes {position} to {start} of its data belong to no tensor")
        position, before = end, name
    if position != size:
        raise damaged(path, f"bytes {position} to {size} of its data belong to no tensor")
