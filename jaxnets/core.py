"""The types that every other module uses, and how a Linen module becomes a pure function.

Types: `Mean`, `Objective`, `Update`, `TrainState`, `StepFn`, `BatchSource`, `Precision`.
Functions: `apply_module`, `record`, `capture`, random streams. Nothing here imports
Flax: an objective is any function on pytrees with the signature of `Objective`, and `apply_module`
calls anything that has Linen's `apply`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

#: Name of the mapped axis over which executors split a batch. Where an executor has bound it,
#: batch normalization and the train step reduce over it.
DATA_AXIS = "data"
#: Further axes of a device mesh: parameters and batch split, features split, time split.
FSDP_AXIS, TENSOR_AXIS, SEQUENCE_AXIS = "fsdp", "tensor", "sequence"

#: Trainable arrays: a pytree, nested dicts in Linen.
Params: TypeAlias = Any
#: Other variable collections: "batch_stats", "hyperparameters", ...; {} if none.
ModelState: TypeAlias = Mapping[str, Any]
#: Arrays whose leading axis is examples; optional "weights" [batch], 0 or more, 0 = padding.
Batch: TypeAlias = Mapping[str, Any]
#: Weighted sums by name.
Metrics: TypeAlias = dict[str, "Mean"]
#: Key, shape and dtype to random numbers: a function of `jax.random`, or an initializer.
Sampler: TypeAlias = Callable[[jax.Array, Sequence[int], Any], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted sum and the sum of its weights; `compute` divides them.

    Means are merged by adding their leaves: over batches, microbatches, scan steps, devices. So
    the result is exact for batches of different sizes, where a mean of means is not.

    Attributes:
        total: sum of weight times value, [...].
        count: sum of the weights; its shape is a leading part of the shape of `total`.

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
            weights: 0 or more, [batch] or any other leading part of the shape of `values`,
                0 = ignore; by default every element of `values` has weight 1. A value of weight 0
                is ignored even if it is NaN or infinite, and its gradient is 0. But 0 times NaN is
                NaN in the chain rule: the operations that produced the value have to be finite too.

        Returns:
            Mean whose `total` has the remaining axes of `values`, and a scalar `count`; both are
            NaN for a weight below 0 that is known only at run time.

        Raises:
            ValueError: the shape of `weights` is not a leading part of the shape of `values`, or a
                weight is known to be below 0.
        """
        values = jnp.asarray(values)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if weights is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))
        weights = checked_weights(weights, values.dtype)
        if weights.shape != values.shape[: weights.ndim]:
            raise ValueError(
                f"weights of shape {weights.shape} do not fit values of shape {values.shape}; "
                f"give weights of shape {values.shape[:1]} (one per example) or {values.shape}"
            )
        # [batch, 1, ...]
        expanded = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
        masked = jnp.where(expanded == 0, jnp.zeros_like(values), values)
        return cls(jnp.sum(masked * expanded, axis=tuple(range(weights.ndim))), jnp.sum(weights))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def compute(self) -> jax.Array:
        """Return `total / count`, with the shape of `total`; NaN where `count` is 0.

        NumPy arrays, such as sums in float64, are divided by NumPy.
        """
        xp = jnp if isinstance(self.count, jax.Array) else np
        missing = jnp.ndim(self.total) - jnp.ndim(self.count)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total / xp.reshape(self.count, jnp.shape(self.count) + (1,) * missing)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Attributes:
        loss: sum of the per-example losses, and sum of their weights; not their mean.
        model_state: the collections after this batch; same tree structure as before it.
        metrics: other weighted sums to report.
    """

    loss: Mean
    model_state: ModelState
    metrics: Metrics


class Objective(Protocol):
    """A loss as a pure function.

    Args:
        params: trainable parameters.
        model_state: other collections; returned with the same tree structure.
        batch: arrays [batch, ...]; "weights" [batch] are the examples' weights, 0 or more,
            0 = padding.
        rng: key of this step; `rng_streams` derives one key per stream from it.
        train: training mode: noise is drawn and running averages are updated.

    Returns:
        ObjectiveOutput, which holds sums, not means.

    An objective that holds large arrays, such as frozen parameters, is a pytree with them as
    leaves: executors pass them to the program as arguments; a closure would embed them in it.
    """

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput: ...


def check_objective(objective: Any) -> None:
    """Check that an objective is a function, and not a module.

    Raises:
        TypeError: it is a module, or cannot be called.
    """
    if hasattr(objective, "init") and hasattr(objective, "apply"):
        raise TypeError(
            f"objective is the module {type(objective).__name__}; give a loss of it, such as "
            "jaxnets.classification(module)"
        )
    if not callable(objective):
        raise TypeError(
            f"objective is {objective!r}; give a loss, such as jaxnets.classification(module)"
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["objective"],
    meta_fields=["optimizer", "wrt", "float32_masters"],
)
@dataclasses.dataclass(frozen=True)
class Update:
    """One gradient phase of a step.

    Attributes:
        objective: the loss to minimize.
        optimizer: any Optax transformation.
        wrt: top-level key of `params` to train, that is one network of several; None trains all.
        float32_masters: for parameters of 16 bits: the optimizer updates copies of them in float32,
            which are part of its state, and the parameters are those rounded. So small updates
            add up, and moments and norms of gradients are float32 too.

    Raises:
        TypeError: the objective is a module or no function, or the optimizer is none of Optax.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    wrt: str | None = None
    float32_masters: bool = False

    def __post_init__(self) -> None:
        check_objective(self.objective)
        if not (hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")):
            raise TypeError(
                f"optimizer is {self.optimizer!r}; give an Optax optimizer, such as "
                "optax.adam(learning_rate=1e-3)"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes during training, as arrays: a checkpoint of it resumes the run.

    Corresponds to `flax.training.train_state.TrainState`, but holds no functions: the optimizer
    is in `Update`. It also has the random key and the model state.

    Attributes:
        step: int32 scalar, number of completed steps.
        rng: root key of the run, constant; `fold_in` with `step` derives the keys of a step.
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
        """The variables for `module.apply`: "params" and the other collections."""
        return {"params": self.params, **self.model_state}


class StepFn(Protocol):
    """One training step as a pure function.

    Args:
        state: the state before the step.
        batch: arrays [batch, ...].
        axis_name: mapped axis over which the batch is split, if any; sums are reduced over it.

    Returns:
        The state after the step, and the metrics as sums.
    """

    def __call__(
        self, state: TrainState, batch: Batch, /, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]: ...


#: A compiled step: `(state, batch) -> (state, metrics)`.
Executor: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class BatchSource(Protocol):
    """Where batches come from: any function from the first step to an iterator of batches.

    The iterator yields the batches of `first_step`, `first_step + 1` and so on, so a resumed run
    gets the batches that it would have got. A source whose batches hold several steps is a
    `ChunkedBatchSource`. One that never ends says so by an attribute `endless` that is true.
    """

    def __call__(self, first_step: int, /) -> Iterator[Batch]: ...


@runtime_checkable
class ChunkedBatchSource(BatchSource, Protocol):
    """A batch source with several steps in a batch, on a new leading axis; see `data.chunked`.

    Attributes:
        steps_per_batch: size of that axis.
    """

    @property
    def steps_per_batch(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of a network (mixed precision).

    `parameter` is Linen's `param_dtype` and `compute` its `dtype`. Norms, softmax and losses are
    computed in float32 or wider under every policy.

    Attributes:
        parameter: dtype in which parameters are stored and updated.
        compute: dtype of matrix products, convolutions and activations.
        output: dtype of the network's output.

    Raises:
        ValueError: one is no floating dtype, such as "bf16".

    Example:
        >>> Precision(compute=jnp.bfloat16).parameter.__name__
        'float32'
    """

    parameter: Any = jnp.float32
    compute: Any = jnp.float32
    output: Any = jnp.float32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            dtype = getattr(self, field.name)
            try:
                floating = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
            except TypeError:
                floating = False
            if not floating:
                raise ValueError(
                    f"Precision({field.name}={dtype!r}) is no floating dtype; give one such as "
                    "jnp.float32 or jnp.bfloat16"
                )


def is_endless(source: Any) -> bool:
    """Return whether a source says that its batches have no end, by an attribute `endless`."""
    return getattr(source, "endless", False)


def steps_per_batch(source: BatchSource) -> int:
    """Return the number of steps in each batch of a source: 1 unless it is chunked."""
    return source.steps_per_batch if isinstance(source, ChunkedBatchSource) else 1


def at_least_float32(array: jax.Array) -> jax.Array:
    """Widen bfloat16 and float16 to float32; leave float32 and float64 as they are.

    Args:
        array: floating [...].

    Returns:
        [...], float32 or wider.
    """
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def drawn_in_float32(sampler: Sampler) -> Sampler:
    """Draw random numbers in float32 or wider, whatever their dtype is in the end.

    Drawn in bfloat16 itself, `jax.random.normal` takes 128 values, none of them beyond 2.9, and in
    float16 1024: a random number has as many random bits as the dtype has digits.

    Args:
        sampler: a function of key, shape and dtype: of `jax.random`, or an initializer.

    Returns:
        The function whose numbers are rounded to the dtype afterwards; unchanged for float32 and
        float64.

    Example:
        >>> normal = drawn_in_float32(jax.random.normal)
        >>> bool(jnp.max(normal(jax.random.key(0), (100_000,), jnp.bfloat16)) > 4)
        True
    """

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        return sampler(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    return draw


def known_values(array: Any) -> np.ndarray | None:
    """Return the values of an array, None while they are unknown.

    Args:
        array: JAX or NumPy array.

    Returns:
        A NumPy array, in which comparisons are computed even inside of a trace, where JAX makes
        tracers even of known arrays; None for a tracer, and for an array that is partly on the
        devices of other processes.
    """
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def checked_weights(weights: Any, dtype: Any) -> jax.Array:
    """Convert the weights of a sum; those below 0 are NaN in a compiled program.

    Raises:
        ValueError: a weight is known to be below 0.
    """
    known = known_values(weights)
    if known is not None and np.any(known < 0):
        raise ValueError(f"weights hold {np.min(known)}; give 0 or more, 0 for examples to ignore")
    weights = jnp.asarray(weights, dtype)
    return jnp.where(weights < 0, jnp.nan, weights) if known is None else weights


def at_least_int32(values: Any) -> Any:
    """Widen narrow and unsigned integers to signed ones of 32 bits or more.

    JAX compares and subtracts in the type of the array, in which a bound wraps: for uint8 values,
    256 is 0. So integers that a caller gives are widened before they are compared.

    Args:
        values: a Python integer, or an integer array [...].

    Returns:
        [...]. A Python integer stays one, a NumPy array becomes int64, a JAX array int32 or wider.
        Values that JAX's integers cannot hold become the nearest ones that they can, so that they
        stay out of range.

    Example:
        >>> at_least_int32(jnp.array([200], jnp.uint8)) < 256
        Array([ True], dtype=bool)
    """
    if isinstance(values, int):
        return values
    unsigned, size = jnp.issubdtype(values.dtype, jnp.unsignedinteger), values.dtype.itemsize
    wide = jnp.result_type(int)  # int32, or int64 in double precision
    limits = jnp.iinfo(wide)
    if not isinstance(values, jax.Array):
        if unsigned and size == 8:
            values = np.minimum(values, np.uint64(np.iinfo(np.int64).max))
        return np.clip(np.asarray(values, np.int64), limits.min, limits.max)
    if size >= 4 and not unsigned:
        return values
    if size >= wide.itemsize:
        values = jnp.minimum(values, jnp.asarray(limits.max, values.dtype))
    return values.astype(wide)


def is_narrow(array: Any) -> bool:
    """Return whether an array is floating and narrower than float32, such as bfloat16."""
    dtype = getattr(array, "dtype", jnp.float32)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def widened(tree: Any) -> Any:
    """Apply `at_least_float32` to the narrow leaves of a tree, and leave the others as they are."""
    return jax.tree.map(lambda leaf: at_least_float32(leaf) if is_narrow(leaf) else leaf, tree)


def rng_streams(rng: jax.Array, *names: str) -> dict[str, jax.Array]:
    """Derive one key per named stream.

    The key of a stream depends only on `rng` and the name of the stream, so adding a stream does
    not change the others.

    Args:
        rng: key of this step.
        names: names of streams, such as "dropout", "latent", "augmentation".

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
    weights: jax.Array | None = None,
    **keywords: Any,
) -> tuple[Any, ModelState]:
    """Call a Linen module as a pure function of parameters and model state.

    `module.apply` with all collections of `model_state` mutable in training, and none otherwise.

    Args:
        module: anything with Linen's `apply`.
        params: its parameters.
        model_state: its other collections.
        inputs: positional inputs of the module.
        rngs: one key per stream; passed on in training only. So a module that draws noise in
            evaluation raises an error, and is never random unnoticed.
        train: training mode: the collections may change.
        weights: [batch], 0 = padding; see `weights_keyword`. Used in training only.
        keywords: other keyword inputs of the module.

    Returns:
        The output, and the collections after the call; unchanged when not `train`.

    Raises:
        ValueError: in training, a module with batch statistics that takes no weights.
    """
    variables = {"params": params, **model_state}
    if not train:
        return module.apply(variables, *inputs, train=False, **keywords), model_state
    keywords |= weights_keyword(module, weights, model_state, method=keywords.get("method"))
    output, changed = module.apply(
        variables, *inputs, train=True, rngs=dict(rngs or {}), mutable=list(model_state), **keywords
    )
    return output, {**model_state, **changed}


def weights_keyword(
    module: Any,
    weights: jax.Array | None,
    collections: Mapping[str, Any],
    *,
    method: str | Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Return the keyword by which a module gets the weights of the examples, for its batch norms.

    A module that computes statistics of a batch takes the keyword `weights` and passes it to the
    layers that do, so that padding does not count in them.

    Args:
        module: a Linen module, or anything with `apply`.
        weights: [batch], 0 = padding; None if all are 1.
        collections: its collections besides the parameters.
        method: of the module, by default `__call__`.

    Returns:
        {"weights": weights} if there are weights and the method takes them, else {}.

    Raises:
        ValueError: the module has batch statistics, but its method takes no weights.
    """
    if weights is None:
        return {}
    named = method if isinstance(method, str) else "__call__"
    called = method if callable(method) else getattr(module, named, module.apply)
    if "weights" in inspect.signature(called).parameters:
        return {"weights": weights}
    if collections.get("batch_stats"):
        raise ValueError(
            f"{type(module).__name__} has batch statistics and takes no weights, so examples of "
            "weight 0 would count in them; add the keyword weights=None to its call and pass it "
            "to each batch norm, or train on batches without weights"
        )
    return {}


def record(module: Any, name: str, value: jax.Array) -> None:
    """Let `capture` return an intermediate value of a module; costs nothing otherwise.

    Corresponds to `module.sow("intermediates", ...)`, but stores one array, not a tuple.

    Args:
        module: the module that computes the value.
        name: such as "features".
        value: the array; a second call with the same name replaces it.
    """
    module.sow("intermediates", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def capture(
    module: Any, variables: Any, *inputs: Any, **keywords: Any
) -> tuple[Any, dict[str, Any]]:
    """Apply a module and also return the intermediate values that it records, such as features.

    Args:
        module: any Linen module.
        variables: parameters and other collections, as returned by `module.init`.
        inputs: inputs of the module.
        keywords: other keyword inputs; with `capture_intermediates=True` the output of every
            layer is recorded too, under `[layer]["__call__"][0]`.

    Returns:
        The output, and {name: array} of the recorded values, with a nested dict for each
        submodule that recorded any.

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


def bound_data_axis() -> str | None:
    """Return `DATA_AXIS` if it is bound where this is traced, else None.

    Batch normalization calls this at trace time, so it needs no `axis_name` argument and computes
    the same batch statistics under every executor.
    """
    try:
        jax.lax.axis_index(DATA_AXIS)
    except NameError:
        return None
    return DATA_AXIS


def tree_path(path: tuple[Any, ...]) -> str:
    """Return a key path of a pytree as a string, such as `params/hidden_0/kernel`.

    Args:
        path: from `jax.tree_util.tree_flatten_with_path`.

    Returns:
        The keys joined with slashes.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")
