"""Data: deterministic batch sources, image data sets, augmentation, files with pinned digests."""

from jaxnets.data.arrays import check_arrays, pad_batch, split
from jaxnets.data.augment import (
    cutout,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_shift,
)
from jaxnets.data.catalog import locate
from jaxnets.data.cifar import cifar10
from jaxnets.data.files import safe_extract
from jaxnets.data.images import ImageDataset, digits, fashion_mnist, mnist
from jaxnets.data.pipeline import grain_batches
from jaxnets.data.prefetching import prefetch
from jaxnets.data.sources import (
    chunked,
    index_batches,
    member_batches,
    sequential_batches,
    shuffled_batches,
)

__all__ = [
    "ImageDataset",
    "check_arrays",
    "chunked",
    "cifar10",
    "cutout",
    "digits",
    "fashion_mnist",
    "grain_batches",
    "index_batches",
    "locate",
    "member_batches",
    "mixup",
    "mnist",
    "normalize",
    "pad_batch",
    "prefetch",
    "random_crop",
    "random_flip",
    "random_shift",
    "safe_extract",
    "sequential_batches",
    "shuffled_batches",
    "split",
]
