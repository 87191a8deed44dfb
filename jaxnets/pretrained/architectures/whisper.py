"""Whisper of Hugging Face (Radford et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.models.transformer import SpeechTransformer
from jaxnets.models.transformer.config import build_preset
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors import SoundProcessor
from jaxnets.pretrained.rules import Leaves, Rule
from jaxnets.pretrained.torch_layers import convolution, dense, norm

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
_ACTIVATIONS |= {"swish": "silu", "tanh": "tanh"}


def _build(config: Config, fields: Mapping[str, Any]) -> nn.Module:
    config.require(
        scale_embedding=False,
        tie_word_embeddings=True,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        is_encoder_decoder=True,
    )
    sizes = {}
    for name, default in (("attention_heads", 6), ("ffn_dim", 1536)):
        encoder, decoder = (
            config.integer(f"{side}_{name}", default) for side in ("encoder", "decoder")
        )
        if encoder != decoder:
            raise config.error(
                f"decoder_{name}",
                f"is not supported; supported is that of the encoder, {encoder}",
            )
        sizes[name] = encoder
    num_layers = config.integer("encoder_layers", 4)
    num_decoder_layers = config.integer("decoder_layers", 4)
    preset = {
        "vocabulary_size": config.integer("vocab_size", 51_865),
        "num_layers": num_layers,
        "num_decoder_layers": None if num_decoder_layers == num_layers else num_decoder_layers,
        "features": config.integer("d_model", 384),
        "num_heads": sizes["attention_heads"],
        "mlp_dim": sizes["ffn_dim"],
        "activation": config.choice("activation_function", _ACTIVATIONS, "gelu"),
        "norm_epsilon": 1e-5,
        "max_source_length": config.integer("max_source_positions", 1500),
        "max_length": config.integer("max_target_positions", 448),
        "dropout_rate": config.number("dropout", 0.0),
        "attention_dropout_rate": config.number("attention_dropout", 0.0),
        "mlp_dropout_rate": config.number("activation_dropout", 0.0),
        "init_std": config.number("init_std", 0.02),
    }
    return build_preset(SpeechTransformer, preset, dict(fields))


def _to_config(module: nn.Module) -> dict[str, Any]:
    config = module.config
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    entries = {
        "vocab_size": module.vocabulary_size,
        "encoder_layers": module.num_layers,
        "decoder_layers": module.num_decoder_layers or module.num_layers,
        "d_model": config.features,
        "activation_function": names[config.activation],
        "max_source_positions": module.max_source_length,
        "max_target_positions": module.max_length,
        "dropout": config.dropout_rate,
        "attention_dropout": config.attention_dropout_rate,
        "activation_dropout": config.mlp_dropout_rate,
        "is_encoder_decoder": True,
    }
    for side in ("encoder", "decoder"):
        entries[f"{side}_attention_heads"] = config.num_heads
        entries[f"{side}_ffn_dim"] = config.mlp_dim or 4 * config.features
    return entries


def _sizes(content: Mapping[str, Any], leaves: Leaves) -> dict[str, Any]:
    return {"num_mel_bins": leaves["params/encoder/conv_0/kernel"].shape[-2]}


def _rules(module: nn.Module) -> list[Rule]:
    encoder, decoder = "model.encoder", "model.decoder"
    return [
        *convolution(f"{encoder}.conv1", "params/encoder/conv_0"),
        *convolution(f"{encoder}.conv2", "params/encoder/conv_1"),
        Rule(f"{encoder}.embed_positions.weight", "constants/encoder/position"),
        *_stack_rules(encoder, "params/encoder/stack"),
        Rule(f"{decoder}.embed_tokens.weight", "params/embedding/token/embedding"),
        Rule(f"{decoder}.embed_positions.weight", "params/embedding/position/embedding"),
        *_stack_rules(decoder, "params/decoder"),
    ]


def _stack_rules(source: str, target: str) -> list[Rule]:
    layer, path = f"{source}.layers.{{layer}}", f"{target}/layer_{{layer}}"
    rules = [
        *norm(f"{source}.layer_norm", f"{target}/norm"),
        *norm(f"{layer}.final_layer_norm", f"{path}/feed_forward_norm"),
        *dense(f"{layer}.fc1", f"{path}/feed_forward/hidden"),
        *dense(f"{layer}.fc2", f"{path}/feed_forward/output"),
    ]
    for theirs, ours in {"self_attn": "attention", "encoder_attn": "cross_attention"}.items():
        rules += norm(f"{layer}.{theirs}_layer_norm", f"{path}/{ours}_norm")
        for short, name in {"q": "query", "k": "key", "v": "value", "out": "output"}.items():
            rules += dense(f"{layer}.{theirs}.{short}_proj", f"{path}/{ours}/{name}")
    return rules


def _inputs(module: nn.Module, config: Config) -> list[jax.ShapeDtypeStruct]:
    frames = jax.ShapeDtypeStruct((1, 4, config.integer("num_mel_bins", 80)), jnp.float32)
    return [frames, jax.ShapeDtypeStruct((1, 2), jnp.int32)]


def _processor(folder: Path, config: Config) -> SoundProcessor | None:
    try:
        processor = SoundProcessor.from_folder(folder)
    except FileNotFoundError:
        return None
    num_mels = processor.features.num_mels
    if num_mels != config.integer("num_mel_bins", 80):
        raise config.error("num_mel_bins", f"is not the {num_mels} features of the processor")
    return processor


WHISPER = Architecture(
    model_type="whisper",
    classes={"WhisperForConditionalGeneration": _build, "WhisperModel": _build},
    rules=_rules,
    inputs=_inputs,
    prefix="model.",
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_key_value_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    },
    copies={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    to_config=_to_config,
    sizes=_sizes,
    processor=_processor,
)
