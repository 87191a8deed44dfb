"""The bar chart of a run, as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a panel per workload: a bar per competitor, with its range over the rounds.

    Args:
        results: {workload: what `driver.measure` returned}.
        path: PNG file.
    """
    names = list(dict.fromkeys(n for each in results.values() for n in each["competitors"]))
    colors = {name: plt.get_cmap("tab10")(index % 10) for index, name in enumerate(names)}
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, (workload, measured) in zip(axes.flat, results.items(), strict=False):
        competitors = measured["competitors"]
        scale, unit = (1, "s") if max(_medians(competitors), default=0.0) >= 10 else (1000, "ms")
        for place, (name, numbers) in enumerate(competitors.items()):
            value, each = scale * numbers["median"], scale * np.array(numbers["rounds"])
            spread = [[max(value - each.min(), 0)], [max(each.max() - value, 0)]]
            axis.barh(place, value, xerr=spread, color=colors[name], ecolor="black", capsize=2)
            axis.annotate(
                f"{value:.3g}" if value < 1000 else f"{value:.0f}",
                (max(value, each.max()), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axis.set_yticks(range(len(competitors)), list(competitors), fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(f"{workload}, {unit} a {measured['unit']}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _medians(competitors: Mapping[str, Any]) -> list[float]:
    return [numbers["median"] for numbers in competitors.values()]
