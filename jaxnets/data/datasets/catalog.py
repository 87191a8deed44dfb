"""Catalog of the datasets and where each is located."""

from __future__ import annotations

import os
from pathlib import Path

from jaxnets.data.datasets import cifar, images, speech, text
from jaxnets.data.files import DataFile, find

# {name of the loader: one representative file per layout of the dataset}
_FILES: dict[str, tuple[DataFile, ...]] = {
    "mnist": images.MNIST_FILES[:1],
    "fashion_mnist": images.FASHION_MNIST_FILES[:1],
    "cifar10": cifar.LAYOUTS,
    "tiny_shakespeare": (text.TINY_SHAKESPEARE_FILE,),
    "multi30k": text.MULTI30K_FILES[:1],
    "sst2": text.SST2_FILES[:1],
    "spoken_digits": speech.LAYOUTS,
}


def locate(directory: str | os.PathLike[str] | None = None) -> dict[str, Path | None]:
    """Return where each dataset would be read from, without reading or downloading it.

    Args:
        directory: the explicit argument of a loader, if any.

    Returns:
        {name of the loader: folder, or None if it would be downloaded}. Datasets that come with
        scikit-learn or Python are not listed.

    Example:
        >>> {"mnist", "multi30k"} <= set(locate())
        True
    """
    found = {name: find(files, directory) for name, files in _FILES.items()}
    return {name: place and place[1].parent for name, place in found.items()}
