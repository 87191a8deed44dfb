"""Resume: bitwise; after damage and kills; of a population; with several processes."""

import dataclasses
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_problem import (
    assert_bitwise_equal,
    at_step,
    flip,
    make_state,
    source,
    train_step,
)
from killed_run import KINDS

from jaxnets.training.checkpoint import (
    CheckpointError,
    all_steps,
    best_steps,
    latest_step,
    restore,
    save,
    verify,
)
from jaxnets.training.history import History, NonFiniteError
from jaxnets.training.hooks import Checkpointing, every, resume
from jaxnets.training.loop import fit
from jaxnets.training.writers import jsonl_writer


@pytest.mark.parametrize("stop", [5, 6, 9])
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(tmp_path, stop):
    expected, _ = fit(
        train_step,
        make_state(),
        source,
        num_steps=10,
        log_every=4,
        writers=[jsonl_writer(tmp_path / "whole.jsonl")],
    )

    def killed(step, state, metrics):
        if step == stop:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(
            train_step,
            make_state(),
            source,
            num_steps=10,
            log_every=4,
            hooks=[killed, Checkpointing(tmp_path / "run", every=3)],
            writers=[jsonl_writer(tmp_path / "run.jsonl")],
        )
    state, history = resume(tmp_path / "run", make_state(7))
    assert history.step == int(state.step) == (stop - 1) // 3 * 3
    state, _ = fit(
        train_step,
        state,
        source,
        num_steps=10,
        log_every=4,
        history=history,
        writers=[jsonl_writer(tmp_path / "run.jsonl")],
    )
    assert_bitwise_equal(state, expected)
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def scripted(values):
    return lambda step, state, metrics: {"validation/accuracy": values[step - 1]}


def test_checkpointing_keeps_the_newest_the_best_and_the_last(tmp_path):
    values = [0.1, 0.9, 0.3, 0.8, 0.2, 0.9, 0.4, 0.1, 0.2, 0.3, 0.3]
    hook = Checkpointing(
        tmp_path, every=4, keep=2, best=("validation/accuracy", "max"), keep_best=2
    )
    fit(train_step, make_state(), source, num_steps=11, hooks=[scripted(values), hook])
    assert hook.best_steps() == [2, 6]  # of equal values the earlier one is first
    assert all_steps(tmp_path) == [2, 6, 8, 11]
    state, metadata = restore(tmp_path, make_state(), step=6)
    history = History.from_json(metadata["history"])
    assert int(state.step) == 6 and history.rows[-1]["validation/accuracy"] == 0.9


def test_best_checkpoints_are_remembered_after_a_resume(tmp_path):
    values = [0.5, 0.1, 0.7, 0.2, 0.1, 0.6]

    def hooks():
        best = Checkpointing(tmp_path, every=2, keep=1, best=("validation/accuracy", "max"))
        return [scripted(values), best]

    fit(train_step, make_state(), source, num_steps=4, hooks=hooks())
    state, history = resume(tmp_path, make_state())
    fit(train_step, state, source, num_steps=6, hooks=hooks(), history=history)
    assert all_steps(tmp_path) == [3, 6]


def test_the_best_checkpoints_are_known_before_after_and_without_a_run(tmp_path):
    values = [0.5, 0.1, 0.7, 0.2]
    best = ("validation/accuracy", "max")

    def checkpointing(**options):
        return Checkpointing(tmp_path, every=1, keep=9, best=best, **options)

    assert checkpointing().best_steps() == []
    state, history = fit(
        train_step, make_state(), source, num_steps=4, hooks=[scripted(values), checkpointing()]
    )
    again = checkpointing(keep_best=2)
    fit(
        train_step,
        state,
        source,
        num_steps=4,
        hooks=[scripted(values), again],
        history=history,
    )
    assert again.best_steps() == [3, 1]
    assert checkpointing(keep_best=9).best_steps() == [3, 1, 4, 2]
    assert best_steps(tmp_path, "validation/accuracy", "min") == [2, 4, 1, 3]
    flip(tmp_path / "step_00000004" / "manifest.json")  # the history of step 3 has them too
    assert checkpointing().best_steps() == [3]


@pytest.mark.filterwarnings("ignore:validation/accuracy .*is NaN:RuntimeWarning")
def test_the_best_checkpoint_is_restored_by_asking_for_it(tmp_path):
    best = ("validation/accuracy", "max")
    # Of a population the mean of its members that are not frozen counts.
    values = [[0.5], [0.1, math.nan], [0.6, 0.8], math.nan]
    hooks = [scripted(values), Checkpointing(tmp_path, every=1, keep=9)]
    fit(train_step, make_state(), source, num_steps=4, hooks=hooks)
    state, metadata = restore(tmp_path, make_state(), best=best)
    assert int(state.step) == 3 and metadata["history"]["step"] == 3
    assert int(restore(tmp_path, make_state(), best=(best[0], "min"))[0].step) == 2
    flip(tmp_path / "step_00000003" / "manifest.json")
    with pytest.warns(UserWarning, match="step_00000003.*trying the next best checkpoint"):
        state, _ = restore(tmp_path, make_state(), best=best)
    assert int(state.step) == 1
    for wrong, message in (
        (("validation/acuracy", "max"), r"no checkpoint .* values of validation/accuracy, loss"),
        (("validation/accuracy", "highest"), "mode is 'highest'"),
    ):
        with pytest.raises(ValueError, match=message):
            restore(tmp_path, make_state(), best=wrong)
    with pytest.raises(ValueError, match="step=1 and best="):
        restore(tmp_path, make_state(), step=1, best=best)


@pytest.mark.filterwarnings("ignore:validation/accuracy .*is NaN or infinite:RuntimeWarning")
def test_an_infinite_value_is_never_the_best(tmp_path):
    best = ("validation/accuracy", "max")

    def train(folder, values):
        hooks = [scripted(values), Checkpointing(folder, every=1, keep=1, best=best)]
        fit(train_step, make_state(), source, num_steps=len(values), hooks=hooks)

    train(tmp_path / "some", [0.1, 0.3, math.inf, [0.2, math.inf], 0.1])
    assert best_steps(tmp_path / "some", *best) == [2, 5]
    assert all_steps(tmp_path / "some") == [2, 5]
    train(tmp_path / "none", [-math.inf, math.nan])
    with pytest.raises(ValueError, match=r"no checkpoint .* has a finite value of validation/acc"):
        restore(tmp_path / "none", make_state(), best=best)


def test_values_of_other_steps_than_those_of_checkpoints_are_told(tmp_path):
    hooks = [every(2, scripted([0.1] * 5)), Checkpointing(tmp_path, every=3)]
    fit(train_step, make_state(), source, num_steps=5, hooks=hooks)
    assert all_steps(tmp_path) == [3, 5]
    message = "has a value of validation/accuracy, which has values of other steps, such as 2; eval"
    with pytest.raises(ValueError, match=message):
        best_steps(tmp_path, "validation/accuracy", "max")


def test_a_checkpoint_of_format_1_is_restored_with_its_history_and_continued(tmp_path):
    shutil.copytree(Path(__file__).parent / "checkpoint_format_1", tmp_path, dirs_exist_ok=True)
    expected, whole = fit(train_step, make_state(), source, num_steps=6, log_every=2)
    state, history = resume(tmp_path, make_state())
    assert history.column("loss")[1] == pytest.approx(whole.column("loss")[1][:2])
    assert history.step == 4
    before = list(history.rows)
    hooks = [Checkpointing(tmp_path, every=2, keep=1)]
    fit(train_step, state, source, num_steps=6, log_every=2, hooks=hooks, history=history)
    assert all_steps(tmp_path) == [6]
    state, history = resume(tmp_path, make_state())
    assert [row["step"] for row in history.rows] == [2, 4, 6] and history.rows[:2] == before
    np.testing.assert_allclose(
        state.params["linear"]["kernel"], expected.params["linear"]["kernel"], rtol=1e-5
    )


def test_a_checkpoint_saved_without_a_history_is_resumed_without_one(tmp_path):
    for step, metadata in ((1, None), (2, {"history": "told by hand"})):
        save(tmp_path, at_step(step), metadata=metadata)
        state, history = resume(tmp_path, make_state())
        assert int(state.step) == history.step == step and history.rows == []
        fit(train_step, state, source, num_steps=step + 1, history=history)
        assert [row["step"] for row in history.rows] == [step + 1]
    with pytest.raises(ValueError, match="metadata has a 'history' and history= is given"):
        save(tmp_path, at_step(3), metadata={"history": 1}, history=history)


def test_a_history_given_to_a_plain_save_is_resumed(tmp_path):
    state, history = fit(train_step, make_state(), source, num_steps=3, log_every=2)
    save(tmp_path, state, history=history, metadata={"note": 1})
    _, metadata = restore(tmp_path, make_state())
    assert metadata == {"note": 1, "history": history.to_json()}
    _, resumed = resume(tmp_path, make_state())
    assert resumed.to_json() == history.to_json()
    for _ in range(2):
        save(tmp_path, state, history=history)
    assert len(list(tmp_path.glob("history_*.jsonl"))) == 1
    assert resume(tmp_path, make_state())[1].to_json() == history.to_json()


def size_of_the_files(folder):
    """Sizes of rows and manifests; Orbax stores the arrays in files of varying sizes."""
    paths = [*folder.glob("history_*.jsonl"), *folder.glob("*/manifest.json")]
    return {path: path.stat().st_size for path in paths}


def test_a_save_writes_as_much_after_many_rows_as_after_few(tmp_path):
    sizes = []
    for count in (10, 5_000):
        folder = tmp_path / str(count)
        rows = [{"step": step, "loss": 0.5} for step in range(1, count + 1)]
        history = History(rows=rows, step=count)
        state = at_step(count)
        hooks = [Checkpointing(folder, every=1)]
        for last in (count + 1, count + 2):
            before = size_of_the_files(folder)
            state, history = fit(
                train_step,
                state,
                source,
                num_steps=last,
                log_every=1,
                hooks=hooks,
                history=history,
            )
        new = size_of_the_files(folder)
        sizes.append(sum(size - before.get(path, 0) for path, size in new.items()))
        assert len(resume(folder, make_state())[1].rows) == count + 2
    assert abs(sizes[0] - sizes[1]) < 1000  # of 100,000 bytes of rows


@pytest.mark.parametrize("damage", ["gone", "cut", "altered"])
def test_a_damaged_history_costs_neither_the_state_nor_a_finished_training(tmp_path, damage):
    hooks = [Checkpointing(tmp_path, every=2)]
    options = {"num_steps": 6, "log_every": 1, "hooks": hooks}
    expected, whole = fit(train_step, make_state(), source, **options)
    path = tmp_path / "history_0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(b"".join(lines[:-1]))
    else:
        flip(path)
    with pytest.raises(CheckpointError, match=r"history_0.jsonl is truncated or altered"):
        verify(tmp_path, 6)
    with pytest.warns(UserWarning, match="history_0.jsonl"):
        state, history = resume(tmp_path, make_state())
    # The newest checkpoint in front of the damage has its whole history; step 6 if none has.
    found = {"gone": (6, 0), "cut": (4, 4), "altered": (2, 2)}[damage]
    assert (int(state.step), len(history.rows)) == found
    state, history = fit(train_step, state, source, **options, history=history)
    assert_bitwise_equal(state, expected)
    if damage != "gone":
        assert history.rows == whole.rows
        resume(tmp_path, make_state())  # without a warning
    assert history.step == 6


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    @jax.jit
    def exploding(state, batch):
        state, metrics = train_step(state, batch)
        bias = jnp.where(state.step == 5, jnp.nan, state.params["linear"]["bias"])
        params = {"linear": {**state.params["linear"], "bias": bias}}
        return dataclasses.replace(state, params=params), metrics

    with pytest.raises(NonFiniteError, match=r"state at step 5 .*parameter linear/bias is NaN"):
        fit(
            exploding,
            make_state(),
            source,
            num_steps=9,
            hooks=[Checkpointing(tmp_path, every=1)],
        )
    state, _ = resume(tmp_path, make_state())
    assert int(state.step) == 4 and np.isfinite(state.params["linear"]["bias"]).all()


def test_a_new_run_in_a_folder_with_a_later_checkpoint_is_refused(tmp_path):
    hooks = [Checkpointing(tmp_path, every=3)]
    fit(train_step, make_state(), source, num_steps=3, hooks=hooks)
    with pytest.raises(ValueError, match="checkpoint of step 3, but the run starts at step 0"):
        fit(train_step, make_state(), source, num_steps=3, hooks=hooks)


def test_a_run_resumes_before_a_damaged_checkpoint_and_overwrites_it(tmp_path):
    hooks = [Checkpointing(tmp_path, every=2, keep=3)]
    expected, whole = fit(train_step, make_state(), source, num_steps=6, hooks=hooks)
    flip(tmp_path / "step_00000006" / "manifest.json")
    with pytest.warns(UserWarning, match="trying the previous checkpoint"):
        state, history = resume(tmp_path, make_state())
    assert int(state.step) == 4
    fit(train_step, state, source, num_steps=6, hooks=hooks, history=history)
    state, history = resume(tmp_path, make_state())
    assert_bitwise_equal(state, expected)
    assert history.rows == whole.rows


def test_a_population_is_saved_with_its_lists(tmp_path):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), make_state(0), make_state(1))
    step = jax.jit(jax.vmap(train_step, in_axes=(0, None)))
    options = {"num_steps": 5, "log_every": 2}
    expected, whole = fit(step, stacked, source, **options)
    fit(
        step,
        stacked,
        source,
        **{**options, "num_steps": 3},
        hooks=[Checkpointing(tmp_path, every=3)],
    )
    state, history = resume(tmp_path, stacked)
    assert len(history.rows[0]["loss"]) == 2
    _, metadata = restore(tmp_path, stacked)
    assert metadata["history"]["step"] == 3
    state, _ = fit(step, state, source, **options)
    assert_bitwise_equal(state, expected)
    assert whole.rows[-1]["step"] == 5


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxnets.training.checkpoint import prune, restore, save
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
for step in (1, 2):
    state = jax.jit(lambda: {"w": step * jnp.arange(8.0)}, out_shardings=split)()
    state["own"] = jnp.float32(step)  # every process has one
    save(sys.argv[3], state, step=step)
assert prune(sys.argv[3], keep=1) == [1]
restored, _ = restore(sys.argv[3], state)
assert restored["w"].sharding == split and restored["own"] == 2
for shard in restored["w"].addressable_shards:
    assert shard.data.tolist() == (2.0 * jnp.arange(8.0))[shard.index].tolist()
"""


@pytest.mark.slow
def test_several_processes_save_and_restore_one_sharded_state(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",  # each has two devices
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(index), str(tmp_path)],
            env=environment,
        )
        for index in range(2)
    ]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    state, _ = restore(tmp_path, {"w": jnp.zeros(8), "own": jnp.zeros(())})
    assert state["w"].tolist() == (2.0 * jnp.arange(8.0)).tolist()


def start_run(folder, num_steps, kind):
    script = Path(__file__).parents[1] / "killed_run.py"
    environment = {
        **os.environ,
        "PYTHONPATH": str(script.parents[1]),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), str(folder), str(num_steps), kind],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(run):
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0
    return output


def check_kills(folder, num_kills, num_steps, kind):
    """Kill a run at random moments, also during saves, and compare its final state and log."""
    digest = finish(start_run(folder / "whole", num_steps, kind))
    moments = random.Random(num_kills)
    for _ in range(num_kills):
        run = start_run(folder / "killed", num_steps, kind)
        known = latest_step(folder / "killed" / "checkpoints")
        while latest_step(folder / "killed" / "checkpoints") == known:
            assert run.poll() is None
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.1))
        assert run.poll() is None
        run.kill()
        run.communicate()
    assert finish(start_run(folder / "killed", num_steps, kind)) == digest
    logs = [(folder / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    steps = [json.loads(line)["step"] for line in logs[0].splitlines()]
    assert steps == [*range(7, num_steps, 7), num_steps]


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_the_uninterrupted_one(tmp_path):
    check_kills(tmp_path, num_kills=3, num_steps=60, kind="functions")


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "functions"])
def test_networks_of_every_family_killed_thirty_times_end_as_the_uninterrupted_one(kind, tmp_path):
    check_kills(tmp_path, num_kills=30, num_steps=900, kind=kind)
