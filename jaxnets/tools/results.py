"""The result of a run as a file, which `compare` and the report read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from jaxnets.metrics.supervised import confidence_interval
from jaxnets.storage import read_json, write_json
from jaxnets.training.history import History

RESULT_FILE = "result.json"


class Result(TypedDict):
    """The content of `result.json`; it may have further entries.

    Attributes:
        dataset: name of the data set.
        metric: name of the metric, such as "test accuracy".
        unit: "%" if the values are fractions, else the unit.
        values: one per seed; null for a network that diverged.
        value: mean of the values; null if all networks diverged.
        ci95: half-width of its 95% confidence interval; null with fewer than two values.
        seeds: number of networks.
        experiment: name of the experiment.
        model: name of the network.
        steps: of the training.
        parameters: number of parameters of one network.
        train_seconds: of the training of all networks; the other times are parts of it, or of the
            final evaluation.
        compile_seconds: of the first call, which compiles.
        step_seconds: of the later calls, without evaluation, checkpoints and batches.
        evaluation_seconds: of the evaluations during the training.
        checkpoints_seconds: of saving.
        batches_seconds: of waiting for batches.
        measure_seconds: of the final evaluation.
        command: that repeats the run.
        notes: sentences on what to compare the value with.
        captions: {name of a picture, without its suffix: sentence}.
    """

    dataset: str
    metric: str
    unit: str
    values: list[float | None]
    value: NotRequired[float | None]
    ci95: NotRequired[float | None]
    seeds: NotRequired[int]
    experiment: NotRequired[str | None]
    model: NotRequired[str | None]
    steps: NotRequired[int | None]
    parameters: NotRequired[int | None]
    train_seconds: NotRequired[float | None]
    compile_seconds: NotRequired[float | None]
    step_seconds: NotRequired[float | None]
    evaluation_seconds: NotRequired[float | None]
    checkpoints_seconds: NotRequired[float | None]
    batches_seconds: NotRequired[float | None]
    measure_seconds: NotRequired[float | None]
    command: NotRequired[str]
    notes: NotRequired[list[str]]
    captions: NotRequired[dict[str, str]]


def make_result(
    *,
    dataset: str,
    metric: str,
    values: npt.ArrayLike,
    unit: str = "%",
    history: History | None = None,
    **details: Any,
) -> dict[str, Any]:
    """Return the content of `result.json`.

    Args:
        dataset: name of the data set.
        metric: name of the metric.
        values: one number, or one per seed, [seeds].
        unit: "%" if the values are fractions, else a unit such as "nats per character".
        history: of the training, for steps and times.
        details: further entries, such as parameters=21_482, command="python train.py",
            model="convnet", notes=["published: 99.2%"], captions={"kernels": "first layer"}, or
            any of your own.

    Returns:
        The entries of `Result`, numbers rounded to 6 decimals and times to 0.01 s.

    Raises:
        ValueError: no value, or more than one axis.
    """
    array = np.atleast_1d(np.asarray(values, np.float64))
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values have shape {array.shape}; give one number per seed, [seeds]")
    value, interval = confidence_interval(array[np.isfinite(array)])  # the file has all of them
    result: dict[str, Any] = {
        "dataset": dataset,
        "metric": metric,
        "unit": unit,
        "value": round(value, 6) if np.isfinite(value) else None,
        "ci95": round(interval, 6) if np.isfinite(interval) else None,
        "values": [round(float(v), 6) if np.isfinite(v) else None for v in array],
        "seeds": len(array),
    }
    if history is not None:
        result |= {
            "steps": history.step,
            "train_seconds": round(history.seconds + history.first_call_seconds, 2),
            "compile_seconds": round(history.first_call_seconds, 2),
            "step_seconds": round(history.seconds - sum(history.spent.values()), 2),
            **{f"{name}_seconds": round(spent, 2) for name, spent in sorted(history.spent.items())},
        }
    return {**result, **details}


def write_result(
    folder: str | os.PathLike[str],
    *,
    dataset: str,
    metric: str,
    values: npt.ArrayLike,
    unit: str = "%",
    history: History | None = None,
    **details: Any,
) -> Path:
    """Write the result of a run, so that `python -m jaxnets compare` and the report show it.

    Args:
        folder: of the run, created if missing.
        dataset: name of the data set; only runs with the same one are compared.
        metric: name of the metric, such as "test accuracy".
        values: one number, or one per seed, [seeds]; NaN for a network that diverged.
        unit: "%" if the values are fractions, else a unit such as "nats per character".
        history: of the training, for steps and times.
        details: further entries, such as parameters=21_482, command="python train.py",
            model="convnet", notes=["published: 99.2%"], captions={"kernels": "first layer"}, or
            any of your own.

    Returns:
        The file, `result.json`; see `jaxnets.tools.results.Result`.

    Raises:
        ValueError: no value, or more than one axis.
        TypeError: a detail is not serializable as JSON.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_result(folder, dataset="digits", metric="accuracy", values=[0.9, 0.94])
        ...     read_result(folder)["value"]
        0.92
    """
    path = Path(folder) / RESULT_FILE
    content = make_result(
        dataset=dataset, metric=metric, values=values, unit=unit, history=history, **details
    )
    write_json(path, content)
    return path


def read_result(folder: str | os.PathLike[str]) -> Result:
    """Read the result of a finished run.

    Args:
        folder: of the run.

    Returns:
        Its content, checked.

    Raises:
        FileNotFoundError: it has no `result.json`.
        ValueError: that is not the result of a run; the message has the file and the line.
    """
    document = read_json(
        Path(folder) / RESULT_FILE,
        what="the result of a run",
        remedy="run it again",
        if_missing="name the folder of a finished run",
    )
    result = document.check(Result)
    if not result["values"]:
        raise document.error("it has no value", key="values")
    if result.get("seeds", len(result["values"])) != len(result["values"]):
        raise document.error(
            f"seeds is {result['seeds']}, but there are {len(result['values'])} values", key="seeds"
        )
    return result


def diverged(values: Sequence[float | None]) -> str | None:
    """Return a sentence on networks without a value, None if all have one.

    Args:
        values: one per seed, None for a network that diverged.
    """
    lost = sum(value is None for value in values)
    if not lost:
        return None
    return f"{lost} of {len(values)} networks diverged and do not count"
