"""What a pretrained network is read from: one function for each kind of folder and file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxnets.pretrained import rules
from jaxnets.pretrained.architectures import ARCHITECTURES, Architecture
from jaxnets.pretrained.architectures.gguf import GGUF_ARCHITECTURES, KIND, read_gguf_config
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.formats import Tensors, read_tensors
from jaxnets.pretrained.module_config import JAXNETS, own_rules, read_module
from jaxnets.pretrained.processors import read_gguf_tokenizer, read_processor
from jaxnets.pretrained.rules import Plan, Rule
from jaxnets.pretrained.sentence_folders import SentenceFolder, read_sentence_folder

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
class Source:
    """A network as a folder or file describes it, before any array is read.

    Attributes:
        config: its configuration.
        tensors: of its file, under the names of the architecture.
        module: the network.
        shapes: of its variables.
        plan: which tensors are which arrays.
        inputs: shapes that initialize the network; None where the source does not say.
        processor: what turns data into inputs; None without one.
        generation: as read from generation_config.json; {} without one.
    """

    config: Config
    tensors: Tensors
    module: nn.Module
    shapes: Any
    plan: Plan
    inputs: Sequence[jax.ShapeDtypeStruct] | None = None
    processor: Any = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_source(
    path: str | os.PathLike[str],
    architecture: str | None,
    fields: Mapping[str, Any],
    *,
    strict: bool,
) -> Source:
    """Open a folder or file of a pretrained network; the arguments are those of `load`.

    Raises:
        FileNotFoundError, ValueError, OSError: as in `load`.
    """
    path = _local(path)
    if architecture is None:
        sentences = read_sentence_folder(path)
        if sentences is not None:
            return _open_sentence_folder(sentences, fields)
    if path.is_dir():
        return _open_folder(path, architecture, fields)
    return _open_file(path, architecture, fields, strict=strict)


def _open_sentence_folder(sentences: SentenceFolder, fields: Mapping[str, Any]) -> Source:
    """Open a folder of sentence-transformers: its encoder, with a pooling."""
    source = _open_folder(sentences.encoder, "SentenceTransformer", {**sentences.fields, **fields})
    if sentences.max_length is None or source.processor is None:
        return source
    # It replaces the tokenizer's, as there; but the network has no further positions.
    limit = min(sentences.max_length, source.module.max_length)
    processor = dataclasses.replace(source.processor, max_length=limit)
    return dataclasses.replace(source, processor=processor)


def _open_folder(folder: Path, architecture: str | None, fields: Mapping[str, Any]) -> Source:
    """Open a folder with config.json, of Hugging Face or of this library."""
    tensors = read_tensors(folder)
    try:
        config = Config.read(folder / "config.json")
    except FileNotFoundError as error:
        remedy = "give the whole folder of a network, or read its tensors alone by read_tensors"
        if KIND in tensors.metadata:
            remedy = f"its file says what network it is: load({str(tensors.path)!r})"
        raise FileNotFoundError(f"{folder} has no config.json; {remedy}") from error
    if config.content.get("model_type") == JAXNETS:
        source = _own_network(config, tensors, fields)
        source = dataclasses.replace(source, processor=read_processor(folder))
    else:
        known, build = _choose(config, architecture, _tables(tensors))
        config = config.rename(known.aliases)
        config.require(quantization_config=None)  # arrays in an encoding of their own
        source = _network(known, build, config, tensors, fields, named=architecture is not None)
        if known.processor is not None:
            source = dataclasses.replace(source, processor=known.processor(folder, config))
    file = folder / GENERATION
    generation = Config.read(file).content if file.exists() else {}
    return dataclasses.replace(source, generation=generation)


def _open_file(
    path: Path, architecture: str | None, fields: Mapping[str, Any], *, strict: bool
) -> Source:
    """Open a file: of GGUF, which says what network it is, or of torchvision."""
    tensors = read_tensors(path)
    if KIND not in tensors.metadata:
        known = ARCHITECTURES["torchvision"]
        if not isinstance(architecture, str) or architecture not in known.classes:
            raise ValueError(
                f"{path} does not say what network it is; give the folder with its config.json, "
                "or for a file of torchvision its function as architecture= "
                f"{', '.join(known.classes)}"
            )
        build = known.classes[architecture]
        return _network(known, build, Config.of(path, {}), tensors, fields, named=True)
    config = read_gguf_config(path, tensors)
    known, build = _choose(config, architecture, GGUF_ARCHITECTURES)
    source = _network(known, build, config, tensors, fields, named=architecture is not None)
    try:
        processor = read_gguf_tokenizer(path, tensors.metadata, max_length=source.module.max_length)
    except ValueError as error:
        if strict:
            raise ValueError(f"{error}, or give strict=False, which leaves it out") from error
        return source
    return dataclasses.replace(source, processor=processor)


def _own_network(config: Config, tensors: Tensors, fields: Mapping[str, Any]) -> Source:
    """Return the network of a folder in the layout of this library."""
    module, shapes = read_module(config, fields)
    leaves = rules.variable_leaves(shapes)
    plan = rules.make_plan(own_rules(leaves), tensors.specs, leaves)
    return Source(config, tensors, module, shapes, plan)


def _network(
    architecture: Architecture,
    build: Callable[[Config, Mapping[str, Any]], nn.Module],
    config: Config,
    tensors: Tensors,
    fields: Mapping[str, Any],
    *,
    named: bool,
) -> Source:
    """Return the network of an architecture; if the caller `named` it, other heads are left out."""
    module, inputs, shapes = _build(architecture, build, config, tensors, fields)
    leaves = rules.variable_leaves(shapes)
    table = list(architecture.rules(module))
    tensors = _full_names(tensors, architecture, table)
    plan = rules.make_plan(table, tensors.specs, leaves)
    plan = _without_copies(plan, architecture, tensors, table if named else [])
    return Source(config, tensors, module, shapes, plan, inputs)


def _tables(tensors: Tensors) -> Mapping[str, Architecture]:
    return GGUF_ARCHITECTURES if KIND in tensors.metadata else ARCHITECTURES


def _choose(
    config: Config, name: str | None, architectures: Mapping[str, Architecture]
) -> tuple[Architecture, Callable[[Config, Mapping[str, Any]], nn.Module]]:
    """Return the architecture of a configuration and what builds its network."""
    kind = str(config.content.get("model_type"))
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
