"""Gemma 2 and 3 of Hugging Face, for text.

Gemma Team 2024 and 2025, arXiv:2408.00118 and arXiv:2503.19786.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jaxnets.pretrained.architectures.llama import decoder, sizes, write_sizes
from jaxnets.pretrained.architectures.rotary import (
    rope,
    rope_of_windows,
    rope_parameters,
    windows,
    write_rope,
    write_windows,
)
from jaxnets.pretrained.config import Config

_ACTIVATION = "hidden_activation"


def _read(config: Config, *, softcap: float | None) -> dict[str, Any]:
    """Return the fields that both have.

    Args:
        config: the configuration.
        softcap: of the logits, without an entry.
    """
    config.require(attention_bias=False)
    if config.flag("use_bidirectional_attention", None):
        raise config.error("use_bidirectional_attention", "is not supported; supported is false")
    fields = sizes(config, head_dim=256, activation=_ACTIVATION)
    scalar = config.number("query_pre_attn_scalar", 256)
    return {
        **fields,
        "norm": "zero_centered_rms",
        "branch_norm": True,
        "attention_scale": None if scalar == fields["head_dim"] else scalar**-0.5,
        "scale_embedding": True,
        "tied": config.flag("tie_word_embeddings", True),
        "logit_softcap": config.number("final_logit_softcapping", softcap, null=True),
    }


def _write(module: nn.Module) -> dict[str, Any]:
    config, scale = module.config, module.config.attention_scale
    return {
        **write_sizes(module, activation=_ACTIVATION),
        **write_windows(config, module.num_layers),
        "query_pre_attn_scalar": config.dim_per_head if scale is None else round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": module.logit_softcap,
        **write_rope(config),
    }


def _windows(config: Config, every: int) -> dict[str, Any]:
    window = config.integer("sliding_window", 4096, null=True)
    default = {"window": window, "global_every": None if window is None else every}
    return windows(config, window, config.integer("num_hidden_layers"), default)


def _read_gemma2(config: Config) -> dict[str, Any]:
    cap = config.number("attn_logit_softcapping", 50.0, null=True)
    fields = _read(config, softcap=30.0) | rope(config) | _windows(config, 2)
    return fields | {"attention_softcap": cap}


def _read_gemma3(config: Config) -> dict[str, Any]:
    config.require(attn_logit_softcapping=None)
    every = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    fields = _read(config, softcap=None) | _windows(config, every)
    fields |= rope_of_windows(config, 1_000_000.0, 10_000.0) | {"qk_norm": True}
    if fields["window"] is None:
        fields["window_rope_theta"] = None
    return fields


def _write_gemma3(module: nn.Module) -> dict[str, Any]:
    config = module.config
    local_theta = config.window_rope_theta or config.rope_theta
    return {
        **_write(module),
        "sliding_window_pattern": config.global_every or 6,
        "rope_local_base_freq": local_theta,
        "rope_parameters": {
            "full_attention": rope_parameters(config.rope_theta, config.rope_scaling),
            "sliding_attention": rope_parameters(local_theta, None),
        },
    }


GEMMA2 = decoder("gemma2", ("Gemma2ForCausalLM", "Gemma2Model"), _read_gemma2, _write)
GEMMA3 = decoder(
    "gemma3_text", ("Gemma3ForCausalLM", "Gemma3TextModel"), _read_gemma3, _write_gemma3
)
