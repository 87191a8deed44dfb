"""The registered results: what was measured, how, and the tables that show it."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results.toml"
#: The pages with a table of results, between `_BEGIN` and `_END`.
RESULTS_PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
_RESULT = "test accuracy, or the number named"
_BEGIN, _END = "<!-- results -->\n", "\n<!-- end of results -->"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Hardware and versions of a measurement.

    Attributes:
        cores: the machine.
        python: version.
        jax: version.
        mark: follows the time of its rows in the table.
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
        data: data set, and the metric if it is not the accuracy.
        network: architecture and number of parameters.
        command: that reproduces the value.
        value: mean over the seeds, as in `result.json`.
        decimals: shown of the value.
        goal: "max" or "min", the better direction.
        seeds: number of networks.
        seconds: training time of all of them.
        setting: hardware and versions.
        ci95: half-width of the interval over the seeds; None for one seed.
        tolerance: difference allowed to a rerun, if larger than the intervals.
        unit: "%" for a fraction, "" if `data` names the unit.
        remark: further metrics of the run.
        reference: a published value, with its source.
        readme: name of the row in the README's short table; "" omits it.
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
    readme: str = ""

    @property
    def result(self) -> str:
        """The registered value with interval and remark, as the tables show it."""
        shown = self.show(self.value, self.ci95)
        return f"{shown} ({self.remark})" if self.remark else shown

    @property
    def time(self) -> str:
        """The training time with the mark of its setting, as the tables show it."""
        return f"{self.seconds:g} s {self.setting.mark}".rstrip()

    def show(self, value: float, ci95: float | None) -> str:
        """Format a value of this row with its interval, as in the table."""

        def write(number: float) -> str:
            if self.unit == "%":
                return f"{number:.{self.decimals}%}"
            return f"{number:.{self.decimals}f}"

        if ci95 is None:
            return write(value)
        return f"{write(value)} +- {write(ci95)}" if ci95 else f"{write(value)} (all seeds)"

    def judge(self, result: Mapping[str, Any]) -> str:
        """Compare a rerun with the registered value.

        Args:
            result: content of the rerun's `result.json`.

        Returns:
            "holds" if the means differ by at most the sum of the two half-widths, or the
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
        ValueError: a field is unknown or missing, a setting is undefined, or two rows have the
            same name.
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


def notes(command: str) -> list[str]:
    """Return sentences on the known and the published results of a command, whatever its --out."""
    words = command.split(" --out ")[0]
    sentences = []
    for entry in load():
        if entry.command == words:
            shown = entry.show(entry.value, entry.ci95)
            sentences.append(f"the same command in docs/results.md: {shown}")
            if entry.reference:
                sentences.append(f"published elsewhere: {entry.reference}")
    return sentences


def full_table(entries: Sequence[Entry]) -> str:
    """Return the table of docs/results.md: every row with its command, in Markdown."""
    rows = [
        (
            f'<a id="{entry.name}"></a>`{entry.name}`',
            entry.data,
            entry.network,
            f"`{entry.command}`",
            entry.result,
            str(entry.seeds),
            entry.time,
            entry.reference,
        )
        for entry in entries
    ]
    heads = ("row", "data", "network", "command", _RESULT, "seeds", "time", "reference")
    return f"{_markdown(heads, rows)}\n\n{_legend(entries)}"


def readme_table(entries: Sequence[Entry]) -> str:
    """Return the table of the README: the rows with a name there, linked to the full table."""
    rows = [
        (
            f"[{entry.readme}](docs/results.md#{entry.name})",
            entry.network.partition(",")[0],
            entry.show(entry.value, entry.ci95),
            str(entry.seeds),
            f"{entry.seconds:g} s",
        )
        for entry in entries
        if entry.readme
    ]
    return _markdown(("data", "network", "result", "seeds", "time"), rows)


def _legend(entries: Sequence[Entry]) -> str:
    """Return a line that explains the times and the marks of the settings."""
    settings = sorted({entry.setting for entry in entries}, key=lambda setting: setting.mark)
    parts = [
        f"{setting.mark or 'unmarked'} {setting.cores}, JAX {setting.jax}, Python {setting.python}"
        for setting in settings
    ]
    return f"Time: training of all seeds, with compilation. Measured on: {'; '.join(parts)}."


def shown_table(page: str) -> str:
    """Return the table of results that a page has.

    Args:
        page: text of README.md or of docs/results.md.

    Raises:
        ValueError: the page lacks a marker.
    """
    return _split(page)[1]


def write_table(path: Path, table: str) -> None:
    """Replace the table of results in a page.

    Raises:
        ValueError: the page lacks a marker.
    """
    before, _, after = _split(path.read_text())
    path.write_text(before + table + after)


def _split(page: str) -> tuple[str, str, str]:
    """Split a page into the text up to its table, the table, and the text after it."""
    before, begin, rest = page.partition(_BEGIN)
    table, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"the page has no table between {_BEGIN.strip()} and {_END.strip()}")
    return before + begin, table, end + after


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in rows]
    return "\n".join(lines)
