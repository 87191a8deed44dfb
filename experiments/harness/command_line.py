"""The command line of the experiments: recipes, options by tyro, errors without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tyro

import jaxnets as jn
from experiments.harness import process, processes
from experiments.harness.run_folder import RunError


class Stopped(Exception):
    """The run was asked to stop before its end and can be resumed."""


def parse(name: str, recipes: Mapping[str, Any]) -> Any:
    """Read the options of an experiment.

    `--preset`, else `--model` or `--kind`, else an option of the name of a recipe, chooses the
    recipe. Every other option overrides it.

    Args:
        name: of the experiment.
        recipes: {name: dataclass of options}; the first is the default.

    Returns:
        The options.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--model")
    first.add_argument("--kind")
    options = {field.name for field in dataclasses.fields(next(iter(recipes.values())))}
    named = [recipe for recipe in recipes if recipe in options]
    for recipe in named:
        first.add_argument(f"--{recipe}")
    chosen, _ = first.parse_known_args()
    given = [recipe for recipe in named if getattr(chosen, recipe)]
    key = chosen.preset or chosen.model or chosen.kind or (given or list(recipes))[0]
    if chosen.preset and chosen.preset not in recipes:
        fail(f"unknown preset {chosen.preset!r}; choose one of {', '.join(recipes)}")
    return tyro.cli(
        type(next(iter(recipes.values()))),
        prog=f"python -m experiments.{name}",
        description=(
            f"Recipes: {', '.join(recipes)}. --preset chooses one, and so does --model or --kind "
            "of the same name. Every other option overrides it."
        ),
        default=recipes.get(key, next(iter(recipes.values()))),
    )


@contextlib.contextmanager
def errors_without_traceback(*, if_stopped: str = "run it again") -> Iterator[None]:
    """Turn errors that the user can correct into one line on standard error and exit code 2.

    Ctrl-C, and a run that stopped before its end, become one line too, and exit code 3.

    Args:
        if_stopped: what the line about Ctrl-C advises.
    """
    try:
        yield
    except Stopped as stopped:
        processes.leave()
        process.leave(str(stopped), process.STOPPED)
    except KeyboardInterrupt as interrupt:
        process.leave(f"stopped by {str(interrupt) or 'SIGINT'}; {if_stopped}", process.STOPPED)
    except (
        *(RunError, ValueError, OSError),
        *(jn.NonFiniteError, jn.CheckpointError, jn.DistributedError),
    ) as error:
        fail(str(error))


def print_result(run: Callable[[], Any]) -> None:
    """Call `run` and print its result as JSON, the last line on standard output.

    For programs that start others: signals raise, see `process.signals_that_raise`.

    Args:
        run: returns the result; errors that the user can correct become one line.
    """
    with errors_without_traceback(), process.signals_that_raise():
        result = run()
    print(json.dumps(result))


def fail(message: str) -> None:
    """Print an error and exit with code 2; other processes of the run stop too."""
    processes.leave(f"error: {message}")
    process.leave(f"error: {message}", 2)
