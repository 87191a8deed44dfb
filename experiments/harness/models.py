"""The networks of the image experiments, by the name that --model takes."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

import jaxnets as jn

ModelName = Literal[
    "perceptron",
    "mlp",
    "mixer",
    "lenet5",
    "cnn",
    "whitened",
    "resnet9",
    "resnet18",
    "wrn16_4",
]


def make_model(name: ModelName, dataset: jn.data.ImageDataset, precision: str) -> Any:
    """Build a network for a data set.

    Args:
        name: see `ModelName`.
        dataset: tells the number of classes and the size of the images.
        precision: compute dtype, "float32" or "bfloat16".

    Returns:
        A Linen module.
    """
    shared = {
        "num_outputs": dataset.num_classes,
        "precision": jn.Precision(compute=jnp.dtype(precision)),
    }
    side = min(dataset.image_shape[:2])
    small = side < 16
    match name:
        case "perceptron":
            return jn.MLP(features=(), **shared)
        case "mlp":
            return jn.MLP(features=(512, 256), norm="batch", dropout_rate=0.3, **shared)
        case "mixer":
            patch = next(size for size in (4, 2, 1) if side % size == 0)
            return jn.MLPMixer(patch, 96, 4, 48, 192, **shared)
        case "lenet5":
            return jn.LeNet5(**shared)
        case "cnn":
            features = (32, 64) if small else (32, 64, 128)
            return jn.ConvNet(
                features, hidden_features=(), norm="batch", dropout_rate=0.3, **shared
            )
        case "whitened":
            if small:
                return jn.WhitenedConvNet((48, 192), **shared)
            return jn.WhitenedConvNet((64, 256, 256), depth=3, patch=3, **shared)
        case "resnet9":
            return jn.ResNet9(width=16, **shared)
        case "resnet18":
            return jn.convolutional.resnet18(dataset.num_classes, stem="cifar", **shared)
        case "wrn16_4":
            return jn.WideResNet(16, 4, **shared)


def prefers_map(name: ModelName) -> bool:
    """Whether a population of this network is faster member by member than side by side on CPU."""
    return name not in ("perceptron", "mlp", "mixer")
