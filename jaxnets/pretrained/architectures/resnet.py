"""ResNet of Hugging Face and of torchvision (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxnets.models import convolutional
from jaxnets.models.convolutional import ResNet
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.images import image_input, read_image_processor
from jaxnets.pretrained.architectures.labels import num_labels
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.rules import Leaves, Rule
from jaxnets.pretrained.torch_layers import batch_norm, convolution, dense


def _build(config: Config, fields: Mapping[str, Any], *, with_head: bool = True) -> nn.Module:
    config.require(hidden_act="relu")
    sizes = config.integers("depths", (3, 4, 6, 3))
    channels = config.integers("hidden_sizes", (256, 512, 1024, 2048))
    if len(channels) != len(sizes):
        raise config.error(
            "hidden_sizes", f"does not have an entry for each of {len(sizes)} depths"
        )
    bottleneck = config.choice("layer_type", {"basic": False, "bottleneck": True}, "bottleneck")
    if bottleneck and any(size % 4 for size in channels):
        raise config.error("hidden_sizes", "is not supported; supported are multiples of 4")
    early = config.flag("downsample_in_bottleneck", False)
    preset: dict[str, Any] = {
        "stage_sizes": sizes,
        "bottleneck": bottleneck,
        "num_outputs": num_labels(config) if with_head else None,
        "width": config.integer("embedding_size", 64),
        "stage_features": tuple(size // 4 for size in channels) if bottleneck else channels,
        "bottleneck_stride": "1x1" if bottleneck and early else "3x3",
        "first_stage_strides": 2 if config.flag("downsample_in_first_stage", False) else 1,
    }
    if preset["stage_features"] == tuple(preset["width"] * 2**i for i in range(len(sizes))):
        del preset["stage_features"]
    return ResNet(**(preset | dict(fields)))


def _build_model(config: Config, fields: Mapping[str, Any]) -> nn.Module:
    return _build(config, fields, with_head=False)


def _inputs(module: nn.Module, config: Config) -> list[jax.ShapeDtypeStruct]:
    return image_input((32, 32), config)


def _to_config(module: nn.Module) -> dict[str, Any]:
    widths = module.stage_features or [
        module.width * 2**index for index in range(len(module.stage_sizes))
    ]
    return {
        "num_labels": module.num_outputs or 0,
        "depths": list(module.stage_sizes),
        "hidden_sizes": [width * (4 if module.bottleneck else 1) for width in widths],
        "embedding_size": module.width,
        "layer_type": "bottleneck" if module.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_bottleneck": module.bottleneck_stride == "1x1",
        "downsample_in_first_stage": module.first_stage_strides == 2,
    }


def _sizes(content: Mapping[str, Any], leaves: Leaves) -> dict[str, Any]:
    return {"num_channels": leaves["params/stem_conv/kernel"].shape[-2]}


def _convolution_norm(
    convolution_name: str, norm_name: str, target: str, suffixes: tuple[str, str]
) -> list[Rule]:
    return [
        *convolution(convolution_name, f"params/{target}{suffixes[0]}"),
        *batch_norm(norm_name, f"{target}{suffixes[1]}"),
    ]


def _rules(module: nn.Module) -> list[Rule]:
    def layer(source: str, target: str, suffixes: tuple[str, str]) -> list[Rule]:
        names = (f"resnet.{source}.convolution", f"resnet.{source}.normalization")
        return _convolution_norm(*names, target, suffixes)

    block, path = "encoder.stages.{stage}.layers.{block}", "stage_{stage+1}_block_{block+1}"
    return [
        *layer("embedder.embedder", "stem", ("_conv", "_norm")),
        *layer(f"{block}.layer.{{index}}", path, ("/conv_{index+1}", "/norm_{index+1}")),
        *layer(f"{block}.shortcut", f"{path}/shortcut", ("_conv", "_norm")),
        *dense("classifier.1", "params/head"),
    ]


def _torchvision_rules(module: nn.Module) -> list[Rule]:
    block, path = "layer{stage}.{block}", "stage_{stage}_block_{block+1}"
    numbered = ("/conv_{index}", "/norm_{index}")
    shortcut, suffixes = f"{block}.downsample", ("_conv", "_norm")
    return [
        *_convolution_norm("conv1", "bn1", "stem", suffixes),
        *_convolution_norm(f"{block}.conv{{index}}", f"{block}.bn{{index}}", path, numbered),
        *_convolution_norm(f"{shortcut}.0", f"{shortcut}.1", f"{path}/shortcut", suffixes),
        *dense("fc", "params/head"),
    ]


def _preset(build: Callable[..., nn.Module]) -> Callable[[Config, Mapping[str, Any]], nn.Module]:
    return lambda config, fields: build(**fields)


RESNET = Architecture(
    model_type="resnet",
    classes={"ResNetForImageClassification": _build, "ResNetModel": _build_model},
    rules=_rules,
    inputs=_inputs,
    prefix="resnet.",
    ignored=(
        "resnet.embedder.embedder.normalization.num_batches_tracked",
        "resnet.encoder.stages.{stage}.layers.{block}.layer.{index}.normalization"
        ".num_batches_tracked",
        "resnet.encoder.stages.{stage}.layers.{block}.shortcut.normalization.num_batches_tracked",
    ),
    to_config=_to_config,
    sizes=_sizes,
    processor=read_image_processor,
)

#: A file of torchvision has no config.json: the caller names its function.
TORCHVISION = Architecture(
    model_type="torchvision",
    classes={
        build.__name__: _preset(build)
        for build in (
            convolutional.resnet18,
            convolutional.resnet34,
            convolutional.resnet50,
            convolutional.resnet101,
            convolutional.resnet152,
        )
    },
    rules=_torchvision_rules,
    inputs=_inputs,
    ignored=(
        "bn1.num_batches_tracked",
        "layer{stage}.{block}.bn{index}.num_batches_tracked",
        "layer{stage}.{block}.downsample.1.num_batches_tracked",
    ),
)
