"""The command line of the experiments: signals."""

import gc
import signal
import sys
import time

import pytest

from experiments.harness.command_line import errors_without_traceback


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_garbage_collection_is_not_lost(number, capsys):
    handler = signal.signal(number, signal.default_int_handler)
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
    report = sys.unraisablehook
    dropped = []

    def collected(phase, info):
        if not dropped:
            dropped.append(phase)
            signal.raise_signal(number)

    try:
        with pytest.raises(SystemExit) as stopped, errors_without_traceback():
            gc.callbacks.append(collected)
            gc.collect()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        gc.callbacks.remove(collected)
        signal.signal(number, handler)
    assert dropped and stopped.value.code == 3
    assert capsys.readouterr().err == f"stopped by {number.name}; run it again\n"
    assert sys.unraisablehook is report
