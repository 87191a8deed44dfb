"""`python -m experiments` says what there is."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def call(*arguments):
    # Without the packages of the site: the list needs none.
    command = [sys.executable, "-S", "-m", "experiments", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_module_that_runs_is_listed_with_its_sentence():
    done = call()
    assert done.returncode == 0 and done.stderr == "" and call("--help").stdout == done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    modules = [path for path in (ROOT / "experiments").glob("*.py") if path.stem != "__main__"]
    runs = {path.stem for path in modules if "__name__ ==" in path.read_text()} | {"benchmark"}
    assert lines.keys() == runs
    assert "Handwritten digits of 8 x 8 pixels" in lines["digits"]
    assert all(len(line.split()) > 4 for line in lines.values())


def test_an_experiment_as_an_argument_is_answered_with_its_command():
    done = call("digits", "--seeds", "3")
    assert done.returncode == 2 and "python -m experiments.digits --seeds 3 runs it" in done.stderr
    assert "python -m experiments lists what there is" in call("nonsense").stderr
