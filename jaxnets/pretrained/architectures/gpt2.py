"""GPT-2 of Hugging Face (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.models.transformer import TransformerLM
from jaxnets.models.transformer.config import build_preset
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.layouts import Split, Transpose
from jaxnets.pretrained.processors import read_text_processor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.torch_layers import norm

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"} | {
    name: name for name in ("relu", "silu", "tanh")
}
_LAYER = "params/stack/layer_{layer}"


def _build(config: Config, fields: Mapping[str, Any]) -> nn.Module:
    config.require(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    features = config.integer("n_embd", 768)
    preset = {
        "vocabulary_size": config.integer("vocab_size", 50_257),
        "num_layers": config.integer("n_layer", 12),
        "features": features,
        "num_heads": config.integer("n_head", 12),
        "mlp_dim": config.integer("n_inner", None) or 4 * features,
        "max_length": config.integer("n_positions", 1024),
        "activation": config.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "dropout_rate": config.number("resid_pdrop", 0.1),
        "attention_dropout_rate": config.number("attn_pdrop", 0.1),
        "tied": config.flag("tie_word_embeddings", True),
        "key_bias": True,
    }
    return build_preset(TransformerLM, preset, dict(fields))


def _to_config(module: nn.Module) -> dict[str, Any]:
    config = module.config
    return {
        "vocab_size": module.vocabulary_size,
        "n_layer": module.num_layers,
        "n_embd": config.features,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "n_positions": module.max_length,
        "activation_function": {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[
            config.activation
        ],
        "layer_norm_epsilon": config.norm_epsilon,
        "embd_pdrop": config.dropout_rate,
        "resid_pdrop": config.dropout_rate,
        "attn_pdrop": config.attention_dropout_rate,
        "tie_word_embeddings": module.tied,
    }


def _rules(module: nn.Module) -> list[Rule]:
    # Dense kernels are stored as [in, out], as here, with queries, keys and values joined.
    def dense(source: str, target: str) -> list[Rule]:
        return [
            Rule(f"{source}.weight", f"{target}/kernel"),
            Rule(f"{source}.bias", f"{target}/bias"),
        ]

    projections = [f"{_LAYER}/attention/{name}" for name in ("query", "key", "value")]
    return [
        Rule("transformer.wte.weight", "params/embedding/token/embedding"),
        Rule("transformer.wpe.weight", "params/embedding/position/embedding"),
        Rule(
            "transformer.h.{layer}.attn.c_attn.weight",
            tuple(f"{path}/kernel" for path in projections),
            (Split(3, axis=1),),
        ),
        Rule(
            "transformer.h.{layer}.attn.c_attn.bias",
            tuple(f"{path}/bias" for path in projections),
            (Split(3),),
        ),
        *dense("transformer.h.{layer}.attn.c_proj", f"{_LAYER}/attention/output"),
        *norm("transformer.h.{layer}.ln_1", f"{_LAYER}/attention_norm"),
        *dense("transformer.h.{layer}.mlp.c_fc", f"{_LAYER}/feed_forward/hidden"),
        *dense("transformer.h.{layer}.mlp.c_proj", f"{_LAYER}/feed_forward/output"),
        *norm("transformer.h.{layer}.ln_2", f"{_LAYER}/feed_forward_norm"),
        *norm("transformer.ln_f", "params/stack/norm"),
        Rule("lm_head.weight", "params/head/kernel", (Transpose(),)),
    ]


GPT2 = Architecture(
    model_type="gpt2",
    classes={"GPT2LMHeadModel": _build, "GPT2Model": _build},
    rules=_rules,
    inputs=lambda module, config: [jax.ShapeDtypeStruct((1, 2), jnp.int32)],
    prefix="transformer.",
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    copies={"lm_head.weight": "transformer.wte.weight"},
    to_config=_to_config,
    processor=lambda folder, config: read_text_processor(folder),
)
