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

from jaxnets.core import Params, TrainState, Update, at_least_float32, is_narrow, tree_path


def decay_mask(params: Params) -> Any:
    """Select the parameters for weight decay: kernels and embeddings, not biases and norm scales.

    A parameter called "bias" or "scale", or whose name ends with "_bias" or "_scale", is never
    decayed, also where layers in a loop (`nn.scan`, `BlockConfig(scan_layers=True)`) or heads give
    it further axes.

    Args:
        params: nested dict of arrays.

    Returns:
        A tree of bools, True for the other arrays with two axes or more. Pass the function itself:
        `optax.adamw(..., mask=decay_mask)`.

    Example:
        >>> decay_mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
        >>> decay_mask({"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((4, 3))})  # four layers
        {'bias': False, 'kernel': True}
    """

    def decays(path: Any, array: jax.Array) -> bool:
        return jnp.ndim(array) > 1 and _name(path).rsplit("_", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


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
        if _name(path) != "kernel" or jnp.ndim(array) not in (2, 4):
            return None
        last = jnp.ndim(array) - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _name(path: tuple[Any, ...]) -> str:
    """Return the name of a parameter; a box such as `nn.Partitioned` has it around its value."""
    names = [tree_path((key,)) for key in path if not isinstance(key, jax.tree_util.SequenceKey)]
    boxed = len(names) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return names[-2 if boxed else -1] if names else ""


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
    """Optimizer state of `with_parameter_average`.

    Attributes:
        average: of the parameters, float32 or wider.
        num_updates: int32 scalar.
        inner: state of the wrapped optimizer.
    """

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
    updates. The average is kept in float32 or wider: in 16 bits it would stand still, because
    (1 - d) times the difference is less than the spacing of the numbers around it.

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
        average = jax.tree.map(lambda array: jnp.copy(at_least_float32(array)), params)
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
        A tree like `state.params`, in float32 or wider. If the update has `wrt`, such as the
        generator of a GAN, a tree like `state.params[wrt]`.

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


class Float32Masters(NamedTuple):
    """Optimizer state of an update with `float32_masters`.

    Attributes:
        masters: the parameters in float32.
        inner: state of the optimizer for the masters.
    """

    masters: Params
    inner: Any

    def current(self, params: Params) -> Params:
        """Return the masters; where parameters were set from outside, those in float32.

        Args:
            params: of 16 bits; equal to the rounded masters unless they were set.
        """
        return jax.tree.map(
            lambda master, array: jnp.where(
                master.astype(array.dtype) == array, master, array.astype(master.dtype)
            ),
            self.masters,
            params,
        )


def initial_state(update: Update, params: Params) -> Any:
    """Return the optimizer state of an update for the parameters that it trains.

    Args:
        update: the gradient phase.
        params: those that it trains.
    """
    if not update.float32_masters:
        return update.optimizer.init(params)
    # A copy: a step that donates its state must not get the same buffer twice.
    masters = jax.tree.map(lambda array: jnp.copy(at_least_float32(array)), params)
    return Float32Masters(masters, update.optimizer.init(masters))


def narrow_states(opt_state: Any) -> list[str]:
    """Name the parts of an optimizer state that have leaves of 16 bits.

    Args:
        opt_state: of any Optax transformation.

    Returns:
        Names such as "ScaleByAdamState.nu", each once.
    """
    fields = getattr(opt_state, "_fields", None)
    if fields is None:
        children = jax.tree.leaves(opt_state, is_leaf=lambda node: hasattr(node, "_fields"))
        names = [
            name for child in children if hasattr(child, "_fields") for name in narrow_states(child)
        ]
    else:
        names = []
        for field in fields:
            value = getattr(opt_state, field)
            inside = narrow_states(value)
            if not inside and any(map(is_narrow, jax.tree.leaves(value))):
                inside = [f"{type(opt_state).__name__}.{field}"]
            names += inside
    return list(dict.fromkeys(names))
