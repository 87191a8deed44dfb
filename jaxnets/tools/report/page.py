"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from jaxnets.storage import atomic_file, read_json, read_json_lines
from jaxnets.tools.comparison import show_number
from jaxnets.tools.report.svg_chart import NUM_COLORS, Series, line_chart
from jaxnets.tools.results import RESULT_FILE, diverged, read_result

_MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif"}
# Images that the report shows as charts.
_DRAWN_AS_CHARTS = frozenset({"curves"})
_HEADLINE = (
    *("value", "ci95", "values", "unit", "metric", "experiment", "dataset", "model", "seeds"),
    *("steps", "parameters", "notes", "captions"),
)
_ENVIRONMENT = (
    *("command", "python", "jaxnets", "sources", "jax", "jaxlib", "flax", "optax"),
    *("devices", "cpu_cores"),
)
_TIMES = {
    "compile_seconds": "first call, compilation",
    "step_seconds": "steps, progress images",
    "evaluation_seconds": "evaluation during training",
    "checkpoints_seconds": "checkpoints",
    "batches_seconds": "waiting for batches",
    "measure_seconds": "final evaluation, images",
}


class _Row(TypedDict):
    step: int


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5d6673; --page: #fbfbf9; --card: #fff;
  --line: #e2e2dc; --accent: #1f5fbf; --series-0: #1f5fbf; --series-1: #d1601d; --series-2: #2b8a4b;
  --series-3: #8a4fc4; --series-4: #b8922a; --series-5: #c23b6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --soft: #9aa4b2; --page: #15171b;
  --card: #1d2026; --line: #343a44; --accent: #7fb0ff; --series-0: #7fb0ff; --series-1: #ff9a5c;
  --series-2: #6fd08f; --series-3: #c79bff; --series-4: #e5c65b; --series-5: #ff85b0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.1rem; margin: 0; color: var(--soft); font-weight: 600; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
.value { font-size: clamp(2rem, 7vw, 3.2rem); font-weight: 700; line-height: 1.15; }
.value small { font-size: .45em; font-weight: 500; color: var(--soft); }
.soft, figcaption, .legend { color: var(--soft); font-size: .9rem; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure, .card { margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem; overflow-x: auto; }
figure img { display: block; max-width: 100%; margin: 0 auto; border-radius: 4px; }
figure.wide { grid-column: 1 / -1; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .35em; }
.legend span { display: inline-block; margin-right: 1em; }
.bar { display: flex; height: 1.4rem; border-radius: 5px; overflow: hidden; gap: 2px; }
table { border-collapse: collapse; }
td { padding: .12rem 1.2rem .12rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); overflow-wrap: normal; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .7rem .9rem; }
"""


def write_report(folder: str | os.PathLike[str], result: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` from the files of a run; any browser shows it, without a network.

    It shows what is there: the result with its interval (`result.json`, see
    `jaxnets.write_result`), curves of the log (`metrics.jsonl`, see `jaxnets.jsonl_writer`), every
    PNG and GIF file of the folder, where the time went, and the options (`config.json`, any JSON
    object).

    Args:
        folder: of the run.
        result: content of `result.json`; by default it is read, if there is one.

    Returns:
        Path of the report.

    Raises:
        ValueError: a file is cut or not what it should be; the message has the file and the line.
        FileNotFoundError: the folder does not exist.

    Example:
        >>> import tempfile
        >>> from jaxnets.tools.results import write_result
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_result(folder, dataset="digits", metric="accuracy", values=[0.9, 0.94])
        ...     write_report(folder).name
        'report.html'
    """
    folder = Path(folder)
    files = sorted(folder.iterdir())
    if result is None:
        result = dict(read_result(folder)) if (folder / RESULT_FILE).exists() else {}
    captions = result.get("captions") or {}
    sections = [
        _head(result, folder),
        _section("Curves", _cards(_curves(_rows(folder / "metrics.jsonl")))),
        _section("Images", _cards(_images(files, captions))),
        _section("Metrics", _metrics(result)),
        _section("Time", _time(result)),
        _section("Reproduce", _again(result, _options(folder / "config.json"))),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(_title(result, folder))}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    path = folder / "report.html"
    with atomic_file(path) as stream:
        stream.write(page.encode(errors="replace"))  # halves of surrogate pairs
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the log, whose values are numbers, or one number per network."""
    remedy = "mend or remove the line, or resume the run, which writes the log anew"
    rows: list[dict[str, Any]] = []
    members, several, before = None, dict[str, bool](), 0
    try:
        documents = read_json_lines(path, what="the metrics of a run", remedy=remedy)
    except FileNotFoundError:
        return []
    for document in documents:
        step = document.check(_Row)["step"]
        row = document.check(dict[str, float | list[float | None] | None])
        if step < before:
            raise document.error(f"step is {step}, which is below {before}", key="step")
        before = step
        for name, value in row.items():
            if several.setdefault(name, isinstance(value, list)) != isinstance(value, list):
                reason = f"{name} is one number in some rows and a list in others"
                raise document.error(reason, key=name)
            if isinstance(value, list):
                members = len(value) if members is None else members
                if len(value) != members or not value:
                    reason = f"{name} has {len(value)} values, not {members or 'one or more'}"
                    raise document.error(reason, key=name)
        rows.append(row)
    return rows


def _options(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path, what="the configuration of a run", remedy="mend or remove it")
    except FileNotFoundError:
        return {}
    options = config.content.get("options")
    return options if isinstance(options, dict) else config.content


def _title(result: Mapping[str, Any], folder: Path) -> str:
    names = filter(None, map(result.get, ("experiment", "dataset", "model")))
    # Experiment and data set may have one name.
    return ", ".join(dict.fromkeys(names)) or folder.absolute().name


def _head(result: Mapping[str, Any], folder: Path) -> str:
    lines = [f"<h1>{html.escape(_title(result, folder))}</h1>"]
    if result:
        lines += _headline(result)
    return "".join(lines)


def _headline(result: Mapping[str, Any]) -> Iterable[str]:
    shown = {
        name: show_number(result[name], result["unit"])
        for name in ("value", "ci95")
        if result.get(name) is not None
    }
    finite = [value for value in result["values"] if value is not None]
    spread = ""
    if "ci95" in shown:
        spread = (
            f" <small>&plusmn; {shown['ci95']} (95% confidence interval of the mean of "
            f"{len(finite)} networks with different seeds)</small>"
        )
    unit = "" if result["unit"] == "%" else f" <small>{html.escape(result['unit'])}</small>"
    yield f'<div class="value">{shown.get("value", "no value")}{unit}{spread}</div>'
    parts = [html.escape(result["metric"])]
    counts = (("parameters", "parameters"), ("steps", "training steps"))
    parts += [f"{result[name]:,} {label}" for name, label in counts if result.get(name) is not None]
    yield f"<div>{'; '.join(parts)}</div>"
    lines = list(result.get("notes") or ())
    if len(finite) > 1:
        each = ", ".join(show_number(value, result["unit"]) for value in finite)
        lines.insert(0, f"each network: {each}")
    lost = diverged(result["values"])
    for line in [*lines, *([lost] if lost else [])]:
        yield f'<div class="soft">{html.escape(line)}</div>'


def _curves(rows: list[dict[str, Any]]) -> Iterable[str]:
    members = max((len(v) for row in rows for v in row.values() if isinstance(v, list)), default=1)
    note = f"line: mean of {members} networks; band: from the lowest to the highest"
    soft = f'<div class="soft">{note}</div>' if members > 1 else ""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        groups.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    for base, names in groups.items():
        series = {name: _series(rows, name) for name in names}
        chart = line_chart(f"{base} over the steps", series)
        if chart:
            shown = (("train" if name == base else name) for name in names)
            title = f"<strong>{html.escape(base)}</strong>"
            yield f"<figure>{title}{chart}{_legend(shown)}{soft}</figure>"


def _series(rows: list[dict[str, Any]], name: str) -> Series:
    with_name = [row for row in rows if name in row]
    steps = np.array([row["step"] for row in with_name])
    values = np.array([np.atleast_1d(np.array(row[name], float)) for row in with_name])
    return Series(steps, values.reshape(len(with_name), -1))  # [points, seeds]


def _legend(names: Iterable[str]) -> str:
    keys = (
        f'<span><i style="background:var(--series-{index % NUM_COLORS})"></i>{html.escape(name)}'
        "</span>"
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def _images(files: Iterable[Path], captions: Mapping[str, str]) -> Iterable[str]:
    for path in files:
        if path.suffix in _MEDIA_TYPES and path.stem not in _DRAWN_AS_CHARTS:
            content = base64.b64encode(path.read_bytes()).decode()
            name = html.escape(path.stem.replace("_", " "))
            caption = html.escape(captions.get(path.stem, ""))
            yield (
                f'<figure class="wide"><img alt="{name}" '
                f'src="data:{_MEDIA_TYPES[path.suffix]};base64,{content}">'
                f"<figcaption><strong>{name}</strong> {caption}</figcaption></figure>"
            )


def _metrics(result: Mapping[str, Any]) -> str:
    hidden = {*_HEADLINE, *_ENVIRONMENT, *_TIMES, "train_seconds", "wall_seconds"}
    return _table({name: value for name, value in result.items() if name not in hidden})


def _time(result: Mapping[str, Any]) -> str:
    parts = {label: result.get(name) or 0.0 for name, label in _TIMES.items()}
    parts = {label: seconds for label, seconds in parts.items() if seconds > 0}
    if not parts or not result.get("train_seconds"):
        return ""
    bar = "".join(
        f'<div style="flex:{seconds:.4f};background:var(--series-{index % NUM_COLORS})"></div>'
        for index, seconds in enumerate(parts.values())
    )
    legend = _legend(f"{label} {seconds:.1f} s" for label, seconds in parts.items())
    share = (result.get("batches_seconds") or 0.0) / max(result["train_seconds"], 1e-9)
    return (
        f'<div class="card"><div class="bar">{bar}</div>{legend}<div class="soft">the device '
        f"waited for data in at most {share:.1%} of the training</div></div>"
    )


def _again(result: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    command = result.get("command")
    versions = {name: result.get(name) for name in _ENVIRONMENT if name != "command"}
    return (
        (f"<pre>{html.escape(command)}</pre>" if command else "")
        + _table(versions)
        + (f"<details><summary>all options</summary>{_table(options)}</details>" if options else "")
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _cards(figures: Iterable[str]) -> str:
    inside = "".join(figures)
    return f'<div class="cards">{inside}</div>' if inside else ""


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(_format(value))}</td>"
        "</tr>"
        for name, value in values.items()
        if value is not None
    )
    return f"<table>{rows}</table>" if rows else ""


def _format(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
