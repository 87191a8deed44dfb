"""Comparison of runs: which differences between their results are significant."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.metrics.supervised import confidence_interval
from jaxnets.tools.results import diverged, read_result

#: Significance level: a difference holds up if its corrected p-value is below this.
LEVEL = 0.05


def show_number(value: float, unit: str, *, sign: str = "") -> str:
    """Format a result; of the units only % is printed.

    Args:
        value: a fraction where the unit is "%".
        unit: "%" or any other.
        sign: "+" also prints the sign of positive numbers.

    Returns:
        Two decimals of a percentage, four digits of any other number.

    Example:
        >>> show_number(0.9926, "%"), show_number(1.88972, "nats", sign="+")
        ('99.26%', '+1.89')
    """
    return f"{value:{sign}.2%}" if unit == "%" else f"{value:{sign}.4g}"


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of one run.

    Attributes:
        name: folder.
        metric: name of the data set and of the metric.
        unit: "%" for fractions, or the unit.
        values: one per seed that has one.
        parameters: number of parameters of one network; None if the run has no record of it.
        seconds: of training, over all seeds; None if the run has no record of it.
        note: a sentence on values that are missing.
    """

    name: str
    metric: str
    unit: str
    values: tuple[float, ...]
    parameters: int | None = None
    seconds: float | None = None
    note: str | None = None

    def show(self, value: float, *, sign: str = "") -> str:
        """Format a number in the unit of the run, see `show_number`."""
        return show_number(value, self.unit, sign=sign)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two runs.

    Attributes:
        first: name of a run.
        second: name of another.
        difference: mean of the second minus mean of the first.
        p_value: of Welch's test, corrected for the number of comparisons.
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
        differences: of all pairs of runs with two or more seeds.
    """

    runs: tuple[Run, ...]
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        """Return a table of the runs, and a line for each pair."""
        rows = [("run", self.runs[0].metric, "seeds", "parameters", "training")]
        for run in self.runs:
            shown = "none"
            if run.values:
                mean, half = confidence_interval(run.values)
                shown = run.show(mean) + (f" +- {run.show(half)}" if np.isfinite(half) else "")
            rows.append(
                (
                    run.name,
                    shown,
                    str(len(run.values)),
                    "" if run.parameters is None else f"{run.parameters:,}",
                    "" if run.seconds is None else f"{run.seconds:.0f} s",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append("")
        for pair in self.differences:
            shown = self.runs[0].show(pair.difference, sign="+")
            verdict = "holds up" if pair.holds_up else "may be chance"
            lines.append(
                f"{pair.second} - {pair.first}: {shown}, p = {pair.p_value:.2g}: {verdict}"
            )
        if self.differences:
            lines.append(
                f"Welch's t-test over seeds, Holm's correction for {len(self.differences)} "
                f"comparison(s); holds up: p < {LEVEL}"
            )
        lines += [f"{run.name}: {run.note}" for run in self.runs if run.note]
        single = [run.name for run in self.runs if len(run.values) < 2]
        if single:
            lines.append(
                f"one seed cannot be tested for significance: {', '.join(single)}; give --seeds 3"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return everything as a dict that `json.dumps` takes."""
        return dataclasses.asdict(self)


def read_run(folder: str | Path) -> Run:
    """Read the result of a finished run.

    Args:
        folder: contains a `result.json`, see `jaxnets.tools.results`.

    Returns:
        The run; networks that diverged have no value in it, but a note.

    Raises:
        ValueError: the file does not exist, or is not the result of a run; the message has the
            file and the line.
    """
    result = read_result(folder)
    return Run(
        name=str(folder),
        metric=f"{result['dataset']}, {result['metric']}",
        unit=result["unit"],
        values=tuple(value for value in result["values"] if value is not None),
        parameters=result.get("parameters"),
        seconds=result.get("train_seconds"),
        note=diverged(result["values"]),
    )


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare the means of all pairs of runs.

    The test is Welch's t-test, which allows unequal variances. The p-values are corrected for
    multiple comparisons by Holm's step-down method, so that the probability of any false
    positive is at most `LEVEL`.

    Args:
        runs: two or more.

    Returns:
        Comparison.

    Raises:
        ValueError: fewer than two runs, the same run twice, or runs with different metrics.

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
    metrics = {(run.metric, run.unit): run.name for run in runs}
    if len(metrics) > 1:
        listed = "; ".join(f"{name} has {metric}" for (metric, _), name in metrics.items())
        raise ValueError(f"the runs have different metrics: {listed}; compare like with like")
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
    import scipy.stats  # as slow to import as the rest of the library

    if np.ptp(first) == 0 and np.ptp(second) == 0:  # no variance: 0 / 0, or infinite
        return float(first[0] == second[0])
    # From moments: `ttest_ind` warns where the values of one run are all equal.
    moments = (
        moment
        for values in (first, second)
        for moment in (np.mean(values), np.std(values, ddof=1), len(values))
    )
    return float(scipy.stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)


def _holm(p_values: Sequence[float]) -> list[float]:
    count = len(p_values)
    order = np.argsort(p_values)
    corrected = np.empty(count)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()
