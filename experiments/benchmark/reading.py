"""Reading a file: without the page cache, and with its peak of memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmark.sides import Prepared, Settings, ready

#: Seconds between two looks at the memory.
_INTERVAL = 0.0005


def reading(settings: Settings, read: Callable[[Path], Any], num_parameters: int) -> Prepared:
    """Return a workload "read" or "read-cold".

    Args:
        settings: of the process.
        read: reads a file and returns what holds its content.
        num_parameters: in the file.
    """
    path = Path(settings.pretrained) / "model.safetensors"

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            read(path)

    def before() -> None:
        if settings.workload.task == "read-cold":
            drop(path)

    def details() -> dict[str, Any]:
        return {"MiB above what stays": round(peak_above(lambda: read(path)) / 2**20, 1)}

    return ready(settings.workload, run, num_parameters, before=before, details=details)


def drop(path: Path) -> None:
    """Drop the pages of a file from the page cache."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())  # only written pages are dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_above(make: Callable[[], Any]) -> int:
    """Return by how many bytes the memory of this process exceeds, at most, what it is at the end.

    Args:
        make: makes what stays.
    """
    peak, done = _resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_INTERVAL):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = make()
    done.set()
    watcher.join()
    above = max(peak - _resident(), 0)
    del result
    return above


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
