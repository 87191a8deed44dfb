"""Image datasets: scikit-learn's digits, MNIST and Fashion-MNIST, and the IDX decoder."""

from __future__ import annotations

import dataclasses
import math
import os
import struct

import numpy as np

from jaxnets.data.arrays import Arrays, check_arrays, split
from jaxnets.data.files import DataFile, fetch, read_verified

_DIGIT_NAMES = tuple("0123456789")
_DIGITS_HELD_OUT = 360  # 20% of the 1,797 images, rounded up


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and labels in memory, with the statistics and names that belong to them.

    Attributes:
        name: for titles and reports.
        train: {"inputs": uint8 [examples, height, width, channels], "labels": int32 [examples]}.
        test: the same for the held-out examples.
        class_names: name of each label.
        mean: per channel, of the training pixels in [0, 1].
        std: per channel, of the training pixels in [0, 1].

    Raises:
        ValueError: arrays that `data.check_arrays` refuses, such as labels without a class name.
    """

    name: str
    train: Arrays
    test: Arrays
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for part in (self.train, self.test):
            check_arrays(part, num_classes=self.num_classes)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.train["inputs"].shape[1:]
        return height, width, channels


def digits() -> ImageDataset:
    """Load scikit-learn's 8 x 8 handwritten digits, which need no download.

    The 17 gray levels 0 ... 16 are scaled to 0 ... 255. The split is fixed and not official: 1,437
    training and 360 held-out images, stratified by class. The images are those of
    `sklearn.datasets.load_digits`.

    Returns:
        Images [8, 8, 1] of 10 classes.

    References:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
        Learning Repository (its test set).

    Example:
        >>> dataset = digits()
        >>> len(dataset.train["labels"]), len(dataset.test["labels"]), dataset.image_shape
        (1437, 360, (8, 8, 1))
    """
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    data = {
        "inputs": np.rint(bunch.images[..., None] * (255 / 16)).astype(np.uint8),
        "labels": bunch.target.astype(np.int32),
    }
    num_train = len(data["labels"]) - _DIGITS_HELD_OUT
    train, test = split(data, (num_train, _DIGITS_HELD_OUT), seed=0, stratify=True)
    return ImageDataset("digits", train, test, _DIGIT_NAMES, (0.3055,), (0.3759,))


# Sizes and sha256 of the decompressed files, in the order images, labels of train, then of test;
# the sizes are those of both datasets.
_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_BYTES = (16 + 60_000 * 784, 8 + 60_000, 16 + 10_000 * 784, 8 + 10_000)
_MNIST_SHA256 = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
# Computed from the files of Debian's package dataset-fashion-mnist.
_FASHION_MNIST_SHA256 = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
_FASHION_MNIST = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist"
    "/b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"
)
MNIST_FILES = tuple(
    DataFile(
        f"{part}-ubyte.gz",
        sha256,
        max_bytes,
        folders=("mnist",),
        url=f"https://storage.googleapis.com/cvdf-datasets/mnist/{part}-ubyte.gz",
    )
    for part, sha256, max_bytes in zip(_PARTS, _MNIST_SHA256, _BYTES, strict=True)
)
FASHION_MNIST_FILES = tuple(
    DataFile(
        f"{part}-ubyte.gz",
        sha256,
        max_bytes,
        folders=("fashion_mnist", "fashion-mnist"),
        url=f"{_FASHION_MNIST}/{part}-ubyte.gz",
        hint="on Debian run `apt-get install dataset-fashion-mnist`",
    )
    for part, sha256, max_bytes in zip(_PARTS, _FASHION_MNIST_SHA256, _BYTES, strict=True)
)


def mnist(
    directory: str | os.PathLike[str] | None = None, *, download: bool = True
) -> ImageDataset:
    """Load MNIST: 60,000 training and 10,000 test images of handwritten digits.

    Args:
        directory: the folder to search first for the four IDX files, gzipped or not, directly or
            in a subfolder `mnist`; then the search order of `jaxnets.data.files`.
        download: whether to download files that are not found.

    Returns:
        Images [28, 28, 1] of 10 classes.

    Raises:
        FileNotFoundError: a file is not found and `download` is False.
        ValueError: a file is truncated or not the published one.
        OSError: the download failed.

    References:
        LeCun, Bottou, Bengio and Haffner (1998), Gradient-Based Learning Applied to Document
        Recognition, Proceedings of the IEEE 86(11).
    """
    train, test = _load_idx(MNIST_FILES, directory, download=download)
    return ImageDataset("MNIST", train, test, _DIGIT_NAMES, (0.1307,), (0.3081,))


def fashion_mnist(
    directory: str | os.PathLike[str] | None = None, *, download: bool = True
) -> ImageDataset:
    """Load Fashion-MNIST: 60,000 training and 10,000 test images of articles of clothing.

    Args:
        directory: the folder to search first for the four IDX files, gzipped or not, directly or
            in a subfolder `fashion_mnist`; then the search order of `jaxnets.data.files`, which
            includes Debian's package.
        download: whether to download files that are not found.

    Returns:
        Images [28, 28, 1] of 10 classes.

    Raises:
        FileNotFoundError: a file is not found and `download` is False.
        ValueError: a file is truncated or not the published one.
        OSError: the download failed.

    References:
        Xiao, Rasul and Vollgraf (2017), Fashion-MNIST, arXiv 1708.07747, table 1.
    """
    train, test = _load_idx(FASHION_MNIST_FILES, directory, download=download)
    class_names = (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )
    return ImageDataset("Fashion-MNIST", train, test, class_names, (0.2860,), (0.3530,))


def _load_idx(
    files: tuple[DataFile, ...], directory: str | os.PathLike[str] | None, *, download: bool
) -> tuple[Arrays, Arrays]:
    arrays = []
    for file in files:
        path = fetch(file, directory, download=download)
        arrays.append(decode_idx(read_verified(path, file), name=str(path)))
    train_images, train_labels, test_images, test_labels = arrays
    return (
        {"inputs": train_images[..., None], "labels": train_labels.astype(np.int32)},
        {"inputs": test_images[..., None], "labels": test_labels.astype(np.int32)},
    )


_MAX_AXES = 32  # of the first NumPy that reads them; published files have at most 4
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def decode_idx(content: bytes, *, name: str = "IDX file") -> np.ndarray:
    """Decode the bytes of an IDX file.

    The format is two zero bytes, a type code, the number of axes, the length of each axis as
    big-endian uint32, then the values in row-major order.

    Args:
        content: the whole file, decompressed.
        name: of the file, for errors.

    Returns:
        Array of the shape and dtype of the header, in native byte order; a read-only view of
        `content` where no byte swap is needed.

    Raises:
        ValueError: a wrong header, or another number of bytes than it announces.

    Example:
        >>> decode_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        array([7, 8, 9], dtype=uint8)
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise ValueError(f"{name} starts with bytes {content[:4]!r}, which is not an IDX header")
    num_axes = content[3]
    if num_axes > _MAX_AXES:
        raise ValueError(f"{name} announces {num_axes} axes; at most {_MAX_AXES} are read")
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
    try:
        array = np.frombuffer(content, dtype, offset=header).reshape(shape)
    except ValueError as error:  # an axis of length 0 beside others that are too long
        raise ValueError(f"{name} announces shape {shape}, which no array can have") from error
    return array.astype(dtype.newbyteorder("="), copy=False)
