"""Rotary positions and windows of a config.json of Hugging Face, read and written."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxnets.models.transformer import (
    BlockConfig,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from jaxnets.pretrained.config import Config

# Entries of each kind of scaling, besides its name and the base.
_ENTRIES = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def rope(config: Config, default_theta: float = 10_000.0) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` of a `BlockConfig`.

    Args:
        config: with rope_parameters (from transformers 5 on), or rope_theta and rope_scaling.
        default_theta: where there is no base.

    Raises:
        ValueError: a scaling that is not supported, or entries that do not fit it.
    """
    config.require(partial_rotary_factor=1.0)
    theta = config.number("rope_theta", default_theta)
    parameters = config.inside("rope_scaling") or config.inside("rope_parameters")
    if parameters is None:
        return {"rope_theta": theta, "rope_scaling": None}
    return _read_rope(config, parameters, theta)


def rope_of_windows(config: Config, global_theta: float, local_theta: float) -> dict[str, Any]:
    """Return what `rope` does, and `window_rope_theta`: Gemma 3 has one base for each kind.

    Args:
        config: with rope_parameters of each kind of layer (from transformers 5 on), or rope_theta,
            rope_scaling and rope_local_base_freq.
        global_theta: where there is no base, of the blocks without a window.
        local_theta: of those with one.

    Raises:
        ValueError: as in `rope`, or a scaling of the blocks with a window.
    """
    config.require(partial_rotary_factor=1.0)
    theta = config.number("rope_theta", global_theta)
    local_theta = config.number("rope_local_base_freq", local_theta)
    parameters = config.inside("rope_parameters")
    scaling = config.inside("rope_scaling")
    wide = {"rope_theta": theta, "rope_scaling": None}
    if parameters is not None:
        unknown = [name for name in parameters.content if name not in (_GLOBAL, _LOCAL)]
        if unknown:
            raise parameters.error(unknown[0], f"is not supported; known are {_GLOBAL}, {_LOCAL}")
        one = parameters.inside(_GLOBAL)
        wide = wide if one is None else _read_rope(config, one, theta)
        local = parameters.inside(_LOCAL)
        if local is not None:
            local.require(rope_type="default")
            local_theta = _read_rope(config, local, local_theta)["rope_theta"]
    if scaling is not None:
        wide = _read_rope(config, scaling, wide["rope_theta"])
    return {**wide, "window_rope_theta": local_theta}


def _read_rope(config: Config, parameters: Config, theta: float) -> dict[str, Any]:
    kind_name = "rope_type" if "rope_type" in parameters.content else "type"
    kind = parameters.choice(kind_name, {name: name for name in _ENTRIES}, "default")
    parameters.require(partial_rotary_factor=1.0)
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *_ENTRIES[kind]}
    for name, value in parameters.content.items():
        if name not in known and value is not None:
            raise parameters.error(name, f"is no option of {kind} rotary positions")
    build = _scaling(config, parameters, kind)
    try:
        scaling = build()
    except ValueError as error:
        raise parameters.error(kind_name, f"has options that do not fit: {error}") from error
    return {"rope_theta": parameters.number("rope_theta", theta), "rope_scaling": scaling}


def _scaling(config: Config, parameters: Config, kind: str) -> Callable[[], RopeScaling | None]:
    """Return what builds a scaling from the options, which are read here."""
    if kind == "default":
        return lambda: None
    factor = parameters.number("factor")
    if factor is None:
        raise parameters.error("factor", "is no number")
    if kind == "linear":
        return functools.partial(LinearScaling, factor)
    length = parameters.integer("original_max_position_embeddings", None)
    outer = config.integer("original_max_position_embeddings", None)
    if length is not None and outer not in (None, length):  # transformers would take this one
        raise config.error(
            "original_max_position_embeddings", f"is not {length}, as in the scaling"
        )
    length = length or outer or config.integer("max_position_embeddings")
    if kind == "llama3":
        low, high = (parameters.number(f"{name}_freq_factor") for name in ("low", "high"))
        return functools.partial(Llama3Scaling, factor, length, low, high)
    attention_scaling = parameters.number("attention_factor", None)
    mscale, over_all = (parameters.number(name, None) for name in ("mscale", "mscale_all_dim"))
    if attention_scaling is None and mscale and over_all:
        # As in DeepSeek: the ratio of two factors, each of the form of the paper's.
        above, below = (0.1 * scale * math.log(factor) + 1 for scale in (mscale, over_all))
        attention_scaling = above / below
    truncate = parameters.flag("truncate", True)
    return functools.partial(
        YarnScaling,
        factor,
        length,
        beta_fast=parameters.number("beta_fast", None) or 32.0,
        beta_slow=parameters.number("beta_slow", None) or 1.0,
        attention_scaling=attention_scaling,
        truncate=True if truncate is None else truncate,
    )


def write_rope(config: BlockConfig) -> dict[str, Any]:
    """Return the entries that `rope` reads, as both old and new versions of transformers do."""
    parameters = rope_parameters(config.rope_theta, config.rope_scaling)
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else parameters,
        "rope_parameters": parameters,
    }


def rope_parameters(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the entry rope_parameters for a base and a scaling."""
    entries: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if isinstance(scaling, LinearScaling):
        entries |= {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        entries |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    if isinstance(scaling, YarnScaling):
        entries |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_scaling is not None:
            entries["attention_factor"] = scaling.attention_scaling
    return entries


def windows(
    config: Config, window: int | None, num_layers: int, default: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `window` and `global_every` of a `BlockConfig` from the types of the layers.

    Args:
        config: with the entry layer_types, or without one.
        window: of the layers that have one; None if none has.
        num_layers: number of layers.
        default: what to return without the entry.

    Raises:
        ValueError: an unknown type, or an order of types that is not every nth one.
    """
    types = config.content.get("layer_types")
    if types is None:
        return dict(default)
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.error("layer_types", f"is no list of {num_layers} types")
    if not set(types) <= {_GLOBAL, _LOCAL}:
        raise config.error("layer_types", f"is not supported; known are {_GLOBAL}, {_LOCAL}")
    if window is None or _LOCAL not in types:
        return {"window": None, "global_every": None}
    every = default["global_every"]
    if _GLOBAL in types:
        every = types.index(_GLOBAL) + 1
    elif every is not None:
        every = max(every, num_layers + 1)
    if every is not None and types != _types(num_layers, every):
        raise config.error(
            "layer_types", "is not supported; global layers must be every second, third, ... one"
        )
    return {"window": window, "global_every": every}


def write_windows(config: BlockConfig, num_layers: int) -> dict[str, Any]:
    """Return the entries layer_types and sliding_window, which some networks cannot do without."""
    kinds = [config.of_layer(index).window for index in range(num_layers)]
    types = [_GLOBAL if window is None else _LOCAL for window in kinds]
    window = {} if config.window is None else {"sliding_window": config.window}
    return {"layer_types": types, **window}


def _types(num_layers: int, every: int) -> list[str]:
    return [_LOCAL if (index + 1) % every else _GLOBAL for index in range(num_layers)]
