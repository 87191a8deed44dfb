"""What the exports share: inputs and weights by name, and functions traced with symbolic sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from jax import export

_Traced = TypeVar("_Traced")


class ArrayInfo(TypedDict):
    name: str
    shape: list[int | str]
    dtype: str


def weights_of(variables: Any) -> dict[str, Any]:
    """Return the leaves by name, such as "params/Dense_0/kernel"."""
    weights: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if name in weights:
            raise ValueError(f"two variables are named {name!r}; rename one of them")
        weights[name] = jnp.asarray(leaf)
    return weights


def function_of_weights(
    network: Any, structure: Any, names: Sequence[str], inputs: tuple[Any, ...]
) -> Callable[..., Any]:
    """Return the function of {name: weight} and of plain inputs, as `plain` makes them."""
    function = network.apply if hasattr(network, "apply") else network
    given, kind = jax.tree.flatten(inputs)
    # A named tuple and the dict that is made of it differ in the order of their leaves.
    order = jax.tree.leaves(plain(jax.tree.unflatten(kind, range(len(given)))))

    def call(weights: dict[str, jax.Array], *plain_inputs: Any) -> Any:
        leaves = dict(zip(order, jax.tree.leaves(plain_inputs), strict=True))
        arguments = jax.tree.unflatten(kind, [leaves[i] for i in range(len(given))])
        variables = jax.tree.unflatten(structure, [weights[name] for name in names])
        return plain(function(variables, *arguments))

    return call


def plain(tree: Any) -> Any:
    """Return nested dicts and tuples: named tuples become dicts, which need no class to read."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if hasattr(tree, "_asdict"):
        return {key: plain(value) for key, value in tree._asdict().items()}
    if isinstance(tree, tuple | list):
        return tuple(plain(value) for value in tree)
    return tree


def input_names(network: Any, count: int) -> list[str]:
    """Return the names of the inputs in the signature, after the variables of a function."""
    # The first parameter is `self` of a module, the variables of a function.
    function = type(network).__call__ if hasattr(network, "apply") else network
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):  # a builtin has no signature
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [*names, *(f"input{i}" for i in range(len(names), count))][:count]


def named_arrays(name: str, tree: Any) -> Iterator[ArrayInfo]:
    """Yield name, shape and type of each array of a tree."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        yield {
            "name": f"{name}/{path}" if path else name,
            "shape": [size if isinstance(size, int) else str(size) for size in leaf.shape],
            "dtype": str(leaf.dtype),
        }


def traced(
    name: str,
    trace: Callable[..., _Traced],
    call: Callable[..., Any],
    weights: Mapping[str, Any],
    arguments: tuple[Any, ...],
    shapes: Any,
    constraints: Sequence[str],
) -> _Traced:
    """Trace a function of the weights and the inputs with symbolic sizes.

    Args:
        name: of the function, for errors.
        trace: takes the weights and the inputs as shapes and types.
        call: the function itself.
        weights: by name.
        arguments: examples of the inputs.
        shapes: of the inputs, as in `export_program`.
        constraints: on the symbolic sizes.
    """
    jax.eval_shape(call, dict(weights), *arguments)  # inputs that do not fit are its own errors
    try:
        specs = arguments
        if shapes is not None:
            specs = export.symbolic_args_specs(arguments, shapes, constraints=constraints)
        return trace(dict(weights), *specs)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if shapes is None:
            raise ValueError(f"{name!r} cannot be exported ({reason})") from error
        raise ValueError(
            f"{name!r} does not trace with the symbolic sizes {shapes!r} ({reason}); fix a size by "
            "its number or by '_', all of them by shapes=None, or give constraints such as "
            "['time <= 512']"
        ) from error
