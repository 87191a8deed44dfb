"""A process of the benchmark: prepares one workload with one side, and computes on command.

Commands are lines of JSON on standard input, answers are lines of JSON on standard output. What the
libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import resource
import sys
import time
import traceback
from typing import Any

from experiments.benchmark.sides import Prepared, Settings


class Timer:
    """Times the calls of a prepared workload.

    Attributes:
        settings: of this process.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.libraries: tuple[str, ...] = ()
        self.prepared: Prepared
        self.loss: float | None = None
        self.longest = 0.0

    def prepare(self) -> dict[str, Any]:
        """Import the library and build everything."""
        started = time.perf_counter()
        side = importlib.import_module(self.settings.module)
        imported = time.perf_counter()
        self.libraries = side.LIBRARIES
        self.prepared = side.prepare(self.settings)
        # After `prepare`: this starts JAX, and `jaxnets.keep_freed_memory` has to precede that.
        check_platform(self.settings.platform, sys.modules.get("jax"))
        return {
            "import_seconds": imported - started,
            "prepare_seconds": time.perf_counter() - imported,
            "num_parameters": self.prepared.num_parameters,
        }

    def first(self) -> dict[str, Any]:
        """Make the first call, which compiles."""
        return {"seconds": self._time(self.prepared.steps_first), "loss": self.loss}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Time at least one call, and further calls until `seconds` have passed.

        An untimed call before them warms up the caches, which the other processes have evicted. It
        is omitted if a call is as long as the turn.
        """
        steps = self.prepared.steps_per_call
        if self.longest < seconds:
            self.longest = self._time(steps)
        times: list[float] = []
        while not times or sum(times) < seconds:
            times.append(self._time(steps))
        self.longest = max(times)
        return {"times": [each / self.prepared.parts for each in times], "loss": self.loss}

    def finish(self) -> dict[str, Any]:
        """Return memory, details and versions."""
        return {
            "peak_bytes": self._peak_bytes(),
            "details": dict(self.prepared.details()),
            "versions": {name: _version(name) for name in self.libraries},
        }

    def _peak_bytes(self) -> int:
        """Return the peak memory of the device, or of this process on a CPU."""
        if self.settings.platform == "cpu":
            return peak_bytes()
        if torch := sys.modules.get("torch"):
            return torch.cuda.max_memory_allocated()
        return sys.modules["jax"].devices()[0].memory_stats()["peak_bytes_in_use"]

    def _time(self, steps: int) -> float:
        self.prepared.before()
        started = time.perf_counter()
        self.loss = self.prepared.run(steps)
        return time.perf_counter() - started


def check_platform(platform: str, jax: Any) -> None:
    """Check that JAX uses the platform: without a GPU it falls back to the CPU; torch fails.

    Args:
        platform: "cpu" or "gpu".
        jax: the package, or None if this process has not imported it.

    Raises:
        RuntimeError: JAX uses another platform.
    """
    if jax is not None and jax.default_backend() != platform:
        raise RuntimeError(
            f"JAX finds no {platform}, only {jax.default_backend()}; for NVIDIA's install "
            "jax[cuda13]"
        )


def _version(package: str) -> str:
    """Return the version of a package; "unknown" for a checkout without metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    try:
        with open("/proc/self/status") as file:
            # Unlike getrusage, this does not count the process that started this one.
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", file.read())[0])
    except (OSError, IndexError):
        scale = 1 if sys.platform == "darwin" else 1024
        return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_cores(count: int) -> None:
    """Restrict this process to `count` cores; later thread pools have as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def main() -> None:
    """Answer commands until standard input ends."""
    settings = Settings(**json.loads(sys.argv[1]))
    limit_cores(settings.threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    timer = Timer(settings)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(timer, arguments.pop("command"))(**arguments)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
