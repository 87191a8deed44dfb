"""An executor of populations that takes the fastest way, found by measuring once."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxnets.core import Batch, Executor, Metrics, StepFn, TrainState
from jaxnets.parallel import jit_step, population_step

#: How the members of a population are computed: side by side, one after the other inside one
#: program, or each by a call of one program.
PopulationLoop: TypeAlias = Literal["vmap", "map", "members"]
_WAYS: tuple[PopulationLoop, ...] = get_args(PopulationLoop)

# Calls that are timed for each way; the shortest one counts, because other work only lengthens.
_TIMED_CALLS = 3


class PopulationExecutor:
    """Run one step of every member of a population, in the way that is fastest here.

    Which way that is depends on network, batch and device. The first call therefore compiles all
    three and times each on a copy of the state, which costs as much memory as one more state; all
    later calls take the fastest one. The three compute the same up to rounding. A run that is to
    resume bit for bit has to go on in the same way: give `remember`, or tell `loop`.

    Args:
        step: a step of one member; `scan_steps` of one will do too.
        shared_batch: every member sees the same batch; otherwise the batch has a leading member
            axis.
        loop: "vmap" computes the members side by side, "map" one after the other inside one
            program, "members" each by a call of its own; None measures.
        remember: JSON file with the way that was found and the times of all; read where it
            exists, else written by the first call.
        donate: reuse the memory of the state that is passed in, which is then gone for the caller.

    Attributes:
        loop: the way that is taken; None before the first call.
        milliseconds: the time of a call in each way, {} where nothing was measured.

    Raises:
        ValueError: an unknown `loop`, or a file that does not hold one.

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
        >>> executor.loop == min(executor.milliseconds, key=executor.milliseconds.get)
        True
    """

    def __init__(
        self,
        step: StepFn,
        *,
        shared_batch: bool = True,
        loop: PopulationLoop | None = None,
        remember: str | os.PathLike[str] | None = None,
        donate: bool = False,
    ) -> None:
        self.milliseconds: dict[PopulationLoop, float] = {}
        self._remember = None if remember is None else Path(remember)
        self._make = functools.partial(_compile, step, shared_batch=shared_batch, donate=donate)
        self._run: Executor | None = None
        if loop is None and self._remember is not None and self._remember.exists():
            loop = _read(self._remember)
        if loop is not None and loop not in _WAYS:
            raise ValueError(
                f"loop is {loop!r}; choose 'vmap', 'map' or 'members', or None to measure"
            )
        self.loop: PopulationLoop | None = loop

    def __call__(self, states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Return the states after the step and its metrics, all with a leading member axis."""
        if self._run is None:
            self.loop = self.loop or self._measure(states, batch)
            self._run = self._make(self.loop)
        return self._run(states, batch)

    def _measure(self, states: TrainState, batch: Batch) -> PopulationLoop:
        for loop in _WAYS:
            run = self._make(loop)
            now, _ = jax.block_until_ready(run(_copied(states), batch))  # compiles
            seconds = []
            for _ in range(_TIMED_CALLS):
                began = time.perf_counter()
                now, _ = jax.block_until_ready(run(now, batch))
                seconds.append(time.perf_counter() - began)
            self.milliseconds[loop] = round(1000 * min(seconds), 4)
        fastest = min(_WAYS, key=self.milliseconds.__getitem__)
        if self._remember is not None:
            content = {"loop": fastest, "milliseconds": self.milliseconds}
            unfinished = self._remember.with_name(f".{self._remember.name}.{os.getpid()}")
            unfinished.write_text(json.dumps(content))
            unfinished.replace(self._remember)
        return fastest


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())["loop"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the way to run a population ({error!r}); delete it to measure "
            "again"
        ) from error


def _compile(step: StepFn, loop: str, *, shared_batch: bool, donate: bool) -> Executor:
    if loop == "members":
        return _member_by_member(step, shared_batch=shared_batch, donate=donate)
    ways: dict[str, Literal["vmap", "map"]] = {"vmap": "vmap", "map": "map"}
    return jit_step(
        population_step(step, shared_batch=shared_batch, loop=ways[loop]), donate=donate
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


def _member(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


_copied: Callable[[TrainState], TrainState] = jax.jit(lambda states: jax.tree.map(jnp.copy, states))
