"""The process of an experiment: signals and exits."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.harness import process
from experiments.harness.command_line import errors_without_traceback

ROOT = pathlib.Path(__file__).parents[3]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def handlers():
    """Python's own handlers, as a new process has them; those of pytest come back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def exits(monkeypatch):
    """Make an exit at once an exception of this process, which is taken for a command."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr(process, "is_command", lambda: True)


def run(module, *, path, before=""):
    """Run a module with `path` in front of all packages, after commands of the shell."""
    return subprocess.run(
        ["sh", "-c", f'{before} exec "$@"', "sh", sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def signals_in_an_import(folder, number):
    """Write a module in the place of one that every experiment imports."""
    code = (
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(1)\nraise SystemExit(5)"
    )
    (folder / "lazy_loader.py").write_text(code)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("module", ["digits", "reproduce", "benchmark"])
def test_a_signal_while_modules_are_imported_ends_in_one_line(module, number, tmp_path):
    signals_in_an_import(tmp_path, number)
    done = run(f"experiments.{module}", path=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"stopped by {number.name}; run it again\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_printed_into_a_pipe_before_a_signal_is_not_lost(number, tmp_path):
    (tmp_path / "program.py").write_text(
        "import os\n"
        "from experiments.harness import process\n"
        "process.exit_on_signals('run it again')\n"
        f"print('one line'); os.kill(os.getpid(), {int(number)})\n"
    )
    done = run("program", path=tmp_path)
    assert (done.returncode, done.stdout) == (3, "one line\n")
    assert done.stderr == f"stopped by {number.name}; run it again\n"


def test_libraries_print_beside_the_result(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os\n"
        "from experiments.harness import process\n"
        "print('before')\n"
        "process.reserve_stdout()\n"
        "os.write(1, b'a library')\n"
        "print('the result')\n"
    )
    done = run("program", path=tmp_path)
    assert (done.stdout, done.stderr) == ("before\nthe result\n", "a library")


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path):
    signals_in_an_import(tmp_path, signal.SIGHUP)
    assert run("experiments.digits", path=tmp_path, before="trap '' HUP;").returncode == 5


def test_an_import_from_another_program_installs_no_handler(tmp_path):
    (tmp_path / "program.py").write_text(
        "import signal, experiments\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL"
    )
    done = run("program", path=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_exits_without_an_exception_and_after_the_result_not_at_all(
    number, handlers, exits, capfd
):
    process.exit_on_signals("continue with --resume")
    with pytest.raises(SystemExit) as stopped:
        signal.raise_signal(number)
    assert stopped.value.code == 3
    assert capfd.readouterr().err == f"stopped by {number.name}; continue with --resume\n"
    process.ignore_signals()
    signal.raise_signal(number)


def test_the_exit_after_an_error_is_not_stopped_by_a_signal(handlers, exits, monkeypatch, capfd):
    """Python does not shut down: what was interrupted may crash there."""
    process.exit_on_signals("run it again")
    with pytest.raises(SystemExit) as left, errors_without_traceback():
        raise ValueError("no such file")
    assert left.value.code == 2
    signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == "error: no such file\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_a_garbage_collection_is_not_lost(number, handlers, capsys):
    before = [signal.getsignal(each) for each in SIGNALS]
    report = sys.unraisablehook
    dropped = []

    def collected(phase, info):
        if not dropped:
            dropped.append(phase)
            signal.raise_signal(number)

    try:
        with (
            pytest.raises(SystemExit) as stopped,
            errors_without_traceback(),
            process.signals_that_raise(),
        ):
            gc.callbacks.append(collected)
            gc.collect()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        gc.callbacks.remove(collected)
    assert dropped and stopped.value.code == 3
    assert capsys.readouterr().err == f"stopped by {number.name}; run it again\n"
    assert sys.unraisablehook is report
    assert before == [signal.getsignal(each) for each in SIGNALS]
