"""Runs the competitors, each in a process of its own, and lets them take turns."""

from __future__ import annotations

import contextlib
import dataclasses
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

#: Seconds between two turns, in which the threads of the last one fall asleep.
PAUSE = 0.3
#: Seconds after which a process that gives no answer is given up.
PATIENCE = 1800.0


class LeftOut(Exception):
    """A competitor cannot take part, or no longer; its text says why."""


class Process(Protocol):
    """What takes the commands of `worker`."""

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer; raises LeftOut."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


class Worker:
    """A process that runs `worker` and computes only when it is asked.

    Args:
        settings: what it is told.
        log: file for whatever it prints.
        patience: seconds to wait for an answer.
        variables: further environment variables of the process.
    """

    def __init__(
        self,
        settings: Settings,
        log: Path,
        patience: float = PATIENCE,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.log, self.patience = log, patience
        threads = str(settings.threads)
        # Torch and NumPy take their number of threads from here, XLA from the cores it may use.
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
        chosen = {
            "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu"}[settings.platform],
            # The competitors wait for their turns side by side on one device.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "experiments.benchmark.worker"),
                    json.dumps(dataclasses.asdict(settings)),
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
            LeftOut: an error in the process, its end, or no answer within `patience`.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(
                json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True
            )
        except BrokenPipeError:
            raise LeftOut(self._epitaph()) from None
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            raise LeftOut(f"gave no answer to {command!r} within {self.patience:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise LeftOut(self._epitaph())
        answer = json.loads(line)
        if "error" in answer:
            raise LeftOut(answer["error"])
        return answer

    def close(self) -> None:
        """End the process: it leaves by itself when its input ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _epitaph(self) -> str:
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
    """Measure a workload: every competitor once in each round, one after the other.

    Args:
        workload: what is computed.
        competitors: in the order of their turns; those that have no way to compute it are passed
            over.
        start: starts the process of a competitor.
        rounds: number of turns of each.
        seconds: length of a turn.
        pause: seconds between two turns.
        tell: gets a line about what goes on.

    Returns:
        "unit"; "competitors", {name: numbers}, times in seconds; "left_out", {name: reason}.
    """
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    running: dict[str, Process] = {}

    def drop(name: str, reason: str) -> None:
        left_out[name] = reason
        tell(f"{workload.name}: {name} is left out: {reason}")
        found.pop(name, None)
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
                found[name] = {**prepared, "first_seconds": first["seconds"], "times": []}
                tell(f"{workload.name}: {name} is ready, first call {first['seconds']:.2f} s")
        for index in range(rounds):
            for name in list(running):
                with turn_of(name):
                    answer = running[name].ask("turn", seconds=seconds)
                    found[name]["times"].append(answer["times"])
                    found[name]["loss"] = answer["loss"]
            tell(f"{workload.name}: round {index + 1} of {rounds} is done")
        for name in list(running):
            with turn_of(name):
                found[name].update(running[name].ask("finish"))
    finally:
        for process in running.values():
            process.close()
    summaries = {name: _summarize(numbers) for name, numbers in found.items()}
    return {"unit": workload.unit, "competitors": summaries, "left_out": left_out}


def _summarize(numbers: Mapping[str, Any]) -> dict[str, Any]:
    times = numbers["times"]
    every = [each for turn in times for each in turn]
    return {
        "median": float(np.median(every)),
        "rounds": [float(np.median(turn)) for turn in times],
        "calls": len(every),
        **{name: value for name, value in numbers.items() if name != "times"},
    }
