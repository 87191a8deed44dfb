"""What `fit` shows on standard error: compiling, the bar, why it stopped."""

import re

import pytest
from loop_problem import Chunked, make_state, scanned_step, source, train_step

from jaxnets.training.history import History
from jaxnets.training.loop import StopTraining, fit


def test_a_run_that_stops_early_shows_the_reason_where_it_shows_progress(capsys):
    def stop(step, state, metrics):
        if step >= 3:
            raise StopTraining("no better")

    for shown in (True, False):
        fit(train_step, make_state(), source, num_steps=9, hooks=[stop], progress=shown)
        lines = capsys.readouterr().err.splitlines()
        assert (lines[-1] == "stopped at step 3 of 9: no better") if shown else not lines


def test_the_progress_bar_shows_loss_and_rates_if_enabled(capsys):
    fit(train_step, make_state(), source, num_steps=40, log_every=2)
    assert capsys.readouterr().err == ""
    fit(train_step, make_state(), source, num_steps=40, log_every=2, progress=True)
    shown = capsys.readouterr().err
    assert "40/40" in shown and "loss" in shown and "examples/s" in shown
    assert re.match(r"compiling the step \.\.\. \d+\.\d s\n", shown)


def test_a_resumed_run_says_how_long_compiling_took(capsys):
    history = History(first_call_seconds=8.3)
    fit(train_step, make_state(), source, num_steps=2, history=history, progress=True)
    assert capsys.readouterr().err.startswith(
        "compiling the step, 8 s at the start of the run ... "
    )


def test_compiling_again_for_the_last_steps_is_announced(capsys):
    fit(scanned_step, make_state(), Chunked(4), num_steps=10, progress=True)
    assert "compiling the step for the last 2" in capsys.readouterr().err


def test_a_run_of_one_call_has_no_bar(capsys):
    fit(scanned_step, make_state(), Chunked(4), num_steps=4, progress=True)
    assert re.fullmatch(r"compiling the step \.\.\. \d+\.\d s\n", capsys.readouterr().err)


def test_a_step_that_fails_to_compile_leaves_a_complete_line(capsys):
    def fails(state, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(fails, make_state(), source, num_steps=2, progress=True)
    assert capsys.readouterr().err == "compiling the step ...\n"
