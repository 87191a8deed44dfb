"""The progress line of a run in a terminal, from the compilation of the step on."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Any

import numpy as np
import tqdm

from jaxnets.training.history import History

# The bar comes last, because a narrow terminal cuts off the end of the line.
_FORMAT = "{n_fmt}/{total_fmt}{postfix}, {rate_fmt}, {remaining} left {bar}"


class ProgressBar(contextlib.AbstractContextManager["ProgressBar"]):
    """A tqdm bar that starts after the first call, so that its rates do not include compilation.

    A terminal that is gone, as after SIGHUP, does not end the run: nothing more is shown.

    Args:
        num_steps: number of steps of the whole run.
        shown: show it on standard error; None: only if that is a terminal.
    """

    def __init__(self, num_steps: int, shown: bool | None) -> None:
        self._hidden = not (sys.stderr.isatty() if shown is None else shown)
        self._num_steps = num_steps
        self._bar: tqdm.tqdm[Any] | None = None
        self._open_line = False
        self._end: str | None = None
        self._began, self._examples = 0.0, 0

    def compiling(self, seconds: float) -> None:
        """Announce the compilation, and how long it took at the start of the run if known."""
        if not self._hidden:
            before = f", {seconds:.0f} s at the start of the run" if seconds else ""
            self._print(f"compiling the step{before} ...", end="")
            self._open_line = True

    def compiled(self, seconds: float) -> None:
        """Print how long the first call took."""
        if not self._hidden:
            self._print(f" {seconds:.1f} s")
            self._open_line = False

    def compiling_rest(self, num_steps: int) -> None:
        """Announce that the last call has fewer steps, which needs another compilation."""
        if self._bar is not None and not self._hidden:
            self._bar.set_postfix_str(f"compiling the step for the last {num_steps}")

    def update(self, step: int, examples: int, history: History | None) -> None:
        """Move to a step; if the history is given, show its last loss and examples/s."""
        try:
            self._update(step, examples, history)
        except OSError:
            self._hidden = True

    def _update(self, step: int, examples: int, history: History | None) -> None:
        if self._bar is None and step == self._num_steps:
            return  # the first call was the whole run
        if self._bar is None:
            self._bar = tqdm.tqdm(
                initial=step,
                total=self._num_steps,
                unit=" steps",
                disable=self._hidden,
                dynamic_ncols=True,
                bar_format=_FORMAT,
            )
            self._began = time.perf_counter()
            return
        self._examples += examples
        self._bar.update(step - self._bar.n)
        if history and history.rows and not self._hidden:
            rate = self._examples / (time.perf_counter() - self._began)
            # Of the last rows only: a step costs the same however many there are.
            logged = [row["loss"] for row in history.rows[-100:] if "loss" in row]
            losses = np.atleast_1d((logged or [math.nan])[-1])
            trained = losses[np.isfinite(losses)]  # those of frozen members are NaN
            loss = np.mean(trained) if trained.size else math.nan
            self._bar.set_postfix_str(
                f"loss {loss:.4g}, {self._bar.format_sizeof(rate)} examples/s"
            )

    def stopped(self, step: int, reason: str) -> None:
        """Remember why the run ends before its last step, for a line at the end."""
        self._end = f"stopped at step {step} of {self._num_steps}: {reason}"

    def __exit__(self, *exception: object) -> None:
        if self._open_line:
            self._print()
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
        if self._end is not None and not self._hidden:
            self._print(self._end)

    def _print(self, text: str = "", end: str = "\n") -> None:
        with contextlib.suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)
