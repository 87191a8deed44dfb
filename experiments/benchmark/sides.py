"""The interface of a side: a module that prepares a workload with one library.

A side has `prepare(settings) -> Prepared` and the tuple `LIBRARIES`, the packages whose versions
its measurements depend on. It imports its library at the top, in the process of `worker`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from experiments.benchmark.workloads import STARTS, WORKLOADS, Workload, shrink


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a process of the benchmark, passed as JSON on its command line.

    Attributes:
        module: the side.
        variant: of the side.
        name: of the workload.
        tiny: shrink the workload.
        threads: number of cores.
        platform: "cpu" or "gpu".
        images: file of Fashion-MNIST's training images, for an epoch.
        labels: file of their labels.
        pretrained: folder of a network.
        sentences: text file with one sentence a line.
    """

    module: str
    variant: str
    name: str
    threads: int
    platform: str = "cpu"
    tiny: bool = False
    images: str = ""
    labels: str = ""
    pretrained: str = ""
    sentences: str = ""

    def as_json(self) -> str:
        """Return the settings that are not the defaults, which an older worker knows by itself."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        chosen = dataclasses.asdict(self).items()
        return json.dumps({name: value for name, value in chosen if value != defaults[name]})

    @property
    def workload(self) -> Workload:
        """The workload of this name."""
        workload = (WORKLOADS | STARTS)[self.name]
        return shrink(workload) if self.tiny else workload


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A workload, ready to be timed.

    Attributes:
        run: does a number of steps, waits for the last one and returns its loss, or None.
        num_parameters: of one network.
        steps_per_call: argument of `run` in the timed calls.
        parts: divisor of the time of a call.
        steps_first: argument of `run` in the first call, which compiles.
        before: is called before each timed call.
        details: further measurements, called at the end.
    """

    run: Callable[[int], float | None]
    num_parameters: int
    steps_per_call: int
    parts: int
    steps_first: int = 1
    before: Callable[[], object] = lambda: None
    details: Callable[[], Mapping[str, Any]] = dict


class Side(Protocol):
    """A module that computes the workloads with one library."""

    LIBRARIES: tuple[str, ...]

    def prepare(self, settings: Settings) -> Prepared:
        """Build the network, its data and its step; the first call compiles."""
        ...


def ready(
    workload: Workload, run: Callable[[int], float | None], num_parameters: int, **changes: Any
) -> Prepared:
    """Return a `Prepared` with the step counts of a workload.

    Args:
        workload: to measure.
        run: see `Prepared`.
        num_parameters: see `Prepared`.
        changes: other fields of `Prepared`.
    """
    steps, parts = workload.steps_per_call, workload.steps_per_call
    if workload.task == "epoch":
        parts = 1
    if workload.new_tokens:
        steps, parts = 1, sum(workload.new_tokens)
    first = steps if workload.task == "epoch" else 1
    fields = {"steps_per_call": steps, "parts": parts, "steps_first": first}
    return Prepared(run, num_parameters, **(fields | changes))


def read_idx(path: str) -> np.ndarray:
    """Read a file of Fashion-MNIST without a library.

    Args:
        path: IDX file of bytes, gzipped or not.

    Returns:
        uint8 of the shape in the header.
    """
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        content = file.read()
    num_axes = content[3]
    shape = struct.unpack(f">{num_axes}I", content[4 : 4 + 4 * num_axes])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
