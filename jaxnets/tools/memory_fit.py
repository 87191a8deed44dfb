"""How much memory a training step needs on each device of a mesh, read from the compiled program.

Nothing is allocated. Collectives are read from the text of the program, those of a loop as often as
it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxnets.checks import check_sizes
from jaxnets.core import Update
from jaxnets.models.registry import MODELS
from jaxnets.models.sharding import sharding_rules
from jaxnets.tools.summary import Memory, look_up, memory_of
from jaxnets.training.optimizers import OPTIMIZERS
from jaxnets.training.sharding import batch_partition, describe_sharding, mesh_axes, state_sharding
from jaxnets.training.step import create_train_state, make_train_step

_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_COLLECTIVES})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind in a program.

    Attributes:
        count: how often they run in one call.
        result_bytes: of their results on one device, in all.
    """

    count: int
    result_bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryFit:
    """Memory of a training step on one device of a mesh; prints as a table.

    Attributes:
        model: name of the architecture.
        mesh: {axis: number of devices}.
        batch_size: examples of the whole batch.
        num_parameters: elements of the whole network.
        parameter_bytes: on one device.
        optimizer_bytes: on one device.
        step: memory of the compiled step: its arguments are the state and a part of the batch, its
            temporaries the activations, gradients and gathered parameters.
        collectives: {operation: `Collective`} of one step.
        largest_batch: the largest multiple of the batch's parts that fits in the budget; 0 if none
            does, None without a budget.
    """

    model: str
    mesh: dict[str, int]
    batch_size: int
    num_parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    step: Memory
    collectives: dict[str, Collective]
    largest_batch: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, with the bytes at the peak beside the fields."""
        return {**dataclasses.asdict(self), "peak_bytes": self.step.peak_bytes}

    def __str__(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1)
        rows = [
            ("model", f"{self.model}, {self.num_parameters:,} parameters"),
            ("mesh", axes or "one device"),
            ("batch", f"{self.batch_size} examples"),
            ("parameters", _mebibytes(self.parameter_bytes)),
            ("optimizer", _mebibytes(self.optimizer_bytes)),
            ("activations and gradients", _mebibytes(self.step.temporary_bytes)),
            ("peak", _mebibytes(self.step.peak_bytes)),
        ]
        rows += [
            (name, f"{each.count} a step, {_mebibytes(each.result_bytes)}")
            for name, each in self.collectives.items()
        ]
        if self.largest_batch is not None:
            rows.append(("largest batch", f"{self.largest_batch} examples"))
        rows.append(("compiled in", f"{self.step.compile_seconds:.1f} s"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def fit_memory(
    name: str,
    mesh: Mesh,
    *,
    batch_size: int = 32,
    input_shape: tuple[int, ...] | None = None,
    num_outputs: int | None = None,
    optimizer: str = "adamw",
    budget_bytes: int | None = None,
    **fields: Any,
) -> MemoryFit:
    """Compile the usual training step of an architecture on a mesh, and read what it needs.

    The state is split by `sharding_rules` of its family. Numbers are those of the compiler for the
    platform of the mesh: XLA for CPU orders a program for speed, so its temporaries are an upper
    bound for accelerators, which order it for memory.

    Args:
        name: key of `models.registry.MODELS`.
        mesh: from `device_mesh`.
        batch_size: examples of the whole batch.
        input_shape: of one example; by default the usual one of the model.
        num_outputs: number of classes or tokens; by default the usual one of the model.
        optimizer: key of `training.optimizers.OPTIMIZERS`.
        budget_bytes: memory of one device: also search the largest batch that fits, which compiles
            the step several times.
        **fields: of the network, such as `scan_layers=True` or `precision`.

    Returns:
        The memory on one device.

    Raises:
        ValueError: an unknown name, or a batch that the mesh does not divide.

    Example:
        >>> from jaxnets.training.sharding import device_mesh
        >>> fit = fit_memory("lenet5", device_mesh(devices=jax.devices()[:1]), batch_size=8)
        >>> fit.parameter_bytes, fit.optimizer_bytes, fit.collectives
        (246824, 493652, {})
    """
    model = look_up(MODELS, name, "model")
    make_optimizer = look_up(OPTIMIZERS, optimizer, "optimizer")
    input_shape = model.input_shape if input_shape is None else tuple(input_shape)
    check_sizes(input_shape=input_shape, batch_size=batch_size)
    module, task = model.network(num_outputs, **fields), model.task
    update = Update(task.objective(module), make_optimizer(1e-3))
    spec = batch_partition(mesh)
    parts = math.prod(mesh.shape[axis] for axis in mesh_axes(spec[0]))
    if batch_size % parts:
        raise ValueError(
            f"batch size {batch_size} is not divisible by the {parts} parts of the mesh; give a "
            f"multiple, such as {batch_size + parts - batch_size % parts}"
        )
    key = jax.eval_shape(lambda: jax.random.key(0))

    def create(key: jax.Array, *inputs: Any) -> Any:
        rngs = dict.fromkeys(("params", "latent", "mask"), key)
        return create_train_state(module.init(rngs, *inputs), update, rng=key)

    one = task.batch(1, input_shape)
    state = jax.eval_shape(create, key, *(one[entry] for entry in task.inputs))
    family = type(module).__module__.split(".")[2]
    shardings = state_sharding(state, mesh, sharding_rules(family))
    compiled: dict[int, tuple[Any, Memory]] = {}

    def compile_for(batch_size: int) -> tuple[Any, Memory]:
        if batch_size not in compiled:
            batch = task.batch(batch_size, input_shape)
            step = jax.jit(
                lambda state, batch: make_train_step(update)(state, batch),
                in_shardings=(shardings, NamedSharding(mesh, spec)),
                out_shardings=(shardings, None),
                donate_argnums=(0,),
            )
            with jax.set_mesh(mesh):
                compiled[batch_size] = memory_of(step, state, batch)
        return compiled[batch_size]

    program, memory = compile_for(batch_size)
    largest = None
    if budget_bytes is not None:
        largest = parts * _largest(
            lambda count: compile_for(count * parts)[1].peak_bytes,
            budget_bytes,
            batch_size // parts,
        )
    return MemoryFit(
        model=name,
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        parameter_bytes=describe_sharding(state.params, shardings.params).device_bytes,
        optimizer_bytes=describe_sharding(state.opt_state, shardings.opt_state).device_bytes,
        step=memory,
        collectives=count_collectives(program.as_text()),
        largest_batch=largest,
    )


def _largest(peak: Callable[[int], int], budget: int, start: int) -> int:
    """Return the largest count whose peak is within a budget, for a peak that grows with it."""
    fits, exceeds, count = 0, None, start
    peaks: dict[int, int] = {}
    while exceeds is None or exceeds - fits > 1:
        peaks[count] = peak(count)
        if peaks[count] <= budget:
            fits = count
        else:
            exceeds = count
        if exceeds is None:
            count = 2 * count
        elif exceeds - fits > 1:
            count = (fits + exceeds) // 2
            if len(peaks) > 1:  # memory is nearly linear in the batch
                (low, at_low), *_, (high, at_high) = sorted(peaks.items())
                slope = max((at_high - at_low) / (high - low), 1e-9)
                count = int(low + (budget - at_low) / slope)
                count = min(max(count, fits + 1), exceeds - 1)
    return fits


def count_collectives(program: str) -> dict[str, Collective]:
    """Count the collectives of a compiled program, those of loops as often as they run.

    Args:
        program: text of the compiled program, `compiled.as_text()`.

    Returns:
        {operation: `Collective`}, such as "all-reduce". A loop whose length XLA does not know
        counts once.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    memo: dict[str, collections.Counter[tuple[str, str]]] = {}

    def cost(name: str) -> collections.Counter[tuple[str, str]]:
        if name not in memo:
            total: collections.Counter[tuple[str, str]] = collections.Counter()
            memo[name] = total
            for line in computations.get(name, ()):
                found = _COLLECTIVE.search(line)
                if found:
                    total[found[2], "count"] += 1
                    total[found[2], "bytes"] += _bytes_of(found[1])
                called = _CALLED.findall(line)
                for branches in _BRANCHES.findall(line):
                    called += [branch.strip(" %") for branch in branches.split(",")]
                trips = _TRIPS.search(line)
                for other in called:
                    for key, value in cost(other).items():
                        total[key] += value * (int(trips[1]) if trips else 1)
        return memo[name]

    total = cost(entry)
    return {
        operation: Collective(total[operation, "count"], total[operation, "bytes"])
        for operation in sorted({operation for operation, _ in total})
    }


def _bytes_of(types: str) -> int:
    """Return the bytes of the arrays in a type such as `(f32[8,4]{1,0}, s32[])`."""
    total = 0
    for kind, bits, sizes in _ARRAY.findall(types):
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        total += elements * (max(int(bits) // 8, 1) if bits else kind == "pred")
    return total


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
