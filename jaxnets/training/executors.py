"""Executors: each takes a step and returns a plain `(state, batch) -> (state, metrics)`.

None of them knows a model, a loss or an optimizer. `scan_steps` and `population_step` return
steps again, so they nest under the others: `pmap_step(scan_steps(step), batch_axis=1)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxnets.core import DATA_AXIS, Batch, Executor, Metrics, StepFn, TrainState


def jit_step(step: StepFn, *, donate: bool = False) -> Executor:
    """Compile a step for one device.

    Args:
        step: `(state, batch, *, axis_name=None) -> (state, metrics)`.
        donate: reuse the memory of the state that is passed in, which is then gone for the caller.

    Returns:
        The compiled `(state, batch) -> (state, metrics)`.
    """
    return jax.jit(lambda state, batch: step(state, batch), donate_argnums=(0,) if donate else ())


def scan_steps(step: StepFn) -> StepFn:
    """Run K steps in one dispatch, which saves the host's share of a small step.

    Args:
        step: a step of batches [batch, ...].

    Returns:
        A step of stacked batches [K, batch, ...] (`data.chunked` makes them) that adds its
        metrics up over the K steps.
    """

    def scanned(
        state: TrainState, batches: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return _call(step, state, batch, axis_name)

        state, metrics = jax.lax.scan(body, state, dict(batches))
        return state, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)

    return scanned


def resident_steps(step: StepFn, data: Mapping[str, Any], *, donate: bool = False) -> Executor:
    """Run K steps in one dispatch on a data set that lives on the device.

    Only indices travel from the host; the batches are gathered inside the compiled scan, in
    exactly the order of `data.shuffled_batches` with the same seed.

    Args:
        step: a step of batches [batch, ...].
        data: arrays [examples, ...]; moved to the device once, here.
        donate: as for `jit_step`.

    Returns:
        An executor of `{"indices": int32 [K, batch]}`, as made by
        `data.chunked(data.index_batches(...), K)`; what else a batch holds goes to the step as it
        is, such as the "epochs" of `data.with_epochs`.
    """
    resident = jax.device_put(dict(data))

    def run(state: TrainState, data: Batch, selection: Batch) -> tuple[TrainState, Metrics]:
        # `data` is an argument, not a constant of the program, which would be compiled into it.
        def gathered(
            state: TrainState, selection: Batch, *, axis_name: str | None = None
        ) -> tuple[TrainState, Metrics]:
            others = {name: array for name, array in selection.items() if name != "indices"}
            batch = {name: array[selection["indices"]] for name, array in data.items()}
            return _call(step, state, {**batch, **others}, axis_name)

        return scan_steps(gathered)(state, selection)

    compiled = jax.jit(run, donate_argnums=(0,) if donate else ())
    return lambda state, selection: compiled(state, resident, selection)


def population_step(
    step: StepFn, *, shared_batch: bool = True, strategy: Literal["vmap", "map"] = "vmap"
) -> StepFn:
    """Run one step of every member of a population: seeds and hyper-parameters as an array axis.

    Args:
        step: a step of one member; an evaluation step `(state, batch) -> metrics` will do too.
        shared_batch: every member sees the same batch [batch, ...]; otherwise the batch has a
            leading member axis.
        strategy: "vmap" computes the members side by side: fast on accelerators and for small
            networks. "map" computes them one after the other inside the program: on CPU faster
            than "vmap" for convolutional and large networks, and with less memory.

    Returns:
        A step of a state whose leaves have a leading member axis, from
        `jax.vmap(create)(keys, ...)`; so have its metrics.

    Raises:
        ValueError: an unknown `strategy`.
    """
    if strategy not in ("vmap", "map"):
        raise ValueError(f"strategy is {strategy!r}; choose 'vmap' or 'map'")

    def population(
        state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        if strategy == "vmap":
            return jax.vmap(
                lambda member, batch: _call(step, member, batch, axis_name),
                in_axes=(0, None if shared_batch else 0),
            )(state, batch)
        if shared_batch:
            return jax.lax.map(lambda member: _call(step, member, batch, axis_name), state)
        return jax.lax.map(
            lambda pair: _call(step, pair[0], pair[1], axis_name), (state, dict(batch))
        )

    return population


def pmap_step(
    step: StepFn,
    *,
    batch_axis: int = 0,
    devices: Sequence[jax.Device] | None = None,
    donate: bool = False,
) -> Executor:
    """Split every batch over the local devices with `jax.pmap`.

    The state is one ordinary, un-replicated tree before and after, so the same checkpoint serves
    every executor.

    Args:
        step: a step that reduces over `axis_name`, which is bound to `DATA_AXIS` here.
        batch_axis: axis of the batch's arrays that is split; 1 for `scan_steps`.
        devices: by default all local devices.
        donate: as for `jit_step`.

    Returns:
        An executor of the same batches as `jit_step`'s.

    Raises:
        ValueError: a step that takes no `axis_name`; at the call, a batch size that is not
            divisible by the number of devices.
    """
    _require_axis_name(step)
    devices = list(devices) if devices is not None else jax.local_devices()
    mapped = jax.pmap(
        lambda state, batch: step(state, batch, axis_name=DATA_AXIS),
        axis_name=DATA_AXIS,
        in_axes=(None, batch_axis),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=(0,) if donate else (),
    )

    def split(array: Any) -> Any:
        _check_divisible(array.shape[batch_axis], len(devices), "devices")
        before, after = array.shape[:batch_axis], array.shape[batch_axis + 1 :]
        return array.reshape(*before, len(devices), array.shape[batch_axis] // len(devices), *after)

    return _bounded(lambda state, batch: mapped(state, jax.tree.map(split, dict(batch))), devices)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay devices out in a mesh with the one axis `DATA_AXIS`.

    Args:
        devices: by default all devices of all processes.

    Returns:
        A mesh whose axis is Auto: the compiler propagates shardings through the network.
    """
    devices = list(devices) if devices is not None else jax.devices()
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Place a copy of every array of a tree on every device of a mesh.

    Args:
        tree: arrays.
        mesh: of any shape.

    Returns:
        The tree, on the mesh.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def fsdp_sharding(tree: Any, mesh: Mesh, *, min_bytes: int = 4 * 2**20) -> Any:
    """Choose shardings that split large arrays over the data axis (fully sharded data parallel).

    Args:
        tree: a TrainState or any arrays; `jax.eval_shape` results will do.
        mesh: with the axis `DATA_AXIS`.
        min_bytes: smaller arrays stay replicated, because gathering them costs more than it saves.

    Returns:
        A tree of shardings: the largest divisible axis of each large array is split.

    References:
        Zhao et al., 2023, arXiv:2304.11277; the rule on axes follows common practice.
    """
    num_devices = mesh.shape[DATA_AXIS]

    def choose(leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % num_devices == 0]
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) and divisible:
            num_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
            if num_bytes >= min_bytes:
                spec[max(divisible, key=lambda axis: leaf.shape[axis])] = DATA_AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(choose, tree)


def sharded_step(
    step: StepFn,
    mesh: Mesh,
    state_sharding: Any = None,
    *,
    batch_spec: PartitionSpec | None = None,
    donate: bool = False,
) -> Executor:
    """Compile a step for a device mesh; the compiler inserts the collectives.

    Args:
        step: computes with global batches; `axis_name` stays None.
        mesh: from `data_mesh`, or with more axes.
        state_sharding: a sharding per leaf, as from `fsdp_sharding`; None replicates the state.
        batch_spec: how the batch's arrays are split; by default the leading axis over
            `DATA_AXIS`, and `PartitionSpec(None, DATA_AXIS)` for `scan_steps`.
        donate: as for `jit_step`.

    Returns:
        An executor of the same batches as `jit_step`'s.

    Raises:
        ValueError: at the call, a batch size that is not divisible by the devices of its axis.
    """
    spec = PartitionSpec(DATA_AXIS) if batch_spec is None else batch_spec
    everywhere = NamedSharding(mesh, PartitionSpec())
    state_sharding = everywhere if state_sharding is None else state_sharding
    compiled = jax.jit(
        lambda state, batch: step(state, batch),
        in_shardings=(state_sharding, NamedSharding(mesh, spec)),
        out_shardings=(state_sharding, everywhere),
        donate_argnums=(0,) if donate else (),
    )

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        for array in jax.tree.leaves(dict(batch)):
            for size, names in zip(array.shape, spec, strict=False):
                names = (names,) if isinstance(names, str) else names or ()
                _check_divisible(size, math.prod(mesh.shape[name] for name in names), "devices")
        return compiled(state, dict(batch))

    return _bounded(run, mesh.devices.flat)


def _bounded(executor: Executor, devices: Iterable[jax.Device]) -> Executor:
    """Keep one call in flight where the devices share the threads of one CPU.

    Programs with collectives that are queued behind each other on fake CPU devices take each
    other's threads, and then wait for each other for ever. Accelerators queue calls freely.
    """
    devices = list(devices)
    if len(devices) == 1 or devices[0].platform != "cpu":
        return executor
    return lambda state, batch: jax.block_until_ready(executor(state, batch))


def _call(
    step: Callable[..., Any], state: TrainState, batch: Batch, axis_name: str | None
) -> tuple[TrainState, Metrics]:
    # A user's own step needs no axis_name as long as no executor splits its batch.
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
