"""Selection of leaves by patterns of their paths."""

from __future__ import annotations

import difflib
import re
from typing import Any

import jax

from jaxnets.core import tree_path
from jaxnets.functional.int8 import Int8Array

#: Paths whose arrays have a leading axis of layers, as with `BlockConfig(scan_layers=True)`.
STACKED = r"(^|/)layers/"


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their paths.

    Args:
        tree: nested dicts of arrays; an `Int8Array` is one leaf.

    Returns:
        {"stack/layer_0/attention_norm/scale": leaf}.
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, Int8Array)
    )
    return {tree_path(path): leaf for path, leaf in pairs}


def matching(tree: Any, pattern: str, *, what: str) -> dict[str, Any]:
    """Return the leaves whose paths a regular expression matches anywhere.

    Args:
        tree: nested dict of arrays.
        pattern: for `re.search`.
        what: name of the argument, for the error.

    Returns:
        {path: leaf}.

    Raises:
        ValueError: none matches; the message has the nearest paths. Or it is no pattern.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}={pattern!r} is no regular expression: {error}") from None
    leaves = leaves_by_path(tree)
    found = {path: leaf for path, leaf in leaves.items() if compiled.search(path)}
    if not found:
        near = difflib.get_close_matches(pattern, leaves, n=4, cutoff=0)
        raise ValueError(
            f"{what}={pattern!r} matches no path; the nearest of {len(leaves)} are "
            f"{', '.join(near)}"
        )
    return found


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
    """Put a value into nested dicts, which are made where they are missing.

    Args:
        tree: changed in place.
        path: names with slashes.
        value: replaces one that is there.
    """
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value
