"""Writers for `fit`: they get the rows of a run, and the images and histograms of its hooks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets.storage import atomic_file
from jaxnets.training.history import History, Row, Writer
from jaxnets.training.media import Histogram, Image, Medium


class _JsonlWriter:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def start(self, history: History, step: int) -> None:
        with atomic_file(self._path) as file:
            file.writelines(_line(row).encode() for row in history.rows)
        self._file = self._path.open("a")

    def __call__(self, row: Row) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: Row) -> str:
    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(one) for one in value]
        return value if math.isfinite(value) else None  # JSON has no NaN

    return json.dumps({name: finite(value) for name, value in row.items()}) + "\n"


def jsonl_writer(path: str | os.PathLike[str]) -> Writer:
    """Write one line of JSON per row.

    At the start of a run the file is replaced, atomically, by the rows of its history. So the file
    of a resumed run is equal, byte for byte, to that of an uninterrupted one.

    Args:
        path: the file, such as `run/metrics.jsonl`.

    Returns:
        Writer for `fit`.
    """
    return _JsonlWriter(path)


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    """Yield (name, number) of a row; in a population (name/member, number)."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{name}/{member}", one) for member, one in enumerate(value))
        elif name != "step":
            yield name, value


class _TensorBoardWriter:
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError(
                "tensorboard_writer needs tensorboardX: pip install 'jaxnets[tensorboard]'"
            ) from error
        self._directory = str(directory)
        self._open = tensorboardX.SummaryWriter

    def start(self, history: History, step: int) -> None:
        # Hide what a killed run wrote after its last checkpoint.
        self._events = self._open(self._directory, purge_step=step + 1 if step else None)

    def __call__(self, row: Row) -> None:
        for name, value in _scalars(row):
            self._events.add_scalar(name, value, row["step"])

    def show(self, step: int, name: str, medium: Medium) -> None:
        if isinstance(medium, Image):
            self._events.add_image(name, medium.as_uint8(), step, dataformats="HWC")
            return
        counts, edges = np.asarray(medium.counts), np.asarray(medium.edges, np.float64)
        centers = (edges[1:] + edges[:-1]) / 2
        self._events.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=counts @ centers,
            sum_squares=counts @ centers**2,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self._events.close()


def tensorboard_writer(directory: str | os.PathLike[str]) -> Writer:
    """Write every number, image and histogram to TensorBoard event files.

    Numbers are scalars; in a population their names are `name/member`.

    Args:
        directory: folder of the event files.

    Returns:
        Writer for `fit`.

    Raises:
        ImportError: tensorboardX is not installed.
    """
    return _TensorBoardWriter(directory)


class _WandbWriter:
    def __init__(self, options: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb_writer needs wandb: pip install 'jaxnets[wandb]'") from error
        self._wandb: Any = wandb
        self._options = options

    def start(self, history: History, step: int) -> None:
        self._run = self._wandb.init(**self._options)

    def __call__(self, row: Row) -> None:
        self._run.log(dict(_scalars(row)), step=row["step"])

    def show(self, step: int, name: str, medium: Medium) -> None:
        if isinstance(medium, Histogram):
            pair = np.asarray(medium.counts), np.asarray(medium.edges)
            shown = self._wandb.Histogram(np_histogram=pair)
        else:
            pixels = medium.as_uint8()
            shown = self._wandb.Image(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        self._run.log({name: shown}, step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_writer(**options: Any) -> Writer:
    """Write every number, image and histogram to a run of Weights & Biases.

    In a population the names of numbers are `name/member`. To continue a run after a kill, give it
    an `id` and `resume="allow"`: the steps after its last checkpoint are logged again, with the
    same values.

    Args:
        options: arguments of `wandb.init`, such as project="digits", name="first",
            config={"learning_rate": 1e-3}, mode="offline".

    Returns:
        Writer for `fit`, which starts the run and finishes it.

    Raises:
        ImportError: wandb is not installed.

    Example:
        >>> fit(step, state, batches, num_steps=100,
        ...     writers=[wandb_writer(project="digits")])  # doctest: +SKIP
    """
    return _WandbWriter(options)
