"""Runs each competitor in its own process, and lets them take turns."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.benchmark.competitors import Competitor
from experiments.benchmark.sides import Settings
from experiments.benchmark.workloads import Workload

#: Seconds between two turns, until the threads of the last one sleep.
PAUSE = 0.3
#: Seconds after which a process without an answer is dropped.
PATIENCE = 1800.0


class LeftOut(Exception):
    """A competitor cannot take part or continue; the message states the reason."""


class Process(Protocol):
    """Receives the commands of `worker`."""

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer; raises LeftOut."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


class Worker:
    """A process that runs `worker` and computes only on command.

    Args:
        settings: of the process.
        log: file for its output.
        patience: seconds to wait for an answer.
        variables: further environment variables of the process.
        folder: checkout of this repository that the process runs; by default this one.
    """

    def __init__(
        self,
        settings: Settings,
        log: Path,
        patience: float = PATIENCE,
        variables: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.log, self.patience = log, patience
        threads = str(settings.threads)
        # These set the threads of torch and NumPy; XLA uses the cores of the process.
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
        chosen = {
            "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu"}[settings.platform],
            # All competitors hold memory of one device at the same time.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "experiments.benchmark.worker"),
                    settings.as_json(),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={
                    **os.environ,
                    **dict.fromkeys(pools, threads),
                    **chosen,
                    **(variables or {}),
                },
                cwd=folder,
                text=True,
            )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer.

        Args:
            command: name of a method of `worker.Timer`.
            arguments: of the method.

        Returns:
            The answer.

        Raises:
            LeftOut: the process failed, ended, or gave no answer within `patience`.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(
                json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True
            )
        except BrokenPipeError:
            raise LeftOut(self._exit_message()) from None
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            raise LeftOut(f"gave no answer to {command!r} within {self.patience:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise LeftOut(self._exit_message())
        answer = json.loads(line)
        if "error" in answer:
            raise LeftOut(answer["error"])
        return answer

    def close(self) -> None:
        """End the process: it exits at the end of its standard input."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _exit_message(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"ended with code {code}" + (f": {lines[-1]}" if lines else "")


def measure(
    workload: Workload,
    competitors: Sequence[Competitor],
    start: Callable[[Competitor], Process],
    *,
    rounds: int,
    seconds: float,
    pause: float = PAUSE,
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure a workload: in each round every competitor has a turn.

    Args:
        workload: to measure.
        competitors: in the order of their turns; those that do not support it are skipped.
        start: starts the process of a competitor.
        rounds: turns per competitor.
        seconds: duration of a turn.
        pause: seconds between two turns.
        tell: is called with lines about the progress.

    Returns:
        "unit"; "competitors", {name: measurements}, times in seconds; "left_out", {name: reason}.
    """
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    running: dict[str, Process] = {}

    def drop(name: str, reason: str) -> None:
        left_out[name] = reason
        tell(f"{workload.name}: {name} is left out: {reason}")
        results.pop(name, None)
        if name in running:
            running.pop(name).close()

    @contextlib.contextmanager
    def turn_of(name: str) -> Any:
        try:
            yield
        except LeftOut as reason:
            drop(name, str(reason))
        time.sleep(pause)

    try:
        for competitor in competitors:
            name = competitor.name
            if not competitor.takes_part(workload):
                continue
            if missing := competitor.missing():
                drop(name, f"{' and '.join(missing)} is not installed")
                continue
            with turn_of(name):
                running[name] = start(competitor)
                prepared = running[name].ask("prepare")
                first = running[name].ask("first")
                results[name] = {**prepared, "first_seconds": first["seconds"], "times": []}
                tell(f"{workload.name}: {name} is ready, first call {first['seconds']:.2f} s")
        for index in range(rounds):
            for name in list(running):
                with turn_of(name):
                    answer = running[name].ask("turn", seconds=seconds)
                    results[name]["times"].append(answer["times"])
                    results[name]["loss"] = answer["loss"]
            tell(f"{workload.name}: round {index + 1} of {rounds} is done")
        for name in list(running):
            with turn_of(name):
                results[name].update(running[name].ask("finish"))
    finally:
        for process in running.values():
            process.close()
    summaries = {name: _summarize(each) for name, each in results.items()}
    return {"unit": workload.unit, "competitors": summaries, "left_out": left_out}


def _summarize(measurements: Mapping[str, Any]) -> dict[str, Any]:
    times = measurements["times"]
    every = [each for turn in times for each in turn]
    return {
        "median": float(np.median(every)),
        "rounds": [float(np.median(turn)) for turn in times],
        "calls": len(every),
        **{name: value for name, value in measurements.items() if name != "times"},
    }
