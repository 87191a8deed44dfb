"""The command line of the experiments: recipes, options by tyro, errors without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tyro

import jaxnets as jn
from experiments.harness.run_folder import RunError


class Stopped(Exception):
    """The run was asked to stop before its end and can be resumed."""


def parse(name: str, recipes: Mapping[str, Any]) -> Any:
    """Read the options of an experiment.

    `--preset`, else `--model` or `--kind`, chooses the recipe. Every other option overrides it.

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
    chosen, _ = first.parse_known_args()
    key = chosen.preset or chosen.model or chosen.kind or next(iter(recipes))
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

    Ctrl-C and the signals SIGTERM and SIGHUP become one line too, and exit code 3. Inside of `fit`
    `jaxnets.Checkpointing` handles them.

    Args:
        if_stopped: what the line about a signal advises.
    """
    handlers, report = _raise_on_signals(), sys.unraisablehook

    def raise_again(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            report(unraisable)
            return
        # Python drops an exception of a garbage collection, and with it what the signal asked for.
        name = str(unraisable.exc_value) or "SIGINT"
        again = threading.Timer(0.05, signal.raise_signal, [signal.Signals[name]])
        again.daemon = True
        again.start()

    sys.unraisablehook = raise_again
    try:
        yield
    except Stopped as stopped:
        _stop(str(stopped))
    except KeyboardInterrupt as interrupt:
        _stop(f"stopped by {str(interrupt) or 'SIGINT'}; {if_stopped}")
    except (RunError, ValueError, OSError, jn.NonFiniteError, jn.CheckpointError) as error:
        fail(str(error))
    finally:
        sys.unraisablehook = report
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _raise_on_signals() -> dict[int, Any]:
    """Let SIGTERM and SIGHUP raise as Ctrl-C does; return the handlers before.

    A signal that the process ignores stays ignored, such as SIGHUP under `nohup`.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {
        number: signal.signal(number, interrupt)
        for number in numbers
        if signal.getsignal(number) is signal.SIG_DFL
    }


def _stop(line: str) -> None:
    _exit(line, 3)


def _exit(line: str, code: int) -> None:
    """Print a line on standard error and exit, with that code even if the terminal is gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at the exit, and change the code to 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def print_result(run: Callable[[], Any]) -> None:
    """Call `run` and print its result as JSON, the last line on standard output.

    Args:
        run: returns the result; errors that the user can correct become one line.
    """
    with errors_without_traceback():
        result = run()
    print(json.dumps(result))


def fail(message: str) -> None:
    """Print an error and exit with code 2."""
    _exit(f"error: {message}", 2)
