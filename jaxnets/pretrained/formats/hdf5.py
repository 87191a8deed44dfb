"""HDF5 files as Keras writes them, through h5py: groups of contiguous arrays.

The format: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html. This reads the
structures that h5py writes by default (superblock 0, object headers 1, symbol tables) and refuses
the others. The HDF5 library itself may loop forever on a damaged file, and follows links to other
files.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.pretrained.formats.zip_members import zip_members
from jaxnets.storage.byte_ranges import ByteRange, Cursor, FileRange, damaged
from jaxnets.storage.safetensors import DTYPES
from jaxnets.storage.tensors import Tensors, TensorSpec, contiguous

_WEIGHTS = "model.weights.h5"
_CONFIG = "config.json"
_MOST_CONFIG_BYTES = 16 << 20
_MOST_DEPTH = 64
_MOST_NAME_BYTES = 1024
_MOST_MESSAGES = 4096

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_ROOT_HEADER = 64  # place of the address of the root group in superblock 0
_UNDEFINED = 2**64 - 1
# Messages of an object header.
_SPACE, _LINK_INFO, _TYPE, _LINK, _EXTERNAL, _LAYOUT = 0x01, 0x02, 0x03, 0x06, 0x07, 0x08
_FILTERS, _ATTRIBUTE, _CONTINUATION, _SYMBOLS = 0x0B, 0x0C, 0x10, 0x11
_SHARED = 2  # flag of a message that lies elsewhere
_SOFT_LINK = 2  # kind of a symbol
_REMEDY = "save the weights anew, with model.save_weights or h5py without options"

#: (size, exponent's place and size, mantissa's place and size) of floating point.
_FLOATS = {
    (2, 10, 5, 0, 10): DTYPES["F16"],
    (2, 7, 8, 0, 7): DTYPES["BF16"],
    (4, 23, 8, 0, 23): DTYPES["F32"],
    (8, 52, 11, 0, 52): DTYPES["F64"],
}


def read_h5(path: Path) -> Tensors:
    """Open an HDF5 file, such as `.weights.h5`; arrays are named by their paths with slashes.

    Args:
        path: the file.

    Returns:
        The arrays by path.

    Raises:
        ValueError: damaged, or a type, link, layout or filter that is not read; the message names
            the file.
        OSError: it cannot be read.
    """
    file = FileRange.of(path)
    return Tensors(path, _Reader(file, file).specs())


def read_keras(path: Path) -> Tensors:
    """Open a `.keras` archive; its config.json is the metadata "config.json".

    Args:
        path: the file.

    Returns:
        The arrays of its weights by path.

    Raises:
        ValueError: damaged, or a type, link, layout or filter that is not read; the message names
            the file.
        OSError: it cannot be read.
    """
    members = zip_members(FileRange.of(path))
    if _WEIGHTS not in members or members[_WEIGHTS].deflated:
        raise damaged(path, f"it is no Keras archive: it has no {_WEIGHTS}, or compresses it")
    metadata = {}
    if _CONFIG in members:
        size = members[_CONFIG].size
        if size > _MOST_CONFIG_BYTES:
            raise damaged(path, f"its {_CONFIG} has {size} bytes")
        text = Cursor(members[_CONFIG].read(0, size).tobytes(), path)
        metadata[_CONFIG] = text.text(size)
    return Tensors(path, _Reader(members[_WEIGHTS].stored, members[_WEIGHTS]).specs(), metadata)


@dataclasses.dataclass(frozen=True)
class _Message:
    kind: int
    data: bytes
    start: int


def _is_boolean(kind: bytes) -> bool:
    """Return whether an enumeration of bytes is FALSE = 0, TRUE = 1."""
    names = b"FALSE\0" in kind and b"TRUE\0" in kind and kind[1:3] == b"\2\0"
    return names and kind.rstrip(b"\0").endswith(b"\0\1")


class _Reader:
    """The arrays of an HDF5 file: its structure is read from one range, its data from another.

    The ranges have the same bytes; only those of `data` are verified.
    """

    def __init__(self, structure: FileRange, data: ByteRange) -> None:
        self._structure, self._data, self._path = structure, data, structure.path

    def specs(self) -> dict[str, TensorSpec]:
        """Return what every array is."""
        start = self._at(0, min(_ROOT_HEADER + 8, self._structure.size))
        if len(start) < _ROOT_HEADER + 8 or not start.startswith(_SIGNATURE):
            raise damaged(self._path, "it is no HDF5 file")
        version, sizes, base = start[8], start[13:15], start[24:32]
        if version or sizes != b"\x08\x08" or any(base):
            raise damaged(self._path, f"its HDF5 superblock {version} is not read", _REMEDY)
        specs: dict[str, TensorSpec] = {}
        stack = [("", struct.unpack_from("<Q", start, _ROOT_HEADER)[0], 0)]
        groups: set[int] = set()
        while stack:
            name, address, depth = stack.pop()
            messages = self._messages(address)
            tables = [one for one in messages if one.kind == _SYMBOLS]
            if any(one.kind in (_LINK, _LINK_INFO) for one in messages):
                raise damaged(self._path, f"{name!r} is a group of a newer layout", _REMEDY)
            if not tables:
                specs[name] = self._spec(name, messages)
                continue
            if address in groups or depth > _MOST_DEPTH:
                raise damaged(self._path, f"the group {name!r} contains itself, or is there twice")
            groups.add(address)
            below = []
            for key, member in self._members(*self._unpack("<QQ", tables[0].data)):
                path = f"{name}/{key}" if name else key
                if path in specs:
                    raise damaged(self._path, f"{path!r} is there twice")
                below.append((path, member, depth + 1))
            if len({path for path, _, _ in below}) < len(below):
                raise damaged(self._path, f"the group {name!r} has a member twice")
            stack += reversed(below)
        return specs

    def _at(self, address: int, size: int) -> bytes:
        return self._structure.read(address, size).tobytes()

    def _unpack(self, layout: str, data: bytes, offset: int = 0) -> tuple[Any, ...]:
        if offset + struct.calcsize(layout) > len(data):
            raise damaged(self._path, "a structure of HDF5 ends early")
        return struct.unpack_from(layout, data, offset)

    def _messages(self, address: int) -> list[_Message]:
        """Return the messages of an object header."""
        version, total, size = self._unpack("<BxH4xI", self._at(address, 12))
        if version != 1:
            raise damaged(self._path, f"its HDF5 object header {version} is not read", _REMEDY)
        messages: list[_Message] = []
        blocks, seen = [(address + 16, size)], set()
        while blocks:
            start, size = blocks.pop(0)
            if start in seen or len(messages) > _MOST_MESSAGES:
                raise damaged(self._path, "an HDF5 object header contains itself")
            seen.add(start)
            block, position = self._at(start, size), 0
            while position + 8 <= size and len(messages) < total:
                kind, length, flags = self._unpack("<HHB", block, position)
                data = block[position + 8 : position + 8 + length]
                if len(data) < length:
                    raise damaged(self._path, "a message of HDF5 ends early")
                if flags & _SHARED:
                    raise damaged(self._path, "it shares types between arrays", _REMEDY)
                messages.append(_Message(kind, data, start + position + 8))
                if kind == _CONTINUATION:
                    blocks.append(self._unpack("<QQ", data))  # type: ignore[arg-type]
                position += 8 + length
        return messages

    def _members(self, tree: int, heap: int) -> Iterator[tuple[str, int]]:
        """Iterate over (name, address) of the members of a group."""
        magic, size, names = self._unpack("<4s4xQ8xQ", self._at(heap, 32))
        if magic != b"HEAP":
            raise damaged(self._path, "a group of HDF5 has no names")
        self._structure.part(names, size)
        stack, seen = [tree], set()
        while stack:
            address = stack.pop()
            if address in seen:
                raise damaged(self._path, "a tree of HDF5 contains itself")
            seen.add(address)
            magic, count = self._unpack("<4s2xH", self._at(address, 8))
            if magic == b"TREE":
                children = self._at(address + 24, 16 * count + 8)
                stack += [
                    self._unpack("<Q", children, 16 * i + 8)[0] for i in reversed(range(count))
                ]
            elif magic == b"SNOD":
                entries = self._at(address + 8, 40 * count)
                for i in range(count):
                    offset, header, kind = self._unpack("<QQI", entries, 40 * i)
                    name = self._name(names, size, offset)
                    if kind == _SOFT_LINK:
                        raise damaged(self._path, f"{name!r} is a link", _REMEDY)
                    yield name, header
            else:
                raise damaged(self._path, "a tree of HDF5 is damaged")

    def _name(self, names: int, size: int, offset: int) -> str:
        length = min(_MOST_NAME_BYTES, size - offset)
        if length <= 0:
            raise damaged(self._path, "a name in HDF5 lies outside its heap")
        name = self._at(names + offset, length).partition(b"\0")[0]
        return Cursor(name, self._path).text(len(name))

    def _spec(self, name: str, messages: list[_Message]) -> TensorSpec:
        """Return the array that the messages of its object header describe."""
        found = {one.kind: one for one in messages if one.kind != _ATTRIBUTE}
        missing = {_SPACE, _TYPE, _LAYOUT} - found.keys()
        if missing or not name:
            raise damaged(self._path, f"{name!r} is no array", _REMEDY)
        if _EXTERNAL in found or _FILTERS in found:
            raise damaged(self._path, f"{name!r} is compressed or lies in another file", _REMEDY)
        shape = self._shape(name, found[_SPACE].data)
        attributes = [one for one in messages if one.kind == _ATTRIBUTE]
        dtype, swap = self._type(name, found[_TYPE].data, attributes)
        start, size = self._layout(name, found[_LAYOUT])
        tensor = contiguous(self._data, start, shape, dtype, swap=swap)
        spec = tensor.spec(name, dtype.name)
        if size != spec.nbytes:
            raise damaged(self._path, f"{name!r} has {size} bytes instead of {spec.nbytes}")
        return spec

    def _shape(self, name: str, data: bytes) -> tuple[int, ...]:
        version, rank, _, kind = self._unpack("<4B", data)
        if version not in (1, 2) or (version == 2 and kind == 2):
            raise damaged(self._path, f"{name!r} has no shape", _REMEDY)
        return self._unpack(f"<{rank}Q", data, 8 if version == 1 else 4)

    def _type(
        self, name: str, data: bytes, attributes: list[_Message]
    ) -> tuple[np.dtype[Any], bool]:
        """Return the type of the elements, and whether they are in big-endian order."""
        first, bits, size = self._unpack("<BB2xI", data)
        kind, big = first & 0x0F, bool(bits & 1)
        if kind == 0 and size in (1, 2, 4, 8):
            if self._unpack("<HH", data, 8) == (0, 8 * size):
                return np.dtype(f"{'i' if bits & 8 else 'u'}{size}"), big and size > 1
        elif kind == 1:
            places = (size, *self._unpack("<4B", data, 12))
            if places in _FLOATS and not bits & 0x40:
                return _FLOATS[places], big
        elif kind == 5 and size == 2 and any(map(self._says_bfloat16, attributes)):
            return DTYPES["BF16"], False  # Keras stores two bytes without a type
        elif kind == 8 and size == 1 and _is_boolean(data):
            return DTYPES["BOOL"], False
        raise damaged(
            self._path, f"{name!r} has the HDF5 type {kind} of {size} bytes, not read", _REMEDY
        )

    def _says_bfloat16(self, message: _Message) -> bool:
        """Return whether an attribute is dtype = "bfloat16"."""
        version, name, kind, space = self._unpack("<BxHHH", message.data)
        padding = 8 if version == 1 else 1
        start = 9 if version == 3 else 8
        place = start + sum(-(-size // padding) * padding for size in (name, kind, space))
        if message.data[start : start + name].rstrip(b"\0") != b"dtype":
            return False
        value = message.data[place:]
        if len(value) == 16 and value[:4] == b"\x08\0\0\0":  # text of 8 bytes in the global heap
            collection, index = self._unpack("<QI", value, 4)
            value = self._global(collection, index)
        return value.rstrip(b"\0") == b"bfloat16"

    def _global(self, collection: int, index: int) -> bytes:
        """Return an object of a global heap."""
        magic, size = self._unpack("<4s4xQ", self._at(collection, 16))
        if magic != b"GCOL":
            raise damaged(self._path, "a heap of HDF5 is damaged")
        cursor = Cursor(self._structure.part(collection, size), self._path)
        cursor.take(16)
        while cursor.position + 16 <= size:
            number, length = self._unpack("<H6xQ", cursor.take(16))
            if not number:
                break
            value = cursor.take(-(-length // 8) * 8)
            if number == index:
                return value[:length]
        raise damaged(self._path, "a heap of HDF5 lacks a text")

    def _layout(self, name: str, message: _Message) -> tuple[int, int]:
        """Return where the data of an array start, and their size."""
        version, kind = self._unpack("<BB", message.data)
        if version in (3, 4) and kind == 0:
            return message.start + 4, self._unpack("<H", message.data, 2)[0]
        if version in (3, 4) and kind == 1:
            start, size = self._unpack("<QQ", message.data, 2)
            if start != _UNDEFINED:
                return start, size
            if not size:
                return 0, 0
        raise damaged(self._path, f"{name!r} is chunked, or was never written", _REMEDY)
