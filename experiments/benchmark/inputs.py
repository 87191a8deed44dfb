"""The files that all sides of a workload read: images, weights, sentences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.benchmark.architectures import Llama
from experiments.benchmark.workloads import NUM_SENTENCES, Workload
from jaxnets.data.datasets import images, text
from jaxnets.data.files import fetch
from jaxnets.storage import write_safetensors

#: Standard deviation of random weights.
_DEVIATION = 0.02


def files(
    workload: Workload, data: Path | None, pretrained: Path | None, temporary: Path
) -> dict[str, str]:
    """Return the files of a workload, as fields of `Settings`; missing data are downloaded.

    Args:
        workload: to measure.
        data: folder of the data sets, or None.
        pretrained: folder of a sentence encoder, for "embed".
        temporary: folder for the files that are made.
    """
    if workload.task == "epoch":
        images_file, labels_file, *_ = (
            str(fetch(file, data)) for file in images.FASHION_MNIST_FILES
        )
        return {"images": images_file, "labels": labels_file}
    if isinstance(workload.network, Llama):
        write_llama(workload.network, temporary)
        return {"pretrained": str(temporary)}
    if workload.task == "embed":
        sentences = text.sst2(data).train.texts[:NUM_SENTENCES]
        path = temporary / "sentences.txt"
        path.write_text("\n".join(sentences), encoding="utf-8")
        return {"pretrained": str(pretrained), "sentences": str(path)}
    return {}


def write_llama(network: Llama, folder: Path) -> None:
    """Write a network with random weights as Hugging Face does, in float32.

    Args:
        network: its architecture.
        folder: for config.json and model.safetensors.
    """
    rng = np.random.default_rng(0)
    arrays = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else np.float32(_DEVIATION) * rng.standard_normal(shape, np.float32)
        for name, shape in network.tensors.items()
    }
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(network.config, indent=1))
