"""What a training run measured, summed exactly, in rows that go to writers."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxnets.core import Metrics
from jaxnets.training.media import Histogram, Image

Row: TypeAlias = dict[str, Any]  # {"step": int, name: float, or [float] with one per member}
# It may have start(history, step), close(), and show(step, name, Image or Histogram).
Writer: TypeAlias = Callable[[Row], None]


class NonFiniteError(FloatingPointError):
    """A loss, a metric or a parameter is NaN or infinite.

    Attributes:
        where: steps and metric, or the state, in which it was found.
        parameter: path of the first parameter that is not finite, None if all are.
    """

    def __init__(self, where: str, *, parameter: str | None = None) -> None:
        super().__init__(where)
        self.where = where
        self.parameter = parameter

    def __str__(self) -> str:
        parameter = f"parameter {self.parameter} is" if self.parameter else "no parameter is yet"
        return (
            f"{self.where} is not finite ({parameter} NaN or infinite); lower the learning rate, "
            "clip the gradients (optax.clip_by_global_norm), and look for NaN in the inputs and "
            "labels out of range"
        )


class _Call(NamedTuple):
    first: int  # step before the call
    last: int  # step after it
    metrics: Metrics
    values: Mapping[str, Any]  # what hooks returned
    cut: bool  # a row with the means since the last one ends here


@dataclasses.dataclass(eq=False)
class History:
    """The rows of a run in step order, and the sums that are not in a row yet.

    Attributes:
        rows: {"step": step, name: number}, one per logged step; a number per member in a list
            where a population trains. Training metrics are means over all examples since the
            row before that has them.
        sums: {name: (total, count)} in float64 of the steps after the last such row.
        step: step up to which rows and sums are complete; None before the first `fit`.
        seconds: wall time in `fit` after the first call, hooks included.
        first_call_seconds: wall time of the first call, that is of compiling.
        spent: parts of `seconds`: "batches", waiting for the source (the device may compute in the
            meantime: an upper bound of what it waits for data), "evaluation", "checkpoints".
        stopped: why the last `fit` ended early; None if it reached `num_steps`.
        interrupted: it ended early for an outer reason, such as a signal, and can go on.

    Example:
        >>> history = History(rows=[{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25}])
        >>> history.column("loss")
        ([10, 20], [0.5, 0.25])
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    sums: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
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

    def column(self, name: str) -> tuple[list[int], list[Any]]:
        """Return the steps at which `name` is known, and its values there."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def flush(self) -> None:
        """Wait for the device and bring rows and sums up to the last call.

        Raises:
            NonFiniteError: the total of a metric is NaN or infinite.
        """
        self.settle(until=None)

    def to_json(self) -> dict[str, Any]:
        """Return, after `flush`, all that a resumed run needs, exactly, as JSON can hold it."""
        self.flush()
        return {
            "rows": list(self.rows),
            "sums": {name: [_number(part) for part in pair] for name, pair in self.sums.items()},
            "step": self.step,
            "seconds": self.seconds,
            "first_call_seconds": self.first_call_seconds,
            "spent": dict(self.spent),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> History:
        """Rebuild what `to_json` returned."""
        sums = {
            name: (np.asarray(total, np.float64), np.asarray(count, np.float64))
            for name, (total, count) in content["sums"].items()
        }
        return cls(**{**content, "rows": list(content["rows"]), "sums": sums})

    def begin(self, step: int, writers: Sequence[Writer]) -> None:
        """Take up a run at `step`; called by `fit`.

        Raises:
            ValueError: the history ends at another step.
        """
        if self.step not in (None, step):
            raise ValueError(
                f"the history ends at step {self.step} and the state is at step {step}; take both "
                "from one checkpoint, or start with history=None"
            )
        self.step, self.stopped, self.interrupted = step, None, False
        self._writers = tuple(writers)

    @contextlib.contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Count the wall time of a block as spent on `name`; called by `fit` and hooks."""
        began = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

    def append(
        self, first: int, last: int, metrics: Metrics, values: Mapping[str, Any], *, cut: bool
    ) -> None:
        """Queue what one call measured, without waiting for it; called by `fit`."""
        self._queue.append(_Call(first, last, metrics, values, cut))

    def settle(self, *, until: int | None) -> None:
        """Fetch the queued calls up to step `until` (None: all), add them up and write rows."""
        while self._queue and (until is None or self._queue[0].last <= until):
            self._add(self._queue.popleft())

    def _add(self, call: _Call) -> None:
        for name, mean in sorted(call.metrics.items()):
            total, count = np.asarray(mean.total, np.float64), np.asarray(mean.count, np.float64)
            if not np.all(np.isfinite(total)):
                raise NonFiniteError(_where(name, call, total))
            before = self.sums.get(name, (np.float64(0), np.float64(0)))
            self.sums[name] = (before[0] + total, before[1] + count)
        self.step = call.last
        row: Row = {"step": call.last}
        if call.cut:
            with np.errstate(invalid="ignore", divide="ignore"):
                row |= {name: _number(total / count) for name, (total, count) in self.sums.items()}
            self.sums = {}
        media = {k: v for k, v in call.values.items() if isinstance(v, Image | Histogram)}
        row |= {k: _number(value) for k, value in call.values.items() if k not in media}
        if len(row) > 1:
            self.rows.append(row)
            for writer in self._writers:
                writer(row)
        for name, medium in media.items():
            for show in (getattr(writer, "show", None) for writer in self._writers):
                if show is not None:
                    show(call.last, name, medium)


def _number(value: Any) -> Any:
    return np.asarray(value, np.float64).tolist()


def _where(name: str, call: _Call, total: Any) -> str:
    steps = f"step {call.last}"
    if call.last - call.first > 1:
        steps = f"steps {call.first + 1} to {call.last}"
    member = f" of member {int(np.argmin(np.isfinite(total)))}" if np.ndim(total) else ""
    return f"{name}{member} at {steps}"
