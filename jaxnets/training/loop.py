"""The training loop: calls the step, then hooks and writers with its metrics.

`fit` works with every executor: one step or many in a call, one network or a population, one
device or several. Logging never blocks on the device: the metrics of a call stay queued on the
device and are fetched one log interval later. Only hooks that read the state wait for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_batch, check_sizes, check_source
from jaxnets.core import (
    Batch,
    BatchSource,
    Mean,
    Metrics,
    is_endless,
    known_values,
    steps_per_batch,
    tree_path,
)
from jaxnets.distributed import check_agreement
from jaxnets.training.history import History, NonFiniteError, Writer
from jaxnets.training.nonfinite import class_counts, first_nonfinite, order_of_use
from jaxnets.training.progress import ProgressBar
from jaxnets.training.watched import WatchedValues

State = TypeVar("State", bound=Any)


class StopTraining(Exception):
    """Raised by a hook: `fit` returns normally after this call of the step."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped for an external reason, such as a signal, and can be continued.

    A hook raises it, such as `Checkpointing`, and `fit` returns normally after this call of the
    step. Without such a hook `fit` itself raises it on Ctrl-C, also after this call.

    Args:
        reason: such as "SIGINT at step 12".

    Attributes:
        state: the last state, where `fit` raised it.
        history: the history up to that state; both continue the run.
    """

    def __init__(self, reason: str, *, state: Any = None, history: History | None = None) -> None:
        super().__init__(reason)
        self.state = state
        self.history = history


class Hook(Protocol):
    """A function that `fit` calls after every call of the step; hooks run in the given order.

    `metrics` holds the `Mean`s of the call and the values that earlier hooks returned at this
    step. The values that the hook returns become part of the row of this step: a number, or a
    list with one number per member of a population. An `Image` or a `Histogram` is not stored in
    the row; it goes to the writers that have a `show`. A hook that reads values of earlier hooks
    names them in an attribute `watches`, so that `fit` can report a name that no hook returns. A
    hook may also have these methods:

        start(history, step)           before the first call; `StopTraining` here ends `fit`
        commit(step, state, *, last)   after the row of the step was added to the history;
                                       `last`: this is the last call
        close()                        at the end, also after an error
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
        step: a compiled step from any executor, `(state, batch) -> (state, metrics)`.
        state: `TrainState` (or any pytree with `step`) to start from; in a population `step` and
            all metrics have a leading member axis. Members whose step is behind are frozen, see
            `population_step`; their values in the rows are NaN.
        batches: batch source, called with the first step. With a `ChunkedBatchSource` the last
            batch is cut to end at `num_steps`, and the step is compiled once more for it.
        num_steps: total number of steps of the run, so calling `fit` on a finished run trains
            nothing, and says so in a line on standard error.
        hooks: see `Hook`.
        writers: called with every complete row, in step order; those with a `show` also get the
            images and histograms of hooks. With several processes only process 0 writes.
        log_every: steps between rows of training metrics; the last step always gets a row.
        history: history of the run that `state` was restored from; extended in place.
        progress: show a progress line on standard error, and at the end why the run stopped early;
            None: only if that is a terminal.

    Returns:
        The state after the last step, and the history.

    Raises:
        NonFiniteError: the total of a metric is NaN or infinite, or all members of a population
            are frozen; the rows before it are written.
            A metric whose weights sum to 0 is no error, see `History.rows`.
        Interrupted: Ctrl-C, in the main thread and without `Checkpointing`: the call of the step
            is finished, and the exception has the state and the history, which continue the run.
            A second Ctrl-C raises KeyboardInterrupt at once.
        DistributedError: the processes of a run have other numbers of steps, states or batches.
        ValueError: the source ends early, a call makes a different number of steps than a batch
            holds, `history` does not end at the step of `state`, a hook reads a value that no
            earlier hook returns, `num_steps` is no integer, or `log_every` no positive one.
        TypeError: `batches` is no source, such as a list, or its batches are no dicts.
    """
    check_source(batches)
    check_sizes(log_every=log_every)
    if not isinstance(num_steps, int | np.integer):
        raise ValueError(f"num_steps is {num_steps!r}; give an integer, the last step of the run")
    first, steps_before = current_step(state), np.asarray(state.step)
    writers = writers if jax.process_index() == 0 else ()
    history = History() if history is None else history
    history.begin(first, writers)
    if first >= num_steps:
        if progress is not False and jax.process_index() == 0:
            line = (
                f"fit: the state is at step {first} and num_steps={num_steps} counts from step 0, "
                "so nothing is trained; give a larger num_steps to go on"
            )
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(line, file=sys.stderr)
        return state, history
    check_agreement("the run", {"first step": first, "num_steps": num_steps})
    shapes = jax.tree_util.tree_flatten_with_path(jax.eval_shape(lambda: state))[0]
    check_agreement("the state", {tree_path(path): str(leaf) for path, leaf in shapes})
    watched = WatchedValues(hooks)
    with contextlib.ExitStack() as stack:
        progress = progress if jax.process_index() == 0 else False
        bar = stack.enter_context(ProgressBar(num_steps, progress))
        ctrl_c = stack.enter_context(_CtrlC(state, history))
        parts: list[Any] = [*hooks, *writers]
        try:
            for part in parts:
                getattr(part, "start", _nothing)(history, first)
                stack.callback(getattr(part, "close", _nothing))
        except (StopTraining, Interrupted) as stop:
            history.stopped = str(stop)
            history.interrupted = isinstance(stop, Interrupted)
            bar.stopped(first, str(stop))
            return state, history
        source = iter(batches(first))
        stack.callback(getattr(source, "close", _nothing))
        size = steps_per_batch(batches)
        bar.compiling(history.first_call_seconds)
        now = last_logged = first
        began, earlier = time.perf_counter(), history.seconds
        while now < num_steps and history.stopped is None and not ctrl_c.pressed:
            with history.spending("batches") if now > first else contextlib.nullcontext():
                batch = next(source, None)
            if batch is None:
                raise ValueError(
                    f"the batch source ended at step {now} of {num_steps}; use a source that "
                    "repeats, or fewer steps"
                )
            if now == first:
                check_batch(batch)
                check_agreement("the first batch", dict(batch))
            previous, now = now, min(now + size, num_steps)
            if now - previous < size:
                batch = _first_steps(batch, now - previous)
                bar.compiling_rest(now - previous)
            state, metrics = step(state, batch)
            if previous == first:
                _check_advance(steps_before, np.asarray(state.step), now - first, metrics)
                history.first_call_seconds = time.perf_counter() - began
                began += history.first_call_seconds
                bar.compiled(history.first_call_seconds)
            history.seconds = earlier + time.perf_counter() - began
            try:
                values = _run_hooks(hooks, now, state, metrics, history, watched)
                complete = now == num_steps or (history.stopped and not history.interrupted)
                logged = complete or now // log_every > previous // log_every
                rank = np.ndim(state.step)
                scalars = {k: mean for k, mean in metrics.items() if np.ndim(mean.total) == rank}
                history.append(previous, now, scalars, values, logged=logged)
                if logged:
                    # The device has finished these calls a log interval ago: no wait.
                    history.settle(until=last_logged)
                    last_logged = now
                last = now == num_steps or history.stopped is not None
                for hook in hooks:
                    getattr(hook, "commit", _nothing)(now, state, last=last)
                if last or ctrl_c.pressed:
                    history.flush()
                if now == num_steps:
                    watched.finish(history)
                bar.update(now, _num_examples(batch, size), history if logged else None)
            except NonFiniteError as error:
                if first_nonfinite(state) is not None:
                    order = order_of_use(step, state, batch)
                    error.parameter = first_nonfinite(state, order)
                described = _describe(step, state, batch)
                error.batch = f"the training batch of step {now} has {described}"
                raise
        history.seconds = earlier + time.perf_counter() - began
        ctrl_c.state = state
        if history.stopped is not None:
            bar.stopped(now, history.stopped)
    return state, history


def evaluate(
    eval_step: Callable[[Any, Batch], Metrics],
    state: Any,
    batches: BatchSource | Iterable[Batch],
    *,
    num_batches: int | None = None,
) -> dict[str, Any]:
    """Compute the metrics of a state over all batches, exact also with padding and a small rest.

    Totals and counts are added in float64 on the host, after one transfer at the end. The
    parameters and the running statistics of batch norms are those of `state`: the last ones, unless
    it was given others, such as by `averaged_parameters` and `recalibrate_batch_norm`.

    Args:
        eval_step: `(state, batch) -> metrics`.
        state: the state to evaluate; in a population `state.step` and all metrics have a leading
            member axis.
        batches: a source that ends after one pass (it is called with 0), or an iterable of
            batches.
        num_batches: evaluate at most this many batches; needed for a source without an end. A
            function of your own that never ends is not recognized unless it has an attribute
            `endless` that is true.

    Returns:
        {name: mean}: a float, a list with one per member, or an array if the total is one: a
        confusion matrix as shares of all examples, whose counts `evaluate_sums` returns. NaN if
        the weights of a metric sum to 0.

    Warns:
        RuntimeWarning: the total of a metric is NaN or infinite, other than that of a frozen member
            of a population; it names the first such batch.

    Raises:
        ValueError: there are no batches, no end of them, or they are those of `data.chunked`.
        TypeError: `batches` is neither a source nor an iterable of batches, or a batch is no dict.

    Example:
        >>> import types
        >>> import jaxnets as jn
        >>> state = types.SimpleNamespace(step=0, scale=2.0)
        >>> scaled = lambda state, batch: {"mean": jn.Mean.of(state.scale * batch["inputs"])}
        >>> evaluate(scaled, state, [{"inputs": jnp.ones(3)}, {"inputs": jnp.full(1, 5.0)}])
        {'mean': 4.0}
    """
    totals, first_bad = _sums(eval_step, state, batches, num_batches)
    for name, index in first_bad.items():
        member = ""
        if np.ndim(state.step):
            finite = np.isfinite(totals[name].total).reshape(len(state.step), -1).all(axis=1)
            finite |= np.asarray(state.step) < np.max(state.step)  # frozen: `fit` has said so
            if np.all(finite):
                continue
            member = f" of member {int(np.argmin(finite))}"
        reason = "look for NaN in the inputs and the state"
        if not isinstance(batches, Iterator):
            source = batches(0) if callable(batches) else batches
            batch = next(itertools.islice(source, index, None))
            reason = f"batch {index} has {_describe(eval_step, state, batch)}; {reason}"
        warnings.warn(
            f"{name}{member} is NaN or infinite: {reason}, and for labels out of range, for n "
            "classes 0 to n - 1",
            RuntimeWarning,
            stacklevel=2,
        )
    return means_of_sums(totals, state)


def means_of_sums(sums: Metrics, state: Any) -> dict[str, Any]:
    """Return the means of `evaluate` from the result of `evaluate_sums`.

    Args:
        sums: by name.
        state: the state, of a population with a leading axis.

    Returns:
        A float for each metric, a list of them for a population; an array for a metric that has
        further axes.
    """
    rank = np.ndim(state.step)
    means = {name: np.asarray(mean.compute()) for name, mean in sums.items()}
    return {name: mean.tolist() if mean.ndim == rank else mean for name, mean in means.items()}


def evaluate_sums(
    eval_step: Callable[[Any, Batch], Metrics],
    state: Any,
    batches: BatchSource | Iterable[Batch],
    *,
    num_batches: int | None = None,
) -> dict[str, Mean]:
    """Sum the metrics of a state over all batches: `evaluate` before its division.

    For totals that are counts, such as those of `metrics.confusion_matrix`.

    Args:
        eval_step: as for `evaluate`.
        state: as for `evaluate`.
        batches: as for `evaluate`.
        num_batches: as for `evaluate`.

    Returns:
        {name: Mean} of NumPy arrays in float64; in a population with a leading member axis.

    Raises:
        ValueError: as for `evaluate`.
        TypeError: as for `evaluate`.

    Example:
        >>> def hits(state, batch):
        ...     return {"confusion": metrics.confusion_matrix(batch["inputs"], batch["labels"])}
        >>> from jaxnets import metrics
        >>> batch = {"inputs": jnp.eye(2)[jnp.array([0, 1, 1])], "labels": jnp.array([0, 0, 1])}
        >>> evaluate_sums(hits, None, [batch, batch])["confusion"].total.tolist()
        [[2.0, 2.0], [0.0, 2.0]]
    """
    return _sums(eval_step, state, batches, num_batches)[0]


def _sums(
    eval_step: Callable[[Any, Batch], Metrics],
    state: Any,
    batches: BatchSource | Iterable[Batch],
    num_batches: int | None,
) -> tuple[dict[str, Mean], dict[str, int]]:
    """Return the sums, and {name: number of the first batch whose total is not finite}."""
    check_evaluation(batches, num_batches)
    with contextlib.ExitStack() as stack:
        source = iter(batches(0) if callable(batches) else batches)
        if callable(batches):
            stack.callback(getattr(source, "close", _nothing))
        measured = []
        for batch in itertools.islice(source, num_batches):
            check_batch(batch)
            measured.append(eval_step(state, batch))
    if not measured:
        raise ValueError("no batches to evaluate; give a source or a list, not a used iterator")
    sums, first_bad = {}, {}
    for name in measured[0]:
        parts = jax.device_get([metrics[name] for metrics in measured])
        sums[name] = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *parts)
        if not np.all(np.isfinite(sums[name].total)):
            finite = [bool(np.all(np.isfinite(part.total))) for part in parts]
            first_bad[name] = int(np.argmin(finite))
    return sums, first_bad


def check_evaluation(batches: Any, num_batches: int | None) -> None:
    """Check that an evaluation has batches, and an end.

    Raises:
        TypeError: `batches` is neither a source nor an iterable of batches, such as the data.
        ValueError: the source has no end, its batches hold several steps, or `num_batches` is not
            an integer of 1 or more.
    """
    if callable(batches) or isinstance(batches, Mapping):
        check_source(batches)
    elif (
        isinstance(batches, str | bytes)
        or hasattr(batches, "dtype")
        or not isinstance(batches, Iterable)
    ):
        shown = f"{type(batches).__name__} {batches!r}"
        if hasattr(batches, "dtype"):
            shown = f"{type(batches).__name__} of shape {np.shape(batches)}"
        raise TypeError(
            f"batches is {shown}; give a source such as data.sequential_batches(arrays, "
            "batch_size), or a list of batches, each a dict of arrays"
        )
    if steps_per_batch(batches) > 1:
        raise ValueError(
            f"a batch of {type(batches).__name__} holds {steps_per_batch(batches)} batches of a "
            "step on another axis, and an evaluation takes one at a time; give the source without "
            "data.chunked"
        )
    if num_batches is not None:
        check_sizes(num_batches=num_batches)
    elif is_endless(batches):
        raise ValueError(
            f"{type(batches).__name__} has no end; evaluate a source of one pass, such as "
            "data.sequential_batches, or give num_batches"
        )


def current_step(state: Any) -> int:
    """Return `state.step` as an int; in a population that of the members that are not frozen."""
    return int(np.max(state.step))


def _describe(step: Callable[..., Any], state: Any, batch: Batch) -> str:
    """Describe the values of a batch, and the number of classes of its labels."""
    counts = " or ".join(map(str, class_counts(step, state, batch)))
    return value_ranges(batch) + (f", and the network has {counts} outputs" if counts else "")


def value_ranges(batch: Batch) -> str:
    """Describe the values of each array of a batch, such as "labels from 1 to 10".

    Args:
        batch: arrays; those whose values are not known, as inside of a compiled step, are left out.
    """
    parts = []
    for name, array in batch.items():
        dtype = getattr(array, "dtype", np.dtype(object))
        real = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
        known = known_values(array) if real else None
        if known is None or not known.size:
            continue
        known = known.astype(np.float64)
        if not np.all(np.isfinite(known)):
            parts.append(f"{name} with NaN or infinity")
        else:
            parts.append(f"{name} from {known.min():g} to {known.max():g}")
    return ", ".join(parts) or "no known values"


def _nothing(*args: Any, **keywords: Any) -> None:
    """Default of an optional method of a hook or writer."""


class _CtrlC(contextlib.AbstractContextManager["_CtrlC"]):
    """Note Ctrl-C, so that no call of the step is cut off, and raise `Interrupted` at the end.

    A second one raises KeyboardInterrupt. Other handlers than Python's own stay.

    Args:
        state: for the exception; set it to the last state of the run.
        history: for the exception.
    """

    def __init__(self, state: Any, history: History) -> None:
        self.state, self._history = state, history
        self.pressed = False
        self._installed = False

    def __enter__(self) -> _CtrlC:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._listen)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.pressed and exception[0] is None:
            reason = f"SIGINT at step {self._history.step}"
            raise Interrupted(reason, state=self.state, history=self._history)

    def _listen(self, number: int, frame: Any) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        write_from_handler("stopping at the end of this step; Ctrl-C again stops at once")


def write_from_handler(line: str) -> None:
    """Write a line to standard error from a signal handler, where only `os.write` is safe."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{line}\n".encode())


def _run_hooks(
    hooks: Sequence[Hook],
    step: int,
    state: Any,
    metrics: Metrics,
    history: History,
    watched: WatchedValues,
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    names: list[Collection[str]] = []
    for hook in hooks:
        try:
            returned = hook(step, state, {**metrics, **values}) or {}
        except (StopTraining, Interrupted) as stop:
            # Later hooks are still called at this step.
            history.stopped = str(stop)
            history.interrupted = isinstance(stop, Interrupted)
            returned = {}
        except NonFiniteError:
            history.flush()  # writes the rows before
            raise
        known = sorted(set(returned) & (set(metrics) | set(values) | {"step"}))
        if known:
            raise ValueError(f"a hook returned {known}, names that are taken; add a prefix")
        values |= returned
        names.append(returned)
    watched.observe(names)
    return values


def _check_advance(before: np.ndarray, after: np.ndarray, expected: int, metrics: Metrics) -> None:
    """Check that the first call made the steps of its batch, and that no frozen member moved."""
    if np.any((before < np.max(before)) & (before != after)):
        raise ValueError(
            f"members are at different steps {np.unique(before).tolist()}; train them separately, "
            "or if some are frozen, with population_step(..., on_non_finite='freeze')"
        )
    made = np.max(after) - np.max(before)
    all_frozen = "frozen" in metrics and np.all(np.asarray(metrics["frozen"].total) > 0)
    if made != expected and not all_frozen:
        raise ValueError(
            f"one call made {made} steps, but a batch of the source holds {expected}; use "
            "scan_steps and data.chunked together, or neither"
        )


def _first_steps(batch: Batch, count: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[:count], batch)


def _num_examples(batch: Batch, steps_per_batch: int) -> int:
    for name in ("weights", "indices"):
        if name in batch:
            return int(np.size(batch[name]))
    leaf = jax.tree.leaves(batch)[0]
    return int(np.prod(np.shape(leaf)[: 1 if steps_per_batch == 1 else 2]))
