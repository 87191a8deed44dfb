"""Arrays of a network of torch or Keras, put into a user's own network."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.pretrained import rules as tables
from jaxnets.pretrained.formats import Tensors, TensorSpec
from jaxnets.pretrained.network import PretrainedNetwork
from jaxnets.pretrained.rules import Rule

#: {pattern of tensors that change what a layer of torch computes: which option it is}.
_TORCH_OPTIONS = {
    r"(.*\.)?bias_[kv]": "a learned key and value, add_bias_kv of torch.nn.MultiheadAttention",
    r"(.*\.)?weight_hr_l\d+(_reverse)?": "a projection of the state, proj_size of torch.nn.LSTM",
}


def from_torch(
    state_dict: Mapping[str, Any], module: nn.Module, variables: Any, *, rules: Iterable[Rule]
) -> PretrainedNetwork:
    """Put the arrays of a torch network into a network of this library or of Flax.

    Args:
        state_dict: `read_tensors(path)`, or {name: array}.
        module: the network.
        variables: of the network, arrays or shapes of them.
        rules: which tensors are which arrays, from the functions of `torch_layers`.

    Returns:
        The network with the arrays of torch, in the dtypes of `variables`.

    Raises:
        ValueError: an array without a tensor, a tensor without an array (but the counters
            `num_batches_tracked`), one of another shape, or an option of a layer that has no
            counterpart here.

    Example:
        >>> import jaxnets as jn
        >>> module = nn.Dense(2)
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
        >>> torch = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
        >>> rules = jn.pretrained.torch_layers.dense("fc", "params")
        >>> network = jn.pretrained.from_torch(torch, module, variables, rules=rules)
        >>> network.variables["params"]["kernel"].shape
        (3, 2)
    """
    tensors = _tensors(state_dict)
    for name in tensors:
        for pattern, option in _TORCH_OPTIONS.items():
            if re.fullmatch(pattern, name):
                raise ValueError(
                    f"{tensors.path}: {name} is {option}, which no layer here has; train the "
                    "network without it"
                )
    return _network(tensors, module, variables, rules, r"(.*\.)?num_batches_tracked")


def from_keras(
    tensors: Mapping[str, Any], module: nn.Module, variables: Any, *, rules: Iterable[Rule]
) -> PretrainedNetwork:
    """Put the arrays of a Keras network into a network of this library or of Flax.

    Args:
        tensors: `read_tensors(path)` of a `.weights.h5` or `.keras` file, or {name: array}.
        module: the network.
        variables: of the network, arrays or shapes of them.
        rules: which tensors are which arrays, from the functions of `keras_layers`.

    Returns:
        The network with the arrays of Keras, in the dtypes of `variables`.

    Raises:
        ValueError: an array without a tensor, a tensor without an array (but those of the optimizer
            and of random seeds), or one of another shape.

    Example:
        >>> import jaxnets as jn
        >>> module = nn.Dense(2)
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
        >>> keras = {"layers/dense/vars/0": np.ones((3, 2)), "layers/dense/vars/1": np.zeros(2)}
        >>> rules = jn.pretrained.keras_layers.dense("layers/dense", "params")
        >>> network = jn.pretrained.from_keras(keras, module, variables, rules=rules)
        >>> network.variables["params"]["kernel"].shape
        (3, 2)
    """
    unread = r"optimizer/.*|(.*/)?seed_generator/.*"
    return _network(_tensors(tensors), module, variables, rules, unread)


def _network(
    tensors: Tensors, module: nn.Module, variables: Any, rules: Iterable[Rule], unread: str
) -> PretrainedNetwork:
    """Read the arrays of a network; tensors that match `unread` may be left over."""
    leaves = tables.variable_leaves(variables)
    plan = tables.make_plan(rules, tensors.specs, leaves)
    unused = [name for name in plan.unused if not re.fullmatch(unread, name)]
    plan = dataclasses.replace(plan, unused=tuple(unused))
    problem = tables.describe_plan(plan)
    if problem:
        raise ValueError(
            f"{tensors.path} is not this {type(module).__name__} by these rules: {problem}; give a "
            "rule for each"
        )
    tables.check_shapes(plan, tensors, leaves)
    flat = tables.read_variables(
        plan, tensors, variables, lambda path, shape, dtype, read: jnp.asarray(read(()))
    )
    arrays = [flat[path] for path in tables.flatten_paths(variables)]
    return PretrainedNetwork(module, jax.tree.unflatten(jax.tree.structure(variables), arrays))


def _tensors(arrays: Mapping[str, Any]) -> Tensors:
    if isinstance(arrays, Tensors):
        return arrays
    path, specs = Path("state_dict"), {}
    for name, value in arrays.items():
        array = np.asarray(value)
        specs[name] = TensorSpec(
            array.shape, array.dtype, str(array.dtype), path, array.__getitem__
        )
    return Tensors(path, specs)
