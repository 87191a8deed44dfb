"""Figures of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from jaxnets.training.history import History


def curves(history: History, panels: dict[str, Sequence[str]], path: Path) -> None:
    """Draw metrics over steps: the mean over seeds as a line, their range as a band.

    Args:
        history: its values are lists with one value per seed.
        panels: {title of a panel: names of its metrics}.
        path: PNG file.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            steps, values = history.column(name)
            if not steps:
                continue
            # Seeds that diverged have no values.
            table = np.ma.masked_invalid(np.array(values, np.float64).reshape(len(steps), -1))
            (line,) = axis.plot(steps, table.mean(1), label=name, linewidth=1.5)
            if table.shape[1] > 1:
                band = table.min(1), table.max(1)
                axis.fill_between(steps, *band, color=line.get_color(), alpha=0.25, linewidth=0)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    _save(figure, path)


def confusion(counts: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, colored by the fraction of each true class.

    Args:
        counts: [true class, predicted class].
        class_names: names in the order of the classes.
        path: PNG file.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_xticks(ticks, class_names, rotation=45, ha="right")
    axis.set_yticks(ticks, class_names)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            text = f"{count:.0f}" if count >= 1 else f"{count:.1f}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    figure.colorbar(image, label="fraction of the true class")
    _save(figure, path)


def mistakes(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    path: Path,
    *,
    num_shown: int = 24,
) -> None:
    """Draw the misclassified images, the most confident predictions first.

    Args:
        images: uint8 [examples, height, width, channels].
        labels: integer [examples].
        probabilities: [examples, num_classes].
        class_names: names in the order of the classes.
        path: PNG file.
        num_shown: maximum number of images.
    """
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:num_shown]
    columns = min(8, max(4, len(worst)))
    rows = max(1, -(-len(worst) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.9 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, worst, strict=False):
        image = images[index].squeeze(-1) if images.shape[-1] == 1 else images[index]
        axis.imshow(image, cmap="gray" if image.ndim == 2 else None)
        guess, confidence = class_names[predicted[index]], probabilities[index].max()
        axis.set_title(f"{guess} {confidence:.0%}\nnot {class_names[labels[index]]}", fontsize=8)
    figure.suptitle(f"{len(wrong)} of {len(labels)} wrong; the most confident mistakes")
    _save(figure, path)


def attention(
    weights: np.ndarray, source: Sequence[str], target: Sequence[str], path: Path
) -> None:
    """Draw cross-attention probabilities.

    Args:
        weights: [target, source]; the rows sum to 1.
        source: texts of the source tokens.
        target: texts of the target tokens.
        path: PNG file.
    """
    size = 1.5 + 0.3 * len(source), 1.2 + 0.3 * len(target)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(weights, cmap="Grays", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(source)), source, rotation=90)
    axis.set_yticks(range(len(target)), target)
    axis.xaxis.tick_top()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
