"""Which data sets there are and where each one is found."""

from __future__ import annotations

import os
from pathlib import Path

from jaxnets.data.datasets import cifar, images, speech, text
from jaxnets.data.files import DataFile, find

# By the name of the loader: the files that stand for the data set, one per layout.
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
    """Tell where each data set would be read from, without reading or downloading it.

    Args:
        directory: the explicit argument of a loader, if any.

    Returns:
        The folder of each data set by the name of its loader, None where it would be downloaded.
        What comes with scikit-learn or Python is not listed.

    Example:
        >>> {"mnist", "multi30k"} <= set(locate())
        True
    """
    found = {name: find(files, directory) for name, files in _FILES.items()}
    return {name: place and place[1].parent for name, place in found.items()}
