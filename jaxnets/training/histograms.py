"""Hooks that return histograms of parameters and of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import Batch, Params, TrainState, tree_path
from jaxnets.training.held_arrays import split_arrays
from jaxnets.training.loop import Hook
from jaxnets.training.media import Histogram
from jaxnets.training.step import TrainStep


def parameter_histograms(*, prefix: str = "params", num_bins: int = 64) -> Hook:
    """Return a histogram of every parameter; wrap it in `every`.

    The values are counted on the device, and only the counts are transferred. In a population one
    histogram covers all members.

    Args:
        prefix: names are `prefix/path`, such as "params/hidden_0/kernel".
        num_bins: number of bins.

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

    The train step does not return gradients, so they are computed here again, always on the same
    batch: differences between two histograms come from the parameters only. They show whether
    gradients vanish or explode towards the first layers.

    Args:
        train_step: from `make_train_step`.
        batch: batch of one network; all members of a population get it.
        prefix: names are `prefix/path`.
        num_bins: number of bins.

    Returns:
        Hook for `fit`.
    """
    held, with_arrays = split_arrays(train_step)

    @jax.jit
    def gradients(held: Sequence[Any], state: TrainState) -> Params:
        one = with_arrays(held).gradients
        every = one if jnp.ndim(state.step) == 0 else jax.vmap(one, in_axes=(0, None))
        return every(state, batch)

    def hook(step: int, state: Any, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        return _named(gradients(held, state), prefix, num_bins)

    return hook


def _named(tree: Any, prefix: str, num_bins: int) -> dict[str, Histogram]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    counted = jax.device_get(_count([leaf for _, leaf in pairs], num_bins))
    return {
        f"{prefix}/{tree_path(path)}": Histogram(*counts_and_edges)
        for (path, _), counts_and_edges in zip(pairs, counted, strict=True)
    }


def _count_leaf(leaf: jax.Array, num_bins: int) -> tuple[jax.Array, jax.Array]:
    values = leaf.ravel().astype(jnp.promote_types(leaf.dtype, jnp.float32))
    finite = jnp.isfinite(values)
    low = jnp.min(values, where=finite, initial=jnp.inf)
    high = jnp.max(values, where=finite, initial=-jnp.inf)
    # A constant, or an array without a finite value, gets an interval of width 1.
    low, high = jnp.where(low <= high, low, 0.0), jnp.where(low <= high, high, 0.0)
    low, high = jnp.where(low < high, low, low - 0.5), jnp.where(low < high, high, high + 0.5)
    bins = jnp.clip((values - low) / (high - low) * num_bins, 0, num_bins - 1)
    bins = jnp.where(finite, bins, 0.0).astype(jnp.int32)
    counts = jnp.zeros(num_bins, jnp.int32).at[bins].add(finite.astype(jnp.int32))
    return counts, low + (high - low) * jnp.linspace(0, 1, num_bins + 1, dtype=low.dtype)


@jax.jit(static_argnums=1)
def _count(leaves: list[jax.Array], num_bins: int) -> list[tuple[jax.Array, jax.Array]]:
    return [_count_leaf(leaf, num_bins) for leaf in leaves]
