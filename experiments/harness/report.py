"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import registry
from experiments.pictures.svg_chart import NUM_COLORS, Series, line_chart
from jaxnets.tools.comparison import show_number
from jaxnets.tools.results import diverged

_MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif"}
# Images that the report shows as charts.
_DRAWN_AS_CHARTS = frozenset({"curves"})
_HEADLINE = ("value", "ci95", "values", "unit", "metric", "experiment", "dataset", "model")
_ENVIRONMENT = ("command", "python", "jax", "flax", "optax", "devices", "cpu_cores")
_TIMES = {
    "compile_seconds": "first call, compilation",
    "step_seconds": "steps, progress images",
    "evaluation_seconds": "evaluation during training",
    "checkpoints_seconds": "checkpoints",
    "batches_seconds": "waiting for batches",
    "measure_seconds": "final evaluation, images",
}

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


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write `report.html` from the files of a run.

    Args:
        folder: with `config.json`, `metrics.jsonl` and images.
        result: content of `result.json`.

    Returns:
        Path of the report.
    """
    config = json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sections = [
        _head(result),
        _section("Curves", _cards(_curves(rows))),
        _section("Images", _cards(_images(folder))),
        _section("Metrics", _metrics(result)),
        _section("Time", _time(result)),
        _section("Reproduce", _again(result, config)),
    ]
    title = f"{result['experiment']}, {result['dataset']}"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _head(result: Mapping[str, Any]) -> str:
    names = filter(None, (result["experiment"], result["dataset"], result["model"]))
    what = ", ".join(dict.fromkeys(names))  # experiment and data set may have one name
    value = _show(result["value"], result["unit"])
    spread = ""
    if result["ci95"] is not None:
        half = show_number(result["ci95"], result["unit"])
        num_values = sum(value is not None for value in result["values"])
        spread = f" <small>&plusmn; {half} (95%, {num_values} seeds)</small>"
    unit = "" if result["unit"] == "%" else f" <small>{html.escape(result['unit'])}</small>"
    lines = [
        f"<h1>{html.escape(what)}</h1>",
        f'<div class="value">{value}{unit}{spread}</div>',
        f"<div>{html.escape(result['metric'])}; {result['parameters']:,} parameters, "
        f"{result['steps']:,} steps</div>",
    ]
    if result["seeds"] > 1:
        each = ", ".join(_show(value, result["unit"]) for value in result["values"])
        lines.append(f'<div class="soft">each seed: {each}</div>')
    lost = diverged(result["values"])
    if lost:
        lines.append(f"<div>{lost}</div>")
    lines += [f'<div class="soft">{html.escape(line)}</div>' for line in _references(result)]
    return "".join(lines)


def _show(value: float | None, unit: str) -> str:
    return "none" if value is None else show_number(value, unit)


def _references(result: Mapping[str, Any]) -> Iterable[str]:
    """Return the registered value and reference of the same command, whatever its --out."""
    words = result["command"].split(" --out ")[0]
    for entry in registry.load():
        if entry.command == words:
            yield f"registered: {entry.show(entry.value, entry.ci95)}"
            if entry.reference:
                yield f"reference: {entry.reference}"


def _curves(rows: list[dict[str, Any]]) -> Iterable[str]:
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        groups.setdefault(name.rsplit("/", 1)[-1], []).append(name)
    for base, names in groups.items():
        series = {name: _series(rows, name) for name in names}
        chart = line_chart(f"{base} over the steps", series)
        if chart:
            shown = (("train" if name == base else name) for name in names)
            yield f"<figure><strong>{html.escape(base)}</strong>{chart}{_legend(shown)}</figure>"


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


def _images(folder: Path) -> Iterable[str]:
    for path in sorted(folder.iterdir()):
        if path.suffix in _MEDIA_TYPES and path.stem not in _DRAWN_AS_CHARTS:
            content = base64.b64encode(path.read_bytes()).decode()
            name = html.escape(path.stem.replace("_", " "))
            yield (
                f'<figure class="wide"><img alt="{name}" '
                f'src="data:{_MEDIA_TYPES[path.suffix]};base64,{content}">'
                f"<figcaption>{name}</figcaption></figure>"
            )


def _metrics(result: Mapping[str, Any]) -> str:
    hidden = {*_HEADLINE, *_ENVIRONMENT, *_TIMES, "train_seconds", "wall_seconds"}
    return _table({name: value for name, value in result.items() if name not in hidden})


def _time(result: Mapping[str, Any]) -> str:
    parts = {label: result.get(name) or 0.0 for name, label in _TIMES.items()}
    parts = {label: seconds for label, seconds in parts.items() if seconds > 0}
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


def _again(result: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    versions = {name: result[name] for name in _ENVIRONMENT if name != "command"}
    return (
        f"<pre>{html.escape(result['command'])}</pre>{_table(versions)}"
        f"<details><summary>all options</summary>{_table(config)}</details>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _cards(figures: Iterable[str]) -> str:
    inside = "".join(figures)
    return f'<div class="cards">{inside}</div>' if inside else ""


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(_format(value))}</td>"
        "</tr>"
        for name, value in values.items()
        if value is not None
    )
    return f"<table>{''.join(rows)}</table>"


def _format(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
