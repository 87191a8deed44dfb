"""Runs of one, two and four real processes: equal curves, one checkpoint, one end."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from process_run import CASES

from experiments.harness.processes import free_port

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "process_run.py"


def job(folder, num_steps=12, **arguments):
    return {"folder": str(folder), "num_steps": num_steps, **arguments}


def cases(folder):
    return [job(folder / f"{k}-{how}", kind=k, layout=how) for k, how in CASES]


def endless(folder):
    return job(folder, 10_000, pause=0.02)


def start(count, jobs, programs):
    """Start processes that run the jobs one after the other."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # a line for each program of the cache would fill the pipes
    }
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(jobs)],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes, codes=(0,)):
    """Return what the processes printed, (results of the jobs, messages) each; Gloo prints too."""
    outputs = [process.communicate(timeout=900) for process in processes]
    assert all(process.returncode in codes for process in processes), outputs
    return [(results_of(out), err) for out, err in outputs]


def results_of(printed):
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def wait_for_rows(folder, processes):
    """Wait until a run has written some rows."""
    deadline = time.monotonic() + 600
    log = folder / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [
            process.communicate() for process in processes if process.poll() is not None
        ]
        time.sleep(0.05)


def finish_without(process, processes):
    """Return what the others printed after one was lost, its results, and how long they took."""
    try:
        began = time.monotonic()
        outputs = finish([each for each in processes if each is not process], codes=(3,))
        seconds = time.monotonic() - began
    finally:
        process.kill()
        printed, _ = process.communicate()
    return outputs, results_of(printed), seconds


# Starting a process takes longer than what it trains, so each does several jobs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder):
    """All cases in one process, and a run of 8 steps."""
    jobs = [*cases(folder / "of_1"), job(folder / "by_1", 8)]
    [(results, _)] = finish(start(1, jobs, folder / "programs"))
    return results


@dataclasses.dataclass
class Two:
    """What two processes did: the jobs of `one`, and more until one of them hung."""

    results: list[dict]
    resumed: dict
    stopped: dict
    hung: int
    messages: str
    seconds: float


@pytest.fixture(scope="module")
def two(one, folder):
    shutil.copytree(folder / "by_1", folder / "by_1_and_2")
    more = [job(folder / "by_1_and_2"), endless(folder / "stopped"), endless(folder / "hung")]
    jobs = [*cases(folder / "of_2"), job(folder / "by_2", 8), *more]
    processes = start(2, jobs, folder / "programs")
    wait_for_rows(folder / "stopped", processes)
    processes[1].send_signal(signal.SIGTERM)
    wait_for_rows(folder / "hung", processes)
    processes[1].send_signal(signal.SIGSTOP)
    [(results, messages)], others, seconds = finish_without(processes[1], processes)
    assert results == others
    *results, resumed, stopped = results
    return Two(results, resumed, stopped, processes[1].pid, messages, seconds)


@pytest.fixture(scope="module")
def later(two, folder):
    """What one and two new processes make of the folders; the two have other data at the end."""
    for count in (1, 2):
        shutil.copytree(folder / "by_2", folder / f"by_2_and_{count}")
    jobs = [job(folder / "by_2_and_1"), job(folder / "stopped", two.stopped["step"] + 4)]
    alone = start(1, jobs, folder / "programs")
    jobs = [job(folder / "by_2_and_2"), job(folder / "others", layout="whole", own_data=True)]
    pair = start(2, jobs, folder / "programs")
    return finish(alone), finish(pair, codes=(1, 3))


def test_two_processes_give_the_curves_of_one(one, two):
    for case, alone, result in zip(CASES, one, two.results, strict=False):
        expected = alone["losses"]
        np.testing.assert_allclose(result["losses"], expected, rtol=1e-5, err_msg=str(case))
        assert result["step"] == 12 and not np.allclose(expected[0], expected[-1], rtol=1e-3)


def test_examples_that_do_not_fill_a_batch_are_evaluated_once(one, two):
    evaluated = 0
    for alone, result in zip(one, two.results, strict=True):
        for name, value in (alone["evaluated"] or {}).items():
            np.testing.assert_allclose(result["evaluated"][name], value, rtol=1e-5, err_msg=name)
            evaluated += 1
    assert evaluated


def test_a_checkpoint_is_for_any_number_of_processes(one, two, later):
    ([([alone, _], _)], [([first], _), ([second], _)]) = later
    assert first == second
    for saved, resumed, whole in [
        (one[-1], two.resumed, two.results[0]),
        (two.results[-1], alone, one[0]),
        (two.results[-1], first, two.results[0]),
    ]:
        assert saved["step"] == 8 and resumed["restored"] == saved["digest"]
        np.testing.assert_allclose(resumed["losses"], whole["losses"], rtol=1e-5)
    assert first["digest"] == two.results[0]["digest"]


def test_a_signal_to_one_stops_all_at_the_same_step(two, later):
    step = two.stopped["step"]
    assert two.stopped["stopped"] == f"SIGTERM (process 1) at step {step}"
    [([_, resumed], _)] = later[0]
    assert resumed["restored"] == two.stopped["digest"] and resumed["step"] == step + 4


def test_a_process_that_hangs_stops_the_other(two):
    assert f"process 1 of 2 (pid {two.hung} on " in two.messages
    assert "it has not answered for 10 s" in two.messages and two.seconds < 60


def test_other_data_are_refused_before_the_first_step(later):
    for _, message in later[1]:
        assert "DistributedError: the first batch differs: process 1 has " in message
        assert '"inputs": "float32[16, 8, 8, 1] of sha256' in message and '"labels"' not in message


def test_four_processes_give_the_curve_of_one_and_notice_a_kill(one, folder):
    jobs = [job(folder / "of_4"), endless(folder / "killed")]
    processes = start(4, jobs, folder / "programs")
    wait_for_rows(folder / "killed", processes)
    processes[2].kill()
    outputs, results, seconds = finish_without(processes[2], processes)
    assert seconds < 60
    for each, messages in outputs:
        assert each == results
        assert f"process 2 of 4 (pid {processes[2].pid} on " in messages
        assert "its connection closed" in messages
    [result] = results
    np.testing.assert_allclose(result["losses"], one[0]["losses"], rtol=1e-5)
