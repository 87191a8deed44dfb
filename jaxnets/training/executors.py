"""Step transforms and executors; none of them depends on a model, a loss or an optimizer.

A step transform (`scan_steps`, `population_step`) takes a step and returns a step. An executor
(`jit_step`, `resident_steps`, `pmap_step`, `sharded_step`) takes a step and returns a compiled
`(state, batch) -> (state, metrics)`. So they compose: `pmap_step(scan_steps(step), batch_axis=1)`.

Steps may hold arrays, such as frozen parameters; see `held_arrays`. So transforms return pytrees.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnets.core import (
    DATA_AXIS,
    Batch,
    Executor,
    Mean,
    Metrics,
    StepFn,
    TrainState,
    tree_path,
)
from jaxnets.training.held_arrays import split_arrays
from jaxnets.training.sharding import (
    batch_partition,
    check_batch_partition,
    data_mesh,
    leading_part,
    mesh_axes,
    place,
    replicate,
)

_Result = TypeVar("_Result")

# Step transforms: a step in, a step out. They nest in each other and in every executor.


def scan_steps(step: StepFn) -> StepFn:
    """Run K steps in one call with `lax.scan`, which saves K - 1 times the dispatch overhead.

    Args:
        step: a step on batches [batch, ...].

    Returns:
        A step on stacked batches [K, batch, ...], as from `data.chunked`. Its metrics are summed
        over the K steps.
    """
    return _ScannedSteps(step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ScannedSteps:
    step: StepFn

    def __call__(
        self, state: TrainState, batches: Batch, /, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return _call(self.step, state, batch, axis_name)

        state, metrics = jax.lax.scan(body, state, dict(batches))
        return state, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)


def population_step(
    step: StepFn,
    *,
    shared_batch: bool = True,
    strategy: Literal["vmap", "map"] = "vmap",
    on_non_finite: Literal["stop", "freeze"] = "stop",
) -> StepFn:
    """Run a step for every member of a population: an array axis of seeds and hyper-parameters.

    Args:
        step: a step of one member, or an evaluation step `(state, batch) -> metrics`.
        shared_batch: all members get the same batch [batch, ...]; otherwise the batch has a
            leading member axis.
        strategy: "vmap" vectorizes over the members (`jax.vmap`): fast on accelerators and for
            small networks. "map" computes them sequentially inside the program (`jax.lax.map`):
            on CPU faster than "vmap" for convolutional and large networks, and it needs less
            memory. `PopulationExecutor` has two more, of several programs or threads.
        on_non_finite: "stop" changes nothing: a member that is NaN or infinite ends `fit`.
            "freeze" lets the other members go on. A call that makes a metric or any array of a
            member's state NaN or infinite is not applied to that member. From then on it keeps
            its state, whose `step` falls behind, and its metrics have weight 0. Another metric,
            "frozen", is 1 for it and 0 for the others. The checks read the whole state once a
            call. Not for an evaluation step.

    Returns:
        A step of a state whose leaves have a leading member axis, as from
        `jax.vmap(create)(keys, ...)`. Its metrics have that axis too.

    Raises:
        ValueError: an unknown `strategy` or `on_non_finite`, or a state without a member axis.
    """
    if strategy not in ("vmap", "map"):
        raise ValueError(f"strategy is {strategy!r}; choose 'vmap' or 'map'")
    check_on_non_finite(on_non_finite)
    return _PopulationStep(step, shared_batch, strategy, on_non_finite)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step"],
    meta_fields=["shared_batch", "strategy", "on_non_finite"],
)
@dataclasses.dataclass(frozen=True)
class _PopulationStep:
    step: StepFn
    shared_batch: bool
    strategy: str
    on_non_finite: str

    def __call__(
        self, state: TrainState, batch: Batch, /, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        if jnp.ndim(state.step) == 0:
            raise ValueError(
                "the state holds one network and population_step needs a member axis; create "
                "the state by jax.vmap over keys"
            )
        member = member_step(self.step, newest_step(state, self.on_non_finite), axis_name)
        if self.strategy == "vmap":
            return jax.vmap(member, in_axes=(0, None if self.shared_batch else 0))(state, batch)
        return map_members(member, state, batch, shared_batch=self.shared_batch)


# The members of a population, also for `PopulationExecutor`.

#: A step of one member without `axis_name`.
MemberStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def check_on_non_finite(on_non_finite: str) -> None:
    """Check what is done about members that are not finite.

    Raises:
        ValueError: it is neither "stop" nor "freeze".
    """
    if on_non_finite not in ("stop", "freeze"):
        raise ValueError(f"on_non_finite is {on_non_finite!r}; choose 'stop' or 'freeze'")


def newest_step(state: TrainState, on_non_finite: str) -> jax.Array | None:
    """Return the step of the members that are not frozen; None where none can be.

    Args:
        state: of all members, with a leading axis.
        on_non_finite: "stop" or "freeze".
    """
    return jnp.max(state.step) if on_non_finite == "freeze" else None


def member_step(step: StepFn, newest: jax.Array | None, axis_name: str | None = None) -> MemberStep:
    """Return the step of one member, which freezes it unless `newest` is None.

    A member that a call makes NaN or infinite stays as it was before that call, in later calls too,
    because its step falls behind `newest`. The metric "frozen" counts it; its other metrics are 0.

    Args:
        step: of one network.
        newest: see `newest_step`.
        axis_name: mapped axis over which the batch is split, if any.

    Raises:
        ValueError: (when traced) a metric of the step is named "frozen".
    """

    def advance(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = _call(step, state, batch, axis_name)
        if "frozen" in metrics:
            raise ValueError("a metric of the step is named frozen; give it another name")
        goes_on = (state.step == newest) & _stays_finite(state, after, metrics)
        after, metrics = jax.tree.map(
            lambda new, old: jnp.where(goes_on, new, old),
            (after, metrics),
            (state, jax.tree.map(jnp.zeros_like, metrics)),
        )
        frozen = jnp.where(goes_on, 0.0, 1.0)
        return after, {**metrics, "frozen": Mean(frozen, jnp.ones_like(frozen))}

    if newest is None:
        return lambda state, batch: _call(step, state, batch, axis_name)
    return advance


def map_members(
    member: MemberStep, state: TrainState, batch: Batch, *, shared_batch: bool
) -> tuple[TrainState, Metrics]:
    """Call the step of a member sequentially for each of them.

    Args:
        member: the step of one of them.
        state: of all members, with a leading axis.
        batch: of all members, or one with a leading axis of members.
        shared_batch: whether the batch is that of all.

    Returns:
        The states and the metrics, with a leading axis of members.
    """
    if shared_batch:
        return jax.lax.map(lambda state: member(state, batch), state)
    return jax.lax.map(lambda pair: member(*pair), (state, dict(batch)))


def _stays_finite(before: TrainState, after: TrainState, metrics: Metrics) -> jax.Array:
    """Return whether a call made nothing NaN or infinite that was not so before it.

    A state may hold infinities from the start, such as the best value of a schedule.
    """
    finite = [jnp.all(jnp.isfinite(mean.total)) for mean in metrics.values()]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            finite.append(jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old)))
    return jnp.all(jnp.stack(finite))


# Executors: a step in, a compiled `(state, batch) -> (state, metrics)` out.


def jit_step(
    step: Callable[[TrainState, Batch], _Result], *, donate: bool = False
) -> Callable[[TrainState, Batch], _Result]:
    """Compile a step for one device.

    Args:
        step: `(state, batch, *, axis_name=None) -> (state, metrics)`, or an evaluation step
            `(state, batch) -> metrics`.
        donate: donate the buffers of the input state, which the caller cannot use afterwards.

    Returns:
        The compiled `(state, batch) -> (state, metrics)`, with the `lower` of `jax.jit`. Arrays
        that the step holds, such as frozen parameters, are arguments of the program;
        `jax.jit(step)` would embed them in it.
    """
    held, with_arrays = split_arrays(step)

    def run(held: Sequence[Any], state: TrainState, batch: Batch) -> _Result:
        return with_arrays(held)(state, batch)

    return _Compiled(jax.jit(run, donate_argnums=(1,) if donate else ()), held)


class _Compiled(functools.partial[Any]):
    """A compiled function with its first argument, and the `lower` of `jax.jit`."""

    def lower(self, *arguments: Any) -> Any:
        return self.func.lower(*self.args, *arguments)  # type: ignore[attr-defined]


def resident_steps(step: StepFn, data: Mapping[str, Any], *, donate: bool = False) -> Executor:
    """Compile K steps in one call on a data set that stays in device memory.

    Only indices are transferred from the host. Batches are gathered inside the compiled scan, in
    exactly the order of `data.shuffled_batches` with the same seed.

    Args:
        step: a step on batches [batch, ...].
        data: arrays [examples, ...]; transferred to the device once, here.
        donate: as for `jit_step`.

    Returns:
        An executor on batches `{"indices": int32 [K, batch]}`, as from
        `data.chunked(data.index_batches(...), K)`. Other arrays of a batch, such as the "epochs"
        of `data.with_epochs`, are passed to the step unchanged.
    """
    held, with_arrays = split_arrays(step)
    resident = jax.device_put((held, dict(data)))

    def run(
        resident: tuple[Sequence[Any], Batch], state: TrainState, selection: Batch
    ) -> tuple[TrainState, Metrics]:
        # An argument because a closure would embed the data in the program as a constant.
        held, data = resident
        step = with_arrays(held)

        def gathered(
            state: TrainState, selection: Batch, *, axis_name: str | None = None
        ) -> tuple[TrainState, Metrics]:
            others = {name: array for name, array in selection.items() if name != "indices"}
            batch = {name: array[selection["indices"]] for name, array in data.items()}
            return _call(step, state, {**batch, **others}, axis_name)

        return scan_steps(gathered)(state, selection)

    return _Compiled(jax.jit(run, donate_argnums=(1,) if donate else ()), resident)


def pmap_step(
    step: StepFn,
    *,
    batch_axis: int = 0,
    devices: Sequence[jax.Device] | None = None,
    donate: bool = False,
) -> Executor:
    """Compile a data-parallel step with `jax.pmap`: every batch is split over the local devices.

    The state has no device axis, so a checkpoint can be used by every executor.

    Args:
        step: a step that reduces over its `axis_name`, which is `DATA_AXIS` here.
        batch_axis: axis of the batch's arrays to split; 1 for `scan_steps`.
        devices: by default all local devices.
        donate: as for `jit_step`.

    Returns:
        An executor on the same batches as that of `jit_step`.

    Raises:
        ValueError: the step has no `axis_name`; at the call, the batch size is not divisible by
            the number of devices.
    """
    _require_axis_name(step)
    devices = list(devices) if devices is not None else jax.local_devices()
    held, with_arrays = split_arrays(step)
    held = replicate(held, data_mesh(devices))
    mapped = jax.pmap(
        lambda held, state, batch: with_arrays(held)(state, batch, axis_name=DATA_AXIS),
        axis_name=DATA_AXIS,
        in_axes=(None, None, batch_axis),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=(1,) if donate else (),
    )

    def split(array: Any) -> Any:
        _check_divisible(array.shape[batch_axis], len(devices), "devices")
        before, after = array.shape[:batch_axis], array.shape[batch_axis + 1 :]
        # [..., devices, batch / devices, ...]
        return array.reshape(*before, len(devices), array.shape[batch_axis] // len(devices), *after)

    return _bounded(
        lambda state, batch: mapped(held, state, jax.tree.map(split, dict(batch))), devices
    )


def sharded_step(
    step: StepFn,
    mesh: Mesh,
    state_sharding: Any = None,
    *,
    batch_spec: PartitionSpec | None = None,
    donate: bool = False,
) -> Executor:
    """Compile a step for a device mesh with `jax.jit`; the compiler inserts the collectives.

    With a mesh of several processes each of them gives the same initial state and the same whole
    batch, of which its devices take their rows, or a batch of `data.sharded_batches`, of which each
    process has made only its own rows.

    Args:
        step: computes with global batches; its `axis_name` stays None. Arrays that it holds, such
            as frozen parameters, keep their sharding on the mesh, or are replicated.
        mesh: from `data_mesh`, `device_mesh`, or one of your own.
        state_sharding: a sharding per leaf, as from `state_sharding` or `fsdp_sharding`; None
            replicates the state.
        batch_spec: partition of the batch's arrays; None splits the leading axis over the mesh axes
            "fsdp" and "data". Give `PartitionSpec(None, "data")` for `scan_steps`, and
            `PartitionSpec(("fsdp", "data"), "sequence")` to split the time too. An array with fewer
            axes takes the first entries.
        donate: as for `jit_step`.

    Returns:
        An executor on the same batches as that of `jit_step`.

    Raises:
        ValueError: `batch_spec` names "data" before "fsdp" on a mesh that splits features; at the
            call, a size of the batch is not divisible by the devices of its axis, or the state was
            placed with other shardings. A state that was not placed is placed here.
    """
    spec = batch_partition(mesh) if batch_spec is None else batch_spec
    check_batch_partition(spec, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    state_sharding = replicated if state_sharding is None else state_sharding
    held, with_arrays = split_arrays(step)
    held = [array if _is_on(array, mesh) else replicate(array, mesh) for array in held]

    @functools.cache
    def compiled(structure: Any, axes: tuple[int, ...]) -> Any:
        return jax.jit(
            lambda held, state, batch: with_arrays(held)(state, batch),
            in_shardings=(
                [array.sharding for array in held],
                state_sharding,
                batch_sharding(structure, axes),
            ),
            out_shardings=(state_sharding, replicated),
            donate_argnums=(1,) if donate else (),
        )

    @functools.cache
    def batch_sharding(structure: Any, axes: tuple[int, ...]) -> Any:
        return structure.unflatten(NamedSharding(mesh, leading_part(spec, n)) for n in axes)

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        arrays, structure = jax.tree.flatten(dict(batch))
        axes = tuple(array.ndim for array in arrays)
        for array in arrays:
            for size, names in zip(array.shape, spec, strict=False):
                parts = math.prod(mesh.shape[name] for name in mesh_axes(names))
                _check_divisible(size, parts, "devices")
        if mesh.is_multi_process:
            state = place(state, state_sharding)
            batch = place(dict(batch), batch_sharding(structure, axes))
        try:
            with jax.set_mesh(mesh):
                return compiled(structure, axes)(held, state, dict(batch))
        except ValueError as error:
            _check_placement(state, state_sharding, error)
            raise

    return _bounded(run, mesh.devices.flat)


def _check_placement(state: TrainState, state_sharding: Any, error: ValueError) -> None:
    """Raise an error with the remedy if an array was placed in another way than the step needs."""
    # A sharding may stand for a whole part of the state.
    wanted = jax.tree.map(lambda s, part: jax.tree.map(lambda _: s, part), state_sharding, state)
    paths = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), sharding in zip(paths, jax.tree.leaves(wanted), strict=True):
        placed = getattr(leaf, "committed", False)
        if placed and not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            raise ValueError(
                f"{tree_path(path)} is placed by {leaf.sharding} and the step needs {sharding}; "
                "place the state with jax.device_put(state, state_sharding), or with "
                "replicate(state, mesh) where the step has no state_sharding"
            ) from error


def _is_on(array: Any, mesh: Mesh) -> bool:
    return isinstance(array, jax.Array) and array.devices() == set(mesh.devices.flat)


def _bounded(executor: Executor, devices: Iterable[jax.Device]) -> Executor:
    """Wait for each call if the devices are several virtual devices of one CPU.

    They share one thread pool. Two queued programs with collectives can each occupy threads that
    the other one needs, which is a deadlock. Accelerators have a queue per device: no wait.
    """
    devices = list(devices)
    if len(devices) == 1 or devices[0].platform != "cpu":
        return executor
    return lambda state, batch: jax.block_until_ready(executor(state, batch))


def _call(
    step: Callable[..., Any], state: TrainState, batch: Batch, axis_name: str | None
) -> tuple[TrainState, Metrics]:
    # A user's own step needs no `axis_name` unless an executor splits its batch.
    if axis_name is None:
        return step(state, batch)
    _require_axis_name(step)
    return step(state, batch, axis_name=axis_name)


def _require_axis_name(step: Callable[..., Any]) -> None:
    parameters = inspect.signature(step).parameters.values()
    if not any(p.name == "axis_name" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{step} takes no axis_name, so it cannot reduce over devices; add "
            "`*, axis_name=None` and psum gradients and metrics over it, or use sharded_step"
        )


def _check_divisible(size: int, parts: int, what: str) -> None:
    if size % parts:
        raise ValueError(
            f"batch size {size} is not divisible by {parts} {what}; "
            f"pad with pad_batch or drop {size % parts}"
        )
