"""The process of `python -m experiments.NAME`: a signal ends it with one line and code 3."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

#: Exit code of a run that was asked to stop and can be continued.
STOPPED = 3

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


def is_command() -> bool:
    """Return whether this process is `python -m experiments.NAME`, and not a test or a notebook."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:  # Python is about to import the module
        return sys.argv[:1] == ["-m"]
    return spec.name.startswith("experiments.")


def exit_on_signals(advice: str) -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end the process with one line and code 3.

    The handler does not raise: an exception at an arbitrary moment inside of an import, of a
    compilation or of a callback of the device runtime can be dropped, or crash the process when
    Python shuts down. What a run writes survives a kill at any moment, and so it does this. Inside
    of `fit`, `jaxnets.Checkpointing` handles the signals.

    Args:
        advice: the end of the line, such as "run it again".
    """
    _set_handlers(functools.partial(_exit_now, advice))


def ignore_signals() -> None:
    """From now on nothing stops the process: the result is written, and only the exit is left."""
    _set_handlers(signal.SIG_IGN)


@contextlib.contextmanager
def signals_that_raise() -> Iterator[None]:
    """Inside, the signals raise KeyboardInterrupt with their name, so that children are ended.

    For a process that waits for others and does not compute itself.
    """
    handlers = _set_handlers(_interrupt)
    report = sys.unraisablehook

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
    finally:
        sys.unraisablehook = report
        for number, handler in handlers.items():
            signal.signal(number, handler)


def reserve_stdout() -> None:
    """From now on only Python prints on standard output; its descriptor is standard error."""
    sys.stdout.flush()
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = open(os.dup(1), "w", encoding=encoding, errors=errors)  # noqa: SIM115
    os.dup2(2, 1)


def leave(line: str, code: int) -> NoReturn:
    """Print a line on standard error and exit, with that code even if the terminal is gone.

    Args:
        line: the reason.
        code: of the exit.
    """
    if is_command():
        ignore_signals()  # they would print a second line
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at the exit, and change the code to 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if is_command():
        # What was interrupted is still alive, and can crash while Python shuts down.
        os._exit(code)
    sys.exit(code)


def _exit_now(advice: str, number: int, frame: Any) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"stopped by {signal.Signals(number).name}; {advice}\n".encode())
    # What was printed into a pipe or a file; RuntimeError: the signal came inside of a print.
    with contextlib.suppress(OSError, RuntimeError):
        sys.stdout.flush()
    os._exit(STOPPED)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _set_handlers(handler: Any) -> dict[int, Any]:
    """Install a handler and return those before; what the process ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {}
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, handler)
    return before
