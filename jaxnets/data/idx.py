"""The IDX format of MNIST and its relatives."""

from __future__ import annotations

import math
import struct

import numpy as np

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def decode_idx(content: bytes, *, name: str = "IDX file") -> np.ndarray:
    """Decode the bytes of an IDX file.

    The format is two zero bytes, a type code, the number of axes, the length of each axis as
    big-endian uint32, then the values.

    Args:
        content: the whole file, decompressed.
        name: what to call it in errors.

    Returns:
        Array of the shape and type in the header, in the machine's byte order; a read-only view
        of `content` where the bytes allow it.

    Raises:
        ValueError: a wrong header, or fewer or more bytes than it announces.

    Example:
        >>> decode_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        array([7, 8, 9], dtype=uint8)
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise ValueError(f"{name} starts with bytes {content[:4]!r}, which is not an IDX header")
    num_axes = content[3]
    header = 4 + 4 * num_axes
    if len(content) < header:
        raise ValueError(f"{name} ends within its header of {header} bytes")
    shape = struct.unpack(f">{num_axes}I", content[4:header])
    dtype = np.dtype(_DTYPES[content[2]])
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(
            f"{name} holds {len(content)} bytes, but its header announces shape {shape} of "
            f"{dtype.name}, {expected} bytes; get the file anew"
        )
    array = np.frombuffer(content, dtype, offset=header).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)
