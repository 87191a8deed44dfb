"""Run the results of docs/results.md again, and report which hold.

    python -m experiments.reproduce digits fashion_mnist_mlp
    python -m experiments.reproduce --table           # write the table of docs/results.md
    python -m experiments.reproduce --table --readme  # write that of README.md

Each row runs in its own process and leaves its run folder under --out. An interrupted
reproduction continues where it stopped: finished runs are read, not repeated.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.harness import process, registry
from experiments.harness.command_line import errors_without_traceback
from experiments.harness.run_folder import RunError
from jaxnets.tools.results import Result, read_result


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows to run."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Rows of experiments/results.toml; all by default."""
    table: bool = False
    """Write the table of docs/results.md, and run nothing."""
    readme: bool = False
    """With --table: write the short table of README.md instead."""
    out: Path = Path("runs/reproduce")
    """Folder of the run folders."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rows again from the command line.

    Args:
        arguments: by default those of this process.

    Returns:
        Exit code: 0 if no row is worse than registered, else 1.
    """
    entries = {entry.name: entry for entry in registry.load()}
    rows = ", ".join(entries)
    config = tyro.cli(
        Config,
        args=arguments,
        prog="python -m experiments.reproduce",
        description=f"Run results of docs/results.md again, and report which hold. Rows: {rows}.",
    )
    with errors_without_traceback(), process.signals_that_raise():
        unknown = [name for name in config.names if name not in entries]
        if unknown:
            raise RunError(f"unknown row {unknown[0]!r}; choose from {rows}")
        if config.table:
            if config.names:
                raise RunError("--table writes all rows; give it without names")
            _write_table(list(entries.values()), readme=config.readme)
            return 0
        chosen = [entries[name] for name in config.names or entries]
        verdicts = [_reproduce(entry, config.out / entry.name) for entry in chosen]
    return int("worse" in verdicts)


def _write_table(entries: Sequence[registry.Entry], *, readme: bool) -> None:
    if readme:
        path, table = registry.README, registry.readme_table(entries)
    else:
        path, table = registry.RESULTS_PAGE, registry.full_table(entries)
    registry.write_table(path, table)
    print(f"wrote the table of {path}", file=sys.stderr)


def _reproduce(entry: registry.Entry, folder: Path) -> str:
    result = run(entry.command, folder)
    verdict = entry.judge(result)
    print(
        f"{entry.name}: {verdict}; {entry.show(result['value'], result['ci95'])}, registered "
        f"{entry.show(entry.value, entry.ci95)}; {result['train_seconds']:.0f} s, registered "
        f"{entry.seconds:.0f} s",
        flush=True,
    )
    return verdict


def run(command: str, folder: Path) -> Result:
    """Run a registered command, or resume it.

    Args:
        command: begins with "python -m".
        folder: of the run.

    Returns:
        The result.

    Raises:
        RunError: the command failed.
        ValueError: `result.json` is missing or damaged.
    """
    words = [sys.executable, *shlex.split(command)[1:], "--out", str(folder), "--resume"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{shlex.join(words)} ended with code {done.returncode}; see above")
    return read_result(folder)


if __name__ == "__main__":
    sys.exit(main())
