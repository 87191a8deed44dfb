"""A new head on a pretrained network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from jaxnets.finetuning.paths import leaves_by_path


def replace_head(
    variables: Mapping[str, Any], fresh: Mapping[str, Any], *, head: str = r"(^|/)head(/|$)"
) -> dict[str, Any]:
    """Return pretrained variables with the head of a network of other outputs.

    Args:
        variables: pretrained: "params" and any other collections.
        fresh: those of the new network, from `initialize`.
        head: regular expression of the paths, such as "params/head/kernel", that come from `fresh`.

    Returns:
        The variables of the new network: its head, and everything else pretrained.

    Raises:
        ValueError: the pattern matches nothing or everything, or beside the head a leaf is
            missing, left over or of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxnets as jn
        >>> old, new = jn.MLP(features=(8,), num_outputs=10), jn.MLP(features=(8,), num_outputs=2)
        >>> x = jnp.ones((1, 3))
        >>> pretrained = jn.initialize(old, jax.random.key(0), x)
        >>> variables = replace_head(pretrained, jn.initialize(new, jax.random.key(1), x))
        >>> new.apply(variables, x).shape
        (1, 2)
    """
    old, new = leaves_by_path(variables), leaves_by_path(fresh)
    is_head = re.compile(head).search
    if not any(map(is_head, new)):
        near = difflib.get_close_matches(head, new, n=4, cutoff=0)
        raise ValueError(
            f"head={head!r} matches no path of the new network; the nearest of {len(new)} are "
            f"{', '.join(near)}"
        )
    if all(map(is_head, new)):
        raise ValueError(
            f"head={head!r} matches every path of the new network, so nothing would be pretrained; "
            "make it narrower"
        )
    problems = [f"{path} is pretrained only" for path in old if path not in new]
    for path, leaf in new.items():
        if path not in old:
            problems.append(f"{path} is new only")
        elif old[path].shape != leaf.shape:
            problems.append(f"{path} has shapes {old[path].shape} and {leaf.shape}")
    problems = [problem for problem in problems if not is_head(problem.split(" ", 1)[0])]
    if problems:
        raise ValueError(
            f"beside the head the networks differ: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}; give the pretrained "
            "network's sizes to the new one, or a wider pattern to head"
        )

    def choose(old: Any, new: Any, path: str) -> Any:
        if isinstance(new, Mapping):
            return {
                name: choose(
                    old.get(name) if isinstance(old, Mapping) else None, leaf, f"{path}/{name}"
                )
                for name, leaf in new.items()
            }
        return new if is_head(path[1:]) else old

    result: dict[str, Any] = choose(variables, fresh, "")
    return result
