"""Ratios of times with their range, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.benchmark.competitors import REFERENCE

#: Name of the comparison with the fastest variant of torch.
BEST_TORCH = "best torch"


def compare(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Divide the times of the reference by those of the others.

    Args:
        measured: as returned by `driver.measure`.

    Returns:
        {competitor: {"ratio", "low", "high"}}: median, minimum and maximum over the rounds of the
        ratio of the median times in a round, below 1 if the reference is faster. It includes
        `BEST_TORCH`, with the name of the fastest variant of torch as "which". Empty without the
        reference.
    """
    competitors = measured["competitors"]
    if REFERENCE not in competitors:
        return {}
    own = competitors[REFERENCE]
    ratios: dict[str, dict[str, Any]] = {}
    for name, other in competitors.items():
        if name != REFERENCE:
            each = np.divide(own["rounds"], other["rounds"])
            ratios[name] = {
                "ratio": float(np.median(each)),
                "low": float(each.min()),
                "high": float(each.max()),
            }
    torch = [name for name in ratios if name.split("-")[0] in ("torch", "transformers")]
    if torch:
        best = min(torch, key=lambda name: competitors[name]["median"])
        ratios[BEST_TORCH] = {**ratios[best], "which": best}
    return ratios


def table(name: str, measured: Mapping[str, Any]) -> str:
    """Return the measurements of a workload as a text table.

    Args:
        name: of the workload.
        measured: as returned by `driver.measure`, with its "ratios".
    """
    heads = (measured["unit"], "first call", "peak memory", f"{REFERENCE} / it", "(rounds)")
    rows = [(name, *heads)]
    ratios = measured["ratios"]
    for competitor, numbers in measured["competitors"].items():
        times = (duration(numbers["median"]), duration(numbers["first_seconds"]))
        row = (competitor, *times, f"{numbers['peak_bytes'] / 2**20:.0f} MiB")
        rows.append((*row, *_ratio(ratios.get(competitor))))
    best = ratios.get(BEST_TORCH)
    if best is not None:
        rows.append((f"{BEST_TORCH} ({best['which']})", "", "", "", *_ratio(best)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    for competitor, reason in measured["left_out"].items():
        lines.append(f"left out: {competitor} ({reason})")
    for competitor, numbers in measured["competitors"].items():
        if measured["unit"] == "token":
            lines.append(f"{competitor}: {1 / numbers['median']:.1f} tokens a second")
        lines += [f"{competitor}: {key} {value}" for key, value in numbers["details"].items()]
    return "\n".join(lines)


def _ratio(ratio: Mapping[str, Any] | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio['ratio']:.2f}", f"({ratio['low']:.2f} to {ratio['high']:.2f})"


def duration(seconds: float) -> str:
    """Format a time with at least three digits, in ms or s.

    Example:
        >>> duration(0.00271828), duration(12.345), duration(0.1234)
        ('2.72 ms', '12.3 s', '123 ms')
    """
    value, unit = (1000 * seconds, "ms") if seconds < 1 else (seconds, "s")
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 2
    return f"{value:.{min(max(digits, 0), 6)}f} {unit}"
