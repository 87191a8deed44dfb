"""Networks of Hugging Face folders as GGUF files, as llama.cpp converts them."""

import json

import gguf
import numpy as np

from jaxnets.pretrained import read_tensors

QUANTIZATION = gguf.GGMLQuantizationType
SCALINGS = gguf.RopeScalingType


def metadata(writer, config):
    """Add what the converters of llama.cpp take from config.json."""
    gpt2 = config["model_type"] == "gpt2"
    first = "n_embd" if gpt2 else "hidden_size"
    writer.add_name("network")
    writer.add_block_count(config["n_layer" if gpt2 else "num_hidden_layers"])
    writer.add_embedding_length(config[first])
    writer.add_context_length(config["n_positions" if gpt2 else "max_position_embeddings"])
    writer.add_head_count(config["n_head" if gpt2 else "num_attention_heads"])
    inner = config.get("n_inner") or 4 * config[first] if gpt2 else config["intermediate_size"]
    writer.add_feed_forward_length(inner)
    writer.add_vocab_size(config["vocab_size"])
    if gpt2:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(SCALINGS(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if config["model_type"].startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
        if config.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def divisors(config):
    """Return the divisors of the frequencies of Llama 3, wavelength by wavelength."""
    scaling, size = config["rope_scaling"], config["head_dim"]
    low, high, factor = (
        scaling[name] for name in ("low_freq_factor", "high_freq_factor", "factor")
    )
    length = scaling["original_max_position_embeddings"]
    result = []
    for index in range(0, size, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (index / size)
        if wavelength < length / high:
            result.append(1.0)
        elif wavelength > length / low:
            result.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


def converted(folder, config):
    """Return {name of llama.cpp: tensor}."""
    kind = config["model_type"].removesuffix("_text")
    names = gguf.get_tensor_name_map(
        next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), 16
    )
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        if kind == "llama" and ("q_proj." in name or "k_proj." in name):
            entry = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            heads = config[entry]
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = divisors(config)
    return tensors


def convert(folder, path, *, stored="F32", entries=None, tokens=(), changed=None):
    """Write a folder of Hugging Face as a GGUF file.

    Args:
        folder: the folder.
        path: of the file.
        stored: type of the matrices.
        entries: {key: value} that replace those of the metadata; None leaves a key out.
        tokens: the vocabulary.
        changed: {name: tensor} in place of those of the folder; None leaves a tensor out.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, config["model_type"].removesuffix("_text"))
    metadata(writer, config)
    if tokens:
        writer.add_token_list(list(tokens))
    (fields,) = writer.kv_data
    for key, value in (entries or {}).items():
        fields.pop(key, None)
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            fields[key] = gguf.GGUFValue(value=value, type=kind)
    for name, tensor in {**converted(folder, config), **(changed or {})}.items():
        if tensor is None:
            continue
        kind = QUANTIZATION[stored] if tensor.ndim == 2 else QUANTIZATION.F32
        data = np.ascontiguousarray(gguf.quants.quantize(np.float32(tensor), kind))
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
