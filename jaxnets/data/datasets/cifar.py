"""CIFAR-10 from its binary version, or from a JPEG re-encoding."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from jaxnets.data.archives import open_archive
from jaxnets.data.arrays import Arrays
from jaxnets.data.datasets.images import ImageDataset
from jaxnets.data.files import (
    DataFile,
    cache_folder,
    cached_array,
    fetch,
    find,
    read_verified,
)

_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_MEMBERS = "cifar-10-batches-bin"  # the folder within the archive
_FOLDERS = ("cifar10", f"cifar10/{_MEMBERS}", _MEMBERS, "cifar10_jpeg")
_RECORD_BYTES = 1 + 3 * 32 * 32
_FILE_BYTES = 10_000 * _RECORD_BYTES
_UNPACKED_BYTES = 6 * _FILE_BYTES + (1 << 20)  # a folder and two short texts beside them
_CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

# Its published md5 is c32a1d4ab5d03f1284b67883e8d87530.
ARCHIVE = DataFile(
    "cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    170_052_171,
    folders=_FOLDERS,
    url=_URL,
)
_BINARY_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
BINARIES = tuple(
    DataFile(name, sha256, _FILE_BYTES, folders=_FOLDERS, hint=f"extract it from {_URL}")
    for name, sha256 in _BINARY_SHA256.items()
)
JPEG = DataFile(
    "cifar10_jpeg.npz",
    "a6fc75b15f162aca55379b9d5d53a82a76e221d36fecea05067d4f329c8feb6b",
    55_793_131,
    folders=_FOLDERS,
    hint=f"use the original: download {_URL}",
)
LAYOUTS = (BINARIES[0], ARCHIVE, JPEG)  # one representative file each


def cifar10(
    directory: str | os.PathLike[str] | None = None, *, download: bool = True
) -> ImageDataset:
    """Load CIFAR-10: 50,000 training and 10,000 test color images.

    Three layouts are supported and tried in this order in every place of the search order of
    `jaxnets.data.files` (subfolders `cifar10`, `cifar-10-batches-bin`, `cifar10_jpeg`):

    1. `data_batch_1.bin` ... `data_batch_5.bin` and `test_batch.bin`, the binary version;
    2. `cifar-10-binary.tar.gz`, the same as published, which is not extracted;
    3. `cifar10_jpeg.npz`, the images as JPEG of quality 75, decoded once into the user's cache.
       These are not the original pixels and results are not comparable with published ones, so
       the dataset is named "CIFAR-10 (JPEG q75)". Needs Pillow.

    The pickled Python version is not supported, because unpickling executes code.

    Args:
        directory: the folder to search first.
        download: whether to download the binary version (170 MB) if no layout is found.

    Returns:
        Images [32, 32, 3] of 10 classes.

    Raises:
        FileNotFoundError: a file is not found and `download` is False.
        ValueError: a file is truncated or not the published one.
        OSError: the download failed.
        ImportError: the JPEG layout without Pillow.

    References:
        Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images, section 3.1.
    """
    found = find(LAYOUTS, directory)
    file, path = found or (ARCHIVE, fetch(ARCHIVE, directory, download=download))
    if file is JPEG:
        return _from_jpeg(path)
    contents = _from_archive(path) if file is ARCHIVE else _from_folder(path.parent)
    *train, test = [decode_records(content, name=name) for name, content in contents.items()]
    joined = {key: np.concatenate([part[key] for part in train]) for key in test}
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return ImageDataset("CIFAR-10", joined, test, _CLASS_NAMES, mean, std)


def _from_folder(folder: Path) -> dict[str, bytes]:
    """Return {name of each part: its records}, the test part last."""
    contents = {}
    for file in BINARIES:
        path = folder / file.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {file.remedy}")
        contents[str(path)] = read_verified(path, file)
    return contents


def _from_archive(path: Path) -> dict[str, bytes]:
    """Return the same as `_from_folder`."""
    archive = io.BytesIO(read_verified(path, ARCHIVE))
    with open_archive(archive, path, max_bytes=_UNPACKED_BYTES) as members:
        contents = {PurePosixPath(member.name).name: member.read() for member in members}
    return {f"{path}/{file.name}": contents[file.name] for file in BINARIES}


def decode_records(content: bytes, *, name: str = "file") -> Arrays:
    """Decode records of the binary version: a label byte, then the red, green and blue planes.

    Args:
        content: complete records of 3,073 bytes.
        name: of the file, for errors.

    Returns:
        {"inputs": uint8 [examples, 32, 32, 3], "labels": int32 [examples]}.

    Raises:
        ValueError: not a whole number of records.
    """
    if len(content) % _RECORD_BYTES:
        raise ValueError(
            f"{name} holds {len(content)} bytes, not a whole number of CIFAR-10 records of "
            f"{_RECORD_BYTES} bytes; get the file anew"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)  # [examples, channels, height, width]
    return {
        # [examples, height, width, channels]
        "inputs": np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
        "labels": records[:, 0].astype(np.int32),
    }


def _from_jpeg(path: Path) -> ImageDataset:
    parts = {}
    with np.load(io.BytesIO(read_verified(path, JPEG)), allow_pickle=False) as archive:
        for part in ("train", "test"):
            parts[part] = {
                "inputs": _decode_or_load(archive, part),
                "labels": archive[f"{part}_labels"].astype(np.int32),
            }
    mean, std = (0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)
    return ImageDataset(
        "CIFAR-10 (JPEG q75)", parts["train"], parts["test"], _CLASS_NAMES, mean, std
    )


def _decode_or_load(archive: Mapping[str, np.ndarray], part: str) -> np.ndarray:
    """Return the pixels of "train" or "test", from the cache if it has them."""
    return cached_array(
        cache_folder() / "cifar10_jpeg" / f"{part}-{JPEG.sha256[:16]}.npy",
        lambda: decode_jpegs(archive[f"{part}_jpeg"], archive[f"{part}_offsets"]),
    )


def decode_jpegs(encoded: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Decode JPEG images that are concatenated in one array.

    Args:
        encoded: uint8 [bytes].
        offsets: int64 [examples + 1]; image i is `encoded[offsets[i]:offsets[i + 1]]`.

    Returns:
        uint8 [examples, height, width, 3].

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("decoding JPEG needs Pillow; run `pip install pillow`") from error
    content = encoded.tobytes()
    return np.stack(
        [
            np.asarray(Image.open(io.BytesIO(content[start:stop])).convert("RGB"))
            for start, stop in itertools.pairwise(offsets.tolist())
        ]
    )
