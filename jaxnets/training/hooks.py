"""Hooks for `fit`: validation, early stopping, checkpoints; and `resume`."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from jaxnets.checks import check_sizes, check_source
from jaxnets.core import Batch, BatchSource, Mean, Metrics
from jaxnets.distributed import agree_to_stop
from jaxnets.training import checkpoint
from jaxnets.training.checkpoint_folder import is_history
from jaxnets.training.history import (
    History,
    Mode,
    NonFiniteError,
    check_best,
    rank,
    sign,
)
from jaxnets.training.loop import (
    Hook,
    Interrupted,
    StopTraining,
    check_evaluation,
    current_step,
    evaluate_sums,
    means_of_sums,
    write_from_handler,
)
from jaxnets.training.nonfinite import first_nonfinite

#: Ctrl-C, the end of a time limit, the end of a terminal; Windows lacks the last.
_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
State = TypeVar("State")


class _Every:
    def __init__(self, num_steps: int, hook: Hook) -> None:
        check_sizes(num_steps=num_steps)
        if hasattr(hook, "commit"):
            raise ValueError(f"{type(hook).__name__} counts steps itself; give it every=")
        self._num_steps = num_steps
        self.hook = hook
        self.called = False
        if hasattr(hook, "watches"):
            self.watches = hook.watches
        self._step = 0

    def start(self, history: History, step: int) -> None:
        self._step, self.called = step, False
        if hasattr(self.hook, "start"):
            self.hook.start(history, step)

    def __call__(
        self, step: int, state: Any, metrics: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        crossed = step // self._num_steps > self._step // self._num_steps
        self._step = step
        if not crossed:
            return None
        self.called = True
        return self.hook(step, state, metrics)

    def close(self) -> None:
        if hasattr(self.hook, "close"):
            self.hook.close()


def every(num_steps: int, hook: Hook) -> Hook:
    """Call a hook only when `step` reaches or passes a multiple of `num_steps`.

    Correct also if a call makes several steps, and after a resume.

    Args:
        num_steps: 1 or more.
        hook: any hook without `commit`.

    Returns:
        Hook for `fit`.

    Raises:
        ValueError: `num_steps` is below 1, or the hook (`Checkpointing`) counts steps itself.

    Example:
        >>> hook = every(10, lambda step, state, metrics: {"called": step})
        >>> [hook(step, None, {}) for step in (4, 8, 12, 16, 20)]
        [None, None, {'called': 12}, None, {'called': 20}]
    """
    return _Every(num_steps, hook)


class _Validation:
    def __init__(
        self,
        eval_step: Callable[[Any, Batch], Metrics],
        batches: BatchSource | Iterable[Batch],
        prefix: str,
        num_batches: int | None,
        on_non_finite: Literal["warn", "stop"],
        evaluated: Callable[[Any], Any],
    ) -> None:
        self._eval_step, self._batches, self._prefix = eval_step, batches, prefix
        self._num_batches, self._on_non_finite = num_batches, on_non_finite
        self._evaluated = evaluated
        self._history = History()

    def start(self, history: History, step: int) -> None:
        self._history = history

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        jax.block_until_ready(state)  # do not count pending steps as evaluation
        with self._history.spending("evaluation"):
            # Without the warning of `evaluate`: `fit` warns of the values that a hook returns.
            sums = evaluate_sums(
                self._eval_step,
                self._evaluated(state),
                self._batches,
                num_batches=self._num_batches,
            )
            measured = means_of_sums(sums, state)
        behind = np.asarray(state.step) < current_step(state)  # frozen members of a population
        values = {
            f"{self._prefix}/{name}": np.where(behind, np.nan, value).tolist()
            for name, value in measured.items()
            if not isinstance(value, np.ndarray)
        }
        for name, value in values.items():
            if self._on_non_finite == "stop" and not np.all(np.isfinite(value) | behind):
                raise NonFiniteError(f"{name} at step {step}")
        return values


def validation(
    eval_step: Callable[[Any, Batch], Metrics],
    batches: BatchSource | Iterable[Batch],
    *,
    prefix: str = "validation",
    num_batches: int | None = None,
    on_non_finite: Literal["warn", "stop"] = "warn",
    evaluated: Callable[[Any], Any] = lambda state: state,
) -> Hook:
    """Evaluate after every call of the step; wrap it in `every` to evaluate less often.

    Args:
        eval_step: `(state, batch) -> metrics`.
        batches: a source that ends after one pass, or a list of batches.
        prefix: names in the row are `prefix/name`; arrays, such as a confusion matrix, are left
            out. Those of frozen members are NaN, see `population_step`.
        num_batches: as for `evaluate`.
        on_non_finite: "stop" raises NonFiniteError if a value is NaN or infinite. "warn" writes
            it into the row; `fit` warns at its first step, as of every value of a hook.
        evaluated: state -> state to evaluate, called once an evaluation, such as a function that
            puts `averaged_parameters` into it.

    Returns:
        Hook for `fit`.

    Raises:
        TypeError: `batches` can be read only once, such as a generator.
        ValueError: the source has no end, `num_batches` is below 1, or an unknown `on_non_finite`.
    """
    if isinstance(batches, Iterator):
        check_source(batches)
    check_evaluation(batches, num_batches)
    if on_non_finite not in ("warn", "stop"):
        raise ValueError(f"on_non_finite is {on_non_finite!r}; choose 'warn' or 'stop'")
    return _Validation(eval_step, batches, prefix, num_batches, on_non_finite, evaluated)


class EarlyStopping:
    """Stop when a validation metric has not improved in `patience` evaluations.

    In a population each member has its own best value, and the run stops when no member improves.
    A value that is NaN or infinite is no improvement; `fit` warns of it.
    A resumed run stops at the same step as an uninterrupted one, because the count is computed
    from the rows of the history.

    Args:
        metric: name of a value that an earlier hook returns, such as "validation/loss".
        mode: "min" if lower is better, "max" if higher is better; needed unless the metric is a
            loss, of which lower is better.
        patience: number of consecutive evaluations without improvement.
        min_delta: smallest change that counts as an improvement, in units of the metric.

    Raises:
        ValueError: an unknown mode, none for a metric that is no loss, or a patience below 1.

    Example:
        >>> stopping = EarlyStopping("validation/loss", patience=2)
        >>> for step, loss in enumerate([3.0, 2.0, 2.5]):
        ...     stopping(step, None, {"validation/loss": loss})
        >>> stopping(3, None, {"validation/loss": 2.0})
        Traceback (most recent call last):
            ...
        jaxnets.training.loop.StopTraining: validation/loss has not improved in 2 evaluations
    """

    def __init__(
        self, metric: str, *, mode: Mode | None = None, patience: int, min_delta: float = 0.0
    ) -> None:
        check_sizes(patience=patience)
        if mode is None and not metric.endswith("loss"):
            raise ValueError(
                f"EarlyStopping does not know whether a lower {metric} is better; give mode='min' "
                "or mode='max'"
            )
        self.watches = (metric,)
        self._metric, self._sign = metric, sign(mode or "min")
        self._patience, self._min_delta = patience, min_delta
        self._best: Any = np.inf
        self._stale = 0

    def start(self, history: History, step: int) -> None:
        """Initialize the count from the history.

        Args:
            history: of the run so far.
            step: at which it goes on.

        Raises:
            StopTraining: the run had stopped already.
        """
        self._best, self._stale = np.inf, 0
        for value in history.column(self._metric)[1]:
            self._observe(value)
        self._check()

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Compare the metric with its best value.

        Args:
            step: completed steps.
            state: not used.
            metrics: those of the step and of earlier hooks.

        Raises:
            StopTraining: no improvement for `patience` evaluations.
        """
        value = _read(metrics, self._metric)
        if value is not None:
            self._observe(value)
            self._check()

    def _observe(self, value: Any) -> None:
        cost = self._sign * np.asarray(value, np.float64)
        improved = np.isfinite(cost) & (cost < self._best - self._min_delta)
        self._best = np.where(improved, cost, self._best)
        self._stale = 0 if np.any(improved) else self._stale + 1

    def _check(self) -> None:
        if self._stale >= self._patience:
            raise StopTraining(f"{self._metric} has not improved in {self._patience} evaluations")


class Checkpointing:
    """Save state and history at regular steps, at the end, and on SIGINT, SIGTERM and SIGHUP.

    A state with a NaN or an infinity in its parameters, its model state (such as the statistics of
    batch norms) or its optimizer state is not saved, so the last checkpoint is usable. On a signal
    the current call is finished and saved, and `fit` returns with `history.interrupted`; a second
    SIGINT raises KeyboardInterrupt at once. A signal that the process ignores stays ignored, such
    as SIGHUP under `nohup`. A save that has begun is finished before the second SIGINT; only a
    third one cuts it off. Continue with `resume`. With several processes a signal to one of them
    stops all after the same call.

    Args:
        directory: folder of the run's checkpoints.
        every: steps between checkpoints.
        keep: number of the newest checkpoints to keep.
        best: (metric, "min" or "max"), a value that an earlier hook returns: the `keep_best`
            best states are saved too, when they occur, and kept. A population is ranked by
            the mean of its members that are not frozen.
        keep_best: number of the best checkpoints to keep.
        on_signal: handle signals; only in the main thread, where Python allows it.

    Raises:
        NonFiniteError: (from `fit`) the state to save is not finite.
        CheckpointError: (from `fit`) the disk is full or not writable.
            Or a folder was changed by hand, see `checkpoint.all_steps`; nothing is removed.
        ValueError: (from `fit`) the folder has a checkpoint of a later step than the run starts
            from.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int,
        keep: int = 3,
        best: tuple[str, Mode] | None = None,
        keep_best: int = 1,
        on_signal: bool = True,
    ) -> None:
        check_sizes(every=every, keep=keep, keep_best=keep_best)
        self._directory = directory
        self._every, self._keep, self._keep_best = every, keep, keep_best
        if best is not None:
            check_best(best)
        self._best = best
        self.watches = best[:1] if best else ()
        self._on_signal = on_signal
        self._history = History()
        self._step = self._saved = 0
        self._measured = False
        self._values: dict[int, Any] = {}  # of the metric, at the steps that have a checkpoint
        self._signal: int | None = None
        self._saving = self._postponed = False
        self._handlers: dict[int, Any] = {}

    def start(self, history: History, step: int) -> None:
        """Check that the folder has no later checkpoint, and install the signal handlers.

        Args:
            history: of the run, saved with each checkpoint.
            step: at which the run starts.

        Raises:
            ValueError: an intact checkpoint of a later step.
            CheckpointError: a folder was changed by hand.
        """
        steps = checkpoint.verify_names(self._directory)
        for later in (s for s in steps if s > step):
            try:
                checkpoint.verify(self._directory, later)
            except checkpoint.CheckpointError:
                continue  # damaged: `restore` has warned, and this run will overwrite it
            raise ValueError(
                f"{self._directory} holds a checkpoint of step {later}, but the run starts at step "
                f"{step}; resume from it, or choose another directory"
            )
        self._history, self._step, self._signal = history, step, None
        self._saved = step
        if self._best is not None:
            self._values = dict(zip(*history.column(self._best[0]), strict=True))
        if self._on_signal and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._listen)

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Note the value of the metric of `best`.

        Args:
            step: completed steps.
            state: not used; `commit` saves it, after all hooks.
            metrics: those of the step and of earlier hooks.

        Raises:
            Interrupted: a signal came during the step.
        """
        value = None if self._best is None else _read(metrics, self._best[0])
        self._measured = value is not None
        if self._measured:
            self._values[step] = value
        name = None if self._signal is None else signal.Signals(self._signal).name
        reason = agree_to_stop(name) if self._on_signal else None
        if reason is not None:
            self._signal = None
            raise Interrupted(f"{reason} at step {step}")

    def commit(self, step: int, state: Any, *, last: bool) -> None:
        """Save a checkpoint if one is due; called by `fit` after all hooks.

        Args:
            step: completed steps.
            state: the state after them.
            last: whether the run ends here, so that one is due.

        Raises:
            NonFiniteError: a metric or the state to save is not finite.
            CheckpointError: the disk is full or not writable, or a folder was changed by hand.
        """
        due = last or step // self._every > self._step // self._every
        self._step = step
        if not (due or self._measured):
            return
        self._history.flush()
        known = {*checkpoint.all_steps(self._directory), step}
        self._values = {at: value for at, value in self._values.items() if at in known}
        best = rank(self._values, self._best[1])[: self._keep_best] if self._best else []
        if not (due or step in best):
            return
        bad = first_nonfinite(state)
        if bad is not None:
            cause = f"a step after {self._saved}"
            raise NonFiniteError(f"the state at step {step}", parameter=bad, cause=cause)
        with self._history.spending("checkpoints"), self._uninterrupted():
            checkpoint.save(self._directory, state, history=self._history, step=step)
            checkpoint.prune(self._directory, keep=self._keep, protect={step, *best})
        self._saved = step

    def close(self) -> None:
        """Restore the signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if self._signal is not None:
            # It arrived after the last call: pass it on to the restored handler.
            late, self._signal = self._signal, None
            signal.raise_signal(late)

    def best_steps(self) -> list[int]:
        """Return the steps of the best checkpoints in the folder, best first.

        They are known before and after a run too; see `checkpoint.best_steps`. To read the best
        one: `checkpoint.restore(directory, state, best=("validation/accuracy", "max"))`.
        """
        if self._best is None:
            return []
        return checkpoint.best_steps(self._directory, *self._best)[: self._keep_best]

    @contextlib.contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """Postpone the second Ctrl-C, because threads of a save that is cut off fail at exit."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False
        if self._postponed:
            self._signal, self._postponed = None, False
            raise KeyboardInterrupt

    def _listen(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            if self._saving and not self._postponed:
                self._postponed = True
                return
            self._signal = None  # for `close`: it is not passed on a second time
            raise KeyboardInterrupt
        self._signal = number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        write_from_handler(f"{name}: saving at the end of this step{again}")


def resume(directory: str | os.PathLike[str], state: State) -> tuple[State, History]:
    """Restore the newest intact checkpoint of `Checkpointing`; without one, start a new run.

    The run goes on bit for bit if its program is the same. `sharded_step` and `pmap_step` place a
    state that is not placed, as it is after `create_train_state`, so it is the same wherever the
    checkpoint was saved. The program of `jit_step` and `resident_steps` follows the placement of
    their arguments: give a state that is placed as it was at the start.

    Args:
        directory: folder of the run's checkpoints.
        state: the initial state; also the template for `checkpoint.restore`.

    Returns:
        State and history for `fit`. A checkpoint that was saved without a history has none: its
        rows begin after it.
    """
    if checkpoint.latest_step(directory) is None:
        return state, History()
    restored, metadata = checkpoint.restore(directory, state)
    content = metadata.get("history")
    if is_history(content):
        return restored, History.from_json(content)
    return restored, History(step=current_step(restored))


def _read(metrics: Mapping[str, Any], name: str) -> Any:
    """Return the value that a hook returned as `name` at this step, None if it was not called."""
    value = metrics.get(name)
    if isinstance(value, Mean):
        raise ValueError(
            f"{name} is a training metric of one call; use a value that an earlier hook returns, "
            "such as 'validation/loss'"
        )
    return value
