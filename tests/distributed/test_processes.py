"""Runs of one, two and four real processes: equal curves, one checkpoint, one end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "process_run.py"


def free_port():
    """Return a port that is free, like the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("localhost", port + 1))
            except OSError:
                continue
            return port


def start(count, folder, num_steps, kind, pause=0.0):
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(SCRIPT), str(folder), str(num_steps), kind, str(pause)]
    return [
        subprocess.Popen(
            command,
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes, code=0):
    """Return what the processes printed, (result, messages) each; Gloo prints too."""
    outputs = [process.communicate(timeout=900) for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [code] * len(processes), outputs
    lines = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in outputs]
    return [
        (json.loads(*out) if out else None, err)
        for out, (_, err) in zip(lines, outputs, strict=True)
    ]


def wait_for_rows(folder, count, processes):
    """Wait until a run has written some rows."""
    deadline = time.monotonic() + 300
    log = folder / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one and two processes know at the end of all networks."""
    folder = tmp_path_factory.mktemp("all")
    return {n: finish(start(n, folder / f"of_{n}", 12, "all")) for n in (1, 2)}


def test_two_processes_give_the_curves_of_one(results):
    [(alone, _)], [(first, _), (second, _)] = results[1], results[2]
    assert first == second and first.keys() == alone.keys()
    for name, result in first.items():
        losses, expected = result["losses"], alone[name]["losses"]
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)
        assert result["step"] == 12 and not np.allclose(expected[0], expected[-1], rtol=1e-3)


def test_four_processes_give_the_curve_of_one(results, tmp_path):
    four = [result for result, _ in finish(start(4, tmp_path / "run", 12, "feedforward"))]
    assert four == [four[0]] * 4
    expected = results[1][0][0]["feedforward-own"]["losses"]
    np.testing.assert_allclose(four[0]["feedforward-own"]["losses"], expected, rtol=1e-5)


@pytest.mark.parametrize(("count", "later"), [(2, 1), (1, 2), (2, 2)])
def test_a_checkpoint_is_for_any_number_of_processes(results, tmp_path, count, later):
    saved = finish(start(count, tmp_path / "run", 8, "feedforward"))[0][0]["feedforward-own"]
    resumed = finish(start(later, tmp_path / "run", 12, "feedforward"))[0][0]["feedforward-own"]
    assert resumed["restored"] == saved["digest"]
    expected = results[later][0][0]["feedforward-own"]
    np.testing.assert_allclose(resumed["losses"], expected["losses"], rtol=1e-5)
    if count == later:
        assert resumed["digest"] == expected["digest"]


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
    processes = start(2, tmp_path / "run", 10_000, "feedforward", pause=0.02)
    wait_for_rows(tmp_path / "run" / "feedforward-own", 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    (first, _), (second, _) = finish(processes)
    assert first == second
    step = first["feedforward-own"]["step"]
    assert first["feedforward-own"]["stopped"] == f"SIGTERM (process 1) at step {step}"
    resumed = finish(start(1, tmp_path / "run", step + 4, "feedforward"))[0][0]
    assert resumed["feedforward-own"]["step"] == step + 4


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "its connection closed"), (signal.SIGSTOP, "it has not answered for 10 s")],
)
def test_a_process_that_is_lost_stops_the_others(tmp_path, number, reason):
    processes = start(2, tmp_path / "run", 10_000, "feedforward", pause=0.02)
    try:
        wait_for_rows(tmp_path / "run" / "feedforward-own", 2, processes)
        processes[1].send_signal(number)
        began = time.monotonic()
        [(_, messages)] = finish(processes[:1], code=3)
        assert time.monotonic() - began < 60
        assert f"process 1 of 2 (pid {processes[1].pid} on " in messages and reason in messages
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_other_data_are_refused_before_the_first_step(tmp_path):
    """Each process has inputs of its own."""
    port = free_port()
    program = (
        "import sys, jax, jaxnets as jn, numpy as np, optax\n"
        f"jn.init_distributed('localhost:{port}', 2, int(sys.argv[1]), timeout_seconds=60)\n"
        "module = jn.MLP((4,), 2)\n"
        "update = jn.Update(jn.classification(module), optax.sgd(0.1))\n"
        "data = {'inputs': np.full((8, 3), float(sys.argv[1])), 'labels': np.zeros(8, int)}\n"
        "variables = module.init(jax.random.key(0), np.zeros((1, 3)))\n"
        "state = jn.create_train_state(variables, update, rng=jax.random.key(0))\n"
        "step = jn.sharded_step(jn.make_train_step(update), jn.data_mesh())\n"
        "jn.fit(step, state, jn.data.shuffled_batches(data, 4, seed=0), num_steps=2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(index)],
            env={**environment, "JAX_NUM_CPU_DEVICES": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    for message in messages:
        assert "DistributedError: the first batch differs: process 1 has " in message
        assert '"inputs": "float64[4, 3] of sha256' in message and '"labels"' not in message
    assert all(process.returncode in (1, 3) for process in processes)
