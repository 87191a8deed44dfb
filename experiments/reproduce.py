"""Run registered results again, and say which hold.

    python -m experiments.reproduce digits fashion_mnist_mlp
    python -m experiments.reproduce --table

Each row runs in a process of its own and leaves its run folder under --out. An interrupted
reproduction goes on where it was: finished runs are only read.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.harness import registry
from experiments.harness.command_line import errors_without_traceback
from experiments.harness.run_folder import RunError


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rows."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Rows of experiments/results.toml; all of them by default."""
    table: bool = False
    """Print the table of registered results, and run nothing."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs."""


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
        description=f"Run registered results again, and say which hold. Rows: {rows}.",
    )
    with errors_without_traceback():
        unknown = [name for name in config.names if name not in entries]
        if unknown:
            raise RunError(f"unknown row {unknown[0]!r}; choose from {rows}")
        chosen = [entries[name] for name in config.names or entries]
        if config.table:
            print(registry.table(chosen))
            return 0
        verdicts = [_reproduce(entry, config.out / entry.name) for entry in chosen]
    return int("worse" in verdicts)


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


def run(command: str, folder: Path) -> dict[str, Any]:
    """Run a registered command, or go on with it.

    Args:
        command: that begins with "python -m".
        folder: of the run.

    Returns:
        The result.

    Raises:
        RunError: the command failed.
    """
    words = [sys.executable, *shlex.split(command)[1:], "--out", str(folder), "--resume"]
    process = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise RunError(f"{shlex.join(words)} ended with code {process.returncode}; see above")
    return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
