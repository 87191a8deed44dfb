"""Reading a file without this library: its bytes, or its tensors by the package safetensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from experiments.benchmark.architectures import Llama
from experiments.benchmark.reading import reading
from experiments.benchmark.sides import Prepared, Settings

LIBRARIES = ("numpy", "safetensors")


def prepare(settings: Settings) -> Prepared:
    """Read the file into new memory; the variant "package" makes tensors of NumPy."""
    network = settings.workload.network
    assert isinstance(network, Llama)
    read = {"raw": _read_bytes, "package": _read_tensors}[settings.variant]
    return reading(settings, read, sum(math.prod(shape) for shape in network.tensors.values()))


def _read_bytes(path: Path) -> object:
    content = np.empty(path.stat().st_size, np.uint8)
    view, position = content.data, 0
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(view[position:]):  # type: ignore[attr-defined]
            position += count
    assert position == len(content)
    return content


def _read_tensors(path: Path) -> object:
    from safetensors.numpy import load_file

    return load_file(path)
