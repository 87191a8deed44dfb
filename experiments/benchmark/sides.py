"""What a side is: a module that prepares a workload with the means of one library.

A side has `prepare(settings) -> Prepared` and the tuple `LIBRARIES`, the packages whose versions
its numbers depend on. It imports its library when it is imported itself, in the process of its own
that `worker` runs.
"""

from __future__ import annotations

import dataclasses
import gzip
import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from experiments.benchmark.workloads import STARTS, WORKLOADS, Workload, shrink


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a process of the benchmark is told, as JSON on its command line.

    Attributes:
        module: the side.
        variant: which of the side's ways to compute.
        name: of the workload.
        tiny: shrink the workload.
        threads: cores to compute on.
        platform: "cpu" or "gpu", where all is computed.
        images: file of Fashion-MNIST's training images, for an epoch.
        labels: file of their labels.
    """

    module: str
    variant: str
    name: str
    threads: int
    platform: str = "cpu"
    tiny: bool = False
    images: str = ""
    labels: str = ""

    @property
    def workload(self) -> Workload:
        """The workload that is meant."""
        workload = (WORKLOADS | STARTS)[self.name]
        return shrink(workload) if self.tiny else workload


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A workload, ready to be timed.

    Attributes:
        run: does a number of steps, waits for the last one and returns its loss, None if there is
            none.
        num_parameters: trainable numbers of one network.
        steps_per_call: steps that `run` is asked for.
        parts: by how much the time of such a call is divided.
        steps_first: steps of the first call, whose time tells how long compilation takes.
        details: further numbers, asked for at the end.
    """

    run: Callable[[int], float | None]
    num_parameters: int
    steps_per_call: int
    parts: int
    steps_first: int = 1
    details: Callable[[], Mapping[str, Any]] = dict


class Side(Protocol):
    """A module with a library's way to compute the workloads."""

    LIBRARIES: tuple[str, ...]

    def prepare(self, settings: Settings) -> Prepared:
        """Build the network, its data and its step, which is compiled by its first call."""
        ...


def ready(
    workload: Workload, run: Callable[[int], float | None], num_parameters: int, **changes: Any
) -> Prepared:
    """Describe a workload whose steps are counted and timed in the usual way.

    Args:
        workload: what is computed.
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
    """Read a file of Fashion-MNIST as its users do who have no library for it.

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
