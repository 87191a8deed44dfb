"""Files and folders of tensors: the format is that of the name, folders are read by their index."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from jaxnets.pretrained.formats.gguf import read_gguf
from jaxnets.pretrained.formats.hdf5 import read_h5, read_keras
from jaxnets.pretrained.formats.numpy_files import read_npy, read_npz
from jaxnets.pretrained.formats.onnx import read_onnx
from jaxnets.pretrained.formats.torch import read_torch
from jaxnets.storage import read_json
from jaxnets.storage.byte_ranges import damaged
from jaxnets.storage.safetensors import read_safetensors
from jaxnets.storage.tensors import Tensors, TensorSpec

_READERS: Mapping[str, Callable[[Path], Tensors]] = {
    ".safetensors": read_safetensors,
    ".pt": read_torch,
    ".pth": read_torch,
    ".bin": read_torch,
    ".npz": read_npz,
    ".npy": read_npy,
    ".gguf": read_gguf,
    ".h5": read_h5,
    ".keras": read_keras,
    ".onnx": read_onnx,
}
#: Files of a Hugging Face folder, the first one that is there counts.
_KNOWN = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_INDEX = ".index.json"
_SHOWN = 5


class _Index(TypedDict):
    weight_map: dict[str, str]


def read_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Open the tensors of a file or folder by name; data are read when a tensor is accessed.

    Nothing in a file is executed, and no other library than NumPy is needed. Files are never mapped
    into memory: at most the bytes of the tensor that is asked for are read, into a new array that
    XLA takes without a copy.

    Args:
        path: a file: .safetensors, torch's .pt, .pth, .bin, .npz, .npy, .gguf, .weights.h5, .keras,
            .onnx; an index of shards (.index.json); or a folder with one of them. A folder of
            Hugging Face is read by model.safetensors.index.json, model.safetensors,
            pytorch_model.bin.index.json or pytorch_model.bin, the first one that is there.

    Returns:
        {name: array}. `specs` has shapes and types without reading data, `read` reads slices.

    Raises:
        FileNotFoundError: no such file or folder, or a missing shard.
        ValueError: damaged, or it holds something that is not read; the message names the file.
        OSError: it cannot be read.

    Example:
        >>> import tempfile, numpy as np
        >>> file = Path(tempfile.mkdtemp()) / "weights.npz"
        >>> np.savez(file, kernel=np.eye(2), bias=np.zeros(2))
        >>> tensors = read_tensors(file)
        >>> {name: spec.shape for name, spec in tensors.specs.items()}
        {'kernel': (2, 2), 'bias': (2,)}
        >>> tensors["kernel"]
        array([[1., 0.],
               [0., 1.]])
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a file or folder of tensors")
        raise damaged(
            path, "its format is not known", f"give a file that ends in {', '.join(_READERS)}"
        )
    return reader(path)


def _file_in(folder: Path) -> Path:
    """Return the file of a folder that has its tensors."""
    for name in _KNOWN:
        if (folder / name).is_file():
            return folder / name
    indices = [path for path in sorted(folder.iterdir()) if path.name.endswith(_INDEX)]
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _READERS]
    found = indices or files
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(
            f"{folder} has no file of tensors; give a folder with one that ends in "
            f"{', '.join(_READERS)}"
        )
    raise ValueError(f"{folder} has {_some([path.name for path in found])}; give one of them")


def _read_shards(index: Path) -> Tensors:
    """Open the files that an index names, which must have its tensors and no others."""
    document = read_json(
        index, what="an index of shards", remedy="get the folder anew, or give one of its files"
    )
    weight_map = document.check(_Index)["weight_map"]
    suffix = Path(index.name.removesuffix(_INDEX)).suffix
    shards: dict[str, Tensors] = {}
    for name in sorted(set(weight_map.values())):
        # A link in the folder may lead elsewhere, as in the cache of the Hugging Face hub.
        if name != os.path.basename(name) or "\\" in name or "\0" in name or name in ("", ".."):
            raise document.error(f"the shard {name!r} is no file of its folder", key="weight_map")
        if not name.endswith(suffix) or suffix not in _READERS:
            raise document.error(f"the shard {name!r} is no {suffix} file", key="weight_map")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is missing; get the folder anew")
        shards[name] = _READERS[suffix](index.parent / name)
    missing = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if missing:
        raise document.error(f"{_some(missing)} not in the shard that it names", key="weight_map")
    stray = [
        name
        for shard, tensors in shards.items()
        for name in tensors
        if weight_map.get(name) != shard
    ]
    if stray:
        raise document.error(f"it does not have {_some(stray)} of its shards", key="weight_map")
    specs: dict[str, TensorSpec] = {n: shards[shard].specs[n] for n, shard in weight_map.items()}
    metadata: dict[str, Any] = {}
    for tensors in shards.values():
        metadata |= tensors.metadata
    return Tensors(index.parent, specs, metadata)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
