"""The metrics of a run: exact sums of every call, and rows for the writers."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from jaxnets.core import Mean, Metrics
from jaxnets.training.media import Histogram, Image

#: {"step": int, name: float}; in a population a list with one float per member.
Row: TypeAlias = dict[str, Any]
#: Whether lower or higher values of a metric are better.
Mode: TypeAlias = Literal["min", "max"]
#: Called with every row. Optional methods: start(history, step), close(), and
#: show(step, name, medium) for an `Image` or `Histogram`.
Writer: TypeAlias = Callable[[Row], None]


class NonFiniteError(FloatingPointError):
    """A loss, a metric or an array of the state is NaN or infinite.

    Attributes:
        where: the metric and its steps, or the state.
        parameter: the first array of the state that is not finite, in the order of the network: the
            path of a parameter, or such as "model_state/batch_stats/norm/var"; None if all are.
        cause: the steps among which the one is that made it so.
        batch: the ranges of the values of a training batch, None if they are unknown.
    """

    def __init__(
        self,
        where: str,
        *,
        parameter: str | None = None,
        cause: str = "this step or the one before",
    ) -> None:
        super().__init__(where)
        self.where = where
        self.parameter = parameter
        self.cause = cause
        self.batch: str | None = None

    def __str__(self) -> str:
        array = "the state is not yet"
        if self.parameter is not None:
            part = self.parameter.startswith(("model_state/", "opt_state/"))
            array = f"{'' if part else 'parameter '}{self.parameter} is"
        batch = f"; {self.batch}" if self.batch else ""
        others = ""
        if " of member " in self.where:
            others = '; population_step(..., on_non_finite="freeze") lets the other members go on'
        return (
            f"{self.where} is not finite ({array} NaN or infinite): {self.cause} made it so. Look "
            "for labels out of range, for n classes 0 to n - 1, and for NaN in the inputs"
            f"{batch}. If the data are right, lower the learning rate or clip the gradients "
            f"(optax.clip_by_global_norm){others}"
        )


class _Call(NamedTuple):
    first: int  # step before the call
    last: int  # step after it
    metrics: Metrics
    values: Mapping[str, Any]  # what hooks returned
    logged: bool  # the row of this call has the means since the previous logged row


@dataclasses.dataclass(eq=False)
class History:
    """The logged rows of a run in step order, and the sums since the last row.

    Attributes:
        rows: {"step": step, name: number}, one per logged step; in a population a list with one
            number per member. A training metric is the mean over all examples since the previous
            row that has training metrics.
            A metric whose weights sum to 0 there has no mean and is left out; in a population
            it is NaN for the members whose weights do.
        sums: {name: Mean} in float64, over the steps after the last such row.
        step: step up to which rows and sums are complete; None before the first `fit`.
        seconds: wall time in `fit` after the first call, hooks included.
        first_call_seconds: wall time of the first call, mostly compilation.
        spent: parts of `seconds`: "batches", "evaluation", "checkpoints". "batches" is the time
            until the source returns a batch; the device may compute meanwhile, so it is an upper
            bound of the time that the device waits for data.
        stopped: why the last `fit` ended early; None if it reached `num_steps`.
        interrupted: it ended early for an external reason, such as a signal, and can be resumed.

    Example:
        >>> history = History(rows=[{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25}])
        >>> history.column("loss")
        ([10, 20], [0.5, 0.25])
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    sums: dict[str, Mean] = dataclasses.field(default_factory=dict)
    step: int | None = None
    seconds: float = 0.0
    first_call_seconds: float = 0.0
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    stopped: str | None = None
    interrupted: bool = False
    _queue: collections.deque[_Call] = dataclasses.field(
        default_factory=collections.deque, init=False, repr=False
    )
    _writers: Sequence[Writer] = dataclasses.field(default=(), init=False, repr=False)
    _warned: set[str] = dataclasses.field(default_factory=set, init=False, repr=False)

    def column(self, name: str) -> tuple[list[int], list[Any]]:
        """Return the steps of the rows that have `name`, and its values in them."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def flush(self) -> None:
        """Wait for the device, then update rows and sums up to the last call.

        Raises:
            NonFiniteError: the total of a metric is NaN or infinite.
        """
        self.settle(until=None)

    def to_json(self) -> dict[str, Any]:
        """Flush, and return everything that a resumed run needs, exactly, for JSON.

        Returns:
            Rows, sums, step, and times in seconds: the argument of `from_json`.

        Raises:
            NonFiniteError: the total of a metric is NaN or infinite.
        """
        summary = self.summary()
        return {"rows": list(self.rows), **summary}

    def summary(self) -> dict[str, Any]:
        """Flush, and return what `to_json` does without the rows, which grow with the run.

        Raises:
            NonFiniteError: the total of a metric is NaN or infinite.
        """
        self.flush()
        return {
            "sums": {
                name: [_number(mean.total), _number(mean.count)] for name, mean in self.sums.items()
            },
            "step": self.step,
            "seconds": self.seconds,
            "first_call_seconds": self.first_call_seconds,
            "spent": dict(self.spent),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> History:
        """Build a history from the result of `to_json`.

        Args:
            content: rows and sums; step and times are optional.
        """
        sums = {name: _double(total, count) for name, (total, count) in content["sums"].items()}
        known = {name: content[name] for name in _KEPT if name in content}
        return cls(rows=list(content["rows"]), sums=sums, **known)

    def begin(self, step: int, writers: Sequence[Writer]) -> None:
        """Start or continue a run at `step`; called by `fit`.

        Args:
            step: of the state.
            writers: get each row as it is added.

        Raises:
            ValueError: the history ends at another step.
        """
        if self.step not in (None, step):
            raise ValueError(
                f"the history ends at step {self.step}, but the state is at step {step}; restore "
                "both from one checkpoint, or start with history=None"
            )
        self.step, self.stopped, self.interrupted = step, None, False
        self._writers = tuple(writers)

    @contextlib.contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to `spent[name]`; called by `fit` and hooks."""
        began = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

    def append(
        self, first: int, last: int, metrics: Metrics, values: Mapping[str, Any], *, logged: bool
    ) -> None:
        """Queue the metrics of a call without waiting for them; called by `fit`.

        Args:
            first: the first step of the call.
            last: the last one, which may be the same.
            metrics: sums of the call.
            values: that hooks returned after it.
            logged: whether they become a row.
        """
        self._queue.append(_Call(first, last, metrics, values, logged))

    def settle(self, *, until: int | None) -> None:
        """Fetch the queued calls, add them and write rows.

        Args:
            until: the last step to wait for; None waits for all.

        Raises:
            NonFiniteError: the total of a metric is NaN or infinite.
        """
        while self._queue and (until is None or self._queue[0].last <= until):
            self._add(self._queue.popleft())

    def _report_frozen(self, frozen: np.ndarray, step: int) -> None:
        if np.all(frozen):
            raise NonFiniteError(f"every member of the population at step {step}")
        for member in np.flatnonzero(frozen):
            self._warn_once(
                f"frozen/{member}",
                f"at step {step} member {member} is frozen, because a metric or its state became "
                "NaN or infinite; the others go on",
            )

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _add(self, call: _Call) -> None:
        frozen = np.zeros((), bool)
        if "frozen" in call.metrics:
            frozen = np.asarray(call.metrics["frozen"].total) > 0
            self._report_frozen(frozen, call.last)
        for name, metric in sorted(call.metrics.items()):
            mean = _double(metric.total, metric.count)
            if not np.all(np.isfinite(mean.total)):
                steps = f"{call.first + 1} to {call.last}"
                one = call.last - call.first == 1
                cause = "this step" if one else "one of these steps"
                raise NonFiniteError(
                    _where(name, call.last if one else steps, mean.total),
                    cause=f"{cause} or the one before" if call.first else f"the start or {cause}",
                )
            self.sums[name] = self.sums[name] + mean if name in self.sums else mean
        self.step = call.last
        row: Row = {"step": call.last}
        if call.logged:
            row |= {
                name: _number(mean.compute())
                for name, mean in self.sums.items()
                if np.any(mean.count)
            }
            for name in self.sums.keys() - row.keys():
                if name.split("/")[-1] == "loss":
                    self._warn_once(
                        name,
                        f"step {call.last} has no {name}, because the weights of all examples "
                        "since the row before sum to 0",
                    )
            self.sums = {}
        media = {k: v for k, v in call.values.items() if isinstance(v, Image | Histogram)}
        row |= {k: _number(value) for k, value in call.values.items() if k not in media}
        for name in call.values.keys() & row.keys():
            value = np.where(frozen, 0.0, row[name]) if np.ndim(row[name]) else row[name]
            if not np.all(np.isfinite(value)):
                self._warn_once(
                    name,
                    f"{_where(name, call.last, value)} is NaN or infinite; later steps "
                    "are not reported",
                )
        if len(row) > 1:
            self.rows.append(row)
            for writer in self._writers:
                writer(row)
        for name, medium in media.items():
            for show in (getattr(writer, "show", None) for writer in self._writers):
                if show is not None:
                    show(call.last, name, medium)


_KEPT = ("step", "seconds", "first_call_seconds", "spent")  # beside rows and sums


def sign(mode: Mode) -> float:
    """Return the factor that makes lower values of a metric better.

    Args:
        mode: "min" or "max".

    Raises:
        ValueError: the mode is another one.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode is {mode!r}; give 'min' if lower is better, 'max' if higher is")
    return 1.0 if mode == "min" else -1.0


def check_best(best: Any) -> None:
    """Check a metric and its mode, such as ("validation/accuracy", "max").

    Raises:
        ValueError: it is something else.
    """
    if not (isinstance(best, tuple) and len(best) == 2):
        raise ValueError(
            f'best is {best!r}; give the metric and its mode: ("validation/loss", "min")'
        )
    sign(best[1])


def rank(values: Mapping[int, Any], mode: Mode) -> list[int]:
    """Return the steps of {step: value}, best first, of equal values the earlier one.

    The value of a population is the mean of its members; those that are NaN, such as frozen ones,
    or infinite are left out.

    Args:
        values: numbers, or arrays [members].
        mode: "min" or "max".

    Raises:
        ValueError: the mode is another one.
    """
    arrays = {step: np.asarray(value, np.float64) for step, value in values.items()}
    costs = [
        (sign(mode) * float(np.mean(array, where=np.isfinite(array))), step)
        for step, array in arrays.items()
        if np.any(np.isfinite(array))
    ]
    return [step for _, step in sorted(costs)]


def _double(total: Any, count: Any) -> Mean:
    """Return a Mean of NumPy arrays in float64, whatever JAX's default precision is."""
    parts: Any = (np.asarray(total, np.float64), np.asarray(count, np.float64))
    return Mean(*parts)


def _number(value: Any) -> Any:
    return np.asarray(value, np.float64).tolist()


def _where(name: str, steps: int | str, value: Any) -> str:
    member = f" of member {int(np.argmin(np.isfinite(value)))}" if np.ndim(value) else ""
    return f"{name}{member} at {'step' if isinstance(steps, int) else 'steps'} {steps}"
