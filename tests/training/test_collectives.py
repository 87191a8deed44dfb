"""The collectives in the compiled program of a sharded step."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from process_run import NETWORKS, SIZE, data_of, updates_of

import jaxnets as jn

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def problem(name):
    """Return the step, the state and a batch of a family, all tiny."""
    module, objective, shapes = NETWORKS[name]()
    updates, data = updates_of(module, objective), data_of(shapes)
    example = jnp.zeros((1, 4)) if name == "gan" else data["inputs"][:1]
    key = jax.random.key(0)
    variables = jax.jit(module.init)({"params": key, "latent": key}, example)
    state = jn.create_train_state(variables, updates, rng=key)
    batch = next(jn.data.shuffled_batches(data, SIZE, seed=0)(0))
    return jn.make_train_step(updates), state, batch


def collectives(step, mesh, state_spec, batch_spec, state, batch):
    """Return {(operation, elements of an array): count} of the compiled step."""
    compiled = jax.jit(
        lambda state, batch: step(state, batch),
        in_shardings=(NamedSharding(mesh, state_spec), NamedSharding(mesh, batch_spec)),
        out_shardings=(NamedSharding(mesh, state_spec), None),
    ).lower(state, batch)
    found = collections.Counter()
    for results, operation in COLLECTIVE.findall(compiled.compile().as_text()):
        for sizes in re.findall(r"[a-z]\d*\[([\d,]*)\]", results):
            elements = np.prod([int(size) for size in sizes.split(",") if size], dtype=int)
            found[operation, int(elements)] += 1
    return found


@pytest.mark.four_devices
@pytest.mark.parametrize("name", NETWORKS)
def test_a_data_parallel_step_reduces_the_gradients_once_and_gathers_nothing(name):
    step, state, batch = problem(name)
    split = PartitionSpec("data")
    found = collectives(step, jn.data_mesh(), PartitionSpec(), split, state, batch)
    assert {operation for operation, _ in found} == {"all-reduce"}
    elements = sum(size * count for (_, size), count in found.items())
    params = jax.tree.leaves(state.params)
    # Sums of vectors are reduced before their last step, one for each of six positions; the uses of
    # a tied table are reduced apart. The rest is sums of losses, metrics and batch statistics.
    extra = 5 * sum(leaf.size for leaf in params if leaf.ndim < 2) + 100
    extra += state.params["embedding"]["token"]["embedding"].size if name == "transformer" else 0
    gradients = sum(leaf.size for leaf in params)
    assert gradients <= elements <= gradients + extra


@pytest.mark.four_devices
def test_a_population_is_split_over_devices_and_exchanges_no_parameters():
    step, state, batch = problem("feedforward")
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state)
    mesh, population = jn.data_mesh(), jn.population_step(step)
    split, whole = PartitionSpec("data"), PartitionSpec()
    members = NamedSharding(mesh, split)
    expected, _ = jn.jit_step(population)(states, batch)
    executor = jn.sharded_step(population, mesh, members, batch_spec=whole)
    found, metrics = executor(jax.device_put(states, members), batch)
    for one, other in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        assert one.addressable_shards[0].data.shape == (2, *one.shape[1:])
    assert metrics["loss"].count.shape == (8,)
    assert not collectives(population, mesh, split, whole, states, batch)
