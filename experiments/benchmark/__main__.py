"""The command line of the benchmark; its last line of output is the result as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import tyro

from experiments.benchmark import chart, driver, inputs, report
from experiments.benchmark.competitors import BEFORE, COMPETITORS, ON_REQUEST, REFERENCE, Competitor
from experiments.benchmark.sides import Settings
from experiments.benchmark.workloads import WORKLOADS, shrink
from experiments.harness.command_line import print_result
from experiments.harness.run_folder import RunError, RunFolder, environment
from jaxnets.host import usable_cores
from jaxnets.storage import read_json


@dataclasses.dataclass(frozen=True)
class Config:
    """Workloads, competitors and duration of the benchmark."""

    workloads: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of workloads; by default all of --platform."""
    against: tuple[str, ...] = tuple(
        name for name in COMPETITORS if name not in (REFERENCE, BEFORE, ON_REQUEST)
    )
    """Competitors of jaxnets."""
    rounds: int = 5
    """Turns per competitor."""
    seconds: float = 3.0
    """Duration of a turn, which has at least one call."""
    platform: Literal["cpu", "gpu"] = "cpu"
    """Where everything is computed; each platform has its own default workloads."""
    threads: int | None = None
    """Cores per competitor; by default all."""
    tiny: bool = False
    """Small shapes, to check that every side runs; the times are meaningless."""
    before: Path | None = None
    """Another checkout of this repository, whose jaxnets competes as jaxnets-before."""
    data: Path | None = None
    """Folder of Fashion-MNIST and SST-2; `python -m jaxnets doctor` shows where they are searched
    by default."""
    pretrained: Path | None = None
    """Folder of sentence-transformers, such as that of all-MiniLM-L6-v2; without it `embed` is left
    out."""
    out: Path = Path("runs/benchmark")
    """Folder of this run."""
    resume: bool = False
    """Measure the workloads that an interrupted run has not measured."""


#: Load average below which no other work disturbs the measurement.
_QUIET = 0.5


class _Times(TypedDict):
    unit: str
    competitors: dict[str, Any]
    left_out: dict[str, str]
    ratios: dict[str, Any]


class _Result(TypedDict):
    experiment: str
    workloads: dict[str, _Times]


def main() -> None:
    """Run the benchmark from the command line."""
    config = tyro.cli(Config, prog="python -m experiments.benchmark", description=_description())
    print_result(lambda: run(config))


def run(config: Config) -> dict[str, Any]:
    """Measure the workloads and write the run folder.

    Args:
        config: of the run.

    Returns:
        The content of `result.json`.

    Raises:
        RunError: a name is unknown, an option out of range, or the folder contains another run.
    """
    _check(config)
    folder = RunFolder(config.out)
    with folder.locked():
        folder.check("benchmark", config, resume=config.resume, other_code=False)
        finished = folder.open("benchmark", config, data=None, kind=_Result)
        if finished is None:
            return _finish(config, folder)
    print(f"{folder.path} is finished; nothing to do", file=sys.stderr)
    return finished


def _finish(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Measure the workloads that are missing, and write the result."""
    load = round(os.getloadavg()[0], 2)
    if load > _QUIET:
        print(f"the load average is {load}: other work disturbs the times", file=sys.stderr)
    # The measured workloads are the checkpoints of this run.
    folder.checkpoints.mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for name in config.workloads or _names(config):
        done = folder.checkpoints / f"{name}.json"
        if not done.exists():
            folder.write(f"checkpoints/{name}.json", _measure(name, config, folder))
        results[name] = read_json(
            done, what="the times of a workload", remedy="remove it to measure again with --resume"
        ).check(_Times)
        print(report.table(name, results[name]) + "\n", file=sys.stderr)
    chart.draw(results, folder.path / "chart.png")
    result = {"experiment": "benchmark", "workloads": results, "load_before": load}
    result |= _machine(config)
    folder.write("result.json", result)
    return result


def _measure(name: str, config: Config, folder: RunFolder) -> dict[str, Any]:
    workload = shrink(WORKLOADS[name]) if config.tiny else WORKLOADS[name]

    def start(competitor: Competitor) -> driver.Worker:
        settings = Settings(
            module=competitor.module,
            variant=competitor.variant,
            name=name,
            threads=_threads(config),
            platform=config.platform,
            tiny=config.tiny,
            **files,
        )
        log = folder.path / f"{name}_{competitor.name}.log"
        checkout = config.before if competitor.name == BEFORE else None
        return driver.Worker(settings, log, folder=checkout)

    with tempfile.TemporaryDirectory(dir=folder.path) as temporary:
        files = inputs.files(workload, config.data, config.pretrained, Path(temporary))
        measured = driver.measure(
            workload,
            [COMPETITORS[one] for one in _competitors(config)],
            start,
            rounds=config.rounds,
            seconds=config.seconds,
            tell=lambda message: print(message, file=sys.stderr),
        )
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ratios = report.compare(measured)
    return {**measured, "ratios": ratios, "date": date}


def _names(config: Config) -> list[str]:
    return [
        name
        for name, workload in WORKLOADS.items()
        if workload.platform == config.platform and (workload.task != "embed" or config.pretrained)
    ]


def _threads(config: Config) -> int:
    return config.threads or usable_cores()


def _machine(config: Config) -> dict[str, Any]:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(row.split(":")[1].strip() for row in rows if "model name" in row)
    except (OSError, StopIteration):
        processor = "unknown"
    return {**environment(), "processor": processor, "threads": _threads(config)}


def _competitors(config: Config) -> list[str]:
    before = () if config.before is None else (BEFORE,)
    return list(dict.fromkeys((REFERENCE, *before, *config.against)))


def _check(config: Config) -> None:
    for what, names, known in (
        ("workload", config.workloads, WORKLOADS),
        ("competitor", config.against, COMPETITORS),
    ):
        for name in names:
            if name not in known:
                raise RunError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    if BEFORE in config.against and config.before is None:
        raise RunError(f"{BEFORE} is another checkout; name its folder with --before")
    if config.before and not (config.before / "experiments/benchmark/worker.py").is_file():
        raise RunError(
            f"--before {config.before} is no checkout of this repository; give the folder that "
            "holds experiments/"
        )
    for name in config.workloads:
        if WORKLOADS[name].task == "embed" and config.pretrained is None:
            raise RunError(
                f"{name} needs a folder of sentence-transformers; name it with --pretrained"
            )
    if config.rounds < 1 or config.seconds <= 0:
        raise RunError(
            f"--rounds {config.rounds} and --seconds {config.seconds:g} measure nothing; give "
            "numbers above 0"
        )
    if config.threads is not None and not 1 <= config.threads <= usable_cores():
        raise RunError(
            f"--threads is {config.threads}; give 1 to {usable_cores()}, the cores of this process"
        )


def _description() -> str:
    return (
        f"Workloads: {', '.join(WORKLOADS)}. Competitors: {', '.join(COMPETITORS)}. The other "
        "libraries come with pip install -e '.[benchmark]'; one that is not installed is skipped."
    )


if __name__ == "__main__":
    main()
