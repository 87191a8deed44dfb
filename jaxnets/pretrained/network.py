"""A pretrained network: read from a folder of another library or of this one."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import Precision
from jaxnets.pretrained import rules
from jaxnets.pretrained.architectures import ARCHITECTURES, Architecture
from jaxnets.pretrained.architectures.gguf import GGUF_ARCHITECTURES, KIND, read_gguf_config
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.formats import Tensors, read_tensors
from jaxnets.pretrained.module_config import JAXNETS, own_rules, read_module
from jaxnets.pretrained.rules import Plan, Rule
from jaxnets.pretrained.sentence_folders import read_sentence_folder

#: The file of a folder that says how its network generates.
GENERATION = "generation_config.json"

#: Entries of config.json that say how many layers there are.
_DEPTHS = (
    *("n_layer", "n_layers", "num_layers", "num_hidden_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers", "depths"),
)
#: Entries that no axis of a tensor can be shorter than.
_AXES = (
    *("n_head", "n_heads", "num_heads", "num_attention_heads", "num_key_value_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "head_dim", "d_kv"),
    *("d_model", "max_source_positions", "relative_attention_num_buckets"),
)
_IMAGES = ("image_size",)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"]


@dataclasses.dataclass(frozen=True)
class PretrainedNetwork:
    """A network, its variables, and what turns data into its inputs.

    Attributes:
        module: a network of this library, configured.
        variables: of the module, {"params": ...} and further collections.
        processor: what turns texts, images or sounds into inputs; None without one.
        config: as read from config.json, or as the metadata of a GGUF file amount to; {} without.
        missing: paths of arrays that the file did not have, which are newly initialized; only with
            `strict=False`.
        unused: names of tensors that were not used; only with `strict=False`.
        generation: as read from generation_config.json, such as "decoder_start_token_id",
            "eos_token_id" and "suppress_tokens"; {} without one.
    """

    module: nn.Module
    variables: Any
    processor: Any = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    strict: bool = True,
    rng: jax.Array | None = None,
    sharding: Any = None,
    **fields: Any,
) -> PretrainedNetwork:
    """Load a pretrained network from a folder of Hugging Face, or one that `save` wrote.

    Args:
        path: a folder with config.json and its tensors, or a file that has both (.gguf; its
            tokenizer is not read). A folder of sentence-transformers (modules.json) is a
            `SentenceEncoder`. A name
            "organization/name" that is no folder is downloaded by `huggingface_hub` if that is
            installed.
        architecture: class of transformers to build, such as "BertForSequenceClassification"; by
            default the one that config.json names. Tensors of another head are left out then. For a
            file of torchvision the name of its function, such as "resnet50".
        strict: refuse tensors that are not used, arrays that are missing, and shapes that differ.
            False reports them in the result; a tensor of another shape counts as unused.
        rng: key for the arrays that are missing, such as a new head; needs `strict=False`.
        sharding: of the arrays: a `Sharding`, or a pytree of them like the variables. Arrays are
            read shard by shard. By default they lie on the default device.
        fields: override those of the network and of its `BlockConfig`, such as `scan_layers=True`,
            `num_outputs=3` or `precision`, whose `parameter` is the dtype of the arrays.

    Returns:
        The network and its variables.

    Raises:
        FileNotFoundError: no such folder, no config.json, or a missing shard.
        ValueError: an unknown architecture, an option that is not supported, tensors that do not
            fit; the message names the file. Nothing has been read then.
        OSError: a file cannot be read.

    Example:
        >>> import tempfile, jaxnets as jn
        >>> module = jn.transformer.gpt2_small(num_layers=1, features=8, num_heads=2)
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        >>> folder = Path(tempfile.mkdtemp()) / "gpt2"
        >>> jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
        >>> jn.pretrained.load(folder).module.config.features
        8
    """
    _check_options(rng, sharding, fields)
    path = _local(path)
    sentences = read_sentence_folder(path) if architecture is None else None
    if sentences is not None:
        path, architecture = sentences.encoder, "SentenceTransformer"
        fields = {**sentences.fields, **fields}
    tensors = read_tensors(path)
    config = _read_config(path, tensors)
    if config.content.get("model_type") == JAXNETS:
        module, shapes = read_module(config, fields)
        leaves = rules.variable_leaves(shapes)
        plan = rules.make_plan(own_rules(leaves), tensors.specs, leaves)
        processor, initialize = None, _refuse_missing
    else:
        architectures = GGUF_ARCHITECTURES if KIND in tensors.metadata else ARCHITECTURES
        known, build = _architecture(config, architecture, architectures)
        module, inputs, shapes = _build(known, build, config, tensors, fields)
        leaves = rules.variable_leaves(shapes)
        table = list(known.rules(module))
        tensors = _full_names(tensors, known, table)
        plan = rules.make_plan(table, tensors.specs, leaves)
        plan = _without_copies(plan, known, tensors, [] if architecture is None else table)
        processor = known.processor(path, config) if known.processor and path.is_dir() else None
        initialize = functools.partial(_initialize, module, rng, inputs)
    if sentences is not None and sentences.max_length is not None and processor is not None:
        processor = dataclasses.replace(processor, max_length=sentences.max_length)
    if not strict:
        plan = rules.without_misfits(plan, tensors, leaves)
    problem = rules.describe_plan(plan)
    if problem and strict:
        raise ValueError(
            f"{tensors.path} is not the network that {config.document.path} describes: {problem}; "
            "name the architecture that it is, or give strict=False"
        )
    if plan.missing and rng is None:
        raise ValueError(f"{tensors.path}: {problem}; give rng to initialize them")
    rules.check_shapes(plan, tensors, leaves)
    file = path / GENERATION
    generation = Config.read(file).content if path.is_dir() and file.exists() else {}
    place = _placement(shapes, sharding)
    flat = rules.read_variables(plan, tensors, shapes, place)
    if plan.missing:
        flat |= initialize(shapes, flat, sharding)
    variables = jax.tree.unflatten(
        jax.tree.structure(shapes), [flat[path] for path in rules.flatten_paths(shapes)]
    )
    return PretrainedNetwork(
        module,
        variables,
        processor,
        dict(config.content),
        tuple(plan.missing),
        plan.unused,
        generation,
    )


def _check_options(rng: Any, sharding: Any, fields: Mapping[str, Any]) -> None:
    """Check the types of what the caller gives, before anything is read."""
    precision = fields.get("precision", Precision())
    if not isinstance(precision, Precision):
        raise ValueError(
            f"precision is {precision!r}; give a Precision, such as "
            "Precision(parameter=jnp.bfloat16)"
        )
    if rng is not None and not hasattr(rng, "shape"):
        raise ValueError(f"rng is {rng!r}; give a key, such as jax.random.key(0)")
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding | Mapping):
        raise ValueError(
            f"sharding is {sharding!r}; give a Sharding, such as NamedSharding(mesh, spec), or a "
            "tree of them like the variables"
        )


def _build(
    architecture: Architecture,
    build: Callable[[Config, Mapping[str, Any]], nn.Module],
    config: Config,
    tensors: Tensors,
    fields: Mapping[str, Any],
) -> tuple[nn.Module, Sequence[jax.ShapeDtypeStruct], Any]:
    """Return the network of a configuration, its inputs, and the shapes of its variables."""
    _bound_sizes(config, tensors)
    try:
        module = build(config, fields)
        if architecture.adapt is not None:
            module = architecture.adapt(module, tensors)
        inputs = architecture.inputs(module, config)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        where = str(config.document.path)
        if isinstance(error, ValueError) and where in str(error):
            raise
        given = f" with {', '.join(fields)}" if fields else ""
        raise ValueError(f"{where}{given} describes no network: {error}") from error
    return module, inputs, shapes


def _bound_sizes(config: Config, tensors: Tensors) -> None:
    """Refuse sizes for which tracing takes long or much memory, such as tables of positions."""
    specs = tensors.specs.values()
    longest = max((size for spec in specs for size in spec.shape), default=0)
    for names, most, what in (
        (_DEPTHS, len(specs), f"the {len(specs)} tensors of the file"),
        (_AXES, longest, f"{longest}, the longest axis of the tensors of the file"),
        (_IMAGES, longest**2, "the tensors of the file have room for"),
    ):
        for name in names:
            value = config.content.get(name)
            sizes = value if isinstance(value, list) else [value]
            if any(type(size) is int and size > most for size in sizes):
                raise config.error(name, f"is more than {what}")


def _full_names(tensors: Tensors, architecture: Architecture, table: list[Rule]) -> Tensors:
    """Return the tensors under the names of the table, also of a file that lacks the prefix."""
    patterns = [pattern for rule in table for pattern in rule.sources]
    patterns += [*architecture.ignored, *architecture.copies]
    plain = {pattern for pattern in patterns if "{" not in pattern}
    numbered = [pattern for pattern in patterns if "{" in pattern]

    def known(name: str) -> bool:
        return name in plain or any(rules.matches(pattern, name) for pattern in numbered)

    specs = {}
    for name, spec in tensors.specs.items():
        full = f"{architecture.prefix}{name}"
        specs[full if not known(name) and known(full) else name] = spec
    return Tensors(tensors.path, specs, tensors.metadata)


def _without_copies(
    plan: Plan, architecture: Architecture, tensors: Tensors, heads: list[Rule]
) -> Plan:
    """Take tensors that need no array out of the unused ones: buffers, copies, other heads."""
    patterns = [*architecture.ignored, *[name for rule in heads for name in rule.sources]]
    unused = []
    for name in plan.unused:
        if any(rules.matches(pattern, name) for pattern in patterns):
            continue
        original = architecture.copies.get(name)
        if original and original in tensors and np.array_equal(tensors[name], tensors[original]):
            continue
        unused.append(name)
    return dataclasses.replace(plan, unused=tuple(unused))


def _local(path: str | os.PathLike[str]) -> Path:
    """Return the folder or file, downloaded if it is the name of one on the hub."""
    name, path = os.fspath(path), Path(path)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give the folder of a network")
        return path
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{path} is no folder here; to download a network of that name run "
            "`pip install huggingface_hub`"
        ) from error
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))


def _read_config(path: Path, tensors: Tensors) -> Config:
    if path.is_dir():
        try:
            return Config.read(path / "config.json")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} has no config.json; give the whole folder of a network, or read its "
                "tensors alone by read_tensors"
            ) from error
    if KIND in tensors.metadata:
        return read_gguf_config(path, tensors)
    return Config.of(path, tensors.metadata)


def _architecture(
    config: Config, name: str | None, architectures: Mapping[str, Architecture]
) -> tuple[Architecture, Callable[[Config, Mapping[str, Any]], nn.Module]]:
    """Return the architecture of a configuration and what builds its network."""
    kind = str(config.content.get("model_type"))
    if kind == "None" and name in ARCHITECTURES["torchvision"].classes:
        kind = "torchvision"  # whose files have no configuration
    if kind not in architectures:
        raise config.error(
            "model_type", f"is no known architecture; known are {', '.join(sorted(architectures))}"
        )
    known = architectures[kind]
    names = config.content.get("architectures")
    if name is None and isinstance(names, list) and names:
        name = names[0]
    if name is None:
        return known, next(iter(known.classes.values()))
    if not isinstance(name, str) or name not in known.classes:
        raise ValueError(
            f"{config.document.path}: architecture {name!r} of {kind} is not supported; give "
            f"architecture= one of {', '.join(known.classes)}"
        )
    return known, known.classes[name]


def _placement(shapes: Any, sharding: Any) -> Callable[..., jax.Array]:
    """Return what makes an array on the device from what reads a part of it."""
    if sharding is None:
        return lambda path, shape, dtype, read: jnp.asarray(read())
    shardings = _shardings(shapes, sharding)
    return lambda path, shape, dtype, read: jax.make_array_from_callback(
        shape, shardings[path], read
    )


def _shardings(shapes: Any, sharding: Any) -> dict[str, jax.sharding.Sharding]:
    if isinstance(sharding, jax.sharding.Sharding):
        return dict.fromkeys(rules.flatten_paths(shapes), sharding)
    given, wanted = rules.flatten_paths(sharding), rules.flatten_paths(shapes)
    if given.keys() != wanted.keys():
        path = sorted(given.keys() ^ wanted.keys())[0]
        raise ValueError(
            f"sharding has {len(given)} leaves for {len(wanted)} arrays, and only one of both has "
            f"{path}; give one Sharding, or a tree like the variables"
        )
    return given


def _refuse_missing(shapes: Any, flat: Mapping[str, Any], sharding: Any) -> dict[str, jax.Array]:
    missing = sorted(rules.flatten_paths(shapes).keys() - flat.keys())
    raise ValueError(
        f"{missing[0]} has no tensor, and the folder does not say how to initialize it; get the "
        "folder anew"
    )


def _initialize(
    module: nn.Module, rng: Any, inputs: Any, shapes: Any, flat: Mapping[str, Any], sharding: Any
) -> dict[str, jax.Array]:
    """Return new values for the arrays that were not read."""

    def init(rng: jax.Array) -> dict[str, jax.Array]:
        zeros = [jnp.zeros(one.shape, one.dtype) for one in inputs]
        arrays = rules.flatten_paths(module.init(rng, *zeros))
        return {path: array for path, array in arrays.items() if path not in flat}

    arrays = jax.jit(init)(rng)
    if sharding is None:
        return arrays
    shardings = _shardings(shapes, sharding)
    return {path: jax.device_put(array, shardings[path]) for path, array in arrays.items()}
