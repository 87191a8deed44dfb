"""Hooks: when they are called, early stopping, signals."""

import math
import os
import signal
import threading

import jax.numpy as jnp
import pytest
from loop_problem import (
    Chunked,
    assert_bitwise_equal,
    eval_step,
    make_state,
    scanned_step,
    source,
    train_step,
)

from jaxnets.core import Mean
from jaxnets.data.batches.sources import index_batches
from jaxnets.training import checkpoint
from jaxnets.training.history import History, NonFiniteError
from jaxnets.training.hooks import Checkpointing, EarlyStopping, every, resume, validation
from jaxnets.training.loop import Interrupted, StopTraining, fit


def test_every_calls_its_hook_at_multiples_also_after_a_resume():
    calls = []
    hook = every(4, lambda step, state, metrics: calls.append(step))
    state, _ = fit(scanned_step, make_state(), Chunked(3), num_steps=6, hooks=[hook])
    fit(scanned_step, state, Chunked(3), num_steps=14, hooks=[hook])
    assert calls == [6, 9, 12]
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"num_steps={wrong} must be a positive integer"):
            every(wrong, hook)
        for name in ("every", "keep", "keep_best"):
            with pytest.raises(ValueError, match=rf"{name}={wrong} must be a positive integer"):
                Checkpointing("unused", **{"every": 1, name: wrong})
    with pytest.raises(ValueError, match="Checkpointing counts steps itself"):
        every(2, Checkpointing("unused", every=1))


def scripted(values):
    remaining = iter(values)
    return lambda step, state, metrics: {"validation/loss": next(remaining)}


@pytest.mark.filterwarnings("ignore:validation/loss .*is NaN or infinite:RuntimeWarning")
@pytest.mark.parametrize(
    ("values", "options", "stop"),
    [
        ([3.0, 2.0, 2.5, 2.0, 1.0], {"patience": 2}, 4),
        ([1.0, 2.0, 3.0, 3.0, 2.5], {"patience": 2, "mode": "max"}, 5),
        ([3.0, 2.8, 2.7, 2.6, 2.5], {"patience": 2, "min_delta": 0.25}, 5),
        ([[3.0, 1.0], [3.0, 0.5], [2.0, 9.0], [9.0, 9.0], [9.0, 9.0]], {"patience": 2}, 5),
        ([3.0, -math.inf, 2.0, 2.5, 2.5], {"patience": 2}, 5),
        (
            [[9.0, math.inf], *[[1.0, best] for best in (5.0, 6.0, 6.0, 6.0)]],
            {"patience": 2, "mode": "max"},
            5,
        ),
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


def test_a_nan_is_reported_with_its_step_and_is_no_improvement():
    values = [3.0, math.nan, math.nan, 1.0, 0.5]
    hooks = [scripted(values), EarlyStopping("validation/loss", patience=2)]
    with pytest.warns(RuntimeWarning, match="validation/loss at step 2 is NaN") as caught:
        state, _ = fit(train_step, make_state(), source, num_steps=6, hooks=hooks)
    assert int(state.step) == 3 and len(caught) == 1
    with pytest.warns(RuntimeWarning, match="validation/loss of member 1 at step 1 is NaN"):
        hooks = [scripted([[1.0, math.inf]])]
        fit(train_step, make_state(), source, num_steps=1, hooks=hooks)


def test_validation_stops_at_a_value_that_is_not_finite_if_asked():
    def measure(state, batch):
        return {"loss": Mean(jnp.where(state.step == 4, jnp.nan, 1.0), jnp.float32(1))}

    hooks = [every(2, validation(measure, [{}], on_non_finite="stop"))]
    written = []
    with pytest.raises(NonFiniteError, match="validation/loss at step 4 is not finite"):
        fit(
            train_step,
            make_state(),
            source,
            num_steps=9,
            log_every=1,
            hooks=hooks,
            writers=[written.append],
        )
    assert [row["step"] for row in written] == [1, 2, 3]
    with pytest.raises(ValueError, match="on_non_finite is 'ignore'"):
        validation(measure, [{}], on_non_finite="ignore")


def test_validation_refuses_batches_without_an_end_or_for_one_evaluation_only():
    with pytest.raises(ValueError, match="IndexBatches has no end"):
        validation(eval_step, index_batches(4, 2, seed=0))
    with pytest.raises(TypeError, match="generator, which cannot start again"):
        validation(eval_step, (batch for batch in [{}]))
    hooks = [validation(eval_step, source, num_batches=2)]
    _, history = fit(train_step, make_state(), source, num_steps=1, hooks=hooks)
    assert "validation/loss" in history.rows[0]


def silent(step, state, metrics):
    return None


VALIDATION = every(2, lambda step, state, metrics: {"validation/loss": 1.0})
STOPPING = EarlyStopping("val_loss", patience=2)


@pytest.mark.parametrize(
    ("hooks", "message", "step"),
    [
        ([VALIDATION, STOPPING], r"val_loss.* mean validation/loss\? There are validation/loss", 2),
        ([VALIDATION, every(3, lambda *args: {"a/b": 1.0}), STOPPING], "There are a/b, val", 3),
        ([every(2, STOPPING), VALIDATION], "EarlyStopping reads; did you mean validation/loss", 2),
        ([STOPPING], "put a hook that returns it in front", 1),
        ([EarlyStopping("validation/loss", patience=2), VALIDATION], "a later hook returns", 2),
        (
            [EarlyStopping("validation/acuracy", mode="max", patience=2), VALIDATION],
            "mean validation/loss",
            2,
        ),
    ],
)
def test_a_name_that_no_earlier_hook_returns_is_an_error_at_the_first_chance(hooks, message, step):
    steps = []
    with pytest.raises(ValueError, match=message):
        fit(
            lambda state, batch: steps.append(1) or train_step(state, batch),
            make_state(),
            source,
            num_steps=9,
            hooks=hooks,
        )
    assert len(steps) == step


def test_the_best_checkpoint_of_a_name_that_no_hook_returns_is_refused(tmp_path):
    best = Checkpointing(tmp_path, every=9, best=("val/accuracy", "max"))
    with pytest.raises(ValueError, match="val/accuracy, which Checkpointing reads; did you mean v"):
        fit(train_step, make_state(), source, num_steps=9, hooks=[VALIDATION, best])


def test_beside_a_hook_that_may_still_return_the_name_it_is_a_warning():
    hooks = [silent, VALIDATION, STOPPING]
    with pytest.warns(UserWarning, match="so far no hook returns val_loss") as caught:
        state, _ = fit(train_step, make_state(), source, num_steps=6, hooks=hooks)
    assert len(caught) == 1 and int(state.step) == 6

    def sometimes(step, state, metrics):
        return {"dev/loss": 1.0} if step == 5 else None

    hooks = [sometimes, EarlyStopping("dev/loss", patience=9)]
    fit(train_step, make_state(), source, num_steps=6, hooks=hooks)


def test_a_value_that_comes_only_after_the_end_of_the_run_is_reported():
    hooks = [every(9, scripted([])), EarlyStopping("validation/loss", patience=2)]
    with pytest.warns(UserWarning, match="so far no hook returns validation/loss"):
        state, history = fit(train_step, make_state(), source, num_steps=6, hooks=hooks)
    history.rows.append({"step": 6, "validation/loss": 1.0})
    fit(train_step, state, source, num_steps=8, hooks=hooks, history=history)


def test_names_of_one_prefix_may_come_at_different_steps():
    rare = every(4, lambda *args: {"validation/distance": 1.0})
    hooks = [VALIDATION, rare, EarlyStopping("validation/distance", mode="min", patience=2)]
    fit(train_step, make_state(), source, num_steps=5, hooks=hooks)


def test_a_training_metric_and_an_unknown_mode_are_refused():
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
    with pytest.raises(ValueError, match="patience=0 must be a positive integer"):
        EarlyStopping("validation/loss", patience=0)


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


@pytest.fixture
def interruptible():
    """Handle signals as in a terminal; background jobs of a shell and of nohup ignore some."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_resumed_run_is_bitwise_the_same(tmp_path, number, capfd):
    expected, whole = fit(train_step, make_state(), source, num_steps=9, log_every=4)
    before = signal.getsignal(number)
    hooks = [send(number, 6), Checkpointing(tmp_path, every=100)]
    state, history = fit(train_step, make_state(), source, num_steps=9, log_every=4, hooks=hooks)
    assert history.interrupted and history.stopped == f"{signal.Signals(number).name} at step 6"
    assert signal.getsignal(number) == before
    name, shown = signal.Signals(number).name, capfd.readouterr().err
    assert f"{name}: saving at the end of this step" in shown
    assert ("Ctrl-C" in shown) == (number == signal.SIGINT)
    state, history = resume(tmp_path, make_state(5))
    state, history = fit(
        train_step, state, source, num_steps=9, log_every=4, history=history, hooks=hooks[1:]
    )
    assert_bitwise_equal(state, expected)
    assert history.rows == whole.rows


@pytest.mark.usefixtures("interruptible")
def test_without_checkpoints_ctrl_c_gives_the_state_and_history_that_go_on(capfd):
    expected, whole = fit(train_step, make_state(), source, num_steps=9, log_every=4)
    with pytest.raises(Interrupted, match="SIGINT at step 6") as stop:
        fit(
            train_step,
            make_state(),
            source,
            num_steps=9,
            log_every=4,
            hooks=[send(signal.SIGINT, 6)],
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "stopping at the end of this step; Ctrl-C again stops at once" in capfd.readouterr().err
    state, history = stop.value.state, stop.value.history
    assert int(state.step) == history.step == 6
    state, history = fit(train_step, state, source, num_steps=9, log_every=4, history=history)
    assert_bitwise_equal(state, expected)
    assert history.rows == whole.rows


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_source_of_a_run_of_chunks_ends_after_the_call(capfd):
    def interrupting(first):
        for index, batch in enumerate(Chunked(3)(first)):
            if index == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    interrupting.steps_per_batch = 3
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(scanned_step, make_state(), interrupting, num_steps=12)
    assert int(stop.value.state.step) == stop.value.history.step == 6


@pytest.mark.usefixtures("interruptible")
def test_another_handler_of_ctrl_c_and_an_ignored_signal_stay(tmp_path):
    received = []
    handler = lambda number, frame: received.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hooks = [send(signal.SIGINT, 1)]
        fit(train_step, make_state(), source, num_steps=2, hooks=hooks)
        hooks = [send(signal.SIGHUP, 1), Checkpointing(tmp_path, every=9)]
        _, history = fit(train_step, make_state(), source, num_steps=2, hooks=hooks)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert received == [signal.SIGINT] and not history.interrupted


@pytest.mark.usefixtures("interruptible")
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
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(train_step, make_state(), source, num_steps=9, hooks=[twice])
    assert type(stop.value) is KeyboardInterrupt


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_during_a_save_waits_for_it(tmp_path, capfd, monkeypatch):
    save, calls = checkpoint.save, []

    def interrupted(*args, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        calls.append("begun")
        folder = save(*args, **keywords)
        calls.append("done")
        return folder

    monkeypatch.setattr(checkpoint, "save", interrupted)
    hooks = [Checkpointing(tmp_path, every=3)]
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(train_step, make_state(), source, num_steps=9, hooks=hooks)
    assert type(stop.value) is KeyboardInterrupt and calls == ["begun", "done"]
    assert resume(tmp_path, make_state())[1].step == 3
    assert capfd.readouterr().err.count("at the end of this step") == 1
    monkeypatch.setattr(checkpoint, "save", save)
    fit(train_step, *resume(tmp_path, make_state())[:1], source, num_steps=6, hooks=hooks)
    assert resume(tmp_path, make_state())[1].step == 6


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


def test_early_stopping_needs_the_mode_of_what_is_no_loss():
    with pytest.raises(ValueError, match="whether a lower validation/accuracy is better"):
        EarlyStopping("validation/accuracy", patience=2)


@pytest.mark.parametrize("best", ["validation/accuracy", ("validation/accuracy",), ["loss", "min"]])
def test_the_best_checkpoint_needs_a_metric_and_its_mode(best, tmp_path):
    with pytest.raises(ValueError, match="give the metric and its mode"):
        Checkpointing(tmp_path, every=1, best=best)
