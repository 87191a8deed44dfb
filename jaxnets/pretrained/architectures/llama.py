"""LLaMA of Hugging Face and the networks of its form: Mistral, Qwen 2 and 3, SmolLM 2.

Touvron et al. 2023, arXiv:2307.09288; Jiang et al. 2023, arXiv:2310.06825; Yang et al. 2024 and
2025, arXiv:2407.10671 and arXiv:2505.09388.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.models.transformer import TransformerLM
from jaxnets.models.transformer.config import build_preset
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.rotary import rope, windows, write_rope, write_windows
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.layouts import Transpose
from jaxnets.pretrained.processors import read_text_processor
from jaxnets.pretrained.rules import Rule
from jaxnets.pretrained.torch_layers import dense, norm

#: {hidden_act of config.json: `activation` of a `BlockConfig`}.
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
_LAYER = "params/stack/layer_{layer}"


def sizes(
    config: Config, *, head_dim: int | None = None, activation: str = "hidden_act"
) -> dict[str, Any]:
    """Return the fields that all networks of this form have.

    Args:
        config: the configuration.
        head_dim: where there is no entry; None is hidden_size / num_attention_heads.
        activation: name of its entry.

    Raises:
        ValueError: an entry that is not supported.
    """
    config.require(per_layer_config=None)  # layers of different sizes
    return {
        "vocabulary_size": config.integer("vocab_size"),
        "num_layers": config.integer("num_hidden_layers"),
        "features": config.integer("hidden_size"),
        "num_heads": config.integer("num_attention_heads"),
        "num_kv_heads": config.integer("num_key_value_heads", None),
        "head_dim": config.integer("head_dim", head_dim),
        "mlp_dim": config.integer("intermediate_size"),
        "max_length": config.integer("max_position_embeddings"),
        "activation": config.choice(activation, GATED_ACTIVATIONS),
        "norm": "rms",
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "attention_dropout_rate": config.number("attention_dropout", 0.0),
        "use_bias": False,
        "tied": config.flag("tie_word_embeddings", False),
    }


def write_sizes(module: nn.Module, *, activation: str = "hidden_act") -> dict[str, Any]:
    """Return the entries of config.json that `sizes` reads."""
    config = module.config
    return {
        "vocab_size": module.vocabulary_size,
        "num_hidden_layers": module.num_layers,
        "hidden_size": config.features,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "intermediate_size": config.mlp_dim or 4 * config.features,
        "max_position_embeddings": module.max_length,
        activation: {ours: theirs for theirs, ours in reversed(GATED_ACTIVATIONS.items())}[
            config.activation
        ],
        "rms_norm_eps": config.norm_epsilon,
        "attention_dropout": config.attention_dropout_rate,
        "tie_word_embeddings": module.tied,
    }


def layer_rules(module: nn.Module) -> list[Rule]:
    """Return the table of networks of this form, whose tensors all have the same names."""
    source, attention, feed_forward = (
        "model.layers.{layer}",
        f"{_LAYER}/attention",
        f"{_LAYER}/feed_forward",
    )
    if module.config.branch_norm:
        after_attention = [
            *norm(f"{source}.post_attention_layernorm", f"{_LAYER}/attention_output_norm"),
            *norm(f"{source}.pre_feedforward_layernorm", f"{_LAYER}/feed_forward_norm"),
            *norm(f"{source}.post_feedforward_layernorm", f"{_LAYER}/feed_forward_output_norm"),
        ]
    else:
        after_attention = norm(f"{source}.post_attention_layernorm", f"{_LAYER}/feed_forward_norm")
    return [
        Rule("model.embed_tokens.weight", "params/embedding/token/embedding"),
        *norm(f"{source}.input_layernorm", f"{_LAYER}/attention_norm"),
        *dense(f"{source}.self_attn.q_proj", f"{attention}/query"),
        *dense(f"{source}.self_attn.k_proj", f"{attention}/key"),
        *dense(f"{source}.self_attn.v_proj", f"{attention}/value"),
        *dense(f"{source}.self_attn.o_proj", f"{attention}/output"),
        *norm(f"{source}.self_attn.q_norm", f"{attention}/query_norm"),
        *norm(f"{source}.self_attn.k_norm", f"{attention}/key_norm"),
        *after_attention,
        *dense(f"{source}.mlp.gate_proj", f"{feed_forward}/gate"),
        *dense(f"{source}.mlp.up_proj", f"{feed_forward}/hidden"),
        *dense(f"{source}.mlp.down_proj", f"{feed_forward}/output"),
        *norm("model.norm", "params/stack/norm"),
        Rule("lm_head.weight", "params/head/kernel", (Transpose(),)),
    ]


def decoder(
    model_type: str,
    classes: tuple[str, ...],
    read: Callable[[Config], dict[str, Any]],
    to_config: Callable[[nn.Module], dict[str, Any]],
) -> Architecture:
    """Return the architecture of a network of this form.

    Args:
        model_type: as config.json names it.
        classes: of transformers.
        read: config -> fields of a `TransformerLM` and its `BlockConfig`.
        to_config: network -> entries of config.json.
    """

    def build(config: Config, fields: Mapping[str, Any]) -> nn.Module:
        return build_preset(TransformerLM, read(config), dict(fields))

    return Architecture(
        model_type=model_type,
        classes=dict.fromkeys(classes, build),
        rules=layer_rules,
        inputs=lambda module, config: [jax.ShapeDtypeStruct((1, 2), jnp.int32)],
        prefix="model.",
        ignored=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        to_config=to_config,
        processor=lambda folder, config: read_text_processor(folder),
    )


def _read_llama(config: Config) -> dict[str, Any]:
    biases = config.flag("attention_bias", False)
    if config.flag("mlp_bias", False) != biases:
        raise config.error("mlp_bias", "is not supported where attention_bias is another")
    return sizes(config) | rope(config) | {"use_bias": biases, "key_bias": biases}


def _write_llama(module: nn.Module) -> dict[str, Any]:
    biases = {"attention_bias": module.config.use_bias, "mlp_bias": module.config.use_bias}
    return {**write_sizes(module), **write_rope(module.config), **biases}


def _read_mistral(config: Config) -> dict[str, Any]:
    config.require(layer_types=None)
    return (
        sizes(config) | rope(config) | {"window": config.integer("sliding_window", 4096, null=True)}
    )


def _write_mistral(module: nn.Module) -> dict[str, Any]:
    window = {"sliding_window": module.config.window}
    return {**write_sizes(module), **write_rope(module.config), **window}


def _read_qwen2(config: Config) -> dict[str, Any]:
    return sizes(config) | rope(config) | _qwen_windows(config) | {"qkv_bias": True}


def _read_qwen3(config: Config) -> dict[str, Any]:
    config.require(attention_bias=False)
    fields = sizes(config, head_dim=128) | rope(config) | _qwen_windows(config)
    return fields | {"qk_norm": True}


def _write_qwen(module: nn.Module) -> dict[str, Any]:
    return {
        **write_sizes(module),
        **write_rope(module.config),
        **write_windows(module.config, module.num_layers),
        "use_sliding_window": module.config.window is not None,
    }


def _qwen_windows(config: Config) -> dict[str, Any]:
    """Return the options of the windows: layers from max_window_layers on have one."""
    num_layers = config.integer("num_hidden_layers")
    window = None
    if config.flag("use_sliding_window", False):
        window = config.integer("sliding_window", 4096, null=True)
    first = config.integer("max_window_layers", 28, least=0)
    listed = config.content.get("layer_types") is not None
    if window is not None and not listed and 0 < first < num_layers:
        raise config.error(
            "max_window_layers", f"is not supported with windows; supported are 0 and {num_layers}"
        )
    default = {"window": None if first else window, "global_every": None}
    return windows(config, window, num_layers, default)


LLAMA = decoder("llama", ("LlamaForCausalLM", "LlamaModel"), _read_llama, _write_llama)
MISTRAL = decoder("mistral", ("MistralForCausalLM", "MistralModel"), _read_mistral, _write_mistral)
QWEN2 = decoder("qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), _read_qwen2, _write_qwen)
QWEN3 = decoder("qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), _read_qwen3, _write_qwen)
