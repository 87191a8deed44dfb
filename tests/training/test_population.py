"""The executor that measures which strategy runs a population fastest."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.core import Mean, TrainState
from jaxnets.training import population
from jaxnets.training.executors import jit_step, population_step, scan_steps
from jaxnets.training.population import PopulationExecutor

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
