"""A run goes on bit for bit wherever its state and its template were: the program is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal

import jaxnets as jn
from jaxnets.core import Mean, ObjectiveOutput, Update
from jaxnets.training.checkpoint import restore, save


def unplaced(tree):
    """Uncommitted, as a new state is."""
    return jax.tree.map(
        lambda leaf: (
            jax.random.wrap_key_data(jnp.asarray(np.asarray(jax.random.key_data(leaf))))
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.asarray(np.asarray(leaf))
        ),
        tree,
    )


def partitioned(tree, mesh):
    return jax.device_put(tree, jn.fsdp_sharding(tree, mesh, min_bytes=0))


@pytest.fixture(scope="module", params=[jn.replicate, partitioned])
def run(request):
    """The placement of a step, the step of a network with dropout, its state, batches and end."""
    module = jn.MLP((16,), num_outputs=4, dropout_rate=0.5)
    update = Update(jn.classification(module), optax.adamw(1e-2))
    rng = np.random.default_rng(0)
    data = {
        "inputs": rng.normal(size=(64, 8)).astype(np.float32),
        "labels": rng.integers(0, 4, 64).astype(np.int32),
    }
    key = jax.random.key(0)
    variables = jn.initialize(module, key, data["inputs"][:1])
    state = jn.create_train_state(variables, update, rng=key)
    mesh = jn.data_mesh()
    sharding = jn.fsdp_sharding(state, mesh, min_bytes=0) if request.param is partitioned else None
    step = jn.sharded_step(jn.make_train_step(update), mesh, sharding, donate=True)
    batches = jn.data.shuffled_batches(data, 16, seed=0)
    end, _ = jn.fit(step, unplaced(state), batches, num_steps=6)
    return lambda tree: request.param(tree, mesh), step, state, batches, end


def test_a_sharded_run_goes_on_bit_for_bit_from_a_template_that_is_placed_or_not(run, tmp_path):
    placed, step, state, batches, end = run
    for started in (unplaced, placed):
        middle, history = jn.fit(step, started(unplaced(state)), batches, num_steps=3)
        save(tmp_path / "placed", middle, history=history)
        save(tmp_path / "moved", unplaced(middle), history=history)
        for folder in ("placed", "moved"):
            for template in (unplaced, placed):
                resumed, history = jn.resume(tmp_path / folder, template(unplaced(state)))
                resumed, _ = jn.fit(step, resumed, batches, num_steps=6, history=history)
                assert_bitwise_equal(resumed, end)
    for leaf in jax.tree.leaves((end.step, end.params["head"]["bias"])):
        copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(copies) == 1 or not leaf.is_fully_replicated


@pytest.mark.four_devices
def test_a_state_that_is_placed_in_another_way_is_refused_with_the_remedy(run):
    placed, step, state, batches, _ = run
    batch, mesh = next(iter(batches(0))), jn.data_mesh()
    replicated = placed(state).params["head"]["bias"].is_fully_replicated
    other = partitioned if replicated else jn.replicate
    with pytest.raises(ValueError, match=r"params/.* is placed by .* place the state with"):
        step(other(unplaced(state), mesh), batch)


def test_weakly_typed_numbers_of_a_state_do_not_change_its_program(tmp_path):
    """A restored array has a strong type, which a product with bfloat16 takes."""

    def objective(params, model_state, batch, rng, *, train):
        scaled = params["w"] * model_state["hyperparameters"]["scale"]
        return ObjectiveOutput(Mean.of((scaled * batch["inputs"]) ** 2), model_state, {})

    update = Update(objective, optax.sgd(0.3), float32_masters=True)
    variables = {
        "params": {"w": jnp.full(3, 1.37, jnp.bfloat16)},
        "hyperparameters": {"scale": jnp.asarray(0.7)},
    }
    assert variables["hyperparameters"]["scale"].weak_type
    state = jn.create_train_state(variables, update, rng=jax.random.key(0))
    step = jn.jit_step(jn.make_train_step(update))
    batch = {"inputs": np.linspace(0.1, 1, 3).astype(jnp.bfloat16)}
    save(tmp_path, state)
    restored, _ = restore(tmp_path, state)
    assert_bitwise_equal(step(restored, batch), step(state, batch))
    again = dataclasses.replace(restored, model_state=state.model_state)
    assert_bitwise_equal(step(again, batch), step(state, batch))
