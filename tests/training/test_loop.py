"""The training loop: rows, sums, hooks, writers, populations, errors, times."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_problem import (
    Chunked,
    assert_bitwise_equal,
    eval_step,
    make_batch,
    make_state,
    plain_step,
    population,
    reference_losses,
    scanned_step,
    source,
    train_step,
)

from jaxnets.core import Mean, Update
from jaxnets.models.feedforward import MLP
from jaxnets.objectives.supervised import classification
from jaxnets.training.executors import jit_step
from jaxnets.training.history import History, NonFiniteError
from jaxnets.training.hooks import Checkpointing, every, validation
from jaxnets.training.loop import evaluate, fit, value_ranges
from jaxnets.training.nonfinite import first_nonfinite
from jaxnets.training.step import create_train_state, make_train_step
from jaxnets.training.writers import jsonl_writer


def test_rows_hold_the_exact_means_since_the_row_before():
    expected, pairs = reference_losses(10)
    state, history = fit(train_step, make_state(), source, num_steps=10, log_every=4)
    assert_bitwise_equal(state, expected)
    steps, losses = history.column("loss")
    assert steps == [4, 8, 10]
    for loss, interval in zip(losses, (pairs[:4], pairs[4:8], pairs[8:]), strict=True):
        total, count = np.sum(np.asarray(interval, np.float64), axis=0)
        assert loss == total / count
    assert not any("outer" in row for row in history.rows)
    assert history.sums == {} and history.step == 10 and history.stopped is None


def test_a_finished_run_calls_nothing_writes_no_file_and_says_so(tmp_path, capsys):
    def forbidden(*args):
        raise AssertionError("called")

    state = dataclasses.replace(make_state(), step=jnp.int32(7))
    path = tmp_path / "metrics.jsonl"
    hook, writer = Checkpointing(tmp_path / "c", every=1), jsonl_writer(path)
    same, history = fit(forbidden, state, forbidden, num_steps=7, hooks=[hook], writers=[writer])
    assert same is state and history.rows == []
    assert list(tmp_path.iterdir()) == []
    line = "fit: the state is at step 7 and num_steps=7 counts from step 0, so nothing is trained"
    assert capsys.readouterr().err.startswith(line)
    fit(forbidden, state, forbidden, num_steps=5, progress=False)
    assert capsys.readouterr().err == ""


def test_a_metric_without_weight_is_left_out_of_its_row_and_the_loss_reported():
    def source_of(weights):
        def batches(first):
            for step in range(first, 9):
                batch = make_batch(step)
                yield {**batch, "weights": batch["weights"] * weights[step]}

        return batches

    weights = [1, 0, 0, 0, 1, 1, 0, 0, 0]
    with pytest.warns(RuntimeWarning, match="step 4 has no loss.* sum to 0") as caught:
        state, history = fit(train_step, make_state(), source_of(weights), num_steps=8, log_every=2)
    assert len(caught) == 1
    assert history.column("loss")[0] == [2, 6] and [row["step"] for row in history.rows] == [2, 6]
    assert np.isfinite(history.column("loss")[1]).all()
    assert first_nonfinite(state.params) is None
    assert history.step == 8 and history.sums == {}


def test_a_member_without_weight_has_no_mean_and_the_others_have():
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), make_state(0), make_state(1))
    step = jax.jit(jax.vmap(plain_step))

    def batches(first):
        batch = make_batch(0)
        both = {name: np.stack([array, array]) for name, array in batch.items()}
        both["weights"][1] = 0
        return [both] * 2

    _, history = fit(step, states, batches, num_steps=2)
    first, second = history.rows[0]["loss"]
    assert np.isfinite(first) and np.isnan(second)


def test_the_source_is_called_with_the_first_step_and_closed():
    calls = []

    def watched(first):
        calls.append(first)
        try:
            yield from source(first)
        finally:
            calls.append("closed")

    state, _ = fit(train_step, make_state(), watched, num_steps=3)
    fit(train_step, state, watched, num_steps=5)
    assert calls == [0, "closed", 3, "closed"]


@pytest.mark.parametrize("size", [1, 3, 4, 7, 50])
def test_chunks_of_steps_end_exactly_at_num_steps(size):
    expected, pairs = reference_losses(10)
    state, history = fit(scanned_step, make_state(), Chunked(size), num_steps=10, log_every=4)
    assert int(state.step) == 10
    np.testing.assert_allclose(
        state.params["linear"]["kernel"], expected.params["linear"]["kernel"], rtol=1e-5
    )
    steps, losses = history.column("loss")
    cuts = [now for now in (*range(size, 10, size), 10) if now // 4 > max(now - size, 0) // 4]
    assert steps == sorted({*cuts, 10})
    for loss, first, last in zip(losses, [0, *steps], steps, strict=False):
        total, count = np.sum(pairs[first:last], axis=0)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_a_step_that_does_not_fit_its_source_is_refused():
    with pytest.raises(ValueError, match=r"made 1 steps, but a batch of the source holds 2"):
        fit(
            lambda state, batch: train_step(state, jax.tree.map(lambda x: x[0], batch)),
            make_state(),
            Chunked(2),
            num_steps=10,
        )
    with pytest.raises(ValueError, match=r"made 4 steps, but a batch of the source holds 1"):
        chunks = Chunked(4)
        fit(scanned_step, make_state(), lambda first: chunks(first), num_steps=10)


def test_a_source_that_ends_early_is_reported():
    with pytest.raises(ValueError, match="ended at step 2 of 5"):
        fit(train_step, make_state(), lambda first: iter([make_batch(0)] * 2), num_steps=5)
    with pytest.raises(ValueError, match="ended at step 0 of 5"):
        fit(train_step, make_state(), lambda first: iter([]), num_steps=5)


def test_batches_that_are_no_source_and_an_interval_of_no_steps_are_refused():
    batches = [make_batch(0)]
    for wrong in (batches, batches[0], iter(batches)):
        with pytest.raises(TypeError, match="batches is a"):
            fit(train_step, make_state(), wrong, num_steps=1)
    with pytest.raises(TypeError, match="a batch of the source is a tuple"):
        fit(train_step, make_state(), lambda first: iter([(1, 2)]), num_steps=1)
    with pytest.raises(TypeError, match="batches is a dict"):
        evaluate(eval_step, make_state(), make_batch(0))
    for log_every in (0, -1):
        with pytest.raises(ValueError, match=f"log_every={log_every} must be a positive"):
            fit(train_step, make_state(), source, num_steps=1, log_every=log_every)
    for num_steps in (1e4, 2.5, None):
        with pytest.raises(ValueError, match=rf"num_steps is {num_steps}; give an integer"):
            fit(train_step, make_state(), source, num_steps=num_steps)


def test_a_source_may_return_a_list():
    expected, _ = reference_losses(2)
    state, _ = fit(
        train_step, make_state(), lambda first: [make_batch(0), make_batch(1)], num_steps=2
    )
    assert_bitwise_equal(state, expected)


def test_metrics_are_fetched_one_log_interval_later():
    """At a hook the history lags by an interval: newer calls are still queued."""
    rows = []
    history = History()

    def hook(step, state, metrics):
        rows.append((step, [row["step"] for row in history.rows]))

    fit(train_step, make_state(), source, num_steps=12, log_every=4, hooks=[hook], history=history)
    assert rows[7] == (8, [])  # at the call of step 8, the calls up to 4 are still queued
    assert rows[8] == (9, [4])
    assert history.column("loss")[0] == [4, 8, 12]


def test_hook_results_join_the_row_of_their_step_in_step_order():
    written = []
    hooks = [
        every(3, lambda step, state, metrics: {"a/three": step}),
        every(2, lambda step, state, metrics: {"b/saw": float("a/three" in metrics)}),
    ]
    _, history = fit(
        train_step,
        make_state(),
        source,
        num_steps=7,
        log_every=4,
        hooks=hooks,
        writers=[written.append],
    )
    assert written == history.rows
    rows = {row["step"]: {n: v for n, v in row.items() if n[1] == "/"} for row in written}
    assert list(rows) == [2, 3, 4, 6, 7]
    assert rows[2] == {"b/saw": 0.0} and rows[3] == {"a/three": 3.0} and rows[7] == {}
    assert rows[6] == {"a/three": 6.0, "b/saw": 1.0}
    assert [row["step"] for row in written if "loss" in row] == [4, 7]


def test_a_hook_may_not_overwrite_a_metric():
    with pytest.raises(ValueError, match=r"\['loss'\], names that are taken; add a prefix"):
        fit(
            train_step,
            make_state(),
            source,
            num_steps=2,
            hooks=[lambda step, state, metrics: {"loss": 1.0}],
        )


def test_hooks_and_writers_are_started_and_closed_also_after_an_error():
    calls = []

    class Watched:
        def start(self, history, step):
            calls.append(("start", step))

        def __call__(self, *args):
            if len(args) == 3:
                raise RuntimeError("broken hook")

        def close(self):
            calls.append("close")

    with pytest.raises(RuntimeError, match="broken hook"):
        fit(
            train_step,
            make_state(),
            source,
            num_steps=2,
            hooks=[Watched()],
            writers=[Watched()],
        )
    assert calls == [("start", 0), ("start", 0), "close", "close"]


def test_the_rows_of_a_population_are_those_of_solo_runs():
    states = [make_state(seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    hooks = [every(3, validation(jax.vmap(eval_step, (0, None)), [make_batch(99)]))]
    state, history = fit(population, stacked, source, num_steps=7, log_every=3, hooks=hooks)
    assert state.step.tolist() == [7, 7]
    for member, solo in enumerate(states):
        hooks = [every(3, validation(eval_step, [make_batch(99)]))]
        _, alone = fit(train_step, solo, source, num_steps=7, log_every=3, hooks=hooks)
        assert [sorted(row) for row in alone.rows] == [sorted(row) for row in history.rows]
        for row, other in zip(history.rows, alone.rows, strict=True):
            for name, value in other.items():
                got = row[name] if name == "step" else row[name][member]
                assert got == pytest.approx(value, rel=1e-5)


def test_members_at_different_steps_are_refused():
    state = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), make_state())
    state = dataclasses.replace(state, step=jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"different steps \[1, 2\]"):
        fit(population, state, source, num_steps=3)


def test_history_survives_json_exactly_and_continues_its_sums():
    saved = []

    class Save:
        def start(self, history, step):
            self.history = history

        def __call__(self, step, state, metrics):
            return None

        def commit(self, step, state, *, last):
            saved.append((state, json.loads(json.dumps(self.history.to_json()))))

    hook = every_two = every(2, lambda step, state, metrics: {"x/y": 1 / (step + 0.3)})
    final, whole = fit(
        train_step, make_state(), source, num_steps=11, log_every=4, hooks=[hook, Save()]
    )
    for state, content in saved:
        history = History.from_json(content)
        assert history.step == int(state.step)
        assert json.loads(json.dumps(history.to_json())) == content
        again, history = fit(
            train_step,
            state,
            source,
            num_steps=11,
            log_every=4,
            history=history,
            hooks=[every_two],
        )
        assert history.rows == whole.rows
        assert_bitwise_equal(again, final)


def test_a_history_of_another_step_is_refused():
    with pytest.raises(ValueError, match="history ends at step 5, but the state is at step 0"):
        fit(train_step, make_state(), source, num_steps=9, history=History(step=5))


def test_a_non_finite_loss_names_step_metric_and_parameter_and_keeps_the_rows_before():
    def poisoned(first):
        for step, batch in enumerate(source(first), first):
            yield {**batch, "inputs": batch["inputs"] * (np.nan if step == 6 else 1)}

    written = []
    with pytest.raises(NonFiniteError) as caught:
        fit(
            train_step,
            make_state(),
            poisoned,
            num_steps=50,
            log_every=2,
            writers=[written.append],
        )
    message = str(caught.value)
    assert message.startswith("loss at step 7 is not finite")
    assert "parameter linear/kernel is NaN" in message and "learning rate" in message
    assert "inputs with NaN or infinity" in message or "inputs from" in message
    assert message.index("NaN in the inputs") < message.index("lower the learning rate")
    assert isinstance(caught.value, FloatingPointError)
    assert [row["step"] for row in written] == [2, 4, 6]


def test_labels_from_one_on_are_named_before_the_learning_rate():
    module = MLP(features=(), num_outputs=10)
    batch = {
        "inputs": np.ones((10, 3), np.float32),
        "labels": np.arange(1, 11, dtype=np.uint8),
        "weights": np.ones(10, jnp.bfloat16),
        "names": np.array(["a"] * 10),
    }
    arrays = {name: array for name, array in batch.items() if name != "names"}
    update = Update(classification(module), optax.sgd(0.1))
    variables = module.init(jax.random.key(0), batch["inputs"])
    state = create_train_state(variables, update, rng=jax.random.key(0))
    with pytest.raises(NonFiniteError) as caught:
        fit(jit_step(make_train_step(update)), state, lambda _: iter([arrays]), num_steps=1)
    message = str(caught.value)
    assert "the training batch of step 1 has inputs from 1 to 1, labels from 1 to 10" in message
    assert "weights from 1 to 1, and the network has 10 outputs" in message
    assert message.index("for n classes 0 to n - 1") < message.index("learning rate")
    assert value_ranges(batch) == "inputs from 1 to 1, labels from 1 to 10, weights from 1 to 1"


def test_a_non_finite_loss_in_a_population_or_chunk_names_member_and_steps():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), make_state(0), make_state(1))
    params = {"linear": {"kernel": stacked.params["linear"]["kernel"].at[1].set(jnp.inf)}}
    with pytest.raises(NonFiniteError, match=r"member 1 at step 1 .*the start or this step"):
        fit(population, dataclasses.replace(stacked, params=params), source, num_steps=3)
    bad = dataclasses.replace(make_state(), params={"linear": {"kernel": jnp.full(3, jnp.nan)}})
    with pytest.raises(NonFiniteError, match="loss at steps 1 to 3 is not finite"):
        fit(scanned_step, bad, Chunked(3), num_steps=3)


def test_the_jsonl_log_is_cut_back_to_the_history_on_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    fit(train_step, make_state(), source, num_steps=8, log_every=2, writers=[jsonl_writer(path)])
    whole = path.read_bytes()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [2, 4, 6, 8]
    state, history = fit(train_step, make_state(), source, num_steps=4, log_every=2)
    path.write_bytes(whole + b'{"step": 10, "lo')
    fit(
        train_step,
        state,
        source,
        num_steps=8,
        log_every=2,
        history=history,
        writers=[jsonl_writer(path)],
    )
    assert path.read_bytes() == whole
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_times_are_measured_and_are_not_in_the_rows():
    _, history = fit(train_step, make_state(), source, num_steps=3)
    assert history.first_call_seconds > 0 and history.seconds > 0
    assert not any("seconds" in name for row in history.rows for name in row)


def test_waiting_evaluating_and_saving_are_counted_separately_and_survive_a_resume(tmp_path):
    def slow_source(step):
        for batch in source(step):
            time.sleep(0.02)
            yield batch

    def slow_eval(state, batch):
        time.sleep(0.03)
        return {"loss": Mean.of(jnp.ones(1))}

    hooks = [validation(slow_eval, [{}]), Checkpointing(tmp_path, every=2)]
    _, history = fit(train_step, make_state(), slow_source, num_steps=3, hooks=hooks)
    spent = history.spent
    assert set(spent) == {"batches", "evaluation", "checkpoints"}
    assert spent["batches"] >= 2 * 0.02  # the first batch counts with the first call
    assert spent["evaluation"] >= 3 * 0.03
    assert sum(spent.values()) <= history.seconds
    assert History.from_json(json.loads(json.dumps(history.to_json()))).spent == spent
