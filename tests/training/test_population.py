"""The executor that measures which strategy runs a population fastest."""

import dataclasses
import functools
import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.core import Mean, TrainState
from jaxnets.training import population
from jaxnets.training.executors import jit_step, population_step, scan_steps
from jaxnets.training.history import NonFiniteError
from jaxnets.training.hooks import Checkpointing, resume, validation
from jaxnets.training.loop import fit
from jaxnets.training.nonfinite import first_nonfinite
from jaxnets.training.population import PopulationExecutor
from jaxnets.training.writers import jsonl_writer

RANDOM = np.random.default_rng(0)
BATCH = {"inputs": RANDOM.standard_normal((6, 5), np.float32)}


def step(state, batch, *, axis_name=None):
    """Gradient descent with momentum on a noisy loss, which compiles in a moment."""
    noise = jax.random.normal(jax.random.fold_in(state.rng, state.step), batch["inputs"].shape[:1])
    outputs = batch["inputs"] @ state.params - 0.2 * noise
    velocity = 0.9 * state.opt_state + outputs @ batch["inputs"] / outputs.size
    params = state.params - 0.1 * velocity
    changed = {"step": state.step + 1, "params": params, "opt_state": velocity}
    return dataclasses.replace(state, **changed), {"loss": Mean.of(outputs**2)}


@pytest.fixture
def states():
    keys = jax.vmap(jax.random.key)(np.arange(3))
    params = 0.2 * np.random.default_rng(1).standard_normal((3, 5), np.float32)
    zeros = jnp.zeros(3, jnp.int32)
    return TrainState(zeros, keys, jnp.asarray(params), {}, jnp.asarray(0 * params))


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, wanted = jax.random.key_data(got), jax.random.key_data(wanted)
        np.testing.assert_allclose(got, wanted, atol=1e-6)


@functools.cache
def reference():
    return jit_step(population_step(step))


def check(executor, states):
    expected, metrics = reference()(states, BATCH)
    for _ in range(2):
        actual, actual_metrics = executor(states, BATCH)
        assert_close(actual, expected)
        assert_close(actual_metrics, metrics)


@pytest.mark.parametrize("strategy", ["vmap", "map", "members", "threads"])
def test_every_strategy_computes_the_same_as_the_step_of_a_population(strategy, states):
    check(PopulationExecutor(step, strategy=strategy), states)


@pytest.mark.parametrize("strategy", ["members", "threads"])
@pytest.mark.parametrize("donate", [False, True])
def test_members_with_batches_of_their_own_and_several_steps_a_call(donate, strategy, states):
    own = jax.tree.map(lambda x: np.stack([[x, x], [x[::-1], x], [x, x[::-1]]]), BATCH)
    steps = scan_steps(step)
    expected, metrics = reference_with_own_batches()(states, own)
    executor = PopulationExecutor(steps, shared_batch=False, strategy=strategy, donate=donate)
    before = states.params
    actual, actual_metrics = executor(states, own)
    assert_close(actual, expected)
    assert_close(actual_metrics, metrics)
    assert before.is_deleted() == donate


@functools.cache
def reference_with_own_batches():
    return jit_step(population_step(scan_steps(step), shared_batch=False))


def test_the_first_call_measures_all_strategies_and_writes_their_times(
    states, tmp_path, monkeypatch
):
    monkeypatch.setattr(population, "usable_cores", lambda: 2)
    path = tmp_path / "strategy.json"
    executor = PopulationExecutor(step, remember=path)
    assert executor.strategy is None
    check(executor, states)
    assert set(executor.milliseconds) == {"vmap", "map", "members", "threads"}
    assert executor.milliseconds[executor.strategy] == min(executor.milliseconds.values())
    written = json.loads(path.read_text())
    assert written["strategy"] == executor.strategy
    assert written["milliseconds"] == executor.milliseconds


def measured(monkeypatch, seconds_of):
    """Return an executor on one core, without threads, whose calls take the given seconds."""
    monkeypatch.setattr(population, "usable_cores", lambda: 1)
    clock, calls, compiled = [0.0], [], []

    def compile_nothing(step, strategy, **options):
        compiled.append(strategy)

        def timed(states, batch):
            clock[0] += seconds_of(strategy, len(calls))
            calls.append(strategy)
            return states, {}

        return timed

    monkeypatch.setattr(population, "_compile", compile_nothing)
    monkeypatch.setattr(population.time, "perf_counter", lambda: clock[0])
    return PopulationExecutor(step), calls, compiled


SECONDS = {"vmap": 3.0, "map": 1.0, "members": 2.0}


def test_the_shortest_time_decides(states, monkeypatch):
    executor, calls, compiled = measured(monkeypatch, lambda strategy, _: SECONDS[strategy])
    for _ in range(2):
        executor(states, BATCH)
    assert executor.strategy == "map"
    assert executor.milliseconds == {"vmap": 3000.0, "map": 1000.0, "members": 2000.0}
    assert calls[-2:] == ["map", "map"]
    assert sorted(compiled) == ["map", "members", "vmap"]


@pytest.mark.parametrize("busy", [range(9), range(3, 9), range(6, 12)])
def test_a_moment_of_other_load_does_not_decide(busy, states, monkeypatch):
    def seconds_of(strategy, call):
        return SECONDS[strategy] * (10 if call in busy else 1)

    executor, _, _ = measured(monkeypatch, seconds_of)
    executor(states, BATCH)
    assert executor.milliseconds == {"vmap": 3000.0, "map": 1000.0, "members": 2000.0}


def test_a_remembered_strategy_is_used_without_measuring(states, tmp_path):
    path = tmp_path / "strategy.json"
    path.write_text('{"strategy": "members"}')
    executor = PopulationExecutor(step, remember=path)
    executor(states, BATCH)
    assert executor.strategy == "members"
    assert executor.milliseconds == {}


def test_an_unknown_strategy_and_a_broken_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="strategy is 'for'"):
        PopulationExecutor(step, strategy="for")
    for content in ("", "[]", '{"milliseconds": {}}'):
        path = tmp_path / "strategy.json"
        path.write_text(content)
        with pytest.raises(ValueError, match="delete it to measure"):
            PopulationExecutor(step, remember=path)
    path.write_text('{\n"strategy": "for"}')
    with pytest.raises(ValueError, match=r'json, line 2: .*strategy is "for", not "vmap"'):
        PopulationExecutor(step, remember=path)


@pytest.mark.parametrize(
    ("cores", "donate"), [(1, False), (1, True), (2, True), (3, False), (8, True)]
)
def test_the_members_are_divided_among_any_number_of_cores(cores, donate, states, monkeypatch):
    monkeypatch.setattr(population, "usable_cores", lambda: cores)
    expected, metrics = reference()(states, BATCH)
    executor = PopulationExecutor(step, strategy="threads", donate=donate)
    actual, actual_metrics = executor(states, BATCH)
    assert_close(actual, expected)
    assert_close(actual_metrics, metrics)
    assert states.params.is_deleted() == donate


def test_groups_differ_by_one_member_at_most():
    assert population._bounds(16, 2) == (0, 8, 16)
    assert population._bounds(7, 3) == (0, 2, 4, 7)
    assert population._bounds(2, 8) == (0, 1, 2)


def test_the_context_of_the_caller_holds_for_all_threads(states):
    precisions = []

    def recording(state, batch):
        precisions.append(jax.config.jax_default_matmul_precision)
        return step(state, batch)

    with jax.default_matmul_precision("highest"):
        PopulationExecutor(recording, strategy="threads")(states, BATCH)
    assert set(precisions) == {"highest"}


def test_a_batch_of_another_size_gets_a_program_of_its_own(states):
    executor = PopulationExecutor(step, strategy="threads")
    for size in (6, 4, 6):
        part = {"inputs": BATCH["inputs"][:size]}
        assert_close(executor(states, part), reference()(states, part))


def test_a_step_that_cannot_be_compiled_does_not_delete_the_states(states):
    def failing(state, batch):
        raise RuntimeError("a step that fails")

    with pytest.raises(RuntimeError, match="a step that fails"):
        PopulationExecutor(failing, strategy="threads", donate=True)(states, BATCH)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))


# Members that are not finite


def failing(state, batch, *, axis_name=None):
    """`step`, which makes a member NaN at the step in its model state."""
    after, metrics = step(state, batch)
    fails = state.step == state.model_state["fails"]
    return dataclasses.replace(after, params=jnp.where(fails, jnp.nan, after.params)), metrics


def failing_at(states, *steps):
    return dataclasses.replace(states, model_state={"fails": jnp.array(steps)})


def batches(first):
    return itertools.repeat(BATCH)


@functools.cache
def freezing():
    return jit_step(population_step(failing, on_non_finite="freeze"))


def solo(states, index, num_steps):
    state, losses = jax.tree.map(lambda leaf: leaf[index], states), []
    for _ in range(num_steps):
        state, metrics = jitted()(state, BATCH)
        losses.append(float(metrics["loss"].compute()))
    return state, losses


@functools.cache
def jitted():
    return jax.jit(step)


@pytest.mark.parametrize("strategy", ["vmap", "map", "members", "threads"])
def test_a_member_that_fails_keeps_its_last_state_and_the_others_go_on(
    strategy, states, monkeypatch
):
    monkeypatch.setattr(population, "usable_cores", lambda: 2)  # member 0 is a group of its own
    executor = PopulationExecutor(failing, strategy=strategy, on_non_finite="freeze")
    after = failing_at(states, 2, 9, 9)
    frozen = []
    for _ in range(4):
        after, metrics = executor(after, BATCH)
        frozen.append(metrics["frozen"].total.tolist())
    assert after.step.tolist() == [2, 4, 4]
    assert frozen == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert metrics["loss"].count.tolist() == [0, 6, 6]
    assert metrics["loss"].total[0] == 0
    for member, num_steps in enumerate((2, 4, 4)):
        expected, _ = solo(states, member, num_steps)
        np.testing.assert_allclose(after.params[member], expected.params, atol=1e-6)
        np.testing.assert_allclose(after.opt_state[member], expected.opt_state, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_a_member_freezes_within_a_call_of_several_steps_or_before_it(several, states):
    """A step inside the scan stops at once; a scan inside the population is undone whole."""
    own = jax.tree.map(lambda x: np.stack([x] * 3), BATCH)
    freeze = functools.partial(population_step, on_non_finite="freeze")
    executor = jit_step(freeze(scan_steps(failing)) if several else scan_steps(freeze(failing)))
    after, metrics = executor(failing_at(states, 9, 4, 9), own)
    after, metrics = executor(after, own)
    assert after.step.tolist() == [6, 3 if several else 4, 6]
    assert metrics["frozen"].compute()[1] == pytest.approx(1 if several else 2 / 3)
    expected, _ = solo(states, 1, 3 if several else 4)
    np.testing.assert_allclose(after.params[1], expected.params, atol=1e-6)


def test_the_rows_and_the_resumed_run_of_a_frozen_member(states, tmp_path):
    start = failing_at(states, 9, 3, 9)
    options = {"log_every": 2, "writers": [jsonl_writer(tmp_path / "metrics.jsonl")]}
    with pytest.warns(RuntimeWarning, match="at step 4 member 1 is frozen") as caught:
        after, history = fit(freezing(), start, batches, num_steps=6, **options)
    assert len(caught) == 1 and after.step.tolist() == [6, 3, 6]
    assert history.column("frozen") == ([2, 4, 6], [[0, 0, 0], [0, 0.5, 0], [0, 1, 0]])
    for member, num_steps in enumerate((6, 3, 6)):
        losses = solo(states, member, num_steps)[1]
        expected = [np.mean(losses[i : i + 2]) if losses[i : i + 2] else np.nan for i in (0, 2, 4)]
        values = [row[member] for row in history.column("loss")[1]]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
    saving = [Checkpointing(tmp_path / "run", every=5)]
    with pytest.warns(RuntimeWarning, match="member 1 is frozen"):
        fit(freezing(), start, batches, num_steps=4, hooks=saving, log_every=2)
    again, history_again = resume(tmp_path / "run", start)
    with pytest.warns(RuntimeWarning, match="member 1 is frozen"):
        again, _ = fit(freezing(), again, batches, num_steps=6, history=history_again, log_every=2)
    assert_close(again, after)
    np.testing.assert_equal(history_again.rows, history.rows)


def test_a_member_that_is_nan_from_the_start_is_saved_and_the_others_go_on(states, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), states.params)
    start = dataclasses.replace(failing_at(states, 9, 9, 9), params=params)
    with pytest.warns(RuntimeWarning, match="member 1 is frozen"):
        after, history = fit(
            freezing(), start, batches, num_steps=4, hooks=[Checkpointing(tmp_path, every=2)]
        )
    assert after.step.tolist() == [4, 0, 4] and history.rows[-1]["frozen"] == [0, 1, 0]
    restored, _ = resume(tmp_path, start)
    assert restored.step.tolist() == [4, 0, 4]
    np.testing.assert_array_equal(restored.params, after.params)
    assert np.all(np.isfinite(restored.params[::2])) and np.all(np.isnan(restored.params[1]))
    bad = dataclasses.replace(after, params=after.params.at[2].set(jnp.inf))
    assert first_nonfinite(after) is None and first_nonfinite(bad) is not None


def test_a_frozen_member_does_not_count_in_validation(states):
    def eval_step(state, batch):
        return {"loss": Mean.of(state.step.astype(float))}

    start, step = failing_at(states, 9, 2, 9), population_step(eval_step)
    hooks = [validation(step, [BATCH], on_non_finite="stop")]
    # The one warning is that the member is frozen; its values are no warning, and no error.
    with pytest.warns(RuntimeWarning, match="at step 3 member 1 is frozen") as caught:
        _, history = fit(freezing(), start, batches, num_steps=4, hooks=hooks, log_every=2)
    assert len(caught) == 1
    values = history.column("validation/loss")[1]
    np.testing.assert_equal(values, [[1, 1, 1], [2, 2, 2], [3, np.nan, 3], [4, np.nan, 4]])


def test_a_population_without_a_member_that_goes_on_ends(states):
    for fails in ((1, 1, 1), (1, 2, 2)):
        match = f"every member of the population at step {max(fails) + 1} is not finite"
        with pytest.raises(NonFiniteError, match=match), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(freezing(), failing_at(states, *fails), batches, num_steps=9, log_every=1)
    with pytest.raises(NonFiniteError, match="every member of the population at step 1"):
        fit(freezing(), failing_at(states, 0, 0, 0), batches, num_steps=1)


def test_a_frozen_member_stays_frozen_only_where_members_freeze(states):
    start = dataclasses.replace(failing_at(states, 9, 9, 9), step=jnp.array([4, 2, 4]))
    with pytest.warns(RuntimeWarning, match="at step 5 member 1 is frozen"):
        after, _ = fit(freezing(), start, batches, num_steps=6)
    assert after.step.tolist() == [6, 2, 6]
    with pytest.raises(ValueError, match=r"different steps \[2, 4\].* on_non_finite='freeze'"):
        fit(reference(), start, batches, num_steps=6)


def test_an_infinity_from_the_start_and_an_infinite_metric_differ(states):
    def watching(state, batch, *, axis_name=None):
        after, metrics = step(dataclasses.replace(state, opt_state=state.opt_state[0]), batch)
        best = state.opt_state[1]  # infinite until the third step, as the best value of a schedule
        best = jnp.where(state.step == 2, 1.0, best)
        ratio = jnp.where(state.step == state.model_state["fails"], jnp.inf, 1.0)
        metrics["ratio"] = Mean(ratio, jnp.ones_like(ratio))
        return dataclasses.replace(after, opt_state=(after.opt_state, best)), metrics

    start = dataclasses.replace(
        failing_at(states, 9, 1, 9), opt_state=(states.opt_state, jnp.full(3, jnp.inf))
    )
    executor = jit_step(population_step(watching, on_non_finite="freeze"))
    with pytest.warns(RuntimeWarning, match="member 1 is frozen"):
        after, _ = fit(executor, start, batches, num_steps=4)
    assert after.step.tolist() == [4, 1, 4]


def test_what_is_done_about_members_that_are_not_finite_is_stop_or_freeze():
    for make in (population_step, PopulationExecutor):
        with pytest.raises(ValueError, match=r"on_non_finite is 'skip'; choose 'stop' or 'freeze'"):
            make(step, on_non_finite="skip")

    def taken(state, batch):
        return state, {"frozen": Mean.of(batch["inputs"])}

    state = TrainState(jnp.zeros(1, jnp.int32), None, jnp.zeros(1), {}, ())
    with pytest.raises(ValueError, match="a metric of the step is named frozen"):
        population_step(taken, on_non_finite="freeze")(state, BATCH)
