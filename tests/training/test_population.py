"""The executor that measures how a population is best run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import classification
from jaxnets.core import Update
from jaxnets.models import feedforward
from jaxnets.training import population
from jaxnets.training.executors import jit_step, population_step, scan_steps
from jaxnets.training.population import PopulationExecutor
from jaxnets.training.step import create_train_state, make_train_step

MODULE = feedforward.MLP((8,), num_outputs=3, dropout_rate=0.2)
UPDATE = Update(classification(MODULE), optax.sgd(0.1, momentum=0.9))
STEP = make_train_step(UPDATE)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((6, 5), np.float32)
    return {"inputs": inputs, "labels": rng.integers(0, 3, 6, np.int32)}


@pytest.fixture
def states(batch):
    def create(seed):
        key = jax.random.key(seed)
        return create_train_state(MODULE.init(key, batch["inputs"]), UPDATE, rng=key)

    return jax.jit(jax.vmap(create))(jnp.arange(3))


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, wanted = jax.random.key_data(got), jax.random.key_data(wanted)
        np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("strategy", ["vmap", "map", "members", "threads", None])
def test_every_way_computes_the_same_as_the_step_of_a_population(strategy, states, batch):
    expected, metrics = jit_step(population_step(STEP))(states, batch)
    executor = PopulationExecutor(STEP, strategy=strategy)
    for _ in range(2):  # the measured call, then the chosen way
        actual, found = executor(states, batch)
        assert_close(actual, expected)
        assert_close(found, metrics)


@pytest.mark.parametrize("strategy", ["members", "threads"])
@pytest.mark.parametrize("donate", [False, True])
def test_members_with_batches_of_their_own_and_several_steps_a_call(
    donate, strategy, states, batch
):
    own = jax.tree.map(lambda x: np.stack([[x, x], [x[::-1], x], [x, x[::-1]]]), batch)
    steps = scan_steps(STEP)
    expected, metrics = jit_step(population_step(steps, shared_batch=False))(states, own)
    executor = PopulationExecutor(steps, shared_batch=False, strategy=strategy, donate=donate)
    kept = jax.tree.leaves(states.params)[0]
    actual, found = executor(states, own)
    assert_close(actual, expected)
    assert_close(found, metrics)
    assert kept.is_deleted() == donate


def test_the_first_call_measures_all_ways_and_writes_what_it_found(
    states, batch, tmp_path, monkeypatch
):
    monkeypatch.setattr(population, "usable_cores", lambda: 2)
    path = tmp_path / "strategy.json"
    executor = PopulationExecutor(STEP, remember=path)
    assert executor.strategy is None
    executor(states, batch)
    assert set(executor.milliseconds) == {"vmap", "map", "members", "threads"}
    assert executor.milliseconds[executor.strategy] == min(executor.milliseconds.values())
    assert json.loads(path.read_text()) == {
        "strategy": executor.strategy,
        "milliseconds": executor.milliseconds,
    }


def measured(monkeypatch, seconds_of):
    """Return an executor on one core, without threads, whose calls take the seconds given."""
    monkeypatch.setattr(population, "usable_cores", lambda: 1)
    clock, calls, compiled = [0.0], [], []
    real = population._compile

    def slow(step, strategy, **options):
        run = real(step, strategy, **options)
        compiled.append(strategy)

        def timed(states, batch):
            clock[0] += seconds_of(strategy, len(calls))
            calls.append(strategy)
            return run(states, batch)

        return timed

    monkeypatch.setattr(population, "_compile", slow)
    monkeypatch.setattr(population.time, "perf_counter", lambda: clock[0])
    return PopulationExecutor(STEP), calls, compiled


SECONDS = {"vmap": 3.0, "map": 1.0, "members": 2.0}


def test_the_shortest_time_decides(states, batch, monkeypatch):
    executor, calls, compiled = measured(monkeypatch, lambda strategy, _: SECONDS[strategy])
    for _ in range(2):
        executor(states, batch)
    assert executor.strategy == "map"
    assert executor.milliseconds == {"vmap": 3000.0, "map": 1000.0, "members": 2000.0}
    assert calls[-2:] == ["map", "map"]
    assert sorted(compiled) == ["map", "members", "vmap"]


@pytest.mark.parametrize("busy", [range(9), range(3, 9), range(6, 12)])
def test_a_moment_in_which_the_machine_is_busy_does_not_decide(busy, states, batch, monkeypatch):
    def seconds_of(strategy, call):
        return SECONDS[strategy] * (10 if call in busy else 1)

    executor, _, _ = measured(monkeypatch, seconds_of)
    executor(states, batch)
    assert executor.milliseconds == {"vmap": 3000.0, "map": 1000.0, "members": 2000.0}


def test_a_remembered_way_is_taken_without_measuring(states, batch, tmp_path):
    path = tmp_path / "strategy.json"
    path.write_text('{"strategy": "members"}')
    executor = PopulationExecutor(STEP, remember=path)
    executor(states, batch)
    assert executor.strategy == "members"
    assert executor.milliseconds == {}


def test_an_unknown_way_and_a_broken_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="strategy is 'for'"):
        PopulationExecutor(STEP, strategy="for")
    for content in ("", "[]", '{"milliseconds": {}}'):
        path = tmp_path / "strategy.json"
        path.write_text(content)
        with pytest.raises(ValueError, match="delete it to measure"):
            PopulationExecutor(STEP, remember=path)
    path.write_text('{"strategy": "for"}')
    with pytest.raises(ValueError, match="strategy is 'for'"):
        PopulationExecutor(STEP, remember=path)


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
@pytest.mark.parametrize("donate", [False, True])
def test_the_members_are_dealt_out_to_any_number_of_cores(
    cores, donate, states, batch, monkeypatch
):
    monkeypatch.setattr(population, "usable_cores", lambda: cores)
    expected, metrics = jit_step(population_step(STEP))(states, batch)
    actual, found = PopulationExecutor(STEP, strategy="threads", donate=donate)(states, batch)
    assert_close(actual, expected)
    assert_close(found, metrics)
    assert jax.tree.leaves(states)[0].is_deleted() == donate


def test_groups_differ_by_one_member_at_most():
    assert population._bounds(16, 2) == (0, 8, 16)
    assert population._bounds(7, 3) == (0, 2, 4, 7)
    assert population._bounds(2, 8) == (0, 1, 2)


def test_the_callers_context_holds_for_all_threads(states, batch):
    seen = []

    def step(state, batch):
        seen.append(jax.config.jax_default_matmul_precision)
        return STEP(state, batch)

    with jax.default_matmul_precision("highest"):
        PopulationExecutor(step, strategy="threads")(states, batch)
    assert set(seen) == {"highest"}


def test_batches_of_another_size_get_a_program_of_their_own(states, batch):
    executor = PopulationExecutor(STEP, strategy="threads")
    step = jit_step(population_step(STEP))
    for size in (6, 4, 6):
        part = jax.tree.map(lambda x, size=size: x[:size], batch)
        assert_close(executor(states, part), step(states, part))


def test_a_step_that_cannot_be_compiled_leaves_the_states_alone(states, batch):
    def failing(state, batch):
        raise RuntimeError("a step that fails")

    with pytest.raises(RuntimeError, match="a step that fails"):
        PopulationExecutor(failing, strategy="threads", donate=True)(states, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))
