"""Adapters of low rank as the files of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnets.finetuning.lora import merge_lora
from jaxnets.finetuning.paths import insert
from jaxnets.pretrained import rules
from jaxnets.pretrained.adapter_layouts import OTHER_NETWORK, Target, check_fits, find_target
from jaxnets.pretrained.adapter_patterns import compile_pattern
from jaxnets.pretrained.architectures import ARCHITECTURES, Architecture
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.formats import Tensors, read_tensors
from jaxnets.pretrained.layouts import FromZeroCentered
from jaxnets.pretrained.network import PretrainedNetwork
from jaxnets.pretrained.rules import Assignment
from jaxnets.pretrained.saving import torch_config
from jaxnets.storage import atomic_folder, write_safetensors

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_(A|B)\.weight|lora_embedding_(A|B)|"
    r"lora_magnitude_vector)(\.weight)?",
)
#: Characters of all keys of alpha_pattern that have repetitions; others may be any number.
_MOST_REPEATING = 5000
#: Of a file: {module: {"a", "b", "magnitude"}}.
Factors = dict[str, dict[str, np.ndarray]]


def load_adapter(path: str | os.PathLike[str], network: PretrainedNetwork) -> dict[str, Any]:
    """Read an adapter that PEFT or `save_adapter` wrote: LoRA, rsLoRA or DoRA.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors (or .bin).
        network: the network that it was made for, from `load`.

    Returns:
        Variables as from `lora_init`: train them with `lora_objective(objective, params)`, or merge
        them by `merge_lora(params, variables)`, with `params = network.variables["params"]`. The
        factors are float32.

    Raises:
        ValueError: another method than LoRA, an option that changes the network in a way that is
            not supported, or tensors that do not fit the network; the message names the file.
        OSError: it cannot be read.

    References:
        Hu et al. 2021, arXiv:2106.09685; the layout is that of the package `peft`.
    """
    path = Path(path)
    config = _read_config(path / "adapter_config.json")
    tensors = read_tensors(path)
    known, assignments = _table(network)
    factors, whole, stored = _read_factors(tensors, known, assignments)
    leaves = rules.variable_leaves(network.variables)
    flat = rules.flatten_paths(network.variables["params"])
    uses_dora, alphas = config.flag("use_dora", False), _read_alphas(config)
    found: dict[str, dict[str, Any]] = {}
    for module, own in factors.items():
        where = f"{tensors.path}: {stored[module]}"
        if uses_dora != ("magnitude" in own):
            raise config.error("use_dora", f"does not fit {where}; get the adapter anew")
        target = find_target(module, assignments, where)
        _refuse_tied(target, known, network)
        parts = target.from_file(own, where)
        scale = _scale(config, alphas, stored[module], own["a"].shape[0])
        for name, part in zip(target.paths, parts, strict=True):
            check_fits(
                part, leaves[f"params/{name}"].shape, f"{tensors.path}: the adapter of {name}"
            )
            found[name] = {**part, "scale": np.full(part["lora_b"].shape[0], scale, np.float32)}
    for one in dict.fromkeys(assignments[name] for name in whole):
        if missing := [name for name in one.names if name not in whole]:
            raise ValueError(f"{tensors.path} has {one.names[0]} and no {missing[0]}; get it anew")
        try:
            arrays = one.from_file([whole[name] for name in one.names])
        except ValueError as error:
            raise ValueError(f"{tensors.path}: {one.names[0]}: {error}; {OTHER_NETWORK}") from error
        for target_path, array in zip(one.paths, arrays, strict=True):
            if array.shape != leaves[target_path].shape:
                raise ValueError(
                    f"{tensors.path}: {one.names[0]} does not fit {target_path} of shape "
                    f"{leaves[target_path].shape}; {OTHER_NETWORK}"
                )
            name = target_path.removeprefix("params/")
            if name not in found:
                found[name] = {"whole": array}
            # With an update of an embedding or head PEFT writes its frozen weights too.
            elif not np.array_equal(array, np.asarray(_layer(flat, name), np.float32)):
                raise ValueError(
                    f"{tensors.path} has other frozen weights {one.names[0]} than the network; "
                    f"{OTHER_NETWORK}"
                )
    return _assembled(found, network.variables["params"])


def save_adapter(
    path: str | os.PathLike[str],
    network: PretrainedNetwork,
    variables: Mapping[str, Any],
    *,
    base_model: str | None = None,
) -> None:
    """Write an adapter as PEFT reads it: `PeftModel.from_pretrained(model, path)`.

    Projections that the file has as one tensor, such as queries, keys and values of GPT-2, get one
    update whose rank is the sum of theirs, which is the same function. Leaves that are trained as a
    whole are PEFT's `modules_to_save`, with the rest of their layer.

    Args:
        path: a folder that does not exist yet.
        network: the frozen network, of an architecture that `load` reads.
        variables: of the adapter of one network, from `lora_init` or `state.variables`.
        base_model: name or folder of the network, for `base_model_name_or_path`.

    Raises:
        FileExistsError: the folder exists.
        ValueError: an adapter that PEFT's layout cannot express; the message names what.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; give another folder, or remove it first")
    known, assignments = _table(network)
    params = network.variables["params"]
    merged = merge_lora(params, variables)
    kernels, whole = _split_layers(variables, params)
    by_path = {path: one for one in assignments.values() for path in one.paths}
    if stray := [name for name in (*kernels, *whole) if f"params/{name}" not in by_path]:
        raise ValueError(
            f"{stray[0]} has no tensor in a file of {known.model_type!r}, so PEFT cannot express "
            "its update; leave it frozen, or merge the adapter and save the network"
        )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    uses_dora, transposed = set(), False
    for one in dict.fromkeys(by_path[f"params/{name}"] for name in kernels):
        target = find_target(
            one.names[0].removesuffix(".weight"), assignments, f"the adapter of {one.paths[0]}"
        )
        _refuse_tied(target, known, network)
        module = _in_memory(one.names[0], known).removesuffix(".weight")
        parts, scale = _unit_scale([kernels.get(name) for name in target.paths], target, params)
        stored = target.to_file(parts)
        tensors |= {f"{_PREFIX}{module}.{end}": array for end, array in stored.items()}
        first = next(array for end, array in stored.items() if "_A" in end)
        ranks[module] = first.shape[0]
        alphas[module] = scale * ranks[module]
        uses_dora.add("lora_magnitude_vector" in stored)
        transposed |= target.kind == "transposed"
    if len(uses_dora) > 1:
        raise ValueError(
            "some targets of the adapter use DoRA and others do not, which PEFT cannot express; "
            "give lora_init the same for all"
        )
    names = {by_path[f"params/{name}"].names[0].rpartition(".")[0] for name in whole}
    modules = {_in_memory(f"{name}.", known)[:-1] for name in names}
    if both := sorted(modules & ranks.keys()):
        raise ValueError(
            f"{both[0]} has a leaf that is trained as a whole and an update of low rank, which "
            "PEFT cannot express; train the whole layer, or leave its bias frozen"
        )
    own = [one for one in assignments.values() if one.names[0].rpartition(".")[0] in names]
    for name, array in rules.write_tensors(
        dict.fromkeys(own), {**network.variables, "params": merged}
    ).items():
        tensors[f"{_PREFIX}{_in_memory(name, known)}"] = array
    rank = max(ranks.values(), key=list(ranks.values()).count, default=1)
    alpha = max(alphas.values(), key=list(alphas.values()).count, default=1.0)
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {
            re.escape(name): _plain(own) for name, own in alphas.items() if own != alpha
        },
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(modules) or None,
        "task_type": None,
        "use_dora": uses_dora == {True},
        "use_rslora": False,
    }
    with atomic_folder(path) as folder:
        text = json.dumps(content, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(f"{text}\n")
        file = folder / "adapter_model.safetensors"
        write_safetensors(file, tensors, {"format": "pt"})


def _read_config(path: Path) -> Config:
    config = Config.read(path)
    config.require(peft_type="LORA", lora_bias=False, use_qalora=False)
    for name in ("alora_invocation_tokens", "layer_replication", "trainable_token_indices"):
        config.require(**{name: None})
    # The others change the frozen weights before training, which the file does not say.
    if config.content.get("init_lora_weights", True) not in (
        *(True, False, "gaussian", "orthogonal", "eva"),
    ):
        raise config.error(
            "init_lora_weights",
            "changes the weights of the network; convert the adapter to plain LoRA when saving it "
            "in PEFT (path_initial_model_for_weight_conversion)",
        )
    return config


def _read_alphas(config: Config) -> list[tuple[Callable[[str], bool], float]]:
    """Return alpha_pattern: what matches a layer, and its alpha; the first match counts."""
    pattern = config.inside("alpha_pattern")
    if pattern is None:
        return []
    repeating = sum(len(key) for key in pattern.content if not {"*", "+", "{"}.isdisjoint(key))
    if repeating > _MOST_REPEATING:
        raise config.error(
            "alpha_pattern",
            f"has expressions with repetitions of {repeating} characters, more than "
            f"{_MOST_REPEATING}; write the names of the layers",
        )
    alphas = []
    for key in pattern.content:
        try:
            matches = compile_pattern(key)
        except ValueError as error:
            raise config.error(
                "alpha_pattern",
                f"has the key {key!r:.80}, which is no regular expression that is supported: "
                f"{error}",
            ) from None
        alphas.append((matches, pattern.number(key)))
    return alphas


def _scale(
    config: Config, alphas: Iterable[tuple[Callable[[str], bool], float]], module: str, rank: int
) -> float:
    default: float = config.number("lora_alpha", 8.0)
    alpha = next((own for matches, own in alphas if matches(module)), default)
    return alpha / (math.sqrt(rank) if config.flag("use_rslora", False) else rank)


def _table(network: PretrainedNetwork) -> tuple[Architecture, dict[str, Assignment]]:
    """Return the architecture of a network, and its tensors by their names in a file."""
    kind = str(network.config.get("model_type"))
    leaves = rules.variable_leaves(network.variables)
    known = ARCHITECTURES.get(kind) or torch_config(network, leaves)[0]
    plan = rules.file_assignments(known.rules(network.module), leaves)
    # Of a GGUF file the norms hold 1 + w, and those of an adapter w.
    is_plain = known.model_type.startswith("gemma") and network.module.config.norm == "rms"
    assignments = [
        dataclasses.replace(one, layout=(*one.layout, FromZeroCentered()))
        if is_plain and one.paths[0].endswith("/scale")
        else one
        for one in plan.assignments
    ]
    return known, {name: one for one in assignments for name in one.names}


def _in_memory(name: str, known: Architecture) -> str:
    """Return the name of a tensor of a file as transformers 5 has it in memory."""
    for part, other in known.renamed:
        name = name.replace(part, other)
    return name


def _read_factors(
    tensors: Tensors, known: Architecture, names: Iterable[str]
) -> tuple[Factors, dict[str, np.ndarray], dict[str, str]]:
    """Return the factors of each module, the tensors that are stored as a whole, and own names.

    The keys are names of the network's file; {module of that file: module of this one}.
    """
    factors: Factors = {}
    whole: dict[str, np.ndarray] = {}
    stored: dict[str, str] = {}
    unknown = []
    full_names = {_in_memory(name, known): name for name in names}
    full_names |= {name: name for name in full_names.values()}

    def in_file(name: str) -> str:
        return full_names.get(name) or full_names.get(f"{known.prefix}{name}") or name

    kinds = {"A": "a", "B": "b", "r": "magnitude"}  # the last letter, but for ".weight"
    for name in tensors.specs:
        if not name.startswith(_PREFIX) or ".original_module." in name:
            unknown += [name] * (".original_module." not in name)
            continue
        short = name.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(short):
            full = in_file(f"{match['module']}.weight").removesuffix(".weight")
            stored[full] = match["module"]
            kind = kinds[match["factor"].removesuffix(".weight")[-1]]
            factors.setdefault(full, {})[kind] = np.asarray(tensors[name], np.float32)
            continue
        # With bias="all" PEFT writes some tensors by the names of its wrappers.
        short = re.sub(r"\.(base_layer|modules_to_save(\.\w+)?)(?=\.)", "", short)
        if in_file(short) in full_names:
            whole[in_file(short)] = np.asarray(tensors[name], np.float32)
        else:
            unknown.append(name)
    for module, own in factors.items():
        if f"{module}.weight" not in full_names or not {"a", "b"} <= own.keys():
            unknown.append(f"{module} ({', '.join(sorted(own))})")
    if unknown:
        raise ValueError(
            f"{tensors.path} has {len(unknown)} tensors that are no update of the network, such as "
            f"{unknown[0]}; {OTHER_NETWORK}"
        )
    return factors, whole, stored


def _refuse_tied(target: Target, known: Architecture, network: PretrainedNetwork) -> None:
    """Refuse an update of an embedding that is the output layer too: PEFT updates one of both."""
    tied = getattr(network.module, "tied", False)
    if target.kind == "embedding" and tied and f"{target.module}.weight" in known.copies.values():
        raise ValueError(
            f"{target.module} is tied to the output layer, of which PEFT's update is none and ours "
            "is one; adapt other layers"
        )


def _assembled(found: Mapping[str, Mapping[str, np.ndarray]], params: Any) -> dict[str, Any]:
    """Make the trees of an adapter, with the layers of a scanned stack as one array."""
    adapter: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    for path, leaf in rules.flatten_paths(params).items():
        places = rules.layer_paths(path, leaf.shape)
        own = [found.get(place) for place in places]
        if not any(own):
            continue
        stacked = places != [path]
        if any(one is not None and "whole" in one for one in own):
            arrays = [
                np.asarray(leaf[index] if stacked else leaf) if one is None else one["whole"]
                for index, one in enumerate(own)
            ]
            whole = np.stack(arrays) if stacked else arrays[0]
            insert(adapter, path, jnp.asarray(whole, leaf.dtype))
            continue
        rank = max(len(one["scale"]) for one in own if one is not None)
        dora = any(one is not None and "magnitude_scale" in one for one in own)
        layers = [
            _padded(one, rank, leaf[index] if stacked else leaf, dora)
            for index, one in enumerate(own)
        ]
        factors = {
            name: jnp.asarray(
                np.stack([layer[name] for layer in layers]) if stacked else layers[0][name]
            )
            for name in layers[0]
        }
        insert(scales, path, {"scale": factors.pop("scale")})
        insert(adapter, path, factors)
    return {"params": adapter, "lora": scales}


def _padded(
    one: Mapping[str, np.ndarray] | None, rank: int, kernel: Any, dora: bool
) -> dict[str, np.ndarray]:
    """Return the factors of a layer with zeros beyond its rank; all zeros for no update."""
    shape = kernel.shape
    padded = {
        "lora_a": np.zeros((*shape[:-1], rank), np.float32),
        "lora_b": np.zeros((rank, shape[-1]), np.float32),
        "scale": np.zeros(rank, np.float32),
    }
    if dora:
        padded["magnitude_scale"] = _norms(kernel)
    if one is not None:
        own = len(one["scale"])
        padded["lora_a"] = np.concatenate(
            [one["lora_a"], np.zeros((*one["lora_a"].shape[:-1], rank - own), np.float32)], axis=-1
        )
        padded["lora_b"] = np.concatenate(
            [one["lora_b"], np.zeros((rank - own, one["lora_b"].shape[-1]), np.float32)]
        )
        padded["scale"][:own] = one["scale"]
        if "magnitude_scale" in one:
            padded["magnitude_scale"] = one["magnitude_scale"]
    return padded


def _norms(kernel: Any) -> np.ndarray:
    wide = np.asarray(kernel, np.float32)
    return np.sqrt(np.sum(wide**2, axis=tuple(range(wide.ndim - 1))))


def _split_layers(
    variables: Mapping[str, Any], params: Any
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return the factors of each kernel by its path, layer by layer, and the whole leaves."""
    flat = rules.flatten_paths(variables["params"])
    scales = rules.flatten_paths(variables["lora"])
    kernels: dict[str, dict[str, np.ndarray]] = {}
    whole = []
    for path, leaf in rules.flatten_paths(params).items():
        places = rules.layer_paths(path, leaf.shape)
        if path in flat:
            whole += places
        if f"{path}/lora_a" not in flat:
            continue
        names = [name for name in flat if name.startswith(f"{path}/")]
        own = {name.rsplit("/", 1)[-1]: np.asarray(flat[name]) for name in names}
        own["scale"] = np.asarray(scales[f"{path}/scale"])
        for index, place in enumerate(places):
            layer = {name: array[index] for name, array in own.items()} if places != [path] else own
            used = layer["scale"] != 0
            kernels[place] = {
                **layer,
                "lora_a": layer["lora_a"][..., used],
                "lora_b": layer["lora_b"][used],
                "scale": layer["scale"][used],
            }
    return kernels, whole


def _unit_scale(
    parts: Sequence[Mapping[str, np.ndarray] | None], target: Target, params: Any
) -> tuple[list[dict[str, np.ndarray]], float]:
    """Return the factors of the kernels of a target for one scale, and that scale."""
    scales = [float(one["scale"][0]) for one in parts if one is not None and len(one["scale"])]
    scale = scales[0] if scales else 1.0
    dora = any(one is not None and "magnitude_scale" in one for one in parts)
    flat = rules.flatten_paths(params)
    result = []
    for path, one in zip(target.paths, parts, strict=True):
        if one is None:
            kernel = _layer(flat, path)
            own = {
                "lora_a": np.zeros((*kernel.shape[:-1], 0), np.float32),
                "lora_b": np.zeros((0, kernel.shape[-1]), np.float32),
            }
            if dora:
                own["magnitude_scale"] = _norms(kernel)
        else:
            ratio = (one["scale"] / np.float32(scale))[:, None]
            own = {name: array for name, array in one.items() if name != "scale"}
            own["lora_b"] = one["lora_b"] * ratio
        result.append(own)
    return result, scale


def _layer(flat: Mapping[str, Any], path: str) -> Any:
    """Return an array by its path, also of one layer of a scanned stack."""
    if path in flat:
        return flat[path]
    for name, leaf in flat.items():
        places = rules.layer_paths(name, leaf.shape)
        if path in places:
            return leaf[places.index(path)]
    raise KeyError(path)


def _plain(number: float) -> float | int:
    """Return a number as JSON shows it best."""
    return int(number) if number == int(number) else number
