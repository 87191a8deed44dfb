"""Runs side by side: which differences between their results hold up."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.metrics.supervised import confidence_interval

#: A difference holds up if chance alone would show it this rarely.
LEVEL = 0.05


def show_number(value: float, unit: str, *, sign: str = "") -> str:
    """Write a number of a result, without the name of its unit unless that is %.

    Args:
        value: a share where the unit is "%".
        unit: "%" or any other.
        sign: "+" shows the sign of positive numbers too.

    Example:
        >>> show_number(0.9926, "%"), show_number(1.88972, "nats", sign="+")
        ('99.26%', '+1.89')
    """
    return f"{value:{sign}.2%}" if unit == "%" else f"{value:{sign}.4g}"


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a run.

    Attributes:
        name: folder.
        metric: what the values are, with the data set.
        unit: "%" for shares, or the unit.
        values: one per seed.
        parameters: of one network; None where the run does not say.
        seconds: of training, all seeds together; None where the run does not say.
    """

    name: str
    metric: str
    unit: str
    values: tuple[float, ...]
    parameters: int | None = None
    seconds: float | None = None

    def show(self, value: float, *, sign: str = "") -> str:
        """Return a number in the unit of the run, see `show_number`."""
        return show_number(value, self.unit, sign=sign)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two runs compared.

    Attributes:
        first: name of a run.
        second: name of another.
        difference: mean of the second less that of the first.
        p_value: Welch's, corrected for the number of comparisons.
        holds_up: `p_value` below `LEVEL`.
    """

    first: str
    second: str
    difference: float
    p_value: float
    holds_up: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs on the same data with the same metric.

    Attributes:
        runs: in the order they were given.
        differences: of all pairs of runs with two seeds or more.
    """

    runs: tuple[Run, ...]
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        """Return a table of the runs, and a line for each pair."""
        rows = [("run", self.runs[0].metric, "seeds", "parameters", "training")]
        for run in self.runs:
            mean, half = confidence_interval(run.values)
            spread = "" if half is None else f" +- {run.show(half)}"
            rows.append(
                (
                    run.name,
                    run.show(mean) + spread,
                    str(len(run.values)),
                    "" if run.parameters is None else f"{run.parameters:,}",
                    "" if run.seconds is None else f"{run.seconds:.0f} s",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append("")
        for found in self.differences:
            shown = self.runs[0].show(found.difference, sign="+")
            verdict = "holds up" if found.holds_up else "may be chance"
            lines.append(
                f"{found.second} - {found.first}: {shown}, p = {found.p_value:.2g}: {verdict}"
            )
        if self.differences:
            lines.append(
                f"Welch's t-test over seeds, Holm's correction for {len(self.differences)} "
                f"comparison(s); holds up: p < {LEVEL}"
            )
        single = [run.name for run in self.runs if len(run.values) < 2]
        if single:
            lines.append(f"one seed says nothing of chance: {', '.join(single)}; give --seeds 3")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON can hold it."""
        return dataclasses.asdict(self)


def read_run(folder: str | Path) -> Run:
    """Read the result of a finished run.

    Args:
        folder: with a `result.json`.

    Raises:
        ValueError: no such file, or one that is no result.
    """
    path = Path(folder) / "result.json"
    try:
        content = json.loads(path.read_text())
        return Run(
            name=str(folder),
            metric=f"{content['dataset']}, {content['metric']}",
            unit=content["unit"],
            values=tuple(map(float, content["values"])),
            parameters=content.get("parameters"),
            seconds=content.get("train_seconds"),
        )
    except OSError as error:
        raise ValueError(
            f"{folder} has no result.json ({error.strerror}); name the folder of a finished run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of a run ({type(error).__name__}: {error}); run it again"
        ) from error


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare the means of all pairs of runs.

    The test is Welch's, which lets every run have a spread of its own. Among many comparisons
    some differ by chance; the p-values are therefore corrected by the step-down method of Holm,
    after which the probability of even one false finding is at most `LEVEL`.

    Args:
        runs: two or more.

    Returns:
        Comparison.

    Raises:
        ValueError: fewer than two runs, the same run twice, or runs that measure different things.

    Example:
        >>> old = Run("old", "digits, test accuracy", "%", (0.90, 0.91, 0.92))
        >>> new = Run("new", "digits, test accuracy", "%", (0.95, 0.96, 0.97))
        >>> compare([old, new]).differences[0].holds_up
        True

    References:
        Welch 1947, doi:10.1093/biomet/34.1-2.28; Holm 1979, "A Simple Sequentially Rejective
        Multiple Test Procedure".
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run(s) to compare; name two or more")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"a run is named twice among {', '.join(names)}")
    measures = {(run.metric, run.unit): run.name for run in runs}
    if len(measures) > 1:
        listed = "; ".join(f"{name} has {metric}" for (metric, _), name in measures.items())
        raise ValueError(f"the runs measure different things: {listed}; compare like with like")
    pairs = [
        pair for pair in itertools.combinations(runs, 2) if all(len(run.values) > 1 for run in pair)
    ]
    corrected = _holm([_welch(first.values, second.values) for first, second in pairs])
    differences = tuple(
        Difference(
            first.name,
            second.name,
            float(np.mean(second.values) - np.mean(first.values)),
            p_value,
            p_value < LEVEL,
        )
        for (first, second), p_value in zip(pairs, corrected, strict=True)
    )
    return Comparison(tuple(runs), differences)


def _welch(first: Sequence[float], second: Sequence[float]) -> float:
    import scipy.stats  # takes as long to import as the rest of the library

    if np.ptp(first) == 0 and np.ptp(second) == 0:  # no spread: the statistic is 0 / 0, or infinite
        return float(first[0] == second[0])
    return float(scipy.stats.ttest_ind(first, second, equal_var=False).pvalue)


def _holm(p_values: Sequence[float]) -> list[float]:
    count = len(p_values)
    order = np.argsort(p_values)
    corrected = np.empty(count)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()
