"""An executor of populations that times several strategies once and uses the fastest."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import jax
import jax.numpy as jnp

from jaxnets.core import Batch, Executor, Metrics, StepFn, TrainState
from jaxnets.host import usable_cores
from jaxnets.storage import read_json, write_json
from jaxnets.training.executors import (
    check_on_non_finite,
    jit_step,
    map_members,
    member_step,
    newest_step,
    population_step,
)
from jaxnets.training.held_arrays import split_arrays

#: How the members of a population are computed: vectorized, sequentially inside one program,
#: with one call per member, or in threads with one group of members per core.
PopulationStrategy: TypeAlias = Literal["vmap", "map", "members", "threads"]
_STRATEGIES: tuple[PopulationStrategy, ...] = get_args(PopulationStrategy)

# Timed calls per strategy; the minimum counts, because other load only makes a call longer.
_TIMED_CALLS = 3


class PopulationExecutor:
    """Run a step for every member of a population with the fastest strategy.

    Which strategy is fastest depends on network, batch and device. The first call compiles all of
    them and times them in turns on copies of the state, which needs the memory of one more state;
    later calls use the fastest one. The results are equal up to rounding. A run that has to resume
    bit for bit must use the same strategy again: give `remember` or `strategy`.

    On CPU the program of a small network uses one core. "threads" trains one group of members on
    each core. It is worth it if a call takes long compared with splitting the state into groups:
    put several steps into a call, `scan_steps(step)`.

    Args:
        step: a step of one member, or `scan_steps` of one.
        shared_batch: all members get the same batch; otherwise the batch has a leading member
            axis.
        strategy: "vmap" and "map" are those of `population_step`: vectorized, and sequential
            inside one program. "members" calls one program once per member. "threads" runs one
            group of members on each core, sequential within the group. None measures all of them,
            "threads" only on CPU.
        remember: JSON file with the chosen strategy and the times of all of them; read if it
            exists, otherwise written by the first call.
        on_non_finite: "stop" or "freeze", as for `population_step`.
        donate: donate the buffers of the input state, which the caller cannot use afterwards.

    Attributes:
        strategy: the strategy in use; None before the first call.
        milliseconds: the time of a call with each strategy, {} if none was measured.

    Raises:
        ValueError: `strategy` or `on_non_finite` is unknown, or the file names no strategy.

    Example:
        >>> import optax
        >>> from jaxnets import MLP, Update, classification, create_train_state, make_train_step
        >>> module = MLP(features=(4,), num_outputs=2)
        >>> batch = {"inputs": jnp.ones((4, 3)), "labels": jnp.ones(4, int)}
        >>> update = Update(classification(module), optax.sgd(0.1))
        >>> def create(seed):
        ...     key = jax.random.key(seed)
        ...     return create_train_state(module.init(key, batch["inputs"]), update, rng=key)
        >>> executor = PopulationExecutor(make_train_step(update))
        >>> states = jax.jit(jax.vmap(create))(jnp.arange(3))
        >>> states, metrics = executor(states, batch)
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
        on_non_finite: Literal["stop", "freeze"] = "stop",
        donate: bool = False,
    ) -> None:
        check_on_non_finite(on_non_finite)
        self.milliseconds: dict[PopulationStrategy, float] = {}
        self._remember = None if remember is None else Path(remember)
        self._make = functools.partial(
            _compile, step, shared_batch=shared_batch, on_non_finite=on_non_finite, donate=donate
        )
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
        """Train every member for a step.

        The first call measures the strategies, unless one is given or remembered.

        Args:
            states: of all members, with a leading axis.
            batch: arrays [batch, ...], or [members, batch, ...] without `shared_batch`.

        Returns:
            The states after the step and its metrics, with a leading axis of members.
        """
        if self._run is None:
            self._run = self._make(self.strategy) if self.strategy else self._fastest(states, batch)
        return self._run(states, batch)

    def _fastest(self, states: TrainState, batch: Batch) -> Executor:
        """Time all strategies, set `strategy` to the fastest, and return its executor."""
        executors = {strategy: self._make(strategy) for strategy in _candidates(states)}
        seconds: dict[PopulationStrategy, list[float]] = {strategy: [] for strategy in executors}
        # In turns, so that other load on the machine affects all of them. The first turn compiles.
        for turn in range(1 + _TIMED_CALLS):
            for strategy, run in executors.items():
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
            write_json(self._remember, content)
        return executors[fastest]


def _candidates(states: TrainState) -> Sequence[PopulationStrategy]:
    leaf = jax.tree.leaves(states)[0]
    on_cpu = {device.platform for device in leaf.devices()} == {"cpu"}
    worth_it = on_cpu and min(len(leaf), usable_cores()) > 1
    return [strategy for strategy in _STRATEGIES if strategy != "threads" or worth_it]


class _Remembered(TypedDict):
    strategy: PopulationStrategy


def _read(path: Path) -> PopulationStrategy:
    document = read_json(
        path,
        what="the strategy of a population",
        remedy=(
            "delete it to measure again, or rename its entry loop to strategy to go on with the "
            "same one"
        ),
    )
    return document.check(_Remembered)["strategy"]


def _compile(
    step: StepFn,
    strategy: str,
    *,
    shared_batch: bool,
    on_non_finite: Literal["stop", "freeze"],
    donate: bool,
) -> Executor:
    if strategy in ("members", "threads"):
        make = _one_call_per_member if strategy == "members" else _groups_in_threads
        return make(step, shared_batch=shared_batch, on_non_finite=on_non_finite, donate=donate)
    in_one_program: dict[str, Literal["vmap", "map"]] = {"vmap": "vmap", "map": "map"}
    population = population_step(
        step,
        shared_batch=shared_batch,
        strategy=in_one_program[strategy],
        on_non_finite=on_non_finite,
    )
    return jit_step(population, donate=donate)


def _one_call_per_member(
    step: StepFn, *, shared_batch: bool, on_non_finite: str, donate: bool
) -> Executor:
    held, with_arrays = split_arrays(step)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def advance(
        states: TrainState,
        held: Sequence[Any],
        batch: Batch,
        index: jax.Array,
        newest: jax.Array | None,
    ) -> tuple[TrainState, Metrics]:
        own = batch if shared_batch else _member(dict(batch), index)
        after, metrics = member_step(with_arrays(held), newest)(_member(states, index), own)
        # The states are donated, so only the row of this member is written.
        return jax.tree.map(lambda all, new: all.at[index].set(new), states, after), metrics

    stack = jax.jit(lambda rows: jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))

    def run(states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        newest = newest_step(states, on_non_finite)
        states = states if donate else _copied(states)
        rows = []
        for index in range(len(jax.tree.leaves(states)[0])):
            states, metrics = advance(states, held, batch, jnp.int32(index), newest)
            rows.append(metrics)
        return states, stack(rows)

    return run


def _groups_in_threads(
    step: StepFn, *, shared_batch: bool, on_non_finite: str, donate: bool
) -> Executor:
    held, with_arrays = split_arrays(step)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def group_step(
        states: TrainState, batch: Batch, newest: jax.Array | None, held: Sequence[Any]
    ) -> tuple[TrainState, Metrics]:
        member = member_step(with_arrays(held), newest)
        return map_members(member, states, batch, shared_batch=shared_batch)

    cores = usable_cores()
    workers = ThreadPoolExecutor(cores, thread_name_prefix="population")
    programs: dict[Any, Callable[..., tuple[TrainState, Metrics]]] = {}

    def program(*arguments: Any) -> Callable[..., tuple[TrainState, Metrics]]:
        # Compiled in the caller's thread, because JAX's context managers are local to a thread.
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, *map(jax.typeof, leaves)
        if key not in programs:
            programs[key] = group_step.lower(*arguments).compile()
        return programs[key]

    def run(states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch, newest = jax.device_put(dict(batch)), newest_step(states, on_non_finite)
        bounds = _bounds(len(jax.tree.leaves(states)[0]), cores)
        groups = _split(states, bounds)
        batches = [batch] * len(groups) if shared_batch else _split(batch, bounds)
        same = [newest] * len(groups), [held] * len(groups)
        advances = list(map(program, groups, batches, *same))
        if donate:
            jax.block_until_ready(groups)
            for leaf in jax.tree.leaves(states):
                leaf.delete()
        done = workers.map(
            lambda advance, *group: jax.block_until_ready(advance(*group)),
            *(advances, groups, batches, *same),
        )
        return _joined(list(done))

    return run


def _bounds(num_members: int, num_groups: int) -> tuple[int, ...]:
    """Return the first member of each group, and the end; group sizes differ by one at most."""
    groups = min(num_members, num_groups)
    return tuple(num_members * index // groups for index in range(groups + 1))


@functools.partial(jax.jit, static_argnums=1)
def _split(tree: Any, bounds: tuple[int, ...]) -> list[Any]:
    # Copies, because a single group would alias the states, and the groups are donated.
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
