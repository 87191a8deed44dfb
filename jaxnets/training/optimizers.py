"""What Optax leaves to its users: which parameters decay, which are matrices, and averages.

Everything else (SGD, Adam, schedules, clipping, `inject_hyperparams`) is used from Optax directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxnets.core import Params, TrainState


def decay_mask(params: Params) -> Any:
    """Mark the parameters that weight decay should shrink: kernels, not biases and norm scales.

    Args:
        params: nested dict of arrays.

    Returns:
        The tree with True for arrays of two axes or more. Pass this function as
        `optax.adamw(..., mask=decay_mask)`.

    Example:
        >>> decay_mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda array: jnp.ndim(array) > 1, params)


def muon_dimensions(params: Params) -> Any:
    """Say which parameters Muon should orthogonalise, and as which matrices.

    Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) is meant for the matrices between hidden
    layers. Optax by default takes every array of two axes, tables of embeddings among them.

    Args:
        params: nested dict of arrays.

    Returns:
        The tree with `optax.contrib.MuonDimensionNumbers` for kernels of two axes (dense) and of
        four (2-D convolution, read as [height x width x inputs, outputs]), and None for the rest,
        which Optax then trains by AdamW: embeddings, biases, scales, and kernels of other shapes,
        such as those of stacked layers. Pass this function as
        `optax.contrib.muon(..., muon_weight_dimension_numbers=muon_dimensions)`.

    Example:
        >>> muon_dimensions({"kernel": jnp.ones((2, 3)), "embedding": jnp.ones((5, 2))})
        {'embedding': None, 'kernel': MuonDimensionNumbers(reduction_axis=(0,), output_axis=1)}
    """

    def dimensions(path: Any, array: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or jnp.ndim(array) not in (2, 4):
            return None
        last = jnp.ndim(array) - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)

    return jax.tree_util.tree_map_with_path(dimensions, params)


#: Name -> optimizer, a function of the learning rate (a number or a schedule) and of the options
#: of its counterpart in Optax. Where there is a mask of weight decay it is `decay_mask`.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, mask=decay_mask),
    "lion": functools.partial(optax.lion, mask=decay_mask),
    "muon": functools.partial(
        optax.contrib.muon,
        weight_decay_mask=decay_mask,
        muon_weight_dimension_numbers=muon_dimensions,
    ),
}


class ParameterAverageState(NamedTuple):
    """Optimizer state of `with_parameter_average`: the average beside the wrapped state."""

    average: Params
    num_updates: jax.Array
    inner: Any


def with_parameter_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the parameters beside an optimizer.

    average <- d average + (1 - d) params after every update, where
    d = min(decay, (1 + t) / (10 + t)) at update t, so that a young average forgets the start.
    The updates themselves are those of `optimizer`.

    Args:
        optimizer: any Optax transformation.
        decay: in [0, 1); the average spans about 1 / (1 - decay) steps.

    Returns:
        An Optax transformation; read its average with `averaged_parameters`.

    Raises:
        ValueError: `decay` outside its range.

    References:
        Polyak and Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging".
        Differs from it: exponential weights, and a decay that warms up.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; give a number in [0, 1)")
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> ParameterAverageState:
        # A copy: params and their average may not share memory that a step donates.
        average = jax.tree.map(jnp.copy, params)
        return ParameterAverageState(average, jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        gradients: Params, state: ParameterAverageState, params: Params = None, **extra: Any
    ) -> tuple[Params, ParameterAverageState]:
        if params is None:
            raise ValueError("with_parameter_average needs params: optimizer.update(g, s, params)")
        changes, inner_state = inner.update(gradients, state.inner, params, **extra)
        new_params = optax.apply_updates(params, changes)
        rate = 1 - jnp.minimum(decay, (1 + state.num_updates) / (10 + state.num_updates))
        average = jax.tree.map(
            lambda old, new: old + rate.astype(old.dtype) * (new - old), state.average, new_params
        )
        return changes, ParameterAverageState(average, state.num_updates + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_parameters(state: TrainState) -> Params:
    """Return the averaged parameters of a run whose optimizer is `with_parameter_average`.

    Args:
        state: TrainState of one run or of a population.

    Returns:
        A tree like `state.params`; evaluate it with
        `dataclasses.replace(state, params=averaged_parameters(state))`. Where the update names
        its network, as a GAN's generator, a tree like `state.params[wrt]`.

    Raises:
        ValueError: no average, or several, in `state.opt_state`.
    """
    leaves = jax.tree.leaves(
        state.opt_state, is_leaf=lambda node: isinstance(node, ParameterAverageState)
    )
    found = [leaf.average for leaf in leaves if isinstance(leaf, ParameterAverageState)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} parameter averages, not one; "
            "wrap the optimizer in with_parameter_average once"
        )
    return found[0]
