"""The registered results: what was measured, how, and how the README shows it."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parents[1] / "results.toml"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where results were measured.

    Attributes:
        cores: the machine.
        python: version.
        jax: version.
        mark: behind the time of its rows in the table.
    """

    cores: str
    python: str
    jax: str
    mark: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered result.

    Attributes:
        name: of the row.
        data: data set, and the measure where it is no accuracy.
        network: architecture and parameters.
        command: that gives the number.
        value: mean over the seeds, as in `result.json`.
        decimals: of the value as it is shown.
        goal: "max" or "min", which way is better.
        seeds: number of networks.
        seconds: training time of all of them.
        setting: where.
        ci95: half-width of the interval over the seeds; None for one seed.
        tolerance: by how much a rerun may differ, if more than the intervals.
        unit: "%" for a share, "" for a number whose unit `data` names.
        remark: further numbers of the run.
        reference: number of others, with its source.
    """

    name: str
    data: str
    network: str
    command: str
    value: float
    decimals: int
    goal: Literal["max", "min"]
    seeds: int
    seconds: float
    setting: Setting
    ci95: float | None = None
    tolerance: float = 0.0
    unit: Literal["%", ""] = ""
    remark: str = ""
    reference: str = ""

    def show(self, value: float, ci95: float | None) -> str:
        """Return a value of this row with its interval, as the table has it."""

        def write(number: float) -> str:
            if self.unit == "%":
                return f"{number:.{self.decimals}%}"
            return f"{number:.{self.decimals}f}"

        if ci95 is None:
            return write(value)
        return f"{write(value)} +- {write(ci95)}" if ci95 else f"{write(value)} (all seeds)"

    def judge(self, result: Mapping[str, Any]) -> str:
        """Compare a rerun with the registered number.

        Args:
            result: content of the rerun's `result.json`.

        Returns:
            "holds" where the means differ by at most the two half-widths together, or the
            tolerance; else "better" or "worse".
        """
        difference = result["value"] - self.value
        rounding = 0.5 * 10.0**-self.decimals / (100 if self.unit == "%" else 1)
        widths = (self.ci95 or 0.0) + (result["ci95"] or 0.0)
        if abs(difference) <= max(widths, self.tolerance) + rounding:
            return "holds"
        return "better" if (difference > 0) == (self.goal == "max") else "worse"


def load(path: Path = RESULTS) -> list[Entry]:
    """Read the registry.

    Raises:
        ValueError: a field that is unknown or missing, a setting without its table, or a name
            that occurs twice.
    """
    content = tomllib.loads(path.read_text())
    settings = {name: Setting(**fields) for name, fields in content["settings"].items()}
    entries = []
    for fields in content["result"]:
        name = fields.get("name")
        try:
            entries.append(Entry(**{**fields, "setting": settings[fields["setting"]]}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"result {name!r} of {path}: {error}; see registry.Entry") from error
        if sum(entry.name == name for entry in entries) > 1:
            raise ValueError(f"result {name!r} occurs twice in {path}; rename one")
    return entries


def table(entries: Sequence[Entry]) -> str:
    """Return the rows as a table in Markdown."""
    measure = "test accuracy, or the number named"
    heads = ("data", "network", "command", measure, "seeds", "time", "reference")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for entry in entries:
        shown = entry.show(entry.value, entry.ci95)
        cells = (
            entry.data,
            entry.network,
            f"`{entry.command}`",
            f"{shown} ({entry.remark})" if entry.remark else shown,
            str(entry.seeds),
            f"{entry.seconds:g} s {entry.setting.mark}".rstrip(),
            entry.reference,
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)
