"""The networks of the image experiments: the library's registry, with fields for small images."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

import jaxnets as jn
from jaxnets.models.registry import MODELS

#: Names of `jaxnets.models.registry.MODELS`, and "perceptron": an MLP without a hidden layer.
ModelName = Literal[
    "perceptron",
    "mlp",
    "mixer",
    "lenet5",
    "convnet",
    "whitened_convnet",
    "resnet9",
    "resnet18_cifar",
    "wide_resnet16_4",
]


def make_model(name: ModelName, dataset: jn.data.ImageDataset, precision: str) -> Any:
    """Build a network for a data set.

    Args:
        name: see `ModelName`.
        dataset: gives the number of classes and the size of the images.
        precision: compute dtype, "float32" or "bfloat16".

    Returns:
        A Linen module.
    """
    return MODELS["mlp" if name == "perceptron" else name].network(
        dataset.num_classes,
        precision=jn.Precision(compute=jnp.dtype(precision)),
        **_fields(name, min(dataset.image_shape[:2])),
    )


def _fields(name: ModelName, side: int) -> dict[str, Any]:
    """Return the fields that differ from the registry's, for images `side` pixels high."""
    small = side < 16
    match name:
        case "perceptron":
            return {"features": ()}
        case "mlp":
            return {"features": (512, 256), "norm": "batch", "dropout_rate": 0.3}
        case "mixer":
            return {
                "patch_size": next(size for size in (4, 2, 1) if side % size == 0),
                "hidden_size": 96,
                "num_layers": 4,
                "token_width": 48,
                "channel_width": 192,
            }
        case "convnet":
            features = (32, 64) if small else (32, 64, 128)
            regularized = {"norm": "batch", "dropout_rate": 0.3}
            return {"features": features, "hidden_features": (), **regularized}
        case "whitened_convnet":
            if small:
                return {"features": (48, 192)}
            return {"features": (64, 256, 256), "depth": 3, "patch": 3}
        case "resnet9":
            return {"width": 16}
    return {}


def prefers_map(name: ModelName) -> bool:
    """Whether a population of this network trains faster on CPU by `lax.map` than by `vmap`."""
    return name not in ("perceptron", "mlp", "mixer")
