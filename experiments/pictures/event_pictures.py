"""The images of a run folder in TensorBoard: those of its hooks, and the final ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import jaxnets as jn


class NewPictures:
    """A hook that returns the images that earlier hooks wrote to subfolders of the run.

    It returns the latest new image of each subfolder, as `pictures/subfolder`.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = self._drawn()

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> Mapping[str, jn.Image]:
        drawn = self._drawn()
        new = sorted(path for path, _ in drawn - self._known)
        self._known = drawn
        return {f"pictures/{path.parent.name}": _read(path) for path in new}

    def _drawn(self) -> set[tuple[Path, int]]:
        # With modification times: a resumed run overwrites some of them.
        return {(path, path.stat().st_mtime_ns) for path in self._folder.glob("*/*.png")}


def show_last(writer: Any, folder: Path, history: jn.History, step: int) -> None:
    """Write the final images of a run, `pictures/name`, to the event files of its log.

    Args:
        writer: one with `show`, closed.
        folder: of the run; its PNG files are written.
        history: of the run.
        step: its last one.
    """
    writer.start(history, step)
    for path in sorted(folder.glob("*.png")):
        writer.show(step, f"pictures/{path.stem}", _read(path))
    writer.close()


def _read(path: Path) -> jn.Image:
    with Image.open(path) as opened:
        image = opened if opened.mode in ("L", "RGB", "RGBA") else opened.convert("RGB")
        return jn.Image(np.asarray(image))
