"""What a training run measured, summed exactly, and the writers that its rows go to."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxnets.core import Metrics

Row: TypeAlias = dict[str, Any]  # {"step": int, name: float, or [float] with one per member}
Writer: TypeAlias = Callable[[Row], None]  # may have start(history, step) and close()


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
        row |= {name: _number(value) for name, value in call.values.items()}
        if len(row) > 1:
            self.rows.append(row)
            for writer in self._writers:
                writer(row)


def _number(value: Any) -> Any:
    return np.asarray(value, np.float64).tolist()


def _where(name: str, call: _Call, total: Any) -> str:
    steps = f"step {call.last}"
    if call.last - call.first > 1:
        steps = f"steps {call.first + 1} to {call.last}"
    member = f" of member {int(np.argmin(np.isfinite(total)))}" if np.ndim(total) else ""
    return f"{name}{member} at {steps}"


class _JsonlWriter:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def start(self, history: History, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".new")
        with temporary.open("w") as file:
            file.writelines(_line(row) for row in history.rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file = self._path.open("a")

    def __call__(self, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: Row) -> str:
    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(one) for one in value]
        return value if math.isfinite(value) else None  # JSON has no NaN

    return json.dumps({name: finite(value) for name, value in row.items()}) + "\n"


def jsonl_writer(path: str | os.PathLike[str]) -> Writer:
    """Write one line of JSON per row.

    At the start of a run the file is replaced, atomically, by the rows of the history it starts
    from, so after a kill and a resume it is byte for byte that of an uninterrupted run.

    Args:
        path: the file, such as `run/metrics.jsonl`.

    Returns:
        Writer for `fit`.
    """
    return _JsonlWriter(path)


class _TensorBoardWriter:
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                "tensorboard_writer needs tensorboardX: pip install 'jaxnets[tensorboard]'"
            ) from error
        self._directory = str(directory)
        self._open = tensorboardX.SummaryWriter

    def start(self, history: History, step: int) -> None:
        # What a killed run wrote after its last checkpoint is to be hidden.
        self._events = self._open(self._directory, purge_step=step + 1 if step else None)

    def __call__(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, list):
                for member, one in enumerate(value):
                    self._events.add_scalar(f"{name}/{member}", one, row["step"])
            elif name != "step":
                self._events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._events.close()


def tensorboard_writer(directory: str | os.PathLike[str]) -> Writer:
    """Write every number of every row as a TensorBoard scalar, `name/member` in a population.

    Args:
        directory: folder of the event files.

    Returns:
        Writer for `fit`.

    Raises:
        ImportError: tensorboardX is not installed.
    """
    return _TensorBoardWriter(directory)
