"""Sheets and animations of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# Small images are enlarged by an integer factor to about this many pixels a side.
_SHOWN_SIDE = 56


def to_pixels(images: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map images in [low, high] to uint8; values outside are clipped, NaN becomes `low`.

    Args:
        images: floating, of any shape.
        low: the value of black, 0.
        high: the value of white, 255.

    Returns:
        uint8 of the same shape.
    """
    shares = (np.nan_to_num(images, nan=low) - low) / (high - low)
    return np.rint(255 * np.clip(shares, 0, 1)).astype(np.uint8)


def grid(images: np.ndarray, path: str | os.PathLike[str]) -> None:
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
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


def film(
    frames: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], *, seconds: float = 0.25
) -> None:
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
