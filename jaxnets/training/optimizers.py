"""Additions to Optax: masks for weight decay and Muon, and a parameter average.

Everything else (SGD, Adam, schedules, clipping, `inject_hyperparams`) comes from Optax itself.
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
    """Select the parameters for weight decay: kernels, but not biases and norm scales.

    Args:
        params: nested dict of arrays.

    Returns:
        A tree of bools, True for arrays with two axes or more. Pass the function itself:
        `optax.adamw(..., mask=decay_mask)`.

    Example:
        >>> decay_mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda array: jnp.ndim(array) > 1, params)


def muon_dimensions(params: Params) -> Any:
    """Select the parameters that Muon orthogonalizes, and the matrices they are reshaped to.

    Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) is meant for the matrices between hidden
    layers. By default Optax uses it for every array with two axes, embedding tables included.

    Args:
        params: nested dict of arrays.

    Returns:
        A tree of `optax.contrib.MuonDimensionNumbers` or None. Kernels with two axes (dense) and
        with four (2-D convolution, as [height x width x inputs, outputs]) have dimension numbers.
        The rest is None, and Optax trains it with AdamW: embeddings, biases, scales, and kernels
        with other ranks, such as those of stacked layers. Pass the function itself:
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
    """Optimizer state of `with_parameter_average`: the average, and the wrapped state."""

    average: Params
    num_updates: jax.Array
    inner: Any


def with_parameter_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """Add an exponential moving average (EMA) of the parameters to an optimizer.

    average <- d average + (1 - d) params after every update, with
    d = min(decay, (1 + t) / (10 + t)) at update t, so that early averages forget the initial
    parameters. The updates are those of `optimizer`. Differs from `optax.ema`, which averages the
    updates.

    The running statistics of batch norms are not averaged; see `averaged_parameters`.

    Args:
        optimizer: any Optax transformation.
        decay: in [0, 1); the average covers about 1 / (1 - decay) steps.

    Returns:
        An Optax transformation; `averaged_parameters` returns its average.

    Raises:
        ValueError: `decay` is outside its range.

    References:
        Polyak and Juditsky, 1992, "Acceleration of Stochastic Approximation by Averaging".
        Differs from it: exponential weights, and a decay that is smaller at first.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; give a number in [0, 1)")
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> ParameterAverageState:
        # A copy: a step that donates its state must not get the same buffer twice.
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
    """Return the parameter average of a state whose optimizer is `with_parameter_average`.

    Args:
        state: TrainState of one run or of a population.

    To evaluate it, put it into a state:

        average = dataclasses.replace(state, params=averaged_parameters(state))
        average = recalibrate_batch_norm(update, average, batches, num_batches=50)

    The second line is for networks with batch norm. The running statistics of `state` belong to its
    last parameters, and without it `evaluate` uses them for the average too.

    Returns:
        A tree like `state.params`. If the update has `wrt`, such as the generator of a GAN, a tree
        like `state.params[wrt]`.

    Raises:
        ValueError: `state.opt_state` has no average, or several.
    """
    leaves = jax.tree.leaves(
        state.opt_state, is_leaf=lambda node: isinstance(node, ParameterAverageState)
    )
    averages = [leaf.average for leaf in leaves if isinstance(leaf, ParameterAverageState)]
    if len(averages) != 1:
        raise ValueError(
            f"the optimizer state holds {len(averages)} parameter averages, not one; "
            "wrap the optimizer in with_parameter_average once"
        )
    return averages[0]
