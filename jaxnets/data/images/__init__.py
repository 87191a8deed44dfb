"""Images: normalization and augmentation."""

from jaxnets.data.images.augment import (
    alternating_flip,
    cutout,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_shift,
)

__all__ = [
    "alternating_flip",
    "cutout",
    "mixup",
    "normalize",
    "random_crop",
    "random_flip",
    "random_shift",
]
