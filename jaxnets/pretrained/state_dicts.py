"""Arrays of a network of torch, put into a user's own network."""

from __future__ import annotations

import dataclasses
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


def from_torch(
    state_dict: Mapping[str, Any], module: nn.Module, variables: Any, *, rules: Iterable[Rule]
) -> PretrainedNetwork:
    """Put the arrays of a torch network into a network of this library.

    Args:
        state_dict: `read_tensors(path)`, or {name: array}.
        module: the network.
        variables: of the network, arrays or shapes of them.
        rules: which tensors are which arrays, from the functions of `torch_layers`.

    Returns:
        The network with the arrays of torch, in the dtypes of `variables`.

    Raises:
        ValueError: an array without a tensor, a tensor without an array (but the counters
            `num_batches_tracked`), or one of another shape.

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
    tensors = state_dict if isinstance(state_dict, Tensors) else _tensors(state_dict)
    leaves = tables.variable_leaves(variables)
    plan = tables.make_plan(rules, tensors.specs, leaves)
    unused = [name for name in plan.unused if name.split(".")[-1] != "num_batches_tracked"]
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
    path, specs = Path("state_dict"), {}
    for name, value in arrays.items():
        array = np.asarray(value)
        specs[name] = TensorSpec(
            array.shape, array.dtype, str(array.dtype), path, array.__getitem__
        )
    return Tensors(path, specs)
