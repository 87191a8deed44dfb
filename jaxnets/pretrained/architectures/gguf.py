"""GGUF files of llama.cpp: their metadata as entries of config.json, their names as a table.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import numpy as np

from jaxnets.models.transformer import Llama3Scaling
from jaxnets.pretrained.architectures.architecture import Architecture
from jaxnets.pretrained.architectures.registry import ARCHITECTURES
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.formats import Tensors
from jaxnets.pretrained.layouts import Layout, RotaryPairs, Transpose
from jaxnets.pretrained.rules import Rule

#: The key of the metadata that only GGUF files have.
KIND = "general.architecture"

#: {general.architecture: `model_type` of config.json}.
_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}
#: {key after the architecture's name: entry of config.json}.
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
}
_GPT2_SIZES = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "feed_forward_length": "n_inner",
    "context_length": "n_positions",
}
_OPTIONS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_GEMMA_OPTIONS = {
    **_OPTIONS,
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA3_OPTIONS = {
    **_GEMMA_OPTIONS,
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base_swa": "rope_local_base_freq",
}
_YARN_OPTIONS = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
#: Keys that are read in another way, or on which outputs do not depend.
_OTHERS = (
    *("vocab_size", "tensor_data_layout"),
    *("attention.value_length", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned"),
    *_YARN_OPTIONS,
)
#: Layers of the Gemma networks whose scores are scaled by features / num_heads, not by head_dim;
#: no key says so.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_FREQUENCIES = "rope_freqs.weight"

_LAYER, _BLOCK = "model.layers.{layer}", "blk.{layer}"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    f"{_LAYER}.input_layernorm": f"{_BLOCK}.attn_norm",
    f"{_LAYER}.self_attn.q_proj": f"{_BLOCK}.attn_q",
    f"{_LAYER}.self_attn.k_proj": f"{_BLOCK}.attn_k",
    f"{_LAYER}.self_attn.v_proj": f"{_BLOCK}.attn_v",
    f"{_LAYER}.self_attn.o_proj": f"{_BLOCK}.attn_output",
    f"{_LAYER}.self_attn.q_norm": f"{_BLOCK}.attn_q_norm",
    f"{_LAYER}.self_attn.k_norm": f"{_BLOCK}.attn_k_norm",
    f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.ffn_norm",
    f"{_LAYER}.mlp.gate_proj": f"{_BLOCK}.ffn_gate",
    f"{_LAYER}.mlp.up_proj": f"{_BLOCK}.ffn_up",
    f"{_LAYER}.mlp.down_proj": f"{_BLOCK}.ffn_down",
}
_GEMMA_NAMES = {
    **_NAMES,
    f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.post_attention_norm",
    f"{_LAYER}.pre_feedforward_layernorm": f"{_BLOCK}.ffn_norm",
    f"{_LAYER}.post_feedforward_layernorm": f"{_BLOCK}.post_ffw_norm",
}
_GPT2_LAYER = "transformer.h.{layer}"
_GPT2_DENSE = {
    f"{_GPT2_LAYER}.attn.c_attn": f"{_BLOCK}.attn_qkv",
    f"{_GPT2_LAYER}.attn.c_proj": f"{_BLOCK}.attn_output",
    f"{_GPT2_LAYER}.mlp.c_fc": f"{_BLOCK}.ffn_up",
    f"{_GPT2_LAYER}.mlp.c_proj": f"{_BLOCK}.ffn_down",
}
_GPT2_NAMES = {
    **_GPT2_DENSE,
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    f"{_GPT2_LAYER}.ln_1": f"{_BLOCK}.attn_norm",
    f"{_GPT2_LAYER}.ln_2": f"{_BLOCK}.ffn_norm",
}


def read_gguf_config(path: Path, tensors: Tensors) -> Config:
    """Return the config.json that the metadata of a GGUF file amount to.

    Args:
        path: of the file.
        tensors: of the file; which of them exist decides about biases and tied embeddings.

    Raises:
        ValueError: an unknown architecture, a key that is missing or not supported; the message
            names it.
    """
    known = {key: value for key, value in tensors.metadata.items() if key[:10] != "tokenizer."}
    metadata = Config.of(path, known)
    model_type = metadata.choice(KIND, _MODEL_TYPES)
    name = known[KIND]
    gpt2, gemma = name == "gpt2", name.startswith("gemma")
    sizes = _GPT2_SIZES if gpt2 else _SIZES
    epsilon = "layer_norm_epsilon" if gpt2 else "layer_norm_rms_epsilon"
    options: Mapping[str, str] = {"gemma2": _GEMMA_OPTIONS, "gemma3": _GEMMA3_OPTIONS}.get(
        name, {} if gpt2 else _OPTIONS
    )
    allowed = {f"{name}.{key}" for key in (*sizes, *options, *_OTHERS, f"attention.{epsilon}")}
    off = (f"{name}.expert_count", f"{name}.expert_used_count")
    for key, value in known.items():
        if key.startswith(f"{name}.") and key not in allowed and (key not in off or value):
            raise metadata.error(key, "is not supported")
    entries = {
        "model_type": model_type,
        "vocab_size": _vocabulary_size(metadata, tensors, name),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{entry: metadata.integer(f"{name}.{key}") for key, entry in sizes.items()},
        "layer_norm_epsilon" if gpt2 else "rms_norm_eps": _shortest(
            metadata.number(f"{name}.attention.{epsilon}")
        ),
    }
    if gpt2:
        return Config.of(path, entries)
    entries |= {
        "hidden_act": "silu",
        "head_dim": entries["hidden_size"] // entries["num_attention_heads"],
        "rope_theta": 10_000.0,
    }
    entries |= _given(known, name, options)
    for key in ("attention.value_length", "rope.dimension_count"):
        if known.get(f"{name}.{key}", entries["head_dim"]) != entries["head_dim"]:
            raise metadata.error(
                f"{name}.{key}", f"is not supported; supported is {entries['head_dim']}"
            )
    if name == "llama":
        entries["attention_bias"] = "blk.0.attn_q.bias" in tensors
        entries["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if gemma:
        del entries["hidden_act"]
        wide = entries["num_hidden_layers"] == _GEMMA_27B[name]
        entries |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": entries["hidden_size"] / entries["num_attention_heads"]
            if wide
            else entries["head_dim"],
            # Without the key, or with 0, Gemma 3 has no windows.
            "sliding_window": entries.get("sliding_window", 4096 if name == "gemma2" else 0)
            or None,
        }
    entries["rope_scaling"] = _scaling(metadata, tensors, name, Config.of(path, entries))
    return Config.of(path, entries)


def _vocabulary_size(metadata: Config, tensors: Tensors, name: str) -> int:
    tokens = tensors.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    if f"{name}.vocab_size" not in metadata.content:
        raise metadata.document.error(
            f"it has neither 'tokenizer.ggml.tokens' nor '{name}.vocab_size'"
        )
    return int(metadata.integer(f"{name}.vocab_size"))


def _given(metadata: Mapping[str, Any], name: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries of config.json whose keys the metadata have."""
    return {
        entry: _shortest(metadata[f"{name}.{key}"])
        for key, entry in options.items()
        if f"{name}.{key}" in metadata
    }


def _shortest(value: Any) -> Any:
    """Return the shortest decimal fraction of a float32, as config.json has it: 1e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(
    metadata: Config, tensors: Tensors, name: str, config: Config
) -> dict[str, Any] | None:
    """Return the entry rope_scaling."""
    kinds = {kind: kind for kind in ("none", "linear", "yarn")}
    kind = metadata.choice(f"{name}.rope.scaling.type", kinds, "linear")
    factor = _shortest(metadata.number(f"{name}.rope.scaling.factor", 1.0)) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return _llama3(tensors, config) if _FREQUENCIES in tensors else None
    if _FREQUENCIES in tensors:
        raise metadata.error(f"{name}.rope.scaling.type", f"is not supported with {_FREQUENCIES}")
    further = _given(metadata.content, name, _YARN_OPTIONS) if kind == "yarn" else {}
    return {"rope_type": kind, "factor": factor, **further}


def _llama3(tensors: Tensors, config: Config) -> dict[str, Any] | None:
    """Return the scaling of Llama 3, of which a file has only the divisors of the frequencies."""
    features, theta = config.integer("head_dim"), config.number("rope_theta")
    divisors = np.asarray(tensors[_FREQUENCIES], np.float32)
    factor = _shortest(float(divisors.max(initial=0)))
    if np.all(divisors == 1) and divisors.shape == (features // 2,):
        return None
    if 1 <= factor < np.inf and divisors.shape == (features // 2,):
        scaling = Llama3Scaling(factor)
        original = Llama3Scaling(1.0).frequencies(features, theta)
        if np.allclose(divisors, original / scaling.frequencies(features, theta), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    raise ValueError(
        f"{tensors.path}: {_FREQUENCIES} is not the scaling of Llama 3.1 to 3.3 for heads of "
        f"{features} features and the base {theta}; load the folder of Hugging Face"
    )


def _in_gguf(architecture: Architecture) -> Architecture:
    """Return an architecture with the names and layouts that llama.cpp gives its tensors."""
    kind = architecture.model_type
    gpt2, gemma = kind == "gpt2", kind.startswith("gemma")
    names = _GEMMA_NAMES if gemma else _GPT2_NAMES if gpt2 else _NAMES

    def translate(rule: Rule, module: nn.Module) -> Rule:
        (source,) = rule.sources
        layer, parameter = source.rsplit(".", 1)
        layout: tuple[Layout, ...] = ()
        if kind == "llama" and layer.endswith(".q_proj"):
            layout = (RotaryPairs(module.config.num_heads),)
        if kind == "llama" and layer.endswith(".k_proj"):
            layout = (RotaryPairs(module.config.kv_heads),)
        if layer in _GPT2_DENSE and parameter == "weight":
            layout = (Transpose(),)
        return Rule(f"{names[layer]}.{parameter}", rule.target, (*layout, *rule.layout))

    return dataclasses.replace(
        architecture,
        classes={
            name: _with_plain_norms(build) if gemma else build
            for name, build in architecture.classes.items()
        },
        rules=lambda module: [translate(rule, module) for rule in architecture.rules(module)],
        prefix="",
        ignored=() if gpt2 else (_FREQUENCIES,),
        copies={},
        processor=None,
    )


def _with_plain_norms(
    build: Callable[[Config, Mapping[str, Any]], nn.Module],
) -> Callable[[Config, Mapping[str, Any]], nn.Module]:
    """Build Gemma with norms that multiply by their scale, since a file holds 1 + scale.

    Subtracting the 1 again would not return the scale that was trained: the sum is rounded.
    """

    def build_plain(config: Config, fields: Mapping[str, Any]) -> nn.Module:
        if fields.get("norm", "rms") != "rms":
            raise ValueError(
                f"{config.document.path}: norm is {fields['norm']!r}, and a GGUF file of Gemma has "
                "the scales of norm='rms'; leave it out"
            )
        return build(config, {**fields, "norm": "rms"})

    return build_plain


#: {`model_type` of config.json: architecture of GGUF files}.
GGUF_ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {kind: _in_gguf(ARCHITECTURES[kind]) for kind in _MODEL_TYPES.values()}
)
