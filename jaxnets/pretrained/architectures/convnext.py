"""ConvNeXt of Hugging Face (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxnets.models.convolutional import ConvNeXt
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.images import image_input, read_image_processor, square
from jaxnets.pretrained.architectures.labels import num_labels
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.rules import Leaves, Rule
from jaxnets.pretrained.torch_layers import convolution, dense, norm

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"} | {
    name: name for name in ("relu", "silu", "tanh")
}


def _build(config: Config, fields: Mapping[str, Any], *, with_head: bool = True) -> nn.Module:
    sizes = config.integers("depths", (3, 3, 9, 3))
    features = config.integers("hidden_sizes", (96, 192, 384, 768))
    if len(features) != len(sizes):
        raise config.error(
            "hidden_sizes", f"does not have an entry for each of {len(sizes)} depths"
        )
    if config.integer("num_stages", len(sizes)) != len(sizes):
        raise config.error("num_stages", f"is not the number of depths, {len(sizes)}")
    preset: dict[str, Any] = {
        "stage_sizes": sizes,
        "stage_features": features,
        "num_outputs": num_labels(config) if with_head else None,
        "patch_size": square(config, "patch_size", 4),
        "dropout_rate": config.number("drop_path_rate", 0.0),
        "scale_init": config.number("layer_scale_init_value", 1e-6),
        "activation": config.choice("hidden_act", _ACTIVATIONS, "gelu"),
        "pooled_norm_epsilon": config.number("layer_norm_eps", 1e-12),
    }
    if preset["scale_init"] <= 0:
        preset["scale_init"] = None
    return ConvNeXt(**(preset | dict(fields)))


def _inputs(module: nn.Module, config: Config) -> list[jax.ShapeDtypeStruct]:
    side = module.patch_size * 2 ** (len(module.stage_sizes) - 1)  # the smallest image
    return image_input((side, side), config)


def _to_config(module: nn.Module) -> dict[str, Any]:
    return {
        "patch_size": module.patch_size,  # which a ResNet does not have
        "num_labels": module.num_outputs or 0,
        "depths": list(module.stage_sizes),
        "hidden_sizes": list(module.stage_features),
        "num_stages": len(module.stage_sizes),
        "drop_path_rate": module.dropout_rate,
        "layer_scale_init_value": module.scale_init or 0.0,
        "hidden_act": {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[
            module.activation
        ],
        "layer_norm_eps": module.pooled_norm_epsilon,
    }


def _sizes(content: Mapping[str, Any], leaves: Leaves) -> dict[str, Any]:
    return {"num_channels": leaves["params/stem_conv/kernel"].shape[-2]}


def _rules(module: nn.Module) -> list[Rule]:
    stages = "convnext.encoder.stages"
    block = f"{stages}.{{stage}}.layers.{{block}}"
    path = "params/stage_{stage+1}_block_{block+1}"
    return [
        *convolution("convnext.embeddings.patch_embeddings", "params/stem_conv"),
        *norm("convnext.embeddings.layernorm", "params/stem_norm"),
        *norm(f"{stages}.{{stage}}.downsampling_layer.0", "params/reduce_{stage+1}_norm"),
        *convolution(f"{stages}.{{stage}}.downsampling_layer.1", "params/reduce_{stage+1}_conv"),
        *convolution(f"{block}.dwconv", f"{path}/depthwise"),
        *norm(f"{block}.layernorm", f"{path}/norm"),
        *dense(f"{block}.pwconv1", f"{path}/expand"),
        *dense(f"{block}.pwconv2", f"{path}/reduce"),
        Rule(f"{block}.layer_scale_parameter", f"{path}/scale"),
        *norm("convnext.layernorm", "params/norm"),
        *dense("classifier", "params/head"),
    ]


def _build_model(config: Config, fields: Mapping[str, Any]) -> nn.Module:
    return _build(config, fields, with_head=False)


CONVNEXT = Architecture(
    model_type="convnext",
    classes={"ConvNextForImageClassification": _build, "ConvNextModel": _build_model},
    rules=_rules,
    inputs=_inputs,
    prefix="convnext.",
    aliases={"num_hidden_layers": "num_stages"},
    to_config=_to_config,
    sizes=_sizes,
    processor=read_image_processor,
)
