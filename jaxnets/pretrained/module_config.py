"""Networks of this library as JSON, and back: what config.json of the layout "jaxnets" says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import Precision
from jaxnets.models import autoencoder, convolutional, feedforward, gan, recurrent, transformer
from jaxnets.objectives import likelihoods
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.rules import Rule, variable_leaves
from jaxnets.storage.safetensors import DTYPES

#: `model_type` of a config.json that this library wrote.
JAXNETS = "jaxnets"

#: Fields on which the outputs of a trained network do not depend.
FREE_FIELDS = (
    *("precision", "init_std", "scan_layers", "remat"),
    *("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"),
    *("mlp_dropout_rate", "output_dropout_rate"),
)

_MODULES = (autoencoder, convolutional, feedforward, gan, recurrent, transformer, likelihoods)
_INTERNAL = ("parent", "name")
# NumPy takes other texts for types too, some with a warning.
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


def module_to_json(module: nn.Module, variables: Any) -> dict[str, Any]:
    """Return a network and the shapes of its variables as JSON values.

    Args:
        module: a network of this library.
        variables: its arrays, in nested dicts.

    Raises:
        ValueError: a class or a field that JSON cannot hold, such as a function.
    """
    return {
        "model_type": JAXNETS,
        "module": encode_module(module),
        "arrays": {
            path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
            for path, leaf in variable_leaves(variables).items()
        },
    }


def encode_module(module: nn.Module) -> dict[str, Any]:
    """Return a network as JSON values: its class and its fields, in nested objects.

    Args:
        module: a network of this library.

    Raises:
        ValueError: a class or a field that JSON cannot hold, such as a function.
    """
    name = type(module).__name__
    if _classes().get(name) is not type(module):
        raise ValueError(
            f"{name} is no network of this library, which alone can be written; "
            "write its variables with a Rule for each array"
        )
    encoded: dict[str, Any] = _encode(module, name)
    return encoded


def read_module(config: Config, fields: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """Return the network that a config.json of this library describes, and its variables' shapes.

    Args:
        config: as `module_to_json` wrote it.
        fields: override those of the network and of its `config`, on which no array depends.

    Returns:
        The network, and shape and dtype of each of its variables, in nested dicts.

    Raises:
        ValueError: another field; damaged, or of a network that this version does not have.
    """
    for name in fields:
        if name not in FREE_FIELDS:
            raise ValueError(
                f"{config.document.path}: {name} cannot be given for a network of this library, "
                f"only {', '.join(FREE_FIELDS)}; change the module that is loaded by clone"
            )
    try:
        module = _decode(config.content.get("module"))
        if not isinstance(module, nn.Module):
            raise ValueError("it is no network")
        module = _replace(module, fields)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise config.error("module", f"is no network of this version: {error}") from error
    tree: dict[str, Any] = {}
    for path, leaf in _leaves(config).items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    if getattr(getattr(module, "config", None), "scan_layers", False):
        tree = jax.eval_shape(transformer.stack_layers, tree)
    if "precision" in fields:
        parameter = jnp.dtype(fields["precision"].parameter)
        tree = jax.tree.map(
            lambda leaf: (
                jax.ShapeDtypeStruct(leaf.shape, parameter)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
            ),
            tree,
        )
    return module, tree


def own_rules(paths: Iterable[str]) -> list[Rule]:
    """Return the table of the layout "jaxnets": dots instead of slashes, layers one by one.

    Args:
        paths: of the arrays.
    """
    return [Rule(path.replace("/", "."), path) for path in paths]


def _leaves(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    try:
        return {
            path: jax.ShapeDtypeStruct(tuple(map(int, one["shape"])), _dtype(one["dtype"]))
            for path, one in config.content["arrays"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise config.error("arrays", f"are no shapes and dtypes: {error}") from error


def _replace(module: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    """Replace fields of a network, or of its `config`."""
    own = {field.name for field in dataclasses.fields(module)} - set(_INTERNAL)
    outer = {name: value for name, value in fields.items() if name in own}
    inner = {name: value for name, value in fields.items() if name not in own}
    if inner:
        outer["config"] = dataclasses.replace(module.config, **inner)
    return module.clone(**outer)


def _classes() -> dict[str, type[Any]]:
    classes: dict[str, type[Any]] = {"Precision": Precision}
    for family in _MODULES:
        for name, value in vars(family).items():
            if isinstance(value, type) and dataclasses.is_dataclass(value):
                classes[name] = value
    return classes


def _encode(value: Any, where: str) -> Any:
    value = value.item() if isinstance(value, np.generic) else value  # such as a maximum plus 1
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_encode(one, f"{where}[{index}]") for index, one in enumerate(value)]
    name = type(value).__name__
    if _classes().get(name) is type(value):
        encoded: dict[str, Any] = {"class": name}
        for field in dataclasses.fields(value):
            if not field.init or field.name in _INTERNAL:
                continue
            part = getattr(value, field.name)
            try:
                encoded[field.name] = _encode(part, f"{where}.{field.name}")
            except ValueError:
                if part is not field.default:  # such as the default initializer, a function
                    raise
        return encoded
    try:
        return {"dtype": jnp.dtype(value).name}
    except (TypeError, ValueError):
        raise ValueError(
            f"{where} is {value!r}, which a file cannot hold; give a name, or a network of this "
            "library"
        ) from None


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(one) for one in value)
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return _dtype(value["dtype"]).type
    kind = _classes().get(value["class"])
    if kind is None:
        raise ValueError(f"class {value['class']!r} is not known")
    fields = {name: _decode(one) for name, one in value.items() if name != "class"}
    if kind is Precision:  # which takes names of types as well
        for one in fields.values():
            if isinstance(one, str):
                _dtype(one)
    return kind(**fields)


def _dtype(name: str) -> np.dtype[Any]:
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not known")
    return _DTYPES[name]
