"""ViT and DeiT of Hugging Face (Dosovitskiy et al. 2021, Touvron et al. 2021)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxnets.models.transformer import VisionTransformer
from jaxnets.models.transformer.config import build_preset
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.images import (
    grid_size,
    height_width,
    image_input,
    read_image_processor,
    square,
)
from jaxnets.pretrained.architectures.labels import num_labels
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.convolution_layouts import PatchKernel
from jaxnets.pretrained.formats import Tensors
from jaxnets.pretrained.layouts import Squeeze
from jaxnets.pretrained.rules import Leaves, Rule
from jaxnets.pretrained.torch_layers import dense, norm

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"} | {
    **{name: name for name in ("relu", "relu6", "sigmoid", "silu", "tanh", "mish")},
    "swish": "silu",
}
_LAYER = "params/stack/layer_{layer}"
_RENAMED = (
    (".encoder.layer.", ".layers."),
    *[
        (f".attention.attention.{name}.", f".attention.{name[0]}_proj.")
        for name in ("query", "key", "value")
    ],
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def _build(
    config: Config,
    fields: Mapping[str, Any],
    *,
    distillation: str | None = None,
    with_pooler: bool = False,
) -> nn.Module:
    features = config.integer("hidden_size", 768)
    preset: dict[str, Any] = {
        "num_outputs": num_labels(config),
        "patch_size": square(config, "patch_size", 16),
        "num_layers": config.integer("num_hidden_layers", 12),
        "features": features,
        "num_heads": config.integer("num_attention_heads", 12),
        "head_dim": config.integer("head_dim", None),
        "mlp_dim": config.integer("intermediate_size", 3072),
        "activation": config.choice("hidden_act", _ACTIVATIONS, "gelu"),
        "norm_epsilon": config.number("layer_norm_eps", 1e-12),
        "dropout_rate": config.number("hidden_dropout_prob", 0.0),
        "attention_dropout_rate": config.number("attention_probs_dropout_prob", 0.0),
        "distillation": distillation,
        "key_bias": True,
    }
    if with_pooler:
        config.require(pooler_act="tanh")
        preset["num_outputs"] = None
        preset["pooler_dim"] = config.integer("pooler_output_size", None) or features
    if not config.flag("qkv_bias", True):
        preset["qkv_bias"] = False
    return build_preset(VisionTransformer, preset, dict(fields))


def _without_pooler(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Leave the pooler out where the file has none, as that of a network without labels."""
    if any(name.endswith("pooler.dense.weight") for name in tensors.specs):
        return module
    return module.clone(pooler_dim=None)


def _inputs(module: nn.Module, config: Config) -> list[jax.ShapeDtypeStruct]:
    return image_input(height_width(config, "image_size", 224), config)


def _to_config(module: nn.Module) -> dict[str, Any]:
    config = module.config
    head_dim = {} if config.head_dim is None else {"head_dim": config.head_dim}
    return {
        **head_dim,
        "num_labels": module.num_outputs or 0,
        "patch_size": module.patch_size,
        "num_hidden_layers": module.num_layers,
        "hidden_size": config.features,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim or 4 * config.features,
        "hidden_act": {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[
            config.activation
        ],
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "qkv_bias": config.qkv_bias is not False,
        "pooler_output_size": module.pooler_dim or config.features,
        "pooler_act": "tanh",
    }


def _sizes(content: Mapping[str, Any], leaves: Leaves) -> dict[str, Any]:
    num_tokens = sum(f"params/{name}" in leaves for name in ("token", "distillation_token"))
    num_patches = leaves["params/position/embedding"].shape[0] - num_tokens
    pixels = leaves["params/patch/kernel"].shape[0] // content["patch_size"] ** 2
    return {"image_size": grid_size(content, num_patches), "num_channels": pixels}


def _rules(module: nn.Module, *, prefix: str) -> list[Rule]:
    layer, embeddings = f"{prefix}encoder.layer.{{layer}}", f"{prefix}embeddings"
    patches = f"{embeddings}.patch_embeddings.projection"
    window = (module.patch_size, module.patch_size)
    heads = [*dense("classifier", "params/head")]
    if module.distillation == "head":
        heads = [
            *dense("cls_classifier", "params/head"),
            *dense("distillation_classifier", "params/distillation_head"),
        ]
    return [
        Rule(f"{embeddings}.cls_token", "params/token", (Squeeze((0, 1)),)),
        Rule(f"{embeddings}.distillation_token", "params/distillation_token", (Squeeze((0, 1)),)),
        Rule(f"{embeddings}.position_embeddings", "params/position/embedding", (Squeeze((0,)),)),
        Rule(f"{patches}.weight", "params/patch/kernel", (PatchKernel(window),)),
        Rule(f"{patches}.bias", "params/patch/bias"),
        *norm(f"{layer}.layernorm_before", f"{_LAYER}/attention_norm"),
        *[
            rule
            for name in ("query", "key", "value")
            for rule in dense(f"{layer}.attention.attention.{name}", f"{_LAYER}/attention/{name}")
        ],
        *dense(f"{layer}.attention.output.dense", f"{_LAYER}/attention/output"),
        *norm(f"{layer}.layernorm_after", f"{_LAYER}/feed_forward_norm"),
        *dense(f"{layer}.intermediate.dense", f"{_LAYER}/feed_forward/hidden"),
        *dense(f"{layer}.output.dense", f"{_LAYER}/feed_forward/output"),
        *norm(f"{prefix}layernorm", "params/stack/norm"),
        *dense(f"{prefix}pooler.dense", "params/pooler"),
        *heads,
    ]


VIT = Architecture(
    model_type="vit",
    classes={
        "ViTForImageClassification": _build,
        "ViTModel": functools.partial(_build, with_pooler=True),
    },
    rules=functools.partial(_rules, prefix="vit."),
    inputs=_inputs,
    prefix="vit.",
    adapt=_without_pooler,
    to_config=_to_config,
    sizes=_sizes,
    renamed=_RENAMED,
    processor=read_image_processor,
)

DEIT = dataclasses.replace(
    VIT,
    model_type="deit",
    classes={
        "DeiTForImageClassification": functools.partial(_build, distillation="token"),
        "DeiTForImageClassificationWithTeacher": functools.partial(_build, distillation="head"),
        "DeiTModel": functools.partial(_build, distillation="token", with_pooler=True),
    },
    rules=functools.partial(_rules, prefix="deit."),
    prefix="deit.",
)
