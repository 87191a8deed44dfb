"""Write a network: in this library's own layout, or as transformers and torch read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.models.transformer import SentenceEncoder
from jaxnets.pretrained import rules
from jaxnets.pretrained.architectures import ARCHITECTURES, Architecture
from jaxnets.pretrained.architectures.labels import name_labels
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.module_config import (
    FREE_FIELDS,
    JAXNETS,
    encode_module,
    module_to_json,
    own_rules,
)
from jaxnets.pretrained.network import PretrainedNetwork
from jaxnets.pretrained.processors import Processor
from jaxnets.pretrained.sentence_folders import write_sentence_modules
from jaxnets.pretrained.sources import GENERATION
from jaxnets.storage import atomic_folder, write_json
from jaxnets.storage.safetensors import write_safetensors


def save(
    path: str | os.PathLike[str],
    network: PretrainedNetwork,
    *,
    layout: Literal["jaxnets", "torch"] = "jaxnets",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a network as a folder of config.json, safetensors and the files of its processor.

    The folder gets its name once it is complete. Arrays keep their values and dtypes bit for bit.

    Args:
        path: a folder that does not exist yet.
        network: for a network that was trained here, `PretrainedNetwork(module, variables)`.
        layout: "jaxnets" has the paths of this library, for every network; "torch" the names and
            the configuration of Hugging Face, for the architectures that `load` reads, so that
            transformers and torch load it; a `SentenceEncoder` also those of sentence-transformers.
        max_shard_bytes: a file is split above this size.

    Raises:
        FileExistsError: the folder exists.
        ValueError: the network is none that the layout can express, or the processor none of this
            library; the message names what.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jaxnets as jn
        >>> module = jn.MLP(features=(8,), num_outputs=2)
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
        >>> folder = Path(tempfile.mkdtemp()) / "mlp"
        >>> save(folder, PretrainedNetwork(module, variables))
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.safetensors']
    """
    path = Path(path)
    check_sizes(max_shard_bytes=max_shard_bytes)
    if layout not in ("jaxnets", "torch"):
        raise ValueError(f"layout is {layout!r}; choose 'jaxnets' or 'torch'")
    if path.exists():
        raise FileExistsError(f"{path} exists; give another folder, or remove it first")
    if not isinstance(network.processor, Processor | None):
        raise ValueError(
            f"the processor is a {type(network.processor).__name__}; give a TextProcessor, an "
            "ImageProcessor, a SoundProcessor or None, and save others yourself"
        )
    for place, leaf in rules.flatten_paths(network.variables).items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"{place} is a {type(leaf).__name__}; give variables that are arrays")
    paths = rules.variable_leaves(network.variables)
    if layout == "jaxnets":
        content = module_to_json(network.module, network.variables)
        table = own_rules(paths)
    else:
        architecture, content = torch_config(network, paths)
        table = list(architecture.rules(network.module))
    plan = rules.file_assignments(table, paths)
    if plan.missing:
        raise ValueError(
            f"{rules.describe_plan(plan)}; save with layout='jaxnets', or save the network without "
            "them"
        )
    if layout == "torch":
        _check_shapes(architecture, content, network.module, paths)
    tensors = rules.write_tensors(plan.assignments, network.variables)
    if layout == "torch":
        tensors |= _batch_counters(tensors)
    with atomic_folder(path) as folder:
        if layout == "jaxnets":
            write_json(folder / "config.json", content)
        else:  # transformers takes every entry for an option, a digest too
            (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        _write_tensors(folder, tensors, max_shard_bytes)
        if network.generation:
            (folder / GENERATION).write_text(json.dumps(dict(network.generation), indent=2) + "\n")
        if network.processor is not None:
            network.processor.save(folder)
        if layout == "torch" and isinstance(network.module, SentenceEncoder):
            limit = getattr(network.processor, "max_length", None)
            write_sentence_modules(folder, network.module, max_length=limit)


def _check_shapes(
    architecture: Architecture, content: Mapping[str, Any], module: nn.Module, leaves: rules.Leaves
) -> None:
    """Check that the arrays are those of the network that the configuration describes."""
    inputs = architecture.inputs(module, Config.of(Path("config.json"), content))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    wanted = {path: leaf.shape for path, leaf in rules.variable_leaves(shapes).items()}
    given = {path: leaf.shape for path, leaf in leaves.items()}
    for path in sorted(wanted.keys() | given.keys()):
        if wanted.get(path) != given.get(path):
            raise ValueError(
                f"{path} has shape {given.get(path)} in the variables and {wanted.get(path)} in "
                f"{type(module).__name__}; give the variables of this network"
            )


def _batch_counters(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what torch's batch norms have beside their statistics, a number of batches: 0."""
    suffix = ".running_var"
    names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {f"{name}.num_batches_tracked": np.zeros((), np.int64) for name in names}


def _write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], most: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    metadata = {"format": "pt"}  # transformers refuses files without it
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def torch_config(
    network: PretrainedNetwork, leaves: rules.Leaves
) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture that a network is, and its config.json."""
    own = ARCHITECTURES.get(str(network.config.get("model_type")))
    known = [own] if own else list(ARCHITECTURES.values())
    reasons = []
    module = network.module
    structure = _structure(module)
    before = {} if network.config.get("model_type") == JAXNETS else network.config
    # The types of the file that was read are not those of these arrays.
    names = ("dtype", "torch_dtype")
    kept = {key: value for key, value in before.items() if key not in names}
    dtypes = {
        leaf.dtype.name for leaf in leaves.values() if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    kept |= {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    for architecture in known:
        if architecture.to_config is None:
            continue
        try:
            entries = architecture.to_config(module)
        except (AttributeError, KeyError, TypeError):  # another class of networks
            continue
        # transformers takes an alias, if there is one, for the entry.
        plain = {key: value for key, value in kept.items() if key not in architecture.aliases}
        content = name_labels({**plain, **entries, "model_type": architecture.model_type})
        for name, build in _preferred(architecture, network.config):
            content["architectures"] = [name]
            config = Config.of(Path("config.json"), content)
            try:
                built = build(config, {})
                if isinstance(built, SentenceEncoder) and isinstance(module, SentenceEncoder):
                    # The modules say both, and config.json is that of the encoder alone.
                    built = built.clone(pool=module.pool, normalize=module.normalize)
                    content["architectures"] = [next(iter(architecture.classes))]
                difference = _difference(_structure(built), structure)
            except ValueError:
                continue
            if difference is None:
                if architecture.sizes is not None:
                    content |= architecture.sizes(content, leaves)
                return architecture, content
            reasons.append(f"{name} has {difference}")
    kinds = ", ".join(one.model_type for one in known if one.to_config)
    nearest = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
    raise ValueError(
        f"{type(module).__name__} as it is configured is no {kinds}{nearest}; save with "
        "layout='jaxnets'"
    )


def _preferred(architecture: Architecture, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the classes of an architecture, the one of the configuration first."""
    named = config.get("architectures") or []
    return sorted(architecture.classes.items(), key=lambda item: item[0] not in named)


def _structure(module: nn.Module) -> Any:
    """Return a network as JSON values, without what its tensors do not depend on."""

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(one) for one in value]
        if not isinstance(value, dict):
            return value
        if value.get("class") == "BlockConfig":  # its defaults depend on other fields
            value = dict(value)
            for field, default in (
                ("mlp_dim", 4 * value["features"]),
                ("num_kv_heads", value["num_heads"]),
                ("head_dim", value["features"] // value["num_heads"]),
            ):
                value[field] = default if value[field] is None else value[field]
        return {name: without(one) for name, one in value.items() if name not in FREE_FIELDS}

    return without(encode_module(module))


def _difference(expected: Any, found: Any, where: str = "") -> str | None:
    """Return the first field in which two networks of one class differ, if their class is one."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = expected.keys() | found.keys()
        for name in sorted(names, key=lambda name: (name != "class", name)):
            inner = _difference(expected.get(name), found.get(name), f"{where}.{name}".lstrip("."))
            if inner is not None:
                return inner
        return None
    return None if expected == found else f"{where} {expected!r}, not {found!r}"
