"""An executor of populations that takes the fastest way, found by measuring once."""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxnets.core import Batch, Executor, Metrics, StepFn, TrainState
from jaxnets.host import usable_cores
from jaxnets.training.executors import jit_step, population_step

#: How the members of a population are computed: side by side, one after the other inside one
#: program, each by a call of one program, or in one group for each core, in threads.
PopulationStrategy: TypeAlias = Literal["vmap", "map", "members", "threads"]
_STRATEGIES: tuple[PopulationStrategy, ...] = get_args(PopulationStrategy)

# Calls that are timed for each way; the shortest one counts, because other work only lengthens.
_TIMED_CALLS = 3


class PopulationExecutor:
    """Run one step of every member of a population, in the way that is fastest here.

    Which way that is depends on network, batch and device. The first call therefore compiles all
    of them and times them in turns on copies of the state, which costs as much memory as one more
    state; later calls take the fastest one. They compute the same up to rounding. A run that is to
    resume bit for bit has to go on in the same way: give `remember`, or tell `strategy`.

    On CPU the program of a small network keeps one core busy. "threads" then trains one group of
    members on each core, and pays where a call is long against handing out the members: make it of
    several steps, `scan_steps(step)`.

    Args:
        step: a step of one member; `scan_steps` of one will do too.
        shared_batch: every member sees the same batch; otherwise the batch has a leading member
            axis.
        strategy: "vmap" computes the members side by side, "map" one after the other inside one
            program, "members" each by a call of its own, "threads" one group for each core, and
            its members one after the other; None measures, threads on CPU only.
        remember: JSON file with the way that was found and the times of all; read where it
            exists, else written by the first call.
        donate: reuse the memory of the state that is passed in, which is then gone for the caller.

    Attributes:
        strategy: the way that is taken; None before the first call.
        milliseconds: the time of a call in each way, {} where nothing was measured.

    Raises:
        ValueError: an unknown `strategy`, or a file that does not hold one.

    Example:
        >>> import optax
        >>> from jaxnets import MLP, Update, classification, create_train_state, make_train_step
        >>> module = MLP(num_outputs=2)
        >>> batch = {"inputs": jnp.ones((4, 3)), "labels": jnp.ones(4, int)}
        >>> update = Update(classification(module), optax.sgd(0.1))
        >>> def create(seed):
        ...     key = jax.random.key(seed)
        ...     return create_train_state(module.init(key, batch["inputs"]), update, rng=key)
        >>> executor = PopulationExecutor(make_train_step(update))
        >>> states, metrics = executor(jax.vmap(create)(jnp.arange(3)), batch)
        >>> executor.strategy == min(executor.milliseconds, key=executor.milliseconds.get)
        True
    """

    def __init__(
        self,
        step: StepFn,
        *,
        shared_batch: bool = True,
        strategy: PopulationStrategy | None = None,
        remember: str | os.PathLike[str] | None = None,
        donate: bool = False,
    ) -> None:
        self.milliseconds: dict[PopulationStrategy, float] = {}
        self._remember = None if remember is None else Path(remember)
        self._make = functools.partial(_compile, step, shared_batch=shared_batch, donate=donate)
        self._run: Executor | None = None
        if strategy is None and self._remember is not None and self._remember.exists():
            strategy = _read(self._remember)
        if strategy is not None and strategy not in _STRATEGIES:
            raise ValueError(
                f"strategy is {strategy!r}; choose 'vmap', 'map', 'members' or 'threads', or "
                "None to measure"
            )
        self.strategy: PopulationStrategy | None = strategy

    def __call__(self, states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Return the states after the step and its metrics, all with a leading member axis."""
        if self._run is None:
            self._run = self._make(self.strategy) if self.strategy else self._fastest(states, batch)
        return self._run(states, batch)

    def _fastest(self, states: TrainState, batch: Batch) -> Executor:
        """Find `strategy`, and return what runs it."""
        ways = {strategy: self._make(strategy) for strategy in _candidates(states)}
        seconds: dict[PopulationStrategy, list[float]] = {strategy: [] for strategy in ways}
        # In turns, so that a moment in which the machine is busy slows all of them. The first
        # round compiles.
        for turn in range(1 + _TIMED_CALLS):
            for strategy, run in ways.items():
                own = jax.block_until_ready(_copied(states))
                began = time.perf_counter()
                jax.block_until_ready(run(own, batch))
                if turn > 0:
                    seconds[strategy].append(time.perf_counter() - began)
        self.milliseconds = {
            strategy: round(1000 * min(each), 4) for strategy, each in seconds.items()
        }
        self.strategy = fastest = min(self.milliseconds, key=self.milliseconds.__getitem__)
        if self._remember is not None:
            content = {"strategy": fastest, "milliseconds": self.milliseconds}
            unfinished = self._remember.with_name(f".{self._remember.name}.{os.getpid()}")
            unfinished.write_text(json.dumps(content))
            unfinished.replace(self._remember)
        return ways[fastest]


def _candidates(states: TrainState) -> Sequence[PopulationStrategy]:
    leaf = jax.tree.leaves(states)[0]
    on_cpu = {device.platform for device in leaf.devices()} == {"cpu"}
    worth_it = on_cpu and min(len(leaf), usable_cores()) > 1
    return [way for way in _STRATEGIES if way != "threads" or worth_it]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())["strategy"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the way to run a population ({error!r}); delete it to measure "
            "again"
        ) from error


def _compile(step: StepFn, strategy: str, *, shared_batch: bool, donate: bool) -> Executor:
    if strategy == "members":
        return _member_by_member(step, shared_batch=shared_batch, donate=donate)
    if strategy == "threads":
        return _groups_in_threads(step, shared_batch=shared_batch, donate=donate)
    ways: dict[str, Literal["vmap", "map"]] = {"vmap": "vmap", "map": "map"}
    return jit_step(
        population_step(step, shared_batch=shared_batch, strategy=ways[strategy]), donate=donate
    )


def _member_by_member(step: StepFn, *, shared_batch: bool, donate: bool) -> Executor:
    @functools.partial(jax.jit, donate_argnums=(0,))
    def advance(states: TrainState, batch: Batch, index: jax.Array) -> tuple[TrainState, Metrics]:
        own = batch if shared_batch else _member(dict(batch), index)
        after, metrics = step(_member(states, index), own)
        # The memory of the states is reused: only the row of the member is written.
        return jax.tree.map(lambda all, new: all.at[index].set(new), states, after), metrics

    stack = jax.jit(lambda rows: jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))

    def run(states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        states = states if donate else _copied(states)
        rows = []
        for index in range(len(jax.tree.leaves(states)[0])):
            states, metrics = advance(states, batch, jnp.int32(index))
            rows.append(metrics)
        return states, stack(rows)

    return run


def _groups_in_threads(step: StepFn, *, shared_batch: bool, donate: bool) -> Executor:
    population = population_step(step, shared_batch=shared_batch, strategy="map")
    together, cores = jax.jit(population, donate_argnums=(0,)), usable_cores()
    workers = ThreadPoolExecutor(cores, thread_name_prefix="population")
    programs: dict[Any, Executor] = {}

    def program(states: TrainState, batch: Batch) -> Executor:
        # Compiled here: what JAX is told by a context manager holds for one thread only.
        leaves, structure = jax.tree.flatten((states, batch))
        key = structure, *map(jax.typeof, leaves)
        if key not in programs:
            programs[key] = together.lower(states, batch).compile()
        return programs[key]

    def run(states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = jax.device_put(dict(batch))
        bounds = _bounds(len(jax.tree.leaves(states)[0]), cores)
        groups = _split(states, bounds)
        batches = [batch] * len(groups) if shared_batch else _split(batch, bounds)
        advances = list(map(program, groups, batches))
        if donate:
            jax.block_until_ready(groups)
            for leaf in jax.tree.leaves(states):
                leaf.delete()
        done = workers.map(
            lambda advance, *group: jax.block_until_ready(advance(*group)),
            *(advances, groups, batches),
        )
        return _joined(list(done))

    return run


def _bounds(num_members: int, num_groups: int) -> tuple[int, ...]:
    """Return where each group begins, and where the last one ends: sizes differ by one at most."""
    groups = min(num_members, num_groups)
    return tuple(num_members * index // groups for index in range(groups + 1))


@functools.partial(jax.jit, static_argnums=1)
def _split(tree: Any, bounds: tuple[int, ...]) -> list[Any]:
    # Copies, because a single group would be the states themselves, whose memory is reused.
    return [
        jax.tree.map(lambda leaf, first=first, end=end: jnp.copy(leaf[first:end]), tree)
        for first, end in itertools.pairwise(bounds)
    ]


@jax.jit
def _joined(groups: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups)


def _member(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


_copied: Callable[[TrainState], TrainState] = jax.jit(lambda states: jax.tree.map(jnp.copy, states))
