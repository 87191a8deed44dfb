"""The training loop: calls a step, hands what it measured to hooks, rows and writers.

`fit` cannot tell executors apart: one step or many in a call, one network or a population, one
device or several. It never waits for the device in order to log: what a call measured is queued
on the device and fetched a log interval later. Only hooks that read the state wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import Batch, BatchSource, Mean, Metrics, tree_path
from jaxnets.training.history import History, NonFiniteError, Writer
from jaxnets.training.progress import ProgressBar

State = TypeVar("State", bound=Any)


class StopTraining(Exception):
    """Raised by a hook to end `fit` normally after this call of the step."""


class Interrupted(StopTraining):
    """Raised by a hook to leave `fit` for an outer reason: the run is not over and can go on."""


class Hook(Protocol):
    """Called after every call of the step, in the order given.

    `metrics` holds the call's Means beside what the hooks before returned at this step; what the
    hook returns is merged into the row of the step: numbers, or one for every member; a `Image`
    or a `Histogram` goes to the writers that show it and into no row. A hook may also have

        start(history, step)           before the first call; `StopTraining` here ends `fit`
        commit(step, state, *, last)   when the step's row is in the history; `last`: fit ends
        close()                        at the end, after an error too
    """

    def __call__(
        self, step: int, state: Any, metrics: Mapping[str, Any]
    ) -> Mapping[str, Any] | None: ...


def fit(
    step: Callable[[State, Batch], tuple[State, Metrics]],
    state: State,
    batches: BatchSource,
    *,
    num_steps: int,
    hooks: Sequence[Hook] = (),
    writers: Sequence[Writer] = (),
    log_every: int = 100,
    history: History | None = None,
    progress: bool | None = None,
) -> tuple[State, History]:
    """Train until `state.step` is `num_steps`.

    Args:
        step: any executor's step, `(state, batch) -> (state, metrics)`.
        state: `TrainState` (or any pytree with `step`) to start from; where a population trains,
            `step` and all metrics have a leading member axis.
        batches: called with the first step. A source whose batches hold several steps on a
            leading axis says how many in its attribute `steps_per_batch`; its last batch is
            trimmed to end at `num_steps`, which compiles the step once more.
        num_steps: absolute: a finished run, run again, does nothing.
        hooks: see `Hook`.
        writers: called with every row, in step order, when it is complete, and with what hooks
            drew, if they have a `show`; of several processes only the first one writes.
        log_every: steps between rows of training metrics; the last step always has one.
        history: of the run that `state` was restored from, continued in place.
        progress: show a progress line on standard error; None shows it in a terminal only.

    Returns:
        State after the last step, and the history.

    Raises:
        NonFiniteError: a metric is NaN or infinite; the rows before it are written.
        ValueError: the source ends early, or a call makes another number of steps than a batch
            of the source holds, or `history` is not that of `state`.
    """
    first = current_step(state)
    writers = writers if jax.process_index() == 0 else ()
    history = History() if history is None else history
    history.begin(first, writers)
    if first >= num_steps:
        return state, history
    with contextlib.ExitStack() as stack:
        parts: list[Any] = [*hooks, *writers]
        try:
            for part in parts:
                getattr(part, "start", _nothing)(history, first)
                stack.callback(getattr(part, "close", _nothing))
        except StopTraining as stop:
            history.stopped = str(stop)
            return state, history
        source = batches(first)
        stack.callback(getattr(source, "close", _nothing))
        size = getattr(batches, "steps_per_batch", 1)
        bar = stack.enter_context(ProgressBar(num_steps, progress))
        bar.compiling(history.first_call_seconds)
        now = logged = first
        began, earlier = time.perf_counter(), history.seconds
        while now < num_steps and history.stopped is None:
            with history.spending("batches") if now > first else contextlib.nullcontext():
                batch = next(source, None)
            if batch is None:
                raise ValueError(
                    f"the batch source ended at step {now} of {num_steps}; give one that repeats, "
                    "or fewer steps"
                )
            previous, now = now, min(now + size, num_steps)
            if now - previous < size:
                batch = _first_steps(batch, now - previous)
                bar.compiling_rest(now - previous)
            state, metrics = step(state, batch)
            if previous == first:
                _check_advance(current_step(state) - first, now - first)
                history.first_call_seconds = time.perf_counter() - began
                began += history.first_call_seconds
                bar.compiled(history.first_call_seconds)
            history.seconds = earlier + time.perf_counter() - began
            try:
                values = _run_hooks(hooks, now, state, metrics, history)
                complete = now == num_steps or (history.stopped and not history.interrupted)
                cut = complete or now // log_every > previous // log_every
                rank = np.ndim(state.step)
                numbers = {k: mean for k, mean in metrics.items() if np.ndim(mean.total) == rank}
                history.append(previous, now, numbers, values, cut=cut)
                if cut:
                    # Older than a log interval: the device has them ready, nothing waits.
                    history.settle(until=logged)
                    logged = now
                last = now == num_steps or history.stopped is not None
                for hook in hooks:
                    getattr(hook, "commit", _nothing)(now, state, last=last)
                if last:
                    history.flush()
                bar.update(now, _num_examples(batch, size), history if cut else None)
            except NonFiniteError as error:
                error.parameter = error.parameter or first_nonfinite(state.params)
                raise
        history.seconds = earlier + time.perf_counter() - began
    return state, history


def evaluate(
    eval_step: Callable[[Any, Batch], Metrics],
    state: Any,
    batches: BatchSource | Iterable[Batch],
) -> dict[str, Any]:
    """Measure a state over all batches, exactly: padding and uneven batches do not matter.

    Totals and counts are added in float64 on the host after one transfer at the end.

    Args:
        eval_step: `(state, batch) -> metrics`.
        state: state to measure; in a population `state.step` and all metrics have a member axis.
        batches: a source that ends after one pass (it is called with 0), or the batches.

    Returns:
        {name: mean}: a float, a list with one per member, or an array where the total is one
        (a confusion matrix, say).

    Raises:
        ValueError: there is no batch.

    Example:
        >>> import types
        >>> state = types.SimpleNamespace(step=0, scale=2.0)
        >>> double = lambda state, batch: {"mean": Mean.of(state.scale * batch["inputs"])}
        >>> evaluate(double, state, [{"inputs": jnp.ones(3)}, {"inputs": jnp.full(1, 5.0)}])
        {'mean': 4.0}
    """
    measured = [eval_step(state, b) for b in (batches(0) if callable(batches) else batches)]
    if not measured:
        raise ValueError("no batches to evaluate; give a source or a list, not a used iterator")
    rank = np.ndim(state.step)
    result = {}
    for name in measured[0]:
        sums = jax.tree.map(
            lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0),
            *jax.device_get([metrics[name] for metrics in measured]),
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = _divide(sums)
        result[name] = mean.tolist() if mean.ndim == rank else mean
    return result


def current_step(state: Any) -> int:
    """Return `state.step`, the one that all members of a population share.

    Raises:
        ValueError: the members are at different steps.
    """
    steps = np.unique(np.asarray(state.step))
    if steps.size != 1:
        raise ValueError(f"members are at different steps {steps.tolist()}; train them apart")
    return int(steps[0])


def first_nonfinite(tree: Any) -> str | None:
    """Return the path of the first leaf that holds NaN or infinity, None if none does."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    finite = jax.device_get(_all_finite([leaf for _, leaf in pairs]))
    return next(
        (tree_path(path) for (path, _), ok in zip(pairs, finite, strict=True) if not ok), None
    )


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [
        jnp.all(jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.array(True)
        for leaf in leaves
    ]


def _divide(sums: Mean) -> Any:
    count = np.reshape(
        sums.count, np.shape(sums.count) + (1,) * (sums.total.ndim - sums.count.ndim)
    )
    return sums.total / count


def _nothing(*args: Any, **keywords: Any) -> None:
    """Stand in for an optional method."""


def _run_hooks(
    hooks: Sequence[Hook], step: int, state: Any, metrics: Metrics, history: History
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for hook in hooks:
        try:
            returned = hook(step, state, {**metrics, **values}) or {}
        except StopTraining as stop:
            # The hooks after it still see this step.
            history.stopped = str(stop)
            history.interrupted = isinstance(stop, Interrupted)
            continue
        known = sorted(set(returned) & (set(metrics) | set(values) | {"step"}))
        if known:
            raise ValueError(f"a hook returned {known}, which is measured already; add a prefix")
        values |= returned
    return values


def _check_advance(made: int, expected: int) -> None:
    if made != expected:
        raise ValueError(
            f"one call of the step made {made} steps where the source gives {expected} in a batch; "
            "use scan_steps with data.chunked, or neither"
        )


def _first_steps(batch: Batch, count: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[:count], batch)


def _num_examples(batch: Batch, steps_per_batch: int) -> int:
    for name in ("weights", "indices"):
        if name in batch:
            return int(np.size(batch[name]))
    leaf = jax.tree.leaves(batch)[0]
    return int(np.prod(np.shape(leaf)[: 1 if steps_per_batch == 1 else 2]))
