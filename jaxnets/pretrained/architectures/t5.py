"""T5, Flan-T5 and mT5 of Hugging Face (Raffel et al. 2020)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.models.transformer import TransformerEncoder, TransformerTranslator
from jaxnets.models.transformer.config import build_preset
from jaxnets.models.transformer.translator import t5_options
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.formats import Tensors
from jaxnets.pretrained.layouts import Transpose
from jaxnets.pretrained.processors import read_text_processor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.torch_layers import dense, norm

_ACTIVATIONS = {
    **{"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "tanh": "tanh"},
    **{"gated-gelu": "geglu_tanh", "gated-gelu_new": "geglu_tanh", "gated-silu": "swiglu"},
}
_TABLE, _HEAD = "shared.weight", "lm_head.weight"

#: Defaults of transformers, which differ.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "t5": {"vocab_size": 32_128, "num_layers": 6, "num_heads": 8, "d_ff": 2048},
    "mt5": {"vocab_size": 250_112, "num_layers": 8, "num_heads": 6, "d_ff": 1024},
}
_FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}


def _blocks(kind: str, config: Config) -> dict[str, Any]:
    """Return the fields of the encoder."""
    config.require(is_decoder=False)
    sizes = {name: config.integer(name, size) for name, size in _DEFAULTS[kind].items()}
    return {
        "vocabulary_size": sizes["vocab_size"],
        "num_layers": sizes["num_layers"],
        "features": config.integer("d_model", 512),
        "num_heads": sizes["num_heads"],
        "head_dim": config.integer("d_kv", 64),
        "mlp_dim": sizes["d_ff"],
        "activation": config.choice("feed_forward_proj", _ACTIVATIONS, _FEED_FORWARD[kind]),
        "norm_epsilon": config.number("layer_norm_epsilon", 1e-6),
        "num_relative_buckets": config.integer("relative_attention_num_buckets", 32),
        "max_relative_distance": config.integer("relative_attention_max_distance", 128),
        **t5_options(config.number("dropout_rate", 0.1)),
    }


def _build(kind: str, config: Config, fields: Mapping[str, Any]) -> nn.Module:
    preset = _blocks(kind, config)
    count = config.integer("num_decoder_layers", None)
    tied = config.flag("tie_word_embeddings", True)
    # transformers 5 scales the outputs of T5 only, and has an entry of its own for it; before,
    # tied embeddings meant it.
    scaled = kind == "t5" and config.flag("scale_decoder_outputs", tied)
    preset |= {
        "num_decoder_layers": None if count == preset["num_layers"] else count,
        "tied": tied,
        "output_scale": preset["features"] ** -0.5 if scaled else 1.0,
    }
    return build_preset(TransformerTranslator, preset, dict(fields))


def _build_encoder(kind: str, config: Config, fields: Mapping[str, Any]) -> nn.Module:
    return build_preset(TransformerEncoder, _blocks(kind, config), dict(fields))


def _adapt(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Tie the embeddings unless the file has an output layer of its own, whatever the config says.

    A file of transformers 5 says nothing else, and older ones may hold the table twice.
    """
    if not isinstance(module, TransformerTranslator):
        return module
    own = _HEAD in tensors
    if own and _TABLE in tensors:
        head, table = (tensors.read(name, (slice(0, 1),)) for name in (_HEAD, _TABLE))
        own = not (np.array_equal(head, table) and np.array_equal(tensors[_HEAD], tensors[_TABLE]))
    return module.clone(tied=not own)


def _to_config(kind: str, module: nn.Module) -> dict[str, Any]:
    config = module.config
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    entries = {
        "vocab_size": module.vocabulary_size,
        "num_layers": module.num_layers,
        "d_model": config.features,
        "num_heads": config.num_heads,
        "d_kv": config.dim_per_head,
        "d_ff": config.mlp_dim or 4 * config.features,
        "feed_forward_proj": names[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "relative_attention_num_buckets": config.num_relative_buckets,
        "relative_attention_max_distance": config.max_relative_distance,
        "dropout_rate": config.dropout_rate,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": isinstance(module, TransformerTranslator),
    }
    if isinstance(module, TransformerTranslator):
        entries["num_decoder_layers"] = module.num_decoder_layers or module.num_layers
        entries["tie_word_embeddings"] = module.tied
        if kind == "t5":
            entries["scale_decoder_outputs"] = module.output_scale != 1
    return entries


def _rules(module: nn.Module) -> list[Rule]:
    encoder = "encoder" if isinstance(module, TransformerTranslator) else "stack"
    layers = {"wi": "hidden", "wo": "output"}
    if module.config.gated:
        layers = {"wi_0": "gate", "wi_1": "hidden", "wo": "output"}
    return [
        Rule(_TABLE, "params/embedding/token/embedding"),
        *_stack_rules("encoder", f"params/{encoder}", ["attention"], layers),
        *_stack_rules("decoder", "params/decoder", ["attention", "cross_attention"], layers),
        Rule(_HEAD, "params/head/kernel", (Transpose(),)),
    ]


def _stack_rules(
    source: str, target: str, attention: list[str], feed_forward: Mapping[str, str]
) -> list[Rule]:
    names = {"attention": "SelfAttention", "cross_attention": "EncDecAttention"}
    projections = {"q": "query", "k": "key", "v": "value", "o": "output"}
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    rules = [
        Rule(f"{source}.block.0.{bias}", f"{target}/relative_bias"),
        *norm(f"{source}.final_layer_norm", f"{target}/norm"),
    ]
    for index, branch in enumerate([*attention, "feed_forward"]):
        name = f"{source}.block.{{layer}}.layer.{index}"
        path = f"{target}/layer_{{layer}}/{branch}"
        rules += norm(f"{name}.layer_norm", f"{path}_norm")
        name = f"{name}.{names.get(branch, 'DenseReluDense')}"
        for theirs, ours in (projections if branch in names else feed_forward).items():
            rules += dense(f"{name}.{theirs}", f"{path}/{ours}")
    return rules


def _architecture(kind: str, prefix: str) -> Architecture:
    build = functools.partial(_build, kind)
    token = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return Architecture(
        model_type=kind,
        classes={
            f"{prefix}ForConditionalGeneration": build,
            f"{prefix}Model": build,
            f"{prefix}EncoderModel": functools.partial(_build_encoder, kind),
        },
        rules=_rules,
        inputs=lambda module, config: (
            [token, token] if isinstance(module, TransformerTranslator) else [token]
        ),
        aliases={
            "hidden_size": "d_model",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
            "head_dim": "d_kv",
        },
        # An array of the first published files that their own code did not use.
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        copies={
            "encoder.embed_tokens.weight": _TABLE,
            "decoder.embed_tokens.weight": _TABLE,
            _HEAD: _TABLE,
        },
        adapt=_adapt,
        to_config=functools.partial(_to_config, kind),
        processor=lambda folder, config: read_text_processor(folder),
    )


T5 = _architecture("t5", "T5")
MT5 = _architecture("mt5", "MT5")
