"""A pretrained network: read from a folder of another library or of this one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.core import Precision
from jaxnets.pretrained import rules
from jaxnets.pretrained.rules import Plan
from jaxnets.pretrained.sources import Source, open_source


@dataclasses.dataclass(frozen=True)
class PretrainedNetwork:
    """A network, its variables, and what turns data into its inputs.

    Attributes:
        module: a network of this library, configured.
        variables: of the module, {"params": ...} and further collections.
        processor: what turns texts, images or sounds into inputs; None without one.
        config: as read from config.json, under the architecture's own names (n_layer, also if the
            file has num_hidden_layers), or as the metadata of a GGUF file amount to; {} without.
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
        path: a folder with config.json and its tensors, or a file that has both (.gguf, with
            its tokenizer). A folder of sentence-transformers (modules.json) is a
            `SentenceEncoder`. A name "organization/name" that is no folder is downloaded by
            `huggingface_hub` if that is installed.
        architecture: class of transformers to build, such as "BertForSequenceClassification"; by
            default the one that config.json names. Tensors of another head are left out then. For a
            file of torchvision the name of its function, such as "resnet50".
        strict: refuse tensors that are not used, arrays that are missing, and shapes that differ.
            False reports them in the result; a tensor of another shape counts as unused. The
            tokenizer of a GGUF file that is not supported is left out then.
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
        ImportError: it has a tokenizer, and `tokenizers` is not installed.
        OSError: a file cannot be read.

    Example:
        >>> import pathlib, tempfile, jaxnets as jn
        >>> module = jn.transformer.gpt2_small(num_layers=1, features=8, num_heads=2)
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "gpt2"
        >>> jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
        >>> jn.pretrained.load(folder).module.config.features
        8
    """
    _check_options(rng, sharding, fields)
    source = open_source(path, architecture, fields, strict=strict)
    plan = _complete_plan(source, strict=strict, rng=rng)
    place = _placement(source.shapes, sharding)
    flat = rules.read_variables(plan, source.tensors, source.shapes, place)
    if plan.missing:
        flat |= _initialize(source, rng, flat, sharding)
    variables = jax.tree.unflatten(
        jax.tree.structure(source.shapes),
        [flat[path] for path in rules.flatten_paths(source.shapes)],
    )
    return PretrainedNetwork(
        source.module,
        variables,
        source.processor,
        dict(source.config.content),
        tuple(plan.missing),
        plan.unused,
        source.generation,
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


def _complete_plan(source: Source, *, strict: bool, rng: Any) -> Plan:
    """Return the plan of a source, unless an array or a tensor is left over that may not be."""
    plan, leaves = source.plan, rules.variable_leaves(source.shapes)
    if not strict:
        plan = rules.without_misfits(plan, source.tensors, leaves)
    problem = rules.describe_plan(plan)
    if problem and strict:
        raise ValueError(
            f"{source.tensors.path} is not the network that {source.config.document.path} "
            f"describes: {problem}; name the architecture that it is, or give strict=False"
        )
    if plan.missing and rng is None:
        raise ValueError(f"{source.tensors.path}: {problem}; give rng to initialize them")
    rules.check_shapes(plan, source.tensors, leaves)
    return plan


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


def _initialize(
    source: Source, rng: Any, flat: Mapping[str, Any], sharding: Any
) -> dict[str, jax.Array]:
    """Return new values for the arrays that were not read."""
    inputs, module = source.inputs, source.module
    if inputs is None:
        missing = sorted(rules.flatten_paths(source.shapes).keys() - flat.keys())
        raise ValueError(
            f"{missing[0]} has no tensor, and the folder does not say how to initialize it; get "
            "the folder anew"
        )

    def init(rng: jax.Array) -> dict[str, jax.Array]:
        zeros = [jnp.zeros(one.shape, one.dtype) for one in inputs]
        arrays = rules.flatten_paths(module.init(rng, *zeros))
        return {path: array for path, array in arrays.items() if path not in flat}

    arrays = jax.jit(init)(rng)
    if sharding is None:
        return arrays
    shardings = _shardings(source.shapes, sharding)
    return {path: jax.device_put(array, shardings[path]) for path, array in arrays.items()}
