"""An experiment that is interrupted, as by a signal."""

import contextlib

import pytest

import jaxnets as jn
from experiments.harness.command_line import Stopped


@contextlib.contextmanager
def stopped_at_three(monkeypatch):
    """Interrupt the run inside at step 3, as a signal would; it has to evaluate every 6 steps."""

    def stop(step, state, metrics):
        if step == 3:
            raise jn.Interrupted("a test")

    every = jn.every
    with monkeypatch.context() as patch:
        patch.setattr(
            "experiments.harness.training.jn.every",
            lambda steps, hook: every(3, stop) if steps == 6 else every(steps, hook),
        )
        with pytest.raises(Stopped, match="continue with --resume"):
            yield
