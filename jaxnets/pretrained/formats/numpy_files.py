"""NumPy's .npy and .npz files, without pickles."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from jaxnets.pretrained.formats.zip_members import zip_members
from jaxnets.storage.byte_ranges import ByteRange, FileRange, damaged
from jaxnets.storage.tensors import Strided, Tensors, TensorSpec, check_shape, row_major

_MAGIC = b"\x93NUMPY"
# NumPy's own bound is 10,000 characters.
_MOST_HEADER_BYTES = 10_000
_DESCR = re.compile(r"""['"]descr['"]\s*:\s*((['"])[^'"]*\2|\[.*\])""")
_ORDER = re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)""")
_SHAPE = re.compile(r"""['"]shape['"]\s*:\s*\(([\d,\s]*)\)""")
_TYPE = re.compile(r"""['"]([<>|=]?)([biufc]\d+)['"]""")
_DTYPES = {
    **{f"{kind}{size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
    **{name: np.dtype(name) for name in ("b1", "f2", "f4", "f8", "c8", "c16")},
}


def read_npy(path: Path) -> Tensors:
    """Open a .npy file; its array is named by the stem of the file.

    Args:
        path: the file.

    Returns:
        One array.

    Raises:
        ValueError: damaged, or a type that is not read, such as objects; the message names the
            file.
        OSError: it cannot be read.
    """
    file = FileRange.of(path)
    return Tensors(path, {path.stem: _spec(file, file, path.stem)})


def read_npz(path: Path) -> Tensors:
    """Open an .npz file.

    Args:
        path: the file.

    Returns:
        The arrays by name.

    Raises:
        ValueError: damaged, or a type that is not read, such as objects; the message names the
            file.
        OSError: it cannot be read.
    """
    specs = {}
    for member, data in zip_members(FileRange.of(path)).items():
        name = member.removesuffix(".npy")
        if name == member or name in specs:
            raise damaged(path, f"its member {member[:200]!r} is no array")
        specs[name] = _spec(dataclasses.replace(data, checksum=None), data, name)
    return Tensors(path, specs)


def _spec(unverified: ByteRange, data: ByteRange, name: str) -> TensorSpec:
    """Return the tensor of a .npy file: its header is read now, from where nothing is verified."""
    path = data.path
    start = unverified.read(0, min(12, data.size)).tobytes()
    if len(start) < 12 or not start.startswith(_MAGIC) or start[6] not in (1, 2, 3):
        raise damaged(path, f"{name!r} is no NumPy array")
    width = 2 if start[6] == 1 else 4
    size = int.from_bytes(start[8 : 8 + width], "little")
    begin = 8 + width
    if size > _MOST_HEADER_BYTES or begin + size > data.size:
        raise damaged(path, f"{name!r} has a header of {size} bytes")
    header = unverified.read(begin, size).tobytes().decode("latin-1")
    found = [pattern.search(header) for pattern in (_DESCR, _ORDER, _SHAPE)]
    rest = header
    for match in found:
        rest = rest.replace(match[0], "", 1) if match else rest
    if None in found or rest.strip("{}, \n"):
        raise damaged(path, f"{name!r} has the header {header[:100]!r}")
    descr, order, sizes = (match[1] for match in found if match)
    kind = _TYPE.fullmatch(descr)
    if not kind or kind[2] not in _DTYPES:
        raise damaged(
            path,
            f"{name!r} has the type {descr[:80]}, which is not read",
            "save it as numbers, and bfloat16 as float32 or in safetensors",
        )
    dtype = _DTYPES[kind[2]]
    digits = [size.strip() for size in sizes.split(",") if size.strip()]
    if not all(size.isdigit() and len(size) <= 20 for size in digits):
        raise damaged(path, f"{name!r} has the header {header[:100]!r}")
    shape = tuple(map(int, digits))
    check_shape(path, name, shape, dtype.itemsize)
    strides = row_major(shape, dtype.itemsize)
    if order == "True":
        strides = row_major(shape[::-1], dtype.itemsize)[::-1]
    offset = begin + size
    tensor = Strided(data, offset, shape, strides, dtype, swap=kind[1] == ">")
    spec = tensor.spec(name, descr.strip("'\""))
    if spec.nbytes != data.size - offset:
        raise damaged(path, f"{name!r} has {data.size - offset} bytes instead of {spec.nbytes}")
    return spec
