"""Figures of generated images in [0, 1]: grids, animations, scatter plots of codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

# Small images are enlarged by an integer factor to about this many pixels a side.
_SHOWN_SIDE = 56


def to_pixels(images: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map images in [low, high] to uint8; values outside are clipped, NaN becomes `low`."""
    shares = (np.nan_to_num(images, nan=low) - low) / (high - low)
    return np.rint(255 * np.clip(shares, 0, 1)).astype(np.uint8)


def grid(images: np.ndarray, path: Path) -> None:
    """Draw images in rows and columns.

    Args:
        images: [rows, columns, height, width, channels], uint8, or floating in [0, 1]; one channel
            is gray.
        path: PNG file; its folder is created.
    """
    rows, columns, height, width, channels = images.shape
    pixels = images if images.dtype == np.uint8 else to_pixels(images, 0, 1)
    factor = max(1, _SHOWN_SIDE // height)
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3)
    border = ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))
    pixels = np.pad(pixels, border, constant_values=255)
    # [rows, height, columns, width, channels] -> [rows * height, columns * width, channels]
    sheet = pixels.swapaxes(1, 2).reshape(
        rows * (height * factor + 2), columns * (width * factor + 2), channels
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(path)


def arrange(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Arrange images in rows, for `grid`.

    Args:
        images: [images, height, width, channels].
        columns: images per row; by default about as many as rows.

    Returns:
        [rows, columns, height, width, channels], without an incomplete last row.
    """
    columns = max(1, round(len(images) ** 0.5)) if columns is None else columns
    rows = len(images) // columns
    return images[: rows * columns].reshape(rows, columns, *images.shape[1:])


def film(frames: Sequence[Path], path: Path, *, seconds: float = 0.25) -> None:
    """Join frames to an animation that loops, with a pause at the end.

    Args:
        frames: PNG files of one size, in order; if empty, nothing is written.
        path: GIF file.
        seconds: duration of a frame.
    """
    if not frames:
        return
    pictures = []
    for frame in frames:
        with Image.open(frame) as opened:
            pictures.append(opened.convert("P"))
    each = round(1000 * seconds)
    lengths = [each] * (len(pictures) - 1) + [8 * each]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=lengths, loop=0, disposal=2
    )


def code_map(codes: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: Path) -> None:
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
    figure, axis = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    colors = plt.get_cmap("tab10" if len(class_names) <= 10 else "tab20")
    for index, name in enumerate(class_names):
        points = codes[labels == index]
        axis.scatter(points[:, 0], points[:, 1], s=4, color=colors(index % colors.N), label=name)
    axis.set(xlabel=names[0], ylabel=names[1], title="codes of the test images")
    axis.legend(frameon=False, markerscale=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
