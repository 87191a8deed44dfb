"""A run of several processes: what starts, joins and ends them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import tiny

import jaxnets as jn
from experiments import digits, sentences
from experiments.classification import ImageClassification
from experiments.harness import process, processes
from experiments.harness.run_folder import RunError
from experiments.harness.training import run

ROOT = Path(__file__).parents[3]
#: Steps that take as long as their checkpoints, so that a signal comes before the last one.
RUN = ("--model=perceptron", "--optimizer=nesterov", "--batch-size=24", "--steps=120")
EXECUTED = ("--executor=sharded", "--log-every=2", "--eval-every=20")


@pytest.mark.parametrize("executor", ["scan", "jit", "pmap"])
def test_several_processes_need_an_executor_that_splits_batches(tmp_path, executor):
    with pytest.raises(RunError, match=f"--processes 2 needs --executor sharded, .* {executor} is"):
        tiny(tmp_path, executor=executor, processes=2)


def test_several_processes_need_a_command(tmp_path):
    with pytest.raises(RunError, match=r"--processes 2 needs a command, python -m experiments"):
        tiny(tmp_path, executor="sharded", processes=2)
    assert not (tmp_path / "config.json").exists()


def test_a_process_that_ends_before_it_is_connected_ends_the_run(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(process, "leave", lambda line, code: left.append((line, code)))
    monkeypatch.setattr(processes, "_LOST_SECONDS", 0.0)
    log, connected = tmp_path / "process_1.log", threading.Event()

    def end(program):
        with log.open("wb") as output:
            child = subprocess.Popen([sys.executable, "-c", program], stderr=output)
        processes._watch(1, child, log, connected)

    end("pass")
    assert left == []
    end("raise SystemExit('no data\\n')")
    line = f"error: process 1 ended with code 1: no data; see {log}"
    assert left == [(line, 2)]
    connected.set()  # a later loss is told by the connection
    end("raise SystemExit('no data\\n')")
    assert left == [(line, 2)]


def test_a_process_ends_with_the_first_one(monkeypatch):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    read, write = os.pipe()
    os.close(write)  # as when the first one is killed
    processes._end_with(read)
    os.close(read)
    assert codes == [3]


def test_a_hook_on_its_own_copy_has_the_methods_of_the_hook():
    class Hook:
        def __init__(self):
            self.watches = ("loss",)

        def __call__(self, step, state, metrics):
            return {"value": step}

    hook = processes.OnOwnCopy(Hook())
    assert hook(3, {"a": np.ones(1)}, {}) == {"value": 3} and hook.watches == ("loss",)
    assert not hasattr(hook, "commit")


def test_batches_of_sentences_do_not_depend_on_a_few_devices(monkeypatch):
    sizes = {}
    for count in (1, 2, 8, 3):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        sizes[count] = sentences._multiple()
    assert sizes == {1: 8, 2: 8, 8: 8, 3: 24}


def start(folder, *options, before=(), **variables):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # a line for each program of the cache would fill the pipes
        **variables,
    }
    out = f"--out={folder / 'run'}"
    command = [sys.executable, "-m", "experiments.digits", *RUN, *EXECUTED, out, *options]
    return subprocess.Popen(
        [*before, *command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rows(folder, name="run"):
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("name", ["slurm.sh", "ssh.sh"])
def test_the_scripts_of_clusters_are_shell(name):
    subprocess.run(["bash", "-n", str(ROOT / "experiments" / "cluster" / name)], check=True)


@pytest.mark.slow
def test_two_processes_that_are_stopped_go_on_as_a_list_of_three_to_the_curve_of_one(tmp_path):
    two = start(tmp_path, "--processes=2", "--checkpoint-every=1")
    deadline = time.monotonic() + 300
    while not rows(tmp_path):
        assert two.poll() is None and time.monotonic() < deadline, two.communicate()
        time.sleep(0.02)
    os.killpg(two.pid, signal.SIGTERM)
    printed, messages = two.communicate(timeout=300)
    assert (two.returncode, printed) == (3, ""), messages
    assert "\nstopped by SIGTERM (process 0) at step " in messages
    assert "Traceback" not in messages and "process 1 of 2" not in messages
    assert "process 1 of 2" in (tmp_path / "run" / "process_1.log").read_text()
    assert 2 <= rows(tmp_path)[-1]["step"] < 120

    stand_in = tmp_path / "ssh"  # on this machine: option, host, command
    stand_in.write_text('#!/bin/sh\nexec sh -c "$3"\n')
    stand_in.chmod(0o755)
    script = [str(ROOT / "experiments" / "cluster" / "ssh.sh"), "localhost,localhost,localhost"]
    port = str(processes.free_port())
    three = start(tmp_path, "--resume", before=script, SSH=str(stand_in), PORT=port)
    printed, messages = three.communicate(timeout=300)
    assert three.returncode == 0 and messages.count("1 of 3 cpu devices") == 3, messages
    result = json.loads(printed)  # the only line

    again = start(tmp_path, "--processes=2")
    printed, messages = again.communicate(timeout=300)
    assert again.returncode == 0 and "is finished; nothing to do" in messages, messages
    assert json.loads(printed) == result

    config = dataclasses.replace(
        digits.RECIPES["perceptron"],
        optimizer="nesterov",
        batch_size=24,
        steps=120,
        executor="jit",
        log_every=2,
        eval_every=20,
        out=tmp_path / "alone",
    )
    problem = ImageClassification(config, jn.data.digits())
    expected = run("digits", config, lambda config: problem)
    assert result["value"] == pytest.approx(expected["value"], abs=1 / 360)
    losses, alone = ([row["loss"] for row in rows(tmp_path, name)] for name in ("run", "alone"))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
