"""Hooks that return histograms of parameters and of gradients, for the writers that show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import Batch, tree_path
from jaxnets.training.loop import Hook
from jaxnets.training.media import Histogram
from jaxnets.training.step import TrainStep


def parameter_histograms(*, prefix: str = "params", num_bins: int = 64) -> Hook:
    """Return a histogram of every parameter; wrap it in `every`.

    They are counted where the parameters are; only the counts travel. The members of a population
    are counted together.

    Args:
        prefix: the histograms are called `prefix/path`, such as "params/hidden_0/kernel".
        num_bins: intervals of each.

    Returns:
        Hook for `fit`.

    Example:
        >>> import types
        >>> hook = parameter_histograms(num_bins=2)
        >>> state = types.SimpleNamespace(params={"bias": jnp.array([0.0, 1.0, 1.0])})
        >>> hook(1, state, {})["params/bias"].counts.tolist()
        [1, 2]
    """

    def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        return _named(state.params, prefix, num_bins)

    return hook


def gradient_histograms(
    train_step: TrainStep, batch: Batch, *, prefix: str = "gradients", num_bins: int = 64
) -> Hook:
    """Return a histogram of the gradient of every parameter; wrap it in `every`.

    The train step keeps no gradient, so it is computed again, on a batch that stays the same: what
    changes from one histogram to the next is the network. Whether gradients vanish or explode
    towards the first layers shows here.

    Args:
        train_step: what `make_train_step` returned.
        batch: of one network; all members of a population see it.
        prefix: the histograms are called `prefix/path`.
        num_bins: intervals of each.

    Returns:
        Hook for `fit`.
    """
    one = jax.jit(train_step.gradients)
    many = jax.jit(jax.vmap(train_step.gradients, in_axes=(0, None)))

    def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        gradients = one(state, batch) if jnp.ndim(state.step) == 0 else many(state, batch)
        return _named(gradients, prefix, num_bins)

    return hook


def _named(tree: Any, prefix: str, num_bins: int) -> dict[str, Histogram]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    counted = jax.device_get(_count([leaf for _, leaf in pairs], num_bins))
    return {
        f"{prefix}/{tree_path(path)}": Histogram(*found)
        for (path, _), found in zip(pairs, counted, strict=True)
    }


def _count_leaf(leaf: jax.Array, num_bins: int) -> tuple[jax.Array, jax.Array]:
    values = leaf.ravel().astype(jnp.promote_types(leaf.dtype, jnp.float32))
    finite = jnp.isfinite(values)
    low = jnp.min(values, where=finite, initial=jnp.inf)
    high = jnp.max(values, where=finite, initial=-jnp.inf)
    # A constant, or nothing that is finite, has an interval too.
    low, high = jnp.where(low <= high, low, 0.0), jnp.where(low <= high, high, 0.0)
    low, high = jnp.where(low < high, low, low - 0.5), jnp.where(low < high, high, high + 0.5)
    place = jnp.clip((values - low) / (high - low) * num_bins, 0, num_bins - 1)
    place = jnp.where(finite, place, 0.0).astype(jnp.int32)
    counts = jnp.zeros(num_bins, jnp.int32).at[place].add(finite.astype(jnp.int32))
    return counts, low + (high - low) * jnp.linspace(0, 1, num_bins + 1, dtype=low.dtype)


@jax.jit(static_argnums=1)
def _count(leaves: list[jax.Array], num_bins: int) -> list[tuple[jax.Array, jax.Array]]:
    return [_count_leaf(leaf, num_bins) for leaf in leaves]
