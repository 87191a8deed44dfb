"""The time of the import, and from the start of a process to the first training step.

    python -m experiments.benchmark.startup

Each measurement runs in a new process. The first process of a network fills JAX's persistent
compilation cache; the later ones read their programs from it. The last line of output is the result
as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.benchmark.competitors import COMPETITORS
from experiments.benchmark.driver import Worker
from experiments.benchmark.sides import Settings
from experiments.harness.command_line import print_result
from experiments.harness.run_folder import RunError, environment
from jaxnets.host import usable_cores

#: {name: statement}; the first is the reference.
IMPORTS = {
    "jax, flax and optax": "import jax, flax.linen, optax",
    "jax, flax, optax and jaxnets": "import jax, flax.linen, optax, jaxnets",
    "jax, flax, optax, jaxnets and the names of a script": (
        "import jax, flax.linen, optax, jaxnets as jn; jn.data, jn.MLP, jn.classification, "
        "jn.Update, jn.create_train_state, jn.make_train_step, jn.jit_step, jn.fit, jn.evaluate"
    ),
}
#: {title: (network, competitor)}.
FIRST_STEPS = {
    "jaxnets, scanned layers": ("gpt-12-scanned", "jaxnets-kept"),
    "jaxnets": ("gpt-12", "jaxnets-kept"),
    "plain Flax": ("gpt-12", "flax"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    rounds: int = 3
    """Processes per measurement."""
    tiny: bool = False
    """Small networks, to check that it runs; the times are meaningless."""


def main() -> None:
    """Run from the command line."""
    config = tyro.cli(Config, prog="python -m experiments.benchmark.startup", description=__doc__)
    print_result(lambda: run(config))


def run(config: Config) -> dict[str, Any]:
    """Measure everything and print it to standard error.

    Args:
        config: of the run.

    Returns:
        "imports", {name: median seconds}; "first_steps", {name: {"cold", "warm": as returned by
        `first_step`}}, where "warm" is the process with the median total; and the environment.

    Raises:
        RunError: no rounds.
    """
    if config.rounds < 1:
        raise RunError(f"rounds is {config.rounds}; give 1 or more")
    imports = import_times(config)
    for name, seconds in imports.items():
        print(f"{seconds:8.3f} s  import of {name}", file=sys.stderr)
    steps: dict[str, dict[str, dict[str, float]]] = {}
    for title, (network, side) in FIRST_STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            cold = first_step(network, side, config, Path(folder))
            warm = [first_step(network, side, config, Path(folder)) for _ in range(config.rounds)]
        middle = sorted(warm, key=lambda each: each["total"])[len(warm) // 2]
        steps[title] = {"cold": cold, "warm": middle}
        print(f"{title}, {network}:", file=sys.stderr)
        for kind, each in steps[title].items():
            print(
                f"{each['total']:8.3f} s  with a {kind} cache, after an import of "
                f"{each['import']:.3f} s: {each['prepare']:.3f} s to the state, "
                f"{each['first']:.3f} s for the first step",
                file=sys.stderr,
            )
    return {"experiment": "startup", "imports": imports, "first_steps": steps, **environment()}


def import_times(config: Config) -> dict[str, float]:
    """Return the median seconds of each of `IMPORTS`, each in a new process."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(config.rounds):
        for name, statement in IMPORTS.items():
            code = f"import time; started = time.perf_counter(); {statement}"
            done = subprocess.run(
                [sys.executable, "-c", f"{code}; print(time.perf_counter() - started)"],
                check=True,
                capture_output=True,
                text=True,
            )
            times[name].append(float(done.stdout))
    return {name: float(np.median(each)) for name, each in times.items()}


def first_step(network: str, side: str, config: Config, folder: Path) -> dict[str, float]:
    """Take the first step of a network in a new process.

    Args:
        network: name of one of `STARTS`.
        side: name of a competitor.
        config: of the run.
        folder: for the log and the cache of compiled programs.

    Returns:
        Seconds: "import", of all of jaxnets if the side uses it; "prepare", to create state and
        batches; "first", of the step; and the "total" of the last two.
    """
    competitor = COMPETITORS[side]
    settings = Settings(
        module=competitor.module,
        variant=competitor.variant,
        name=network,
        threads=usable_cores(),
        tiny=config.tiny,
    )
    # Otherwise lazily loaded modules would count as "prepare".
    variables = _cache(folder / "cache") | {"EAGER_IMPORT": "1"}
    with contextlib.closing(Worker(settings, folder / "log", variables=variables)) as worker:
        prepared, first = worker.ask("prepare"), worker.ask("first")
    parts = {"prepare": prepared["prepare_seconds"], "first": first["seconds"]}
    return {"import": prepared["import_seconds"], **parts, "total": sum(parts.values())}


def _cache(folder: Path) -> dict[str, str]:
    """Return the environment in which JAX caches every compiled program in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


if __name__ == "__main__":
    main()
