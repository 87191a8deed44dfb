"""Tensors in files of `torch.save`, zip and legacy layout, without torch and without unpickling.

The layouts are those of torch/serialization.py; a tensor is a storage with an offset, sizes and
strides (torch/_utils.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.pretrained.formats.pickled import Attributed, read_pickle
from jaxnets.pretrained.formats.zip_members import zip_members
from jaxnets.storage.byte_ranges import ByteRange, Cursor, FileRange, damaged
from jaxnets.storage.safetensors import DTYPES
from jaxnets.storage.tensors import Strided, Tensors, TensorSpec, flatten

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# A tensor takes about 200 bytes.
_MOST_PICKLE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class _Type:
    """A type of elements: a class of storages, or a dtype; bytes without a type for None."""

    name: str
    dtype: np.dtype[Any] | None


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Elements of one type, or bytes.

    Attributes:
        key: name of its data in the file.
        kind: type of the elements.
        size: of the data, in bytes.
        start: bytes before the first element, for a storage that is a part of another.
    """

    key: str
    kind: _Type
    size: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    kind: _Type
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugate: bool = False
    negate: bool = False


_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
_KINDS = {
    **{name: _Type(f"torch.{name}", DTYPES[code]) for name, code in _DTYPES.items()},
    "complex128": _Type("torch.complex128", np.dtype(np.complex128)),
}
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_BYTES = _Type("torch.UntypedStorage", None)
_NAMES: Mapping[str, Any] = {
    **{kind.name: kind for kind in _KINDS.values()},
    **{f"torch.{name}": _KINDS[dtype] for name, dtype in _STORAGES.items()},
    "torch.UntypedStorage": _BYTES,
    "torch.storage.UntypedStorage": _BYTES,
}


def read_torch(path: Path) -> Tensors:
    """Open a file of `torch.save`.

    Nested dicts and lists are flattened by dotted paths; what is no tensor is in `metadata`.

    Args:
        path: the file.

    Returns:
        The tensors by dotted path.

    Raises:
        ValueError: damaged, or it holds something else than tensors, numbers and text; the message
            has the file and the name of what it holds.
        OSError: it cannot be read.
    """
    file = FileRange.of(path)
    start = Cursor(file, path).take(4)
    return _read_zip(file) if start == _ZIP_MAGIC else _read_legacy(file)


def _read_zip(file: FileRange) -> Tensors:
    path = file.path
    members = zip_members(file)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise damaged(path, "it is no file of torch.save: it has not one member data.pkl")
    pickle = members[pickles[0]]
    folder = pickles[0].removesuffix("data.pkl")
    if pickle.size > _MOST_PICKLE_BYTES:
        raise damaged(path, f"its data.pkl has {pickle.size} bytes")
    order = "little"
    if f"{folder}byteorder" in members:
        member = members[f"{folder}byteorder"]
        order = member.read(0, min(member.size, 10)).tobytes().decode("latin-1")
    if order not in ("little", "big"):
        raise damaged(path, f"its byte order is {order!r}")
    content = pickle.read(0, pickle.size).tobytes()
    tree = _pickle(Cursor(content, path), path)
    prefix = f"{folder}data/"
    data = {n.removeprefix(prefix): m for n, m in members.items() if n.startswith(prefix)}
    return _tensors(path, tree, data, swap=order == "big", most=len(content))


def _read_legacy(file: FileRange) -> Tensors:
    path = file.path
    cursor = Cursor(file, path)
    if _pickle(cursor, path) != _LEGACY_MAGIC or _pickle(cursor, path) != _LEGACY_VERSION:
        raise damaged(path, "it is no file of torch.save")
    _pickle(cursor, path)  # sizes of types, which never varied; the data are little-endian
    storages: dict[str, _Storage] = {}
    begin = cursor.position
    tree = _pickle(cursor, path, storages)
    most = cursor.position - begin
    keys = _pickle(cursor, path)
    if not isinstance(keys, list) or set(map(str, keys)) != storages.keys():
        raise damaged(path, "the list of its storages is not that of its tensors")
    data: dict[str, ByteRange] = {}
    position = cursor.position
    for key in keys:
        count = Cursor(file.part(position, 8), path).unpack("<q")
        storage = storages[key]
        itemsize = 1 if storage.kind.dtype is None else storage.kind.dtype.itemsize
        data[key] = file.part(position + 8, count * itemsize)
        position += 8 + count * itemsize
    if position != file.size:
        raise damaged(path, f"it has {file.size - position} bytes after its last storage")
    return _tensors(path, tree, data, swap=False, most=most)


def _pickle(cursor: Cursor, path: Path, storages: dict[str, _Storage] | None = None) -> Any:
    """Read one pickle; what it says of storages is added to the dict."""

    def persistent(identifier: Any) -> _Storage:
        storage = _storage(identifier, path)
        whole = storages.setdefault(storage.key, storage) if storages is not None else storage
        if (whole.kind, whole.size) != (storage.kind, storage.size):
            raise damaged(path, f"storage {storage.key!r} has two types or sizes")
        return storage

    functions: Mapping[str, Callable[..., Any]] = {
        "collections.OrderedDict": lambda pairs=(): Attributed(pairs),
        "torch._utils._rebuild_tensor": _rebuild,
        "torch._utils._rebuild_tensor_v2": _rebuild_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_v3,
        "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: data,
        "torch.Size": tuple,
        "torch.device": lambda kind, index=None: kind if index is None else f"{kind}:{index}",
    }
    return read_pickle(cursor, path, functions=functions, names=_NAMES, persistent=persistent)


def _storage(identifier: Any, path: Path) -> _Storage:
    """Return the storage with an identifier (text, type, key, device, elements, part)."""
    if isinstance(identifier, tuple) and len(identifier) in (5, 6):
        word, kind, key, _, count, *parts = identifier
        view = parts[0] if parts else None
        whole = isinstance(kind, _Type) and isinstance(key, str) and type(count) is int
        if word == "storage" and whole and 0 <= count < 2**60:
            itemsize = 1 if kind.dtype is None else kind.dtype.itemsize
            if view is None:
                return _Storage(key, kind, count * itemsize)
            if isinstance(view, tuple) and len(view) == 3 and type(view[1]) is int:
                return _Storage(key, kind, count * itemsize, view[1] * itemsize)
    raise damaged(path, f"it refers to {str(identifier)[:80]}, which is no storage")


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    return _tensor(storage, storage.kind, offset, shape, strides)


def _rebuild_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> _Tensor:
    return _tensor(storage, storage.kind, offset, shape, strides, metadata)


def _rebuild_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    kind: Any,
    metadata: Any = None,
) -> _Tensor:
    return _tensor(storage, kind, offset, shape, strides, metadata)


def _tensor(
    storage: Any, kind: Any, offset: Any, shape: Any, strides: Any, metadata: Any = None
) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(kind, _Type) or kind.dtype is None:
        raise TypeError("no storage, or no type")
    for values in ((offset,), shape, strides):
        if not isinstance(values, tuple) or not all(type(v) is int for v in values):
            raise TypeError("offset, sizes or strides are no integers")
    bits = {} if metadata is None else metadata
    if not isinstance(bits, dict) or not bits.keys() <= {"conj", "neg"}:
        raise TypeError("other attributes than conj and neg")
    return _Tensor(
        storage, kind, offset, shape, strides, bool(bits.get("conj")), bool(bits.get("neg"))
    )


def _tensors(
    path: Path, tree: Any, data: Mapping[str, ByteRange], *, swap: bool, most: int
) -> Tensors:
    tensors, others = flatten(path, tree, lambda leaf: isinstance(leaf, _Tensor), most)
    for name, value in others.items():
        if isinstance(value, _Type):
            others[name] = value.name
        elif value is not None and not isinstance(value, str | int | float | bytes):
            raise damaged(path, f"{name!r} is a {type(value).__name__.strip('_')}, no tensor")
    specs = {name: _spec(path, name, tensor, data, swap) for name, tensor in tensors.items()}
    return Tensors(path, specs, others)


def _spec(
    path: Path, name: str, tensor: _Tensor, data: Mapping[str, ByteRange], swap: bool
) -> TensorSpec:
    storage, dtype = tensor.storage, tensor.kind.dtype
    assert dtype is not None
    bytes_of = data.get(storage.key)
    if bytes_of is None or bytes_of.size != storage.size:
        size = "no" if bytes_of is None else bytes_of.size
        raise damaged(path, f"the storage of {name!r} has {size} bytes instead of {storage.size}")
    if (dtype.kind == "b" and tensor.negate) or (dtype.kind != "c" and tensor.conjugate):
        raise damaged(path, f"{name!r} is the negative or conjugate of a {dtype}")
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return Strided(
        bytes_of,
        storage.start + tensor.offset * dtype.itemsize,
        tensor.shape,
        strides,
        dtype,
        swap=swap and dtype.itemsize > 1,
        conjugate=tensor.conjugate,
        negate=tensor.negate,
    ).spec(name, tensor.kind.name.removeprefix("torch."))
