"""An experiment that is interrupted, as by a signal."""

import contextlib

import pytest

import jaxnets as jn
from experiments.harness.command_line import Stopped


@contextlib.contextmanager
def stopped_at(last, monkeypatch):
    """Interrupt the run inside at a step, as a signal would."""

    def stop(step, state, metrics):
        if step == last:
            raise jn.Interrupted("a test")

    fit = jn.fit
    with monkeypatch.context() as patch:
        patch.setattr(
            "experiments.harness.training.jn.fit",
            lambda *given, hooks, **options: fit(*given, hooks=[stop, *hooks], **options),
        )
        with pytest.raises(Stopped, match="continue with --resume"):
            yield
