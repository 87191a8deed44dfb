"""Which array of a state is NaN or infinite: the first one in the order of the network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import classes_in_scope
from jaxnets.core import tree_path

# Their output is one of their operands, moved or converted: not yet a use by a layer.
_MOVES = frozenset(
    {"convert_element_type", "copy", "reshape", "squeeze", "transpose", "broadcast_in_dim", "slice"}
)
_PARAMETERS = "params/"


def first_nonfinite(tree: Any, order: Sequence[str] = ()) -> str | None:
    """Return the path of the first array with a NaN or an infinity.

    A single number beside the parameters, such as the best value so far in the state of an
    optimizer or a hyperparameter, may be infinite: only NaN counts there. Members of a population
    that are frozen, whose step is behind, do not count.

    Args:
        tree: a `TrainState`, or any pytree of arrays.
        order: paths, from `order_of_use`; arrays that it lacks come last, in the order of their
            names, in which 10 follows 9.

    Returns:
        The path, without "params/" for a parameter; None if there is none.
    """
    pairs = jax.tree_util.tree_flatten_with_path(_not_frozen(tree))[0]
    leaves = {tree_path(path): leaf for path, leaf in pairs}
    parameters = [path for path in leaves if path.startswith(_PARAMETERS)]
    rank = np.ndim(getattr(tree, "step", 0))
    bad = [
        path
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
        and not _is_finite(leaf, or_infinite=np.ndim(leaf) <= rank and not _owner(path, parameters))
    ]
    positions = {path: index for index, path in enumerate(order)}

    def position(path: str) -> tuple[Any, ...]:
        owner = _owner(path, parameters) or path
        # The parameter itself comes before its statistics in the state of the optimizer.
        return positions.get(owner, len(order)), _natural(owner), owner != path, _natural(path)

    first = min(bad, key=position, default=None)
    return None if first is None else first.removeprefix(_PARAMETERS)


def _not_frozen(tree: Any) -> Any:
    """Return the members of a population that go on; anything else as it is."""
    steps = np.asarray(getattr(tree, "step", 0))
    if steps.ndim == 0 or np.all(steps == steps.max()):
        return tree
    members = np.flatnonzero(steps == steps.max())
    return jax.tree.map(lambda leaf: leaf[members], tree)


def order_of_use(step: Callable[..., Any], state: Any, batch: Any) -> list[str]:
    """Return the paths of the arrays of a state in the order in which a step first uses them.

    That of the forward pass, which the names do not tell: JAX sorts dictionaries.

    Args:
        step: `(state, batch) -> ...`; it is traced and not run.
        state: its state.
        batch: a batch.

    Returns:
        Paths in the state; [] if the step cannot be traced, such as a loop in Python.
    """
    try:
        jaxpr = jax.make_jaxpr(step)(state, batch).jaxpr
    except Exception:  # any error of any step: there are names to go by
        return []
    paths = [tree_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    found: dict[str, None] = {}
    _follow(jaxpr, dict(zip(jaxpr.invars, paths, strict=False)), found)
    return list(found)


def class_counts(step: Callable[..., Any], state: Any, batch: Any) -> list[int]:
    """Return the numbers of classes with which a step compares labels, such as [10].

    Args:
        step: as for `order_of_use`.
        state: its state.
        batch: a batch.

    Returns:
        In ascending order; [] if there are none or the step cannot be traced.
    """
    try:
        jaxpr = jax.make_jaxpr(step)(state, batch).jaxpr
    except Exception:  # any error of any step
        return []
    programs, counts = [jaxpr], set[int]()
    while programs:
        for equation in programs.pop().eqns:
            counts |= {classes_in_scope(str(equation.source_info.name_stack)) or 0}
            programs += _inner(equation.params)
    return sorted(counts - {0})


def _follow(jaxpr: Any, names: Mapping[Any, str], found: dict[str, None]) -> None:
    names = dict(names)
    for equation in jaxpr.eqns:
        # A literal has a value; it is no variable.
        operands = [None if hasattr(v, "val") else names.get(v) for v in equation.invars]
        used = [name for name in operands if name is not None]
        inner = list(_inner(equation.params))
        if not used:
            continue
        if inner:
            for part in inner:
                # What comes before the operands of a part is its own: a branch's index, a test's
                # constants.
                pairs = zip(reversed(part.invars), reversed(operands), strict=False)
                _follow(part, {v: name for v, name in pairs if name is not None}, found)
        elif equation.primitive.name in _MOVES:
            names[equation.outvars[0]] = used[0]
        else:
            found.update(dict.fromkeys(used))


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the programs in the parameters of an operation, such as the body of a loop."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            program = getattr(part, "jaxpr", part)
            if hasattr(program, "eqns"):
                yield program


def _owner(path: str, parameters: Sequence[str]) -> str | None:
    """Return the parameter that an array belongs to: itself, or what its path ends with."""
    owners = [
        parameter
        for parameter in parameters
        if path == parameter or path.endswith(parameter.replace(_PARAMETERS, "/", 1))
    ]
    return max(owners, key=len, default=None)


def _natural(path: str) -> list[tuple[str, int]]:
    """Return a key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", path)
    return [("", int(part)) if part.isdigit() else (part, 0) for part in parts]


def _is_finite(leaf: Any, *, or_infinite: bool) -> bool:
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return bool(_all_finite(jnp.where(jnp.isinf(leaf), 0, leaf) if or_infinite else leaf))
    array = np.asarray(leaf)  # needs no compilation, and a save reads it too
    return not np.any(np.isnan(array) if or_infinite else ~np.isfinite(array))


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))
