"""Evaluation over batches: exact means, sources without an end, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_problem import eval_step, make_batch, make_state, source

from jaxnets.core import Mean, Update, is_endless
from jaxnets.data.batches.bucketing import bucketed_batches
from jaxnets.data.batches.prefetching import prefetch
from jaxnets.data.batches.sources import (
    chunked,
    index_batches,
    member_batches,
    sequential_batches,
    shuffled_batches,
    with_epochs,
)
from jaxnets.data.batches.windows import token_streams, token_windows
from jaxnets.models.feedforward import MLP
from jaxnets.objectives.supervised import classification
from jaxnets.training.hooks import validation
from jaxnets.training.loop import evaluate
from jaxnets.training.step import create_train_state, make_eval_step


def test_evaluation_is_exact_with_padding_and_uneven_batches():
    state = make_state()
    big = jax.tree.map(lambda *leaves: np.concatenate(leaves), make_batch(0, 5), make_batch(1, 2))
    loss_only = lambda state, batch: {"loss": eval_step(state, batch)["loss"]}  # noqa: E731
    result = evaluate(loss_only, state, [make_batch(0, 5), make_batch(1, 2)])
    kernel = np.asarray(state.params["linear"]["kernel"], np.float64)
    residual = big["inputs"] @ kernel - big["targets"]
    expected = np.average(residual**2, weights=big["weights"])
    assert isinstance(result["loss"], float)
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    several = evaluate(eval_step, state, lambda first: iter([make_batch(first)] * 2))
    assert several["outer"].shape == (4, 4) and several["outer"].dtype == np.float64
    with pytest.raises(ValueError, match="no batches to evaluate"):
        evaluate(eval_step, state, iter([]))


def test_an_evaluation_with_labels_out_of_range_names_metric_batch_and_outputs():
    module = MLP(features=(), num_outputs=10)
    objective = classification(module)
    good = {"inputs": np.ones((2, 3), np.float32), "labels": np.array([0, 9])}
    bad = {**good, "labels": np.array([3, 12])}
    variables = module.init(jax.random.key(0), good["inputs"])
    update = Update(objective, optax.sgd(0.1))
    state = create_train_state(variables, update, rng=jax.random.key(0))
    step = jax.jit(make_eval_step(objective))
    assert np.isfinite(evaluate(step, state, [good])["loss"])
    message = "loss is NaN or infinite: batch 1 has .*labels from 3 to 12, and .* 10 outputs"
    with pytest.warns(RuntimeWarning, match=message):
        assert np.isnan(evaluate(step, state, [good, bad])["loss"])
    with pytest.warns(RuntimeWarning, match="loss is NaN or infinite: look for .* labels out of"):
        evaluate(step, state, iter([bad]))


def test_an_evaluation_that_is_not_finite_names_the_member_whatever_the_shape_of_the_metric():
    state = make_state()
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[make_state(n) for n in range(3)])
    table = np.zeros((3, 2, 2), np.float32)
    table[1, 1, 0] = np.nan
    ones = jnp.ones(3)

    def several(state, batch):
        return {
            "table": Mean(jnp.asarray(table), ones),
            "loss": Mean(ones.at[2].set(jnp.inf), ones),
        }

    with pytest.warns(RuntimeWarning) as caught:
        evaluate(several, states, [make_batch(0)])
    found = [str(each.message).split(" is NaN")[0] for each in caught]
    assert found == ["table of member 1", "loss of member 2"]
    frozen = dataclasses.replace(states, step=jnp.array([4, 4, 0]))
    with pytest.warns(RuntimeWarning) as caught:  # `fit` has said that member 2 is frozen
        evaluate(several, frozen, [make_batch(0)])
    assert [str(each.message).split(" is NaN")[0] for each in caught] == ["table of member 1"]
    one = lambda state, batch: {"table": Mean(jnp.asarray(table[1]), jnp.float32(1))}  # noqa: E731
    with pytest.warns(RuntimeWarning, match="^table is NaN"):
        evaluate(one, state, [make_batch(0)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"batches is NoneType None; give a source such as"),
        (3, r"batches is int 3; give a source"),
        (np.ones(3), r"batches is ndarray of shape \(3,\); give a source"),
        (jnp.ones((2, 3)), r"of shape \(2, 3\); give a source"),
        ("abc", r"batches is str 'abc'; give a source"),
        ([(np.ones(2), np.ones(2))], r"a batch of the source is a tuple; give a dict"),
    ],
)
def test_what_is_no_source_of_batches_is_not_evaluated(batches, message):
    with pytest.raises(TypeError, match=message):
        evaluate(eval_step, make_state(), batches, num_batches=2)
    if not isinstance(batches, list):
        with pytest.raises(TypeError, match=message):
            validation(eval_step, batches)


@pytest.mark.parametrize("number", [True, np.True_, 0, 1.5])
def test_a_number_of_batches_is_an_integer(number):
    with pytest.raises(ValueError, match=f"num_batches={number} must be a positive integer"):
        evaluate(eval_step, make_state(), [make_batch(0)], num_batches=number)


@pytest.mark.parametrize(
    "endless",
    [
        shuffled_batches({"inputs": np.ones((4, 3), np.float32)}, 2, seed=0),
        prefetch(index_batches(4, 2, seed=0)),
        member_batches([with_epochs(index_batches(4, 2, seed=seed)) for seed in range(2)]),
        token_windows(np.arange(9), batch_size=1, length=2, seed=0),
        token_streams(np.arange(9), batch_size=1, length=2),
        bucketed_batches([([5], 0), ([6], 1)], tokens_per_batch=4, seed=0),
    ],
    ids=lambda source: type(source).__name__,
)
def test_a_source_without_an_end_is_evaluated_only_for_a_number_of_batches(endless):
    count = lambda state, batch: {"batches": Mean(jnp.float32(1), jnp.float32(1))}  # noqa: E731
    with pytest.raises(ValueError, match=f"{type(endless).__name__} has no end; .*num_batches"):
        evaluate(count, make_state(), endless)
    seen = []
    evaluate(lambda s, b: seen.append(b) or count(s, b), make_state(), endless, num_batches=3)
    assert len(seen) == 3


def test_batches_of_several_steps_are_not_evaluated():
    """Of [steps, batch, ...] one loss of the wrong shape, or of the wrong axis, would come out."""
    data = {"inputs": np.ones((8, 3), np.float32), "targets": np.ones(8, np.float32)}
    for stacked in (
        chunked(sequential_batches(data, 2), 4),
        prefetch(chunked(shuffled_batches(data, 2, seed=0), 4)),
    ):
        with pytest.raises(ValueError, match=r"holds 4 batches .* without data\.chunked"):
            evaluate(eval_step, make_state(), stacked, num_batches=1)
        with pytest.raises(ValueError, match=r"holds 4 batches"):
            validation(eval_step, stacked, num_batches=1)


def test_a_number_of_batches_limits_any_source_and_is_closed():
    calls = []

    def own(first):
        try:
            yield from source(first)
        finally:
            calls.append("closed")

    two = evaluate(eval_step, make_state(), own, num_batches=2)
    assert calls == ["closed"]
    np.testing.assert_equal(two, evaluate(eval_step, make_state(), [make_batch(0), make_batch(1)]))
    finite = [make_batch(0)]
    np.testing.assert_equal(
        evaluate(eval_step, make_state(), finite, num_batches=9),
        evaluate(eval_step, make_state(), finite),
    )
    with pytest.raises(ValueError, match="num_batches=0 must be a positive integer"):
        evaluate(eval_step, make_state(), own, num_batches=0)
    assert not any(map(is_endless, (own, finite, sequential_batches({"a": np.ones(3)}, 2))))
