"""Writing of safetensors files.

The format: https://huggingface.co/docs/safetensors. Its package scrambles arrays that are not
contiguous, and has no float8 for NumPy (0.8.0), so this is a writer of its own.
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
