"""The train step. No other module of the library differentiates an objective."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxnets.checks import check_key, check_sizes
from jaxnets.core import (
    Batch,
    Metrics,
    ModelState,
    Objective,
    ObjectiveOutput,
    Params,
    TrainState,
    Update,
    check_objective,
    is_narrow,
    widened,
)
from jaxnets.training.optimizers import Float32Masters, initial_state, narrow_states


def create_train_state(
    variables: Mapping[str, Any], updates: Update | Sequence[Update], *, rng: jax.Array
) -> TrainState:
    """Build the state of a run before its first step.

    Args:
        variables: from `module.init`: "params" and any other collections.
        updates: the same update or updates as for `make_train_step`.
        rng: root key of the run, from `jax.random.key(seed)`.

    Returns:
        TrainState at step 0. Call it under `jax.vmap` over keys (and hyper-parameters) for the
        state of a population.

    Warns:
        UserWarning: the optimizer keeps its state in 16 bits; it names the state and the remedy.

    Raises:
        ValueError: `variables` has no "params", or an update does not fit its networks.
        TypeError: `rng` is not a key, or an update is something else, such as an optimizer.
    """
    check_key(rng)
    if "params" not in variables:
        raise ValueError(
            f"variables has the collections {sorted(variables)} and no 'params'; "
            "pass the result of module.init"
        )
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    params = variables["params"]
    owners = _check_updates(_as_tuple(updates), params)
    if None in owners:
        opt_state = initial_state(owners[None], params)
    else:
        opt_state = {
            name: initial_state(update, params[name]) for name, update in owners.items() if name
        }
    narrow = narrow_states(opt_state) if any(map(is_narrow, jax.tree.leaves(params))) else []
    if narrow:
        warnings.warn(
            f"the optimizer keeps {', '.join(narrow)} in 16 bits, as the parameters are; there an "
            "average over many steps stands still (Adam's second moment with b2=0.999 never "
            "decays). Give Update(..., float32_masters=True), or keep the parameters in float32: "
            "Precision(compute=jnp.bfloat16)",
            stacklevel=2,
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jnp.copy(rng),  # donating the state must not delete the caller's key
        params=params,
        model_state=model_state,
        opt_state=opt_state,
    )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["updates"], meta_fields=["num_microbatches"]
)
@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One training step as a pure function of state and batch; `make_train_step` builds it.

    Attributes:
        updates: the gradient phases of a step, in order; each starts from the result of the
            previous one.
        num_microbatches: parts of the batch whose gradients are accumulated sequentially.
    """

    updates: tuple[Update, ...]
    num_microbatches: int = 1

    def __call__(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Run one step.

        Args:
            state: TrainState.
            batch: dict of arrays [batch, ...].
            axis_name: mapped axis over which the batch is split; sums are reduced over it.

        Returns:
            The state after the step, and the metrics as sums: "loss" and the metrics of the
            objective, with the prefix "wrt/" where updates name their network.

        Raises:
            ValueError: an update does not fit its networks, the optimizer state is that of
                another optimizer, or the state is that of a population.
        """
        _check_one_network(state)
        state = _strongly_typed(state)
        owners = _check_updates(self.updates, state.params)
        _check_opt_state(owners, state.params, state.opt_state)
        params, model_state, opt_state = state.params, state.model_state, state.opt_state
        metrics: Metrics = {}
        for index, update in enumerate(self.updates):
            rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), index)
            if axis_name is not None:
                rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
            gradients, output = self._gradient_sums(update, params, model_state, batch, rng)
            gradients = widened(gradients)
            loss, new_metrics, new_model_state = output.loss, output.metrics, output.model_state
            if axis_name is not None:
                # Outside the differentiated function: a psum inside it would be transposed and
                # give wrong gradients without an error (jax issue 3970).
                gradients, loss, new_metrics = jax.lax.psum(
                    (gradients, loss, new_metrics), axis_name
                )
                new_model_state = _mean_of_floats(new_model_state, model_state, axis_name)
            gradients = _divide(gradients, loss.count)
            params, opt_state = _apply(update, gradients, params, opt_state, loss)
            model_state = _merge_model_state(update, params, model_state, new_model_state)
            prefix = "" if update.wrt is None else f"{update.wrt}/"
            for name, value in {"loss": loss, **new_metrics}.items():
                # A network with several updates in a step reports the mean over all of them.
                earlier = metrics.get(prefix + name)
                metrics[prefix + name] = value if earlier is None else earlier + value
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
        )
        return new_state, metrics

    def gradients(self, state: TrainState, batch: Batch) -> Params:
        """Return the gradients of every update at one state, without an optimizer step.

        Args:
            state: TrainState.
            batch: dict of arrays [batch, ...].

        Returns:
            A tree like `state.params`, without the parameters that no update trains. If several
            updates train one network, it is the gradient of the last one.
        """
        _check_updates(self.updates, state.params)
        gradients: dict[str | None, Params] = {}
        for index, update in enumerate(self.updates):
            rng = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), index)
            sums, output = self._gradient_sums(update, state.params, state.model_state, batch, rng)
            trained = state.params if update.wrt is None else state.params[update.wrt]
            gradients[update.wrt] = _cast_like(_divide(sums, output.loss.count), trained)
        return gradients.get(None, gradients)

    def _gradient_sums(
        self,
        update: Update,
        params: Params,
        model_state: ModelState,
        batch: Batch,
        rng: jax.Array,
    ) -> tuple[Params, ObjectiveOutput]:
        """Return the gradient of the loss summed over the batch, and the objective's sums."""

        def sums(
            model_state: ModelState, batch: Batch, rng: jax.Array
        ) -> tuple[Params, ObjectiveOutput]:
            def total_loss(trained: Params) -> tuple[jax.Array, ObjectiveOutput]:
                all_params = trained if update.wrt is None else {**params, update.wrt: trained}
                output = update.objective(all_params, model_state, batch, rng, train=True)
                _check_output(output, model_state)
                loss, metrics = widened((output.loss, output.metrics))
                return loss.total, dataclasses.replace(output, loss=loss, metrics=metrics)

            trained = params if update.wrt is None else params[update.wrt]
            return jax.grad(total_loss, has_aux=True)(trained)

        if self.num_microbatches == 1:
            return sums(model_state, batch, rng)

        def add_microbatch(carry: Any, inputs: Any) -> tuple[Any, None]:
            gradients, loss, metrics, model_state = carry
            index, microbatch = inputs
            more, output = sums(model_state, microbatch, jax.random.fold_in(rng, index))
            gradients, loss, metrics = jax.tree.map(
                jnp.add, (gradients, loss, metrics), (more, output.loss, output.metrics)
            )
            return (gradients, loss, metrics, output.model_state), None

        microbatches = _split(batch, self.num_microbatches)
        one = jax.tree.map(lambda x: x[0], microbatches)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(lambda *inputs: widened(sums(*inputs)), model_state, one, rng),
        )
        carry = (zeros[0], zeros[1].loss, zeros[1].metrics, model_state)
        indices = jnp.arange(self.num_microbatches)
        carry, _ = jax.lax.scan(add_microbatch, carry, (indices, microbatches))
        gradients, loss, metrics, model_state = carry
        return gradients, ObjectiveOutput(loss=loss, model_state=model_state, metrics=metrics)


def make_train_step(updates: Update | Sequence[Update], *, num_microbatches: int = 1) -> TrainStep:
    """Build the train step that every executor compiles.

    For each update in order: differentiate the *summed* loss, and divide the gradient once by the
    summed weights. So gradient accumulation, padding, token masks and data parallelism all compute
    the same exact formula, sum of gradients / sum of weights.

    Args:
        updates: one update, or several for several networks (a GAN: discriminator, generator).
        num_microbatches: gradient accumulation: split the batch into this many parts and add up
            their gradients, for batches that do not fit in memory. The result equals that of the
            whole batch, also with uneven weights, except that batch normalization computes the
            statistics of each part separately. Differs from `optax.MultiSteps`, which averages
            the mean gradients of several steps.

    Returns:
        TrainStep, a function `(state, batch, *, axis_name=None) -> (state, metrics)`.

    Raises:
        ValueError: there is no update, or `num_microbatches` is no positive integer.
        TypeError: an update is something else, such as an objective.

    Example:
        >>> from jaxnets.core import Mean, ObjectiveOutput
        >>> def objective(params, model_state, batch, rng, *, train):
        ...     loss = Mean.of((batch["inputs"] * params["w"] - batch["labels"]) ** 2)
        ...     return ObjectiveOutput(loss, model_state, {})
        >>> update = Update(objective, optax.sgd(0.1))
        >>> state = create_train_state({"params": {"w": jnp.zeros(())}}, update,
        ...                            rng=jax.random.key(0))
        >>> batch = {"inputs": jnp.array([1.0, 2.0]), "labels": jnp.array([2.0, 4.0])}
        >>> state, metrics = make_train_step(update)(state, batch)
        >>> float(metrics["loss"].compute()), float(state.params["w"])
        (10.0, 1.0)
    """
    check_sizes(num_microbatches=num_microbatches)
    updates = _as_tuple(updates)
    if not updates:
        raise ValueError("updates is empty; give at least one Update(objective, optimizer)")
    return TrainStep(updates, num_microbatches)


def make_eval_step(objective: Objective) -> Callable[[TrainState, Batch], Metrics]:
    """Build the evaluation step of an objective; the caller compiles it.

    Args:
        objective: called with `train=False` and the same key at every call, so a random
            evaluation (such as a sampled bound) is reproducible.

    Returns:
        `(state, batch) -> metrics`: sums, "loss" included. For a population wrap it in
        `population_step`.

    Raises:
        TypeError: the objective is a module, or no function.
    """
    check_objective(objective)
    return _EvalStep(objective)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _EvalStep:
    objective: Objective

    def __call__(self, state: TrainState, batch: Batch) -> Metrics:
        _check_one_network(state)
        rng = jax.random.fold_in(state.rng, zlib.crc32(b"evaluation"))
        output = self.objective(state.params, state.model_state, batch, rng, train=False)
        return widened({"loss": output.loss, **output.metrics})


def _check_one_network(state: TrainState) -> None:
    if jnp.ndim(state.step) > 0:
        raise ValueError(
            f"the state holds {jnp.shape(state.step)[0]} networks and the step trains or evaluates "
            "one; wrap the step in population_step"
        )


def _strongly_typed(state: TrainState) -> TrainState:
    """Return the state without weak types, such as that of `jnp.asarray(0.1)`.

    A checkpoint does not have them, and a product of bfloat16 with a weak float32 is bfloat16, with
    a strong one float32. So a resumed run would be another program.
    """
    return jax.tree.map(
        lambda leaf: leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf, state
    )


def _as_tuple(updates: Update | Sequence[Update]) -> tuple[Update, ...]:
    several = isinstance(updates, Sequence)
    found = tuple(updates) if isinstance(updates, Sequence) else (updates,)
    for update in found:
        if not isinstance(update, Update):
            name = "an element of updates" if several else "updates"
            raise TypeError(f"{name} is {update!r}; give Update(objective, optimizer)")
    return found


def _check_updates(updates: tuple[Update, ...], params: Params) -> dict[str | None, Update]:
    """Check that the updates are consistent; return the first update of each network."""
    owners: dict[str | None, Update] = {}
    for update in updates:
        if update.wrt is not None and update.wrt not in params:
            raise ValueError(f"an update has wrt={update.wrt!r}, but params has {sorted(params)}")
        first = owners.setdefault(update.wrt, update)
        if first.optimizer is not update.optimizer:
            raise ValueError(
                f"two updates with wrt={update.wrt!r} have different optimizers; "
                "give both the same optimizer object"
            )
        if first.float32_masters != update.float32_masters:
            raise ValueError(
                f"two updates with wrt={update.wrt!r} have float32_masters={first.float32_masters} "
                f"and {update.float32_masters}; they share one optimizer state, give both the same"
            )
    if None in owners and len(owners) > 1:
        raise ValueError(
            "some updates have wrt=None and train all of params, others name a network; set wrt "
            "in all of them"
        )
    return owners


def _check_opt_state(owners: Mapping[str | None, Update], params: Params, opt_state: Any) -> None:
    """Check that the state has the structure that its optimizers give it; while tracing."""
    expected = {
        wrt: jax.eval_shape(
            functools.partial(initial_state, update), params if wrt is None else params[wrt]
        )
        for wrt, update in owners.items()
    }
    needed, held = expected.get(None, expected), opt_state
    if None not in expected and type(opt_state) is dict:  # other steps may train other networks
        held = {wrt: opt_state[wrt] for wrt in expected if wrt in opt_state}
    structures: list[Any] = [jax.tree.structure(needed), jax.tree.structure(held)]
    if structures[0] != structures[1]:
        same = " for parameters of other names" if _kinds(held) == _kinds(needed) else ""
        raise ValueError(
            f"opt_state holds {_kinds(held)}, but the optimizers of the step need "
            f"{_kinds(needed)}{same}; give create_train_state and make_train_step the same updates"
        )


def _kinds(opt_state: Any) -> str:
    """Return the classes inside an optimizer state, such as "(ScaleByAdamState, EmptyState)"."""
    if isinstance(opt_state, Mapping):
        return "{" + ", ".join(f"{key}: {_kinds(opt_state[key])}" for key in opt_state) + "}"
    if type(opt_state) in (tuple, list):
        return f"({', '.join(map(_kinds, opt_state))})"
    return type(opt_state).__name__


def _check_output(output: ObjectiveOutput, model_state: ModelState) -> None:
    before: Any = jax.tree.structure(model_state)
    after: Any = jax.tree.structure(output.model_state)
    if before != after:
        raise ValueError(
            f"the objective changed the structure of model_state from {before} to {after}; "
            "return the same collections with new values"
        )
    if jnp.ndim(output.loss.total) != 0:
        raise ValueError(
            f"the objective's loss.total has shape {jnp.shape(output.loss.total)}, not (); "
            "sum over the examples with Mean.of(per_example_loss, weights)"
        )


def _apply(
    update: Update, gradients: Params, params: Params, opt_state: Any, loss: Any
) -> tuple[Params, Any]:
    """Apply one optimizer update; return params and opt_state with only `wrt` replaced."""
    trained = params if update.wrt is None else params[update.wrt]
    own_state = opt_state if update.wrt is None else opt_state[update.wrt]
    if update.float32_masters:
        masters = own_state.current(trained)
        masters, inner = _updated(update, gradients, masters, own_state.inner, loss)
        trained, own_state = _cast_like(masters, trained), Float32Masters(masters, inner)
    else:
        gradients = _cast_like(gradients, trained)
        trained, own_state = _updated(update, gradients, trained, own_state, loss)
    if update.wrt is None:
        return trained, own_state
    return {**params, update.wrt: trained}, {**opt_state, update.wrt: own_state}


def _updated(
    update: Update, gradients: Params, params: Params, opt_state: Any, loss: Any
) -> tuple[Params, Any]:
    optimizer = optax.with_extra_args_support(update.optimizer)
    empty = loss.count == 0  # 0 / 0 is NaN, which an optimizer that reads the loss would keep
    value = jnp.where(empty, 0.0, loss.compute())
    changes, new_state = optimizer.update(gradients, opt_state, params, value=value)
    after = optax.apply_updates(params, changes), new_state
    if not _averages_losses(opt_state):
        return after
    # Any value in place of a loss would count as one, such as 0 as the best of all.
    before = params, opt_state
    return jax.tree.map(lambda old, new: jnp.where(empty, old, new), before, after)


#: States of Optax's optimizers that average or compare the losses of several steps.
_LOSS_STATES = (
    optax.contrib.ReduceLROnPlateauState,
    optax.contrib.MomoState,
    optax.contrib.MomoAdamState,
)


def _averages_losses(opt_state: Any) -> bool:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _LOSS_STATES))
    return any(isinstance(node, _LOSS_STATES) for node in nodes)


def _cast_like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


def _divide(gradients: Params, count: jax.Array) -> Params:
    # The gradient of a batch of padding only is 0; 0 / 0 would make the parameters NaN.
    scale = 1.0 / jnp.where(count == 0, jnp.ones_like(count), count)
    # In float32 or wider: float16 has no 1 / count for a count above 16 million.
    return jax.tree.map(
        lambda gradient: gradient * scale.astype(gradient.dtype), widened(gradients)
    )


def _mean_of_floats(tree: Any, before: Any, axis_name: str) -> Any:
    def mean(leaf: jax.Array, old: jax.Array) -> jax.Array:
        # What the objective passes on is equal on all devices, and a mean would round it.
        if leaf is old or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jax.lax.pmean(leaf, axis_name)

    return jax.tree.map(mean, tree, before)


def _merge_model_state(
    update: Update, params: Params, old: ModelState, new: ModelState
) -> ModelState:
    """Take from `new` only the entries of the network that `update` trains (`wrt`)."""
    if update.wrt is None:
        return new
    merged = {}
    for name, collection in new.items():
        if isinstance(collection, Mapping) and set(collection) <= set(params):
            own = {update.wrt: collection[update.wrt]} if update.wrt in collection else {}
            merged[name] = {**old[name], **own}
        else:
            merged[name] = collection
    return merged


def _split(batch: Batch, num_parts: int) -> Batch:
    def split(array: jax.Array) -> jax.Array:
        array = jnp.asarray(array)
        if array.shape[0] % num_parts:
            raise ValueError(
                f"batch size {array.shape[0]} is not divisible by num_microbatches "
                f"{num_parts}; pad with pad_batch or drop {array.shape[0] % num_parts}"
            )
        # Part k has the examples k, k + num_parts, ...: if the batch is sharded over devices,
        # each part is sharded over all of them too, and no example changes its device.
        # [batch / num_parts, num_parts, ...]
        parts = array.reshape(array.shape[0] // num_parts, num_parts, *array.shape[1:])
        return jnp.moveaxis(parts, 1, 0)  # [num_parts, batch / num_parts, ...]

    return jax.tree.map(split, dict(batch))
