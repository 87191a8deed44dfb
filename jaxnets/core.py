"""The types that every other file speaks: sums, objectives, updates, train state, random streams.

Nothing here imports Flax. An objective is any function on pytrees with the signature of
`Objective`; `apply_module` calls anything that has Linen's `apply`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax


def record(module: Any, name: str, value: jax.Array) -> None:
    """Make a value inside a network readable with `capture`; free when nobody reads it.

    Args:
        module: the module that computes the value.
        name: such as "features".
        value: the array; a second call with the same name replaces it.
    """
    module.sow("intermediates", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def capture(
    module: Any, variables: Any, *inputs: Any, **keywords: Any
) -> tuple[Any, dict[str, Any]]:
    """Run a network in evaluation and return what it recorded, such as its features.

    Args:
        module: any Linen network.
        variables: parameters and other collections, as given by `module.init`.
        inputs: inputs of the network.
        keywords: further keyword inputs; `capture_intermediates=True` records the output of
            every layer too, under `[layer]["__call__"][0]`.

    Returns:
        The output, and {name: array} of the values recorded by the network itself, with one
        nested dict for each submodule that recorded some.

    Example:
        >>> import flax.linen as nn
        >>> class Doubled(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         record(self, "doubled", 2 * x)
        ...         return 3 * x
        >>> output, recorded = capture(Doubled(), {}, 1.0)
        >>> output, recorded["doubled"]
        (3.0, 2.0)
    """
    output, state = module.apply(variables, *inputs, mutable=["intermediates"], **keywords)
    return output, dict(state.get("intermediates", {}))


#: Name of the mapped axis over which executors split a batch. Batch normalization and the
#: train step reduce over this axis where an executor has bound it.
DATA_AXIS = "data"

#: Nested dict of trainable arrays.
Params: TypeAlias = Any
#: Further collections: "batch_stats", "hyperparameters", ...; {} if none.
ModelState: TypeAlias = Mapping[str, Any]
#: Arrays whose leading axis is examples; optional "weights" [batch], 0 = padding.
Batch: TypeAlias = Mapping[str, Any]
#: Weighted sums by name.
Metrics: TypeAlias = dict[str, "Mean"]
#: First step -> the batches from there on.
BatchSource: TypeAlias = Callable[[int], Iterator[Batch]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted sum and its weight, from which the mean is taken at the very end.

    Merging anywhere (batches, microbatches, scan steps, devices) is leaf-wise addition, so the
    mean is exact for uneven batches, where a mean of means is not.

    Attributes:
        total: sum of weight times value, [...].
        count: sum of the weights; its shape is a prefix of the shape of `total`.

    Example:
        >>> first, second = Mean.of(jnp.array([1.0, 2.0, 3.0])), Mean.of(jnp.array([6.0]))
        >>> float((first + second).compute())
        3.0
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | None = None) -> Mean:
        """Sum `values` over the axes of `weights`.

        Args:
            values: [batch, ...], any numeric dtype; summed in float32 or wider.
            weights: [batch] or any other leading part of the shape of `values`, 0 = ignore; by
                default every element of `values` counts 1. A value of weight 0 is ignored even
                where it is not finite, and no gradient reaches it; but 0 times NaN is NaN, so what
                it was computed from has to be finite for gradients further back to be.

        Returns:
            Mean with `total` of the shape left after the axes of `weights`, and a scalar `count`.

        Raises:
            ValueError: the shape of `weights` is not a leading part of the shape of `values`.
        """
        values = jnp.asarray(values)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if weights is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))
        weights = jnp.asarray(weights, values.dtype)
        if weights.shape != values.shape[: weights.ndim]:
            raise ValueError(
                f"weights of shape {weights.shape} do not fit values of shape {values.shape}; "
                f"give weights of shape {values.shape[:1]} (one per example) or {values.shape}"
            )
        expanded = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
        kept = jnp.where(expanded == 0, jnp.zeros_like(values), values)
        return cls(jnp.sum(kept * expanded, axis=tuple(range(weights.ndim))), jnp.sum(weights))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> jax.Array:
        """Return `total / count`, NaN where nothing was counted. Shape of `total`."""
        missing = jnp.ndim(self.total) - jnp.ndim(self.count)
        return self.total / jnp.reshape(self.count, jnp.shape(self.count) + (1,) * missing)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: sum of the per-example losses and the sum of their weights, never a mean.
        model_state: the collections after this batch, with the tree structure of the ones before.
        metrics: further weighted sums to report.
    """

    loss: Mean
    model_state: ModelState
    metrics: Metrics


class Objective(Protocol):
    """A loss as a pure function.

    Args:
        params: trainable parameters.
        model_state: further collections; returned with the same tree structure.
        batch: arrays [batch, ...]; "weights" [batch] weighs the examples, 0 = padding.
        rng: key of this step, to be split into streams with `rng_streams`.
        train: training mode: noise is drawn, running averages move.

    Returns:
        ObjectiveOutput with sums, never means.
    """

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput: ...


@dataclasses.dataclass(frozen=True)
class Update:
    """One gradient phase of a step.

    Attributes:
        objective: the loss to lower.
        optimizer: any Optax transformation.
        wrt: top-level key of `params` to train (one network of several); None trains all of it.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    wrt: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training, arrays only: saving it is saving the run.

    Attributes:
        step: int32 scalar, completed steps.
        rng: root key of the run, constant; the keys of a step are folded from it and `step`.
        params: trainable parameters.
        model_state: other collections ("batch_stats", "hyperparameters", ...); {} if none.
        opt_state: optimizer state, or {wrt: optimizer state} where updates name their network.
    """

    step: jax.Array
    rng: jax.Array
    params: Params
    model_state: ModelState
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes: the parameters beside the other collections."""
        return {"params": self.params, **self.model_state}


class StepFn(Protocol):
    """One training step as a pure function.

    Args:
        state: where the step starts.
        batch: arrays [batch, ...].
        axis_name: mapped axis over which the batch is split, if any; sums are reduced over it.

    Returns:
        The next state, and the metrics as sums.
    """

    def __call__(
        self, state: TrainState, batch: Batch, /, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]: ...


Executor: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The one precision policy of a network.

    Norms, softmax and losses are computed in float32 or wider whatever the policy says.

    Attributes:
        parameter: dtype in which parameters are kept and updated.
        compute: dtype of matrix products, convolutions and activations.
        output: dtype of what the network returns.

    Example:
        >>> Precision(compute=jnp.bfloat16).parameter.__name__
        'float32'
    """

    parameter: Any = jnp.float32
    compute: Any = jnp.float32
    output: Any = jnp.float32


def at_least_float32(array: jax.Array) -> jax.Array:
    """Widen bfloat16 and float16 to float32; leave float32 and float64 as they are.

    Args:
        array: floating [...].

    Returns:
        [...], float32 or wider.
    """
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def rng_streams(rng: jax.Array, *names: str) -> dict[str, jax.Array]:
    """Derive one key per named stream.

    A stream's key depends on `rng` and its own name only, so adding a stream shifts no other.

    Args:
        rng: key of this step.
        names: streams such as "dropout", "latent", "augmentation".

    Returns:
        {name: key}.
    """
    return {name: jax.random.fold_in(rng, zlib.crc32(name.encode())) for name in names}


def apply_module(
    module: Any,
    params: Params,
    model_state: ModelState,
    *inputs: Any,
    rngs: Mapping[str, jax.Array] | None = None,
    train: bool = False,
    **keywords: Any,
) -> tuple[Any, ModelState]:
    """Call a Linen module as a pure function of parameters and model state.

    Args:
        module: anything with Linen's `apply`.
        params: its parameters.
        model_state: its other collections.
        inputs: positional inputs of the module.
        rngs: key per stream, used only when `train`; without training no stream is passed, so a
            network that draws noise in evaluation raises instead of being random in silence.
        train: training mode: the collections may change.
        keywords: further keyword inputs of the module.

    Returns:
        The output, and the collections afterwards (unchanged when not `train`).
    """
    variables = {"params": params, **model_state}
    if not train:
        return module.apply(variables, *inputs, train=False, **keywords), model_state
    output, changed = module.apply(
        variables, *inputs, train=True, rngs=dict(rngs or {}), mutable=list(model_state), **keywords
    )
    return output, {**model_state, **changed}


def bound_data_axis() -> str | None:
    """Return `DATA_AXIS` if the executor that is tracing has bound it, else None.

    A network asks this instead of being told, so that one definition computes the same batch
    statistics under every executor.
    """
    try:
        jax.lax.axis_index(DATA_AXIS)
    except NameError:
        return None
    return DATA_AXIS


def tree_path(path: tuple[Any, ...]) -> str:
    """Write a key path of a pytree as `params/hidden_0/kernel`.

    Args:
        path: as given by `jax.tree_util.tree_flatten_with_path`.

    Returns:
        The names joined with slashes.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")
