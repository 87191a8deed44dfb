"""A whole experiment: command line, run folder, resume, kills."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import pty
import random
import resource
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from checks import slow_or_exhaustive
from stopping import stopped_at
from tiny_run import TINY, tiny

import jaxnets as jn
from experiments import classification, mnist
from experiments import digits as experiment
from experiments.classification import Config, ImageClassification
from experiments.harness import command_line, process, training
from experiments.harness.identity import code_version, content_sha256
from experiments.harness.problem import Measured
from experiments.harness.run_folder import RunError
from experiments.harness.training import run
from jaxnets import data
from jaxnets.data import digits
from jaxnets.storage import lock_folder, read_json
from jaxnets.tools.comparison import compare, read_run
from jaxnets.training.checkpoint import latest_step, verify

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, tiny(out, seeds=3)


def test_a_run_writes_result_log_figures_and_configuration(finished):
    out, result = finished
    assert {"experiment", "metric", "value", "ci95", "seeds", "steps"} <= set(result)
    assert {"train_seconds", "parameters_sha256"} <= set(result)
    assert read_json(out / "result.json", what="a result", remedy="").content == result
    config = read_json(out / "config.json", what="a configuration", remedy="").content
    assert config["experiment"] == "digits" and config["options"]["seeds"] == 3
    assert config["data"] == content_sha256(digits()) and config["code"] == [code_version()]
    assert not (out / ".lock").exists()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert all(len(row["loss"]) == 3 for row in rows)
    assert "test/accuracy" in rows[1] and "test/accuracy" not in rows[0]
    for figure in ("curves.png", "confusion.png", "mistakes.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    assert result["value"] == pytest.approx(np.mean(result["values"]), abs=1e-6)


class Staged(ImageClassification):
    """Two stages of 10 steps; preparing the second fails until the run is resumed."""

    stopped = True

    @property
    def stages(self):
        return (10, 20)

    def prepare(self, folder, stage, states):
        assert int(states.step[0]) == 10 * (stage if Staged.stopped else 1)
        if stage and Staged.stopped:
            raise RunError("stopped between the stages")
        return f"stage {stage}"


@pytest.mark.slow
def test_a_run_in_two_stages_prepares_both_and_ends_bitwise_as_one_stage(
    finished, tmp_path, capsys
):
    def staged(**changes):
        config = dataclasses.replace(TINY, out=tmp_path / "run", seeds=3, **changes)
        return run("digits", config, lambda config: Staged(config, digits()))

    with pytest.raises(RunError, match="between the stages"):
        staged()
    assert latest_step(tmp_path / "run" / "checkpoints") == 10
    Staged.stopped = False
    result = staged(resume=True)
    assert capsys.readouterr().err.count("stage 0\nstage 1\n") == 1
    assert result["parameters_sha256"] == finished[1]["parameters_sha256"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]


def test_running_a_finished_run_again_does_nothing(finished, capsys):
    out, result = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert tiny(out, seeds=3) == result
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().err


def test_another_run_in_the_same_folder_is_refused(finished):
    with pytest.raises(RunError, match=r"learning_rate = 0\.002, not 0\.1; choose another folder"):
        tiny(finished[0], seeds=3, learning_rate=0.1)


@pytest.mark.slow
def test_each_seed_of_a_population_equals_its_solo_run(finished, tmp_path):
    solo = tiny(tmp_path, seed=2)
    assert solo["values"][0] == pytest.approx(finished[1]["values"][2], abs=1 / 360 + 1e-6)
    assert solo["ci95"] is None
    last = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for folder in (tmp_path, finished[0])
    ]
    assert last[0]["loss"][0] == pytest.approx(last[1]["loss"][2], rel=1e-4)


@pytest.mark.slow
def test_every_executor_trains_the_same_networks(tmp_path):
    # Without dropout, whose masks differ between devices.
    results = {
        executor: tiny(tmp_path / executor, model="perceptron", seeds=2, executor=executor)
        for executor in ("scan", "jit", "pmap", "sharded")
    }
    for result in results.values():
        assert result["values"] == pytest.approx(results["scan"]["values"], abs=1 / 360 + 1e-6)
        assert result["test_loss"] == pytest.approx(results["scan"]["test_loss"], rel=1e-4)


def test_an_unfinished_run_needs_resume_and_then_ends_bitwise_the_same(
    finished, tmp_path, monkeypatch
):
    # The final evaluation and the figures do not matter here, and take longest.
    monkeypatch.setattr(ImageClassification, "measure", lambda *_: Measured("none", np.zeros(1)))
    monkeypatch.setattr(ImageClassification, "draw", lambda *_: {})
    with stopped_at(10, monkeypatch):
        tiny(tmp_path, seeds=3)
    with pytest.raises(RunError, match="unfinished run; continue it with --resume"):
        tiny(tmp_path, seeds=3)
    result = tiny(tmp_path, seeds=3, resume=True)
    assert result["parameters_sha256"] == finished[1]["parameters_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 5000}, "batch size 5000 is larger than the 1437 examples"),
        ({"steps": -1}, "--steps is -1"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"average_decay": 1.0}, "decay is 1.0"),
        pytest.param(
            {"executor": "pmap", "batch_size": 30},
            "batch size 30 is not divisible by 4 devices",
            marks=pytest.mark.four_devices,
        ),
    ],
)
def test_impossible_options_are_named(changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        tiny(tmp_path, **changes)


def test_a_file_in_the_way_is_reported(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RunError, match="is a file; choose another --out"):
        tiny(tmp_path / "file")
    with pytest.raises(RunError, match=r"cannot write|is a file"):
        tiny(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="no /proc on this system")
def test_a_folder_that_is_not_writable_is_reported():
    # Not even root can create a folder in /proc, as on a read-only disk.
    with pytest.raises(RunError, match=r"cannot write to /proc/jaxnets: .*choose another --out"):
        tiny(pathlib.Path("/proc/jaxnets"))


def test_a_damaged_configuration_is_reported(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json, line 1: not the configuration of a run: "):
        tiny(tmp_path)


def test_a_finished_folder_does_not_answer_for_another_experiment_or_other_data(finished, capsys):
    config = dataclasses.replace(TINY, out=finished[0], seeds=3)
    loaded = []

    def other_data(config):
        loaded.append(config)
        dataset = digits()
        train = {**dataset.train, "labels": dataset.train["labels"][::-1].copy()}
        return ImageClassification(config, dataclasses.replace(dataset, train=train))

    with pytest.raises(RunError, match="a run with experiment = 'digits', not 'mnist'"):
        run("mnist", config, other_data)
    assert loaded == []  # compared before anything
    with pytest.raises(RunError, match=r"a run with data \(sha256\) = '\w+', not '\w+'"):
        run("digits", config, other_data)
    assert "nothing to do" not in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(finished, tmp_path):
    with lock_folder(tmp_path), pytest.raises(RunError, match=r"in use by process .* since"):
        tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_resumption_while_the_first_one_runs_ends_in_one_line(tmp_path):
    first = subprocess.Popen(
        command(*KILLED, "--out", tmp_path), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    try:
        wait_for_a_new_checkpoint(first, tmp_path, None)
        second = call(*KILLED, "--out", tmp_path, "--resume")
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on " in second.stderr
        assert "Traceback" not in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_a_diverging_run_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    from jaxnets import NonFiniteError

    with pytest.raises(NonFiniteError, match=r"loss of member \d at steps \d+ to \d+"):
        tiny(tmp_path, seeds=2, optimizer="nesterov", learning_rate=1e30, steps=200)
    assert not (tmp_path / "result.json").exists()
    assert latest_step(tmp_path / "checkpoints") in (None, 10)


@pytest.mark.slow
def test_a_frozen_network_has_no_result_and_the_others_are_those_without_it(
    finished, tmp_path, monkeypatch
):
    """The first layer of the second network overflows."""
    create = ImageClassification.create_states

    def one_diverges(self):
        states = create(self)
        kernel = states.params["hidden_0"]["kernel"].at[1].set(3e38)
        hidden = {**states.params["hidden_0"], "kernel": kernel}
        return dataclasses.replace(states, params={**states.params, "hidden_0": hidden})

    monkeypatch.setattr(ImageClassification, "create_states", one_diverges)
    with pytest.raises(jn.NonFiniteError, match="loss of member 1 at steps 1 to 5"):
        tiny(tmp_path, seeds=3)
    with pytest.warns(RuntimeWarning, match="at step 5 member 1 is frozen"):
        result = tiny(tmp_path, seeds=3, on_non_finite="freeze")
    expected = finished[1]["values"]
    assert result["values"] == [expected[0], None, expected[2]]
    assert result["value"] == pytest.approx((expected[0] + expected[2]) / 2, abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["frozen"] for row in rows] == [[0, 1, 0]] * 4
    assert [row["loss"][1] for row in rows] == [None] * 4
    page = (tmp_path / "report.html").read_text()
    assert "1 of 3 networks diverged and do not count" in page and "mean of 2 networks" in page
    assert "loss over the steps" in page
    assert "1 of 3 networks diverged" in str(compare([read_run(finished[0]), read_run(tmp_path)]))


class Signalled(ImageClassification):
    """Sends itself signals before, after or during the training."""

    moment: str
    number: signal.Signals

    def send(self, moment):
        if moment == self.moment:
            os.kill(os.getpid(), self.number)

    def create_states(self):
        self.send("before")
        return super().create_states()

    def measure(self, states):
        self.send("after")
        return super().measure(states)

    def hooks(self, folder):
        def twice(step, state, metrics):
            if step == 15:
                self.send("twice")
                self.send("twice")

        return [twice]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("twice", signal.SIGINT),
        pytest.param("before", signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param("after", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_at_any_moment_ends_in_one_line_and_a_folder_that_goes_on(
    moment, number, finished, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("jaxnets.keep_freed_memory", lambda: None)
    monkeypatch.setattr(Signalled, "moment", moment, raising=False)
    monkeypatch.setattr(Signalled, "number", number, raising=False)
    monkeypatch.setattr(process, "is_command", lambda: True)
    monkeypatch.setattr("os._exit", sys.exit)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.getsignal(each) for each in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def main():
        make = lambda config: Signalled(config, digits())  # noqa: E731
        training.main("digits", make, {"mlp": dataclasses.replace(TINY, seeds=3)})

    try:
        assert exit_code(monkeypatch, main, "--out", tmp_path) == 3
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"stopped by {number.name}; continue with --resume"
    result = tiny(tmp_path, seeds=3, resume=True)
    assert result["parameters_sha256"] == finished[1]["parameters_sha256"]


def test_an_error_and_a_stop_end_quietly_where_the_terminal_is_gone(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    for error, code in ((RunError("no"), 2), (KeyboardInterrupt(), 3)):
        with pytest.raises(SystemExit) as stopped, command_line.errors_without_traceback():
            raise error
        assert stopped.value.code == code


# Makes standard input the terminal of this process, and becomes the program of its arguments.
IN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_a_checkpoint_of_that_moment(tmp_path):
    """With a progress line on the terminal, to which nothing can be written any more."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *command(*KILLED, "--out", tmp_path)],
        cwd=ROOT,
        env=environment(),
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    wait_for_a_new_checkpoint(process, tmp_path, None)
    assert select.select([terminal], [], [], 30)[0]  # the progress line
    os.close(terminal)
    assert process.wait(timeout=60) == 3
    verify(tmp_path / "checkpoints", latest_step(tmp_path / "checkpoints"))


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}


def command(*options):
    return [sys.executable, "-m", "experiments.digits", *map(str, options)]


def call(*options):
    return subprocess.run(
        command(*options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )


def exit_code(monkeypatch, main, *options):
    """Run a command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def run_digits():
    classification.main("digits", lambda config: data.digits(), experiment.RECIPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "transformer"), "invalid choice"),
        (("--preset", "fastest"), "unknown preset 'fastest'; choose one of convnet, mlp"),
        (("--learning-rat", "1"), "--learning-rat"),
        (("--steps", "0", "--out", "nowhere"), "error: --steps is 0; give a number above 0"),
    ],
)
def test_impossible_command_lines_end_with_code_2(options, message, monkeypatch, capsys):
    monkeypatch.setattr("jaxnets.keep_freed_memory", lambda: None)  # not of the tests' process
    assert exit_code(monkeypatch, run_digits, *options) == 2
    assert message in "".join(capsys.readouterr())


def test_help_shows_every_option_and_its_default(monkeypatch, capsys):
    assert exit_code(monkeypatch, run_digits, "--model", "mlp", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("default:") >= len(dataclasses.fields(Config))


KILLED = ("--model", "mlp", "--steps", 3000, "--steps-per-dispatch", 5, "--log-every", 50)
KILLED = (*KILLED, "--checkpoint-every", 10, "--eval-every", 500, "--seeds", 2)


def wait_for_a_new_checkpoint(process, folder, known):
    while latest_step(folder / "checkpoints") == known:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.005)


def test_a_run_told_to_stop_saves_and_ends_with_code_3(tmp_path):
    process = subprocess.Popen(
        command(*KILLED, "--out", tmp_path), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    wait_for_a_new_checkpoint(process, tmp_path, None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert b"SIGTERM" in errors and b"continue with --resume" in errors


@pytest.mark.parametrize("num_signals", slow_or_exhaustive([6, 120], [6]))
def test_a_signal_between_the_first_import_and_the_exit_is_one_line_and_code_3(
    num_signals, tmp_path, optimized_processes
):
    """At moments over the whole duration of a run; code 0 if it had finished by then."""
    short = ("--model", "mlp", "--steps", 20, "--steps-per-dispatch", 5, "--checkpoint-every", 5)
    began = time.monotonic()
    assert call(*short, "--out", tmp_path / "whole").returncode == 0
    seconds, moments = time.monotonic() - began, random.Random(1)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for index in range(num_signals):
        process = subprocess.Popen(
            command(*short, "--out", tmp_path / f"run_{index // 3}", "--resume"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        moment = 0.3 + seconds * (index + moments.random()) / num_signals
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.send_signal(numbers[index % 3])
        errors = process.communicate(timeout=120)[1]
        told = (f"after {moment:.2f} s: code {process.returncode}", errors)
        assert process.returncode in (0, 3) and "Traceback" not in errors, told
        lines = [line for line in errors.splitlines() if line.startswith("stopped by")]
        assert len(lines) == (process.returncode == 3), told


@pytest.mark.parametrize("num_kills", slow_or_exhaustive([4, 20], [4]))
def test_a_run_that_is_killed_ends_bitwise_as_one_that_was_not(
    num_kills, tmp_path, optimized_processes
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (*KILLED, "--steps", 150 * num_kills)  # enough for all kills to come in time
    expected = json.loads(call(*options, "--out", whole).stdout.splitlines()[-1])
    moments = random.Random(0)
    for index in range(num_kills):
        known = latest_step(killed / "checkpoints")
        resume = ("--resume",) if (killed / "config.json").exists() else ()
        process = subprocess.Popen(
            command(*options, "--out", killed, *resume),
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        if index % 5:  # most kills during training and saving, some during startup
            wait_for_a_new_checkpoint(process, killed, known)
            time.sleep(moments.uniform(0.0, 0.3))
        else:
            time.sleep(moments.uniform(0.5, 5.0))
        assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        process.communicate()
    result = json.loads(call(*options, "--out", killed, "--resume").stdout.splitlines()[-1])
    assert result["parameters_sha256"] == expected["parameters_sha256"]
    assert result["values"] == expected["values"]
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in (whole, killed)]
    assert logs[0] == logs[1]


def test_a_truncated_data_file_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxnets.keep_freed_memory", lambda: None)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b cut short")

    def run_mnist():
        classification.main("mnist", lambda config: data.mnist(config.data), mnist.RECIPES)

    options = ("--data", tmp_path, "--out", tmp_path / "run")
    assert exit_code(monkeypatch, run_mnist, *options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "train-images-idx3-ubyte.gz" in error


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_an_error_and_keeps_the_checkpoints(tmp_path):
    options = ("--model", "mlp", "--steps", 300, "--steps-per-dispatch", 10)
    options = (*options, "--checkpoint-every", 10, "--eval-every", 300, "--out", tmp_path)
    process = subprocess.Popen(
        command(*options), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_a_new_checkpoint(process, tmp_path, None)
    # From here on no file can grow beyond 64 bytes, as on a full disk.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64, 64))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "error: " in errors and str(tmp_path) in errors and "Traceback" not in errors
    step = latest_step(tmp_path / "checkpoints")
    assert step is not None and 10 <= step < 300
    assert json.loads(call(*options, "--resume").stdout.splitlines()[-1])["steps"] == 300
