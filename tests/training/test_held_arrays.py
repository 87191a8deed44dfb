"""Arrays that a step holds are arguments of its compiled programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_trees_near

import jaxnets as jn
from jaxnets.core import Mean, ObjectiveOutput, Update
from jaxnets.training.equivalence import check_equivalence
from jaxnets.training.executors import (
    jit_step,
    population_step,
    resident_steps,
    scan_steps,
    sharded_step,
)
from jaxnets.training.histograms import gradient_histograms
from jaxnets.training.population import PopulationExecutor
from jaxnets.training.sharding import data_mesh, fsdp_sharding, replicate
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Linear regression on frozen features."""

    features: jax.Array

    def __call__(self, params, model_state, batch, rng, *, train):
        predictions = jnp.tanh(batch["inputs"] @ self.features) @ params["w"]
        losses = (predictions - batch["labels"]) ** 2
        return ObjectiveOutput(Mean.of(losses, batch.get("weights")), model_state, {})


FEATURES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
BATCH = {
    "inputs": np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32),
    "labels": np.arange(8, dtype=np.float32),
    "weights": np.array([1, 1, 0.5, 1, 0, 1, 2, 1], np.float32),
}


def problem(features=FEATURES):
    update = Update(Frozen(features), optax.sgd(0.01))
    state = create_train_state({"params": {"w": jnp.ones(5)}}, update, rng=jax.random.key(0))
    return update, make_train_step(update), state


def test_every_executor_gives_what_the_plain_step_gives():
    _, step, state = problem()
    report = check_equivalence(step, state, BATCH)
    assert set(report.differences) == {
        *("jit", "scan", "pmap", "replicated", "fsdp", "microbatched"),
    }
    assert report.largest < 1e-5, report.table()


@pytest.mark.parametrize(
    "transform",
    [
        lambda step: step,
        scan_steps,
        functools.partial(population_step, shared_batch=False),
        functools.partial(jn.scheduled, rate=lambda step: 0.5),
        lambda step: scan_steps(population_step(step)),
    ],
)
def test_transforms_of_a_step_have_its_arrays(transform):
    _, step, _ = problem()
    assert [leaf for leaf in jax.tree.leaves(transform(step)) if leaf is FEATURES]


def test_transforms_of_the_batch_keep_the_arrays():
    objective = jn.with_batch_transform(Frozen(FEATURES), lambda batch, rng, train: batch)
    assert any(leaf is FEATURES for leaf in jax.tree.leaves(make_eval_step(objective)))


def test_the_program_has_no_copy_of_the_arrays():
    large = jnp.asarray(np.random.default_rng(0).normal(size=(300, 400)), jnp.float32)
    update = Update(Frozen(large), optax.sgd(0.01))
    state = create_train_state({"params": {"w": jnp.ones(400)}}, update, rng=jax.random.key(0))
    batch = {"inputs": jnp.ones((2, 300)), "labels": jnp.ones(2)}
    for step in (make_train_step(update), make_eval_step(update.objective)):
        program = jit_step(step).lower(state, batch)
        assert len(program.as_text()) < large.nbytes / 4


def test_resident_steps_and_sharded_frozen_arrays():
    _, step, state = problem()
    expected, _ = jit_step(scan_steps(step))(state, {k: v[None] for k, v in BATCH.items()})
    resident = resident_steps(step, BATCH)
    after, _ = resident(state, {"indices": np.arange(8)[None]})
    assert_trees_near(after.params, expected.params)

    mesh = data_mesh(jax.local_devices())
    wide = np.concatenate([FEATURES, np.zeros((1, 5), np.float32)])
    inputs = np.concatenate([BATCH["inputs"], np.ones((8, 1), np.float32)], axis=1)
    sharded = jax.device_put(wide, fsdp_sharding(wide, mesh, min_bytes=0))
    _, step, _ = problem(sharded)
    run = sharded_step(step, mesh)
    after, _ = run(replicate(state, mesh), {**BATCH, "inputs": inputs})
    assert_trees_near(after.params, expected.params)


@pytest.mark.parametrize("strategy", ["vmap", "map", "members", "threads"])
def test_members_of_a_population_share_the_arrays(strategy):
    _, step, state = problem()
    states = jax.vmap(lambda scale: dataclasses.replace(state, params={"w": scale * jnp.ones(5)}))(
        jnp.array([1.0, 2.0])
    )
    after, _ = PopulationExecutor(step, strategy=strategy)(states, BATCH)
    for index in range(2):
        solo = jax.tree.map(lambda leaf, i=index: leaf[i], states)
        expected, _ = jit_step(step)(solo, BATCH)
        member = jax.tree.map(lambda leaf, i=index: leaf[i], after)
        assert_trees_near(member.params, expected.params)


def test_diagnostics_take_steps_that_hold_arrays():
    update, step, state = problem()
    histograms = gradient_histograms(step, BATCH)(0, state, {})
    assert list(histograms) == ["gradients/w"]
    report = jn.overfit_one_batch(
        update, {"params": state.params}, BATCH, rng=jax.random.key(0), num_steps=3
    )
    assert report.losses[-1] < report.losses[0]


@pytest.mark.four_devices
def test_what_an_objective_passes_on_is_not_averaged_over_devices():
    def objective(params, model_state, batch, rng, *, train):
        return ObjectiveOutput(Mean.of(batch["inputs"] * params["w"]), model_state, {})

    update = Update(objective, optax.sgd(0.1))
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    variables = {"params": {"w": jnp.ones(())}, "hyperparameters": {"scale": jnp.asarray(values)}}
    state = create_train_state(variables, update, rng=jax.random.key(0))
    run = jn.pmap_step(make_train_step(update), devices=jax.local_devices()[:3])
    after, _ = run(state, {"inputs": np.ones(6, np.float32)})
    np.testing.assert_array_equal(after.model_state["hyperparameters"]["scale"], values)
