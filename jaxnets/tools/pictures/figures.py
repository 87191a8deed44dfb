"""Figures of a run, as PNG files: curves, confusions, mistakes, attention, codes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxnets.training.history import History

try:  # figures without pyplot, which would choose a backend for the whole process
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "pictures need Matplotlib and Pillow: pip install 'jaxnets[pictures]'"
    ) from error


def curves(
    history: History, panels: Mapping[str, Sequence[str]], path: str | os.PathLike[str]
) -> None:
    """Draw metrics over steps: the mean over seeds as a line, their range as a band.

    Args:
        history: of one network, or of a population, whose rows have one value per seed.
        panels: {title of a panel: names of its metrics}.
        path: PNG file.
    """
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    num_networks = 1
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            steps, values = history.column(name)
            if not steps:
                continue
            # Networks that diverged have no values.
            table = np.ma.masked_invalid(np.array(values, np.float64).reshape(len(steps), -1))
            (line,) = axis.plot(steps, table.mean(1), label=name, linewidth=1.5)
            num_networks = max(num_networks, table.shape[1])
            if table.shape[1] > 1:
                band = table.min(1), table.max(1)
                axis.fill_between(steps, *band, color=line.get_color(), alpha=0.25, linewidth=0)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    if num_networks > 1:
        text = f"line: mean of {num_networks} networks; band: from the lowest to the highest"
        figure.suptitle(text, fontsize=9)
    _save(figure, path)


def confusion(
    counts: np.ndarray,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    num_networks: int = 1,
) -> None:
    """Draw a confusion matrix, colored by the fraction of each true class.

    Args:
        counts: [true class, predicted class]; the mean over the networks if there are several.
        class_names: names in the order of the classes.
        path: PNG file.
        num_networks: for the title.

    Raises:
        ValueError: another number of names than of classes.
    """
    _check_names(class_names, len(counts))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    several = f", mean of {num_networks} networks" if num_networks > 1 else ""
    axis.set(xlabel="predicted class", ylabel="true class", title=f"number of examples{several}")
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
    path: str | os.PathLike[str],
    *,
    num_shown: int = 24,
    num_networks: int = 1,
) -> None:
    """Draw the misclassified images, the most confident predictions first.

    Args:
        images: uint8 [examples, height, width, channels].
        labels: integer [examples].
        probabilities: [examples, num_classes]; the mean over the networks if there are several.
        class_names: names in the order of the classes.
        path: PNG file.
        num_shown: maximum number of images.
        num_networks: for the title.

    Raises:
        ValueError: another number of names than of classes.
    """
    _check_names(class_names, probabilities.shape[1])
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:num_shown]
    columns = min(8, max(4, len(worst)))
    rows = max(1, -(-len(worst) // columns))
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, worst, strict=False):
        image = images[index].squeeze(-1) if images.shape[-1] == 1 else images[index]
        axis.imshow(image, cmap="gray" if image.ndim == 2 else None)
        guess, confidence = class_names[predicted[index]], probabilities[index].max()
        axis.set_title(f"{guess} {confidence:.0%}\nnot {class_names[labels[index]]}", fontsize=8)
    whose = "the network's predictions"
    if num_networks > 1:
        whose = f"the predictions of {num_networks} networks together (mean probabilities)"
    shown = "no mistakes to show"
    if len(worst):
        shown = "the most confident mistakes: predicted class, its probability, true class"
    figure.suptitle(f"{len(wrong)} of {len(labels)} of {whose} are wrong;\n{shown}", fontsize=9)
    _save(figure, path)


def attention(
    weights: np.ndarray, source: Sequence[str], target: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draw cross-attention probabilities.

    Args:
        weights: [target, source]; the rows sum to 1.
        source: texts of the source tokens.
        target: texts of the target tokens.
        path: PNG file.
    """
    size = 1.5 + 0.3 * len(source), 1.2 + 0.3 * len(target)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.imshow(weights, cmap="Grays", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(source)), source, rotation=90)
    axis.set_yticks(range(len(target)), target)
    axis.xaxis.tick_top()
    _save(figure, path)


def code_map(
    codes: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draw a scatter plot of codes, colored by class.

    Codes of other than two dimensions are projected to their first two principal components.

    Args:
        codes: [examples, features].
        labels: integer [examples].
        class_names: names in the order of the classes.
        path: PNG file.
    """
    names = ("first dimension", "second dimension")
    if codes.shape[1] != 2:
        centered = codes - codes.mean(axis=0)
        _, _, components = np.linalg.svd(centered, full_matrices=False)
        flat = centered @ components[:2].T
        codes = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
        names = ("first principal component", "second principal component")
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = figure.subplots()
    colors = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    for index, name in enumerate(class_names):
        points = codes[labels == index]
        axis.scatter(points[:, 0], points[:, 1], s=4, color=colors(index % colors.N), label=name)
    axis.set(xlabel=names[0], ylabel=names[1], title="codes of the test images")
    axis.legend(frameon=False, markerscale=4, fontsize=8)
    _save(figure, path)


def _check_names(class_names: Sequence[str], num_classes: int) -> None:
    if len(class_names) != num_classes:
        raise ValueError(
            f"{len(class_names)} names for {num_classes} classes; give one name per class, in "
            "their order"
        )


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
