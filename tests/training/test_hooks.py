"""Hooks: when they are called, early stopping, signals."""

import math
import os
import signal
import threading

import pytest
from loop_problem import Chunked, assert_bitwise_equal, make_state, scanned_step, source, train_step

from jaxnets.training.history import History
from jaxnets.training.hooks import Checkpointing, EarlyStopping, every, resume
from jaxnets.training.loop import Interrupted, StopTraining, fit


def test_every_calls_its_hook_at_multiples_also_after_a_resume():
    calls = []
    hook = every(4, lambda step, state, metrics: calls.append(step))
    state, _ = fit(scanned_step, make_state(), Chunked(3), num_steps=6, hooks=[hook])
    fit(scanned_step, state, Chunked(3), num_steps=14, hooks=[hook])
    assert calls == [6, 9, 12]
    with pytest.raises(ValueError, match="give 1 or more"):
        every(0, hook)
    with pytest.raises(ValueError, match="Checkpointing counts steps itself"):
        every(2, Checkpointing("unused", every=1))


def scripted(values):
    remaining = iter(values)
    return lambda step, state, metrics: {"validation/loss": next(remaining)}


@pytest.mark.parametrize(
    ("values", "options", "stop"),
    [
        ([3.0, 2.0, 2.5, 2.0, 1.0], {"patience": 2}, 4),
        ([1.0, 2.0, 3.0, 3.0, 2.5], {"patience": 2, "mode": "max"}, 5),
        ([3.0, 2.8, 2.7, 2.6, 2.5], {"patience": 2, "min_delta": 0.25}, 5),
        ([3.0, math.nan, math.nan, 1.0, 0.5], {"patience": 2}, 3),
        ([[3.0, 1.0], [3.0, 0.5], [2.0, 9.0], [9.0, 9.0], [9.0, 9.0]], {"patience": 2}, 5),
    ],
)
def test_early_stopping_counts_evaluations_without_improvement(values, options, stop):
    hooks = [scripted(values), EarlyStopping("validation/loss", **options)]
    state, history = fit(train_step, make_state(), source, num_steps=6, hooks=hooks)
    assert "has not improved in 2 evaluations" in history.stopped
    assert int(state.step) == stop
    assert not history.interrupted and history.rows[-1]["step"] == stop
    assert "loss" in history.rows[-1]


def test_early_stopping_resumes_its_count_and_stays_stopped():
    values = [3.0, 2.0, 2.5, 2.6, 2.7, 2.8]
    stopping = EarlyStopping("validation/loss", patience=3)
    state, history = fit(
        train_step, make_state(), source, num_steps=3, hooks=[scripted(values), stopping]
    )
    history = History.from_json(history.to_json())
    fresh = EarlyStopping("validation/loss", patience=3)
    state, history = fit(
        train_step,
        state,
        source,
        num_steps=9,
        hooks=[scripted(values[3:]), fresh],
        history=history,
    )
    assert int(state.step) == 5 and "in 3 evaluations" in history.stopped
    same, history = fit(
        train_step, state, source, num_steps=9, hooks=[scripted([]), fresh], history=history
    )
    assert same is state and "in 3 evaluations" in history.stopped


def test_a_metric_that_no_hook_returns_is_reported():
    hooks = [scripted([1.0]), EarlyStopping("validation/acuracy", patience=2)]
    with pytest.raises(ValueError, match="no metric validation/acuracy; there are validation/loss"):
        fit(train_step, make_state(), source, num_steps=3, hooks=hooks)
    with pytest.raises(ValueError, match="loss is a training metric"):
        fit(
            train_step,
            make_state(),
            source,
            num_steps=3,
            hooks=[EarlyStopping("loss", patience=2)],
        )
    with pytest.raises(ValueError, match="mode is 'lowest'"):
        EarlyStopping("validation/loss", patience=1, mode="lowest")


def test_hooks_after_the_one_that_stops_are_still_called():
    calls = []

    def stop(step, state, metrics):
        if step == 2:
            raise StopTraining("enough")

    _, history = fit(
        train_step,
        make_state(),
        source,
        num_steps=9,
        hooks=[stop, lambda step, state, metrics: calls.append(step)],
    )
    assert calls == [1, 2] and history.stopped == "enough" and not history.interrupted


def test_an_interrupted_run_gets_no_row_that_the_uninterrupted_one_lacks():
    def stop(step, state, metrics):
        if step == 6:
            raise Interrupted("signal")

    _, whole = fit(train_step, make_state(), source, num_steps=9, log_every=4)
    state, history = fit(train_step, make_state(), source, num_steps=9, log_every=4, hooks=[stop])
    assert history.interrupted and [row["step"] for row in history.rows] == [4]
    _, history = fit(train_step, state, source, num_steps=9, log_every=4, history=history)
    assert history.rows == whole.rows and not history.interrupted


def send(number, at):
    def hook(step, state, metrics):
        if step == at:
            os.kill(os.getpid(), number)

    return hook


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_bitwise_the_same(tmp_path, number, capfd):
    expected, whole = fit(train_step, make_state(), source, num_steps=9, log_every=4)
    before = signal.getsignal(number)
    hooks = [send(number, 6), Checkpointing(tmp_path, every=100)]
    state, history = fit(train_step, make_state(), source, num_steps=9, log_every=4, hooks=hooks)
    assert history.interrupted and history.stopped == f"{signal.Signals(number).name} at step 6"
    assert signal.getsignal(number) == before
    assert "saving at the end of this step" in capfd.readouterr().err
    state, history = resume(tmp_path, make_state(5))
    state, history = fit(
        train_step, state, source, num_steps=9, log_every=4, history=history, hooks=hooks[1:]
    )
    assert_bitwise_equal(state, expected)
    assert history.rows == whole.rows


def test_a_second_interrupt_stops_at_once(tmp_path, capfd):
    def twice(step, state, metrics):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(
            train_step,
            make_state(),
            source,
            num_steps=9,
            hooks=[twice, Checkpointing(tmp_path, every=100)],
        )


@pytest.fixture
def interruptible():
    """Handle SIGINT as in a terminal; background jobs of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_after_the_last_call_reaches_the_previous_handler(tmp_path, capfd):
    hook = Checkpointing(tmp_path, every=100)
    with pytest.raises(KeyboardInterrupt):
        fit(
            train_step,
            make_state(),
            source,
            num_steps=2,
            hooks=[hook, send(signal.SIGINT, 2)],
        )
    assert resume(tmp_path, make_state())[1].step == 2


def test_checkpointing_in_another_thread_installs_no_signal_handler(tmp_path):
    failures = []

    def run():
        try:
            fit(
                train_step,
                make_state(),
                source,
                num_steps=2,
                hooks=[Checkpointing(tmp_path, every=1)],
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == [] and resume(tmp_path, make_state())[1].step == 2
