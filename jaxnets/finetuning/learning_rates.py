"""Optimizers that move some parameters less than others, or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets.core import Params, tree_path
from jaxnets.finetuning.paths import STACKED, leaves_by_path, matching

# Of tokens and positions, and those of images: the patches and the tokens beside them.
_EMBEDDINGS = r"embed|^(encoder/)?(patch|token|distillation_token)(/|$)"
_ORDER = (_EMBEDDINGS, rf"layer_(\d+)/|{STACKED}", r"")


def freeze(
    optimizer: optax.GradientTransformation, pattern: str
) -> optax.GradientTransformationExtraArgs:
    """Leave the parameters whose paths match a pattern as they are.

    The optimizer gets the others only: frozen leaves have no optimizer state, no weight decay, and
    do not count in the norm of the gradients that it clips. Nothing uses their gradients, so XLA
    does not compute them. Batch norms of frozen layers still move their running statistics; see
    `layers.frozen_batch_norm`.

    Frozen parameters stay part of the state and of its checkpoints. `lora_objective` keeps them out
    of it.

    Args:
        optimizer: any Optax transformation.
        pattern: regular expression, searched in paths such as "stack/layer_0/attention_norm/scale".

    Returns:
        An Optax transformation.

    Raises:
        ValueError: at `init`, the pattern matches no path (the message has the nearest), or all.

    Example:
        >>> optimizer = freeze(optax.adam(0.1), "^body/")
        >>> params = {"body": {"kernel": jnp.ones(1000)}, "head": {"kernel": jnp.ones(10)}}
        >>> sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(params)))
        21
    """

    def labels(params: Params) -> Any:
        frozen = matching(params, pattern, what="pattern")
        if len(frozen) == len(leaves_by_path(params)):
            raise ValueError(f"pattern={pattern!r} matches every path, so nothing would be trained")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if tree_path(path) in frozen else "trained", params
        )

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def layerwise_decay(
    optimizer: optax.GradientTransformation,
    decay: float | jax.Array,
    *,
    order: Sequence[str] | None = None,
    stacked: str = STACKED,
) -> optax.GradientTransformationExtraArgs:
    """Decay the learning rate from the last layer to the first.

    The updates of the last layer are those of `optimizer`, of the one before it `decay` times
    those, of the one before that `decay`^2 times. So weight decay and schedules are scaled too.

    Args:
        optimizer: any Optax transformation.
        decay: scalar in (0, 1], such as 0.8 for a small transformer and 0.9 for a large one.
        order: regular expressions of the paths from the first layer to the last. A path belongs to
            the first one that it matches; the numbers in its groups order the layers of one
            expression. By default embeddings (also of patches), layer_0, layer_1, ..., the rest.
        stacked: regular expression of the paths whose first axis is that of layers in a loop, each
            of which is a layer here.

    Returns:
        An Optax transformation.

    Raises:
        ValueError: `decay` is outside its range; at `init`, a path matches none of `order`, or a
            pattern of `order` matches no path.

    Example:
        >>> params = {"embedding": 1.0, "layer_0": {"bias": 1.0}, "head": 1.0}
        >>> optimizer = layerwise_decay(optax.sgd(1.0), 0.5)
        >>> changes, _ = optimizer.update(params, optimizer.init(params), params)
        >>> jax.tree.map(float, changes)
        {'embedding': -0.25, 'head': -1.0, 'layer_0': {'bias': -0.5}}

    References:
        Howard and Ruder 2018, arXiv:1801.06146, section 3.2 (decay 1 / 2.6). Clark et al. 2020,
        arXiv:2003.10555, table 7 (0.8 and 0.9). Bao et al. 2021, arXiv:2106.08254 (images).
    """
    if isinstance(decay, (int, float)) and not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; give a number in (0, 1], such as 0.8")

    patterns = _ORDER if order is None else tuple(order)

    def scale(updates: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
        depths, last = _depths(updates, patterns, stacked)

        def scaled(path: Any, update: jax.Array) -> jax.Array:
            # A number, or [layers, 1, ...]
            factor = jnp.asarray(decay) ** (last - depths[tree_path(path)])
            return update * factor.astype(jnp.result_type(update))

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    def init(params: Params) -> optax.EmptyState:
        _depths(params, patterns, stacked)
        if order is not None:
            for pattern in patterns:
                _check_matches(params, pattern)
        return optax.EmptyState()

    return optax.with_extra_args_support(
        optax.chain(optimizer, optax.GradientTransformation(init, scale))
    )


def _check_matches(params: Params, pattern: str) -> None:
    """Refuse a pattern that no path matches; those of leaves that `freeze` leaves out count."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
    matching({tree_path(path): 0 for path, _ in pairs}, pattern, what="order")


def _depths(params: Params, order: Sequence[str], stacked: str) -> tuple[dict[str, Any], int]:
    """Return the depth of every path, an integer or [layers, 1, ...], and the last depth."""
    leaves = leaves_by_path(params)
    group: dict[str, tuple[int, ...]] = {}
    for path in leaves:
        for index, pattern in enumerate(order):
            if (match := re.search(pattern, path)) is not None:
                numbers = (int(text) for text in match.groups() if text and text.isdigit())
                group[path] = (index, *numbers)
                break
        else:
            raise ValueError(
                f"{path} matches none of the patterns of order, {tuple(order)}; add one for it"
            )
    sizes = {
        key: max(
            len(leaves[path]) if re.search(stacked, path) else 1
            for path, own in group.items()
            if own == key
        )
        for key in set(group.values())
    }
    first, start = {}, 0
    for key in sorted(sizes):
        first[key] = start
        start += sizes[key]
    depths: dict[str, Any] = {}
    for path, key in group.items():
        depths[path] = first[key]
        if re.search(stacked, path):
            shape = (-1,) + (1,) * (leaves[path].ndim - 1)
            depths[path] = first[key] + jnp.arange(len(leaves[path])).reshape(shape)
    return depths, start - 1
