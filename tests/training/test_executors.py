"""One definition, every executor: equal to rounding."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import mostly_slow
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets import convolutional, recurrent
from jaxnets.core import DATA_AXIS, Precision, Update
from jaxnets.data import chunked, index_batches, sequential_batches, shuffled_batches
from jaxnets.models import feedforward
from jaxnets.objectives.supervised import classification
from jaxnets.training.equivalence import check_equivalence
from jaxnets.training.executors import (
    data_mesh,
    fsdp_sharding,
    jit_step,
    pmap_step,
    population_step,
    replicate,
    resident_steps,
    scan_steps,
    sharded_step,
)
from jaxnets.training.loop import fit
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step

DOUBLE = Precision(jnp.float64, jnp.float64, jnp.float64)

# name -> (module without batch statistics?, constructor, shape of one input)
NETWORKS = {
    "mlp": (
        True,
        lambda p: feedforward.MLP((8, 8), num_outputs=3, norm="layer", residual=True, precision=p),
        (5,),
    ),
    "mlp_batch_norm": (
        False,
        lambda p: feedforward.MLP((8, 8), num_outputs=3, norm="batch", precision=p),
        (5,),
    ),
    "conv_net_audio": (
        True,
        lambda p: convolutional.ConvNet((4, 4), num_outputs=3, precision=p),
        (16, 2),
    ),
    "conv_net_batch_norm": (
        False,
        lambda p: convolutional.ConvNet((4, 4), num_outputs=3, norm="batch", precision=p),
        (8, 8, 1),
    ),
    "resnet": (
        False,
        lambda p: convolutional.ResNet((1, 1), num_outputs=3, stem="cifar", width=4, precision=p),
        (6, 6, 2),
    ),
    "lstm": (
        True,
        lambda p: recurrent.SequenceClassifier(3, 4, precision=p),
        (5, 2),
    ),
    "bidirectional_gru": (
        True,
        lambda p: recurrent.SequenceClassifier(3, 4, cell="gru", bidirectional=True, precision=p),
        (5, 2),
    ),
}


def problem(name, optimizer, precision=Precision(), seed=0):
    _, make_module, shape = NETWORKS[name]
    module = make_module(precision)
    rng = np.random.default_rng(seed)
    batch = {
        "inputs": rng.normal(size=(8, *shape)).astype(precision.parameter),
        "labels": rng.integers(0, 3, 8).astype(np.int32),
        "weights": np.array([1, 1, 0.5, 1, 0, 1, 2, 1], precision.parameter),
    }
    if isinstance(module, recurrent.SequenceClassifier):
        batch["lengths"] = np.array([5, 3, 1, 5, 0, 2, 4, 5], np.int32)
    update = Update(classification(module), optimizer)
    variables = jax.jit(module.init)(jax.random.key(seed), batch["inputs"])
    state = create_train_state(variables, update, rng=jax.random.key(seed + 1))
    return make_train_step(update), state, batch


def distance(first, second):
    def leaf(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0)

    return max(jax.tree.leaves(jax.tree.map(leaf, first, second)))


def member_of(population, index):
    return jax.tree.map(lambda x: x[index], population)


def check_report(report, name):
    if not NETWORKS[name][0]:  # microbatches are seen one at a time by batch normalization
        report.differences.pop("microbatched")
    expected = {"jit", "scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert set(report.differences) >= expected - {"microbatched"}
    assert report.num_devices == jax.device_count() and not report.skipped


@pytest.mark.parametrize("name", mostly_slow(NETWORKS, ["mlp_batch_norm", "lstm"]))
def test_executors_agree_in_float32_under_momentum(name):
    step, state, batch = problem(name, optax.sgd(0.1, momentum=0.9))
    report = check_equivalence(step, state, batch, num_steps=3)
    check_report(report, name)
    # The loss is a sum over the batch, about 10, whose neighbors in float32 are 1e-6 apart: its
    # mean is compared, and everything else as it is.
    for found in report.differences.values():
        found["metrics/loss"] /= batch["weights"].sum()
    assert report.largest < 1e-6, report.table()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_executors_agree_in_float64_under_adam(name, enable_x64):
    step, state, batch = problem(name, optax.adam(1e-2), DOUBLE)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float64")}
    report = check_equivalence(step, state, batch, num_steps=3)
    check_report(report, name)
    assert report.largest < 1e-10, report.table()


@pytest.mark.parametrize("strategy", ["vmap", "map"])
@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["mlp", "mlp_batch_norm", "conv_net_batch_norm", "lstm"], ["mlp_batch_norm", "lstm"]
    ),
)
def test_each_of_eight_members_equals_its_solo_run(name, strategy):
    check_population(name, strategy, optax.sgd, Precision(), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_batch_norm", "conv_net_batch_norm"])
def test_members_equal_their_solo_runs_in_float64_under_adam(name, enable_x64):
    check_population(name, "vmap", optax.adam, DOUBLE, 1e-10)


def check_population(name, strategy, make_optimizer, precision, tolerance):
    _, make_module, _ = NETWORKS[name]
    module = make_module(precision)
    _, _, batch = problem(name, optax.sgd(0.1), precision)
    rates = jnp.linspace(0.01, 0.2, 8, dtype=precision.parameter)
    update = Update(
        classification(module), optax.inject_hyperparams(make_optimizer)(learning_rate=0.1)
    )

    def create(seed, rate):
        key = jax.random.key(seed)
        variables = module.init(key, batch["inputs"])
        state = create_train_state(variables, update, rng=key)
        return dataclasses.replace(
            state, opt_state=optax.tree.set(state.opt_state, learning_rate=rate)
        )

    solo = jit_step(make_train_step(update))
    states = jax.vmap(create)(jnp.arange(8), rates)
    step = jit_step(scan_steps(population_step(make_train_step(update), strategy=strategy)))
    batches = jax.tree.map(lambda x: jnp.stack([x] * 3), batch)
    states, metrics = step(states, batches)
    assert metrics["loss"].count.shape == (8,)
    for member in range(8):
        state = create(member, rates[member])
        for _ in range(3):
            state, _ = solo(state, batch)
        assert distance(state, member_of(states, member)) < tolerance


def test_members_with_batches_of_their_own():
    step, state, batch = problem("mlp", optax.sgd(0.1))
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1]]), batch)
    for strategy in ("vmap", "map"):
        run = jit_step(population_step(step, shared_batch=False, strategy=strategy))
        results, _ = run(states, batches)
        first, _ = jit_step(step)(state, batch)
        assert distance(first, member_of(results, 0)) < 1e-6
        assert distance(first, member_of(results, 1)) < 1e-6
    with pytest.raises(ValueError, match="strategy is 'for'"):
        population_step(step, strategy="for")


def test_populations_run_on_a_mesh_and_under_pmap():
    step, state, batch = problem("conv_net_batch_norm", optax.sgd(0.1))
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    expected, _ = jit_step(population_step(step))(states, batch)
    for run in (
        pmap_step(population_step(step)),
        pmap_step(population_step(step, strategy="map")),
        sharded_step(population_step(step), data_mesh()),
    ):
        assert distance(expected, run(states, batch)[0]) < 1e-6


def test_scans_nest_under_pmap_and_mesh():
    step, state, batch = problem("mlp_batch_norm", optax.sgd(0.1, momentum=0.9))
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1]]), batch)
    expected, metrics = jit_step(scan_steps(step))(state, batches)
    spec = PartitionSpec(None, DATA_AXIS)
    for run in (
        pmap_step(scan_steps(step), batch_axis=1),
        sharded_step(scan_steps(step), data_mesh(), batch_spec=spec),
    ):
        found, found_metrics = run(state, batches)
        assert distance(expected, found) < 1e-6
        assert distance(metrics, found_metrics) < 1e-5


def test_one_trace_serves_every_batch_with_padding_and_without():
    step, state, batch = problem("mlp", optax.sgd(0.1))
    run = jax.jit(chex.assert_max_traces(n=1)(lambda state, batch: step(state, batch)))
    state, _ = run(state, batch)
    run(state, {**batch, "weights": np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)})


def test_data_on_the_device_gives_the_batches_of_the_host_in_the_same_order():
    rng = np.random.default_rng(0)
    data = {
        "inputs": rng.integers(0, 255, (30, 5)).astype(np.uint8),
        "labels": rng.integers(0, 3, 30).astype(np.int32),
    }
    host, device = shuffled_batches(data, 8, seed=3), index_batches(30, 8, seed=3)
    for _, batch, selection in zip(range(10), host(2), device(2), strict=False):
        for name in data:
            np.testing.assert_array_equal(batch[name], data[name][selection["indices"]])

    step, state, _ = problem("mlp", optax.sgd(0.01, momentum=0.9))
    resident, on_host = state, state
    selection = next(iter(chunked(device, 5)(0)))
    resident, metrics = resident_steps(step, data)(resident, selection)
    run = jit_step(step)
    for _, batch in zip(range(5), host(0), strict=False):
        on_host, _ = run(on_host, batch)
    assert int(resident.step) == 5 and float(metrics["loss"].count) == 40
    assert distance(resident, on_host) < 1e-6


def test_data_on_the_device_come_with_what_else_a_batch_holds():
    data = {"inputs": np.arange(12.0, dtype=np.float32)}
    _, state, _ = problem("mlp", optax.sgd(0.1))

    def step(state, batch, *, axis_name=None):
        return state, {"weighted": jnp.sum(batch["inputs"] * batch["epochs"])}

    selection = {
        "indices": np.array([[1, 2], [3, 4]], np.int32),
        "epochs": np.array([[1, 1], [2, 2]], np.int32),
    }
    _, metrics = resident_steps(step, data)(state, selection)
    assert float(metrics["weighted"]) == 1 + 2 + 2 * (3 + 4)


def test_donation_leaves_the_result_as_it_is():
    step, state, batch = problem("mlp_batch_norm", optax.adam(0.1))
    expected, _ = jit_step(step)(state, batch)
    mesh = data_mesh()
    for make in (
        lambda: jit_step(step, donate=True),
        lambda: pmap_step(step, donate=True),
        lambda: sharded_step(step, mesh, donate=True),
    ):
        copy = jax.tree.map(jnp.copy, state)
        assert distance(expected, make()(copy, batch)[0]) < 1e-6


@pytest.mark.slow
def test_hundreds_of_calls_in_a_row_do_not_wait_for_each_other_for_ever():
    step, state, batch = problem("mlp_batch_norm", optax.sgd(0.1))
    for run in (pmap_step(step), sharded_step(step, data_mesh())):
        final, _ = fit(run, state, lambda first: itertools.repeat(batch), num_steps=300)
        assert int(final.step) == 300


@pytest.mark.four_devices
def test_fsdp_splits_the_largest_divisible_axis_of_large_arrays_only():
    mesh = data_mesh()
    tree = {
        "large": jnp.zeros((8, 1024)),
        "odd": jnp.zeros((1023, 7)),
        "small": jnp.zeros(4),
        "key": jax.random.key(0),
    }
    shardings = fsdp_sharding(tree, mesh, min_bytes=1024)
    specs = {name: sharding.spec for name, sharding in shardings.items()}
    assert specs["large"] == PartitionSpec(None, DATA_AXIS)
    assert specs["odd"] == PartitionSpec(None, None)
    assert specs["small"] == PartitionSpec(None)
    placed = jax.device_put(tree, shardings)
    assert placed["large"].addressable_shards[0].data.shape == (8, 256)


@pytest.mark.four_devices
def test_fsdp_keeps_the_state_split_after_a_step():
    step, state, batch = problem("mlp", optax.adam(0.1))
    mesh = data_mesh()
    shardings = fsdp_sharding(state, mesh, min_bytes=0)
    state = jax.device_put(state, shardings)
    state, _ = sharded_step(step, mesh, shardings)(state, batch)
    kernels = [x for x in jax.tree.leaves(state.params) if x.ndim == 2 and x.shape[0] % 4 == 0]
    assert kernels and not any(x.is_fully_replicated for x in kernels)


@pytest.mark.four_devices
def test_replicated_arrays_stand_on_every_device():
    placed = replicate({"w": jnp.ones(3)}, data_mesh())
    assert isinstance(placed["w"].sharding, NamedSharding)
    assert placed["w"].is_fully_replicated and len(placed["w"].addressable_shards) == 4


@pytest.mark.four_devices
def test_a_batch_that_does_not_divide_is_refused_with_the_remedy():
    step, state, batch = problem("mlp", optax.sgd(0.1))
    batch = {name: array[:6] for name, array in batch.items()}
    for run in (pmap_step(step), sharded_step(step, data_mesh())):
        with pytest.raises(ValueError, match=r"batch size 6 is not divisible by 4 devices; pad"):
            run(state, batch)


def test_noise_differs_between_devices_and_steps():
    module = feedforward.MLP((64,), num_outputs=3, dropout_rate=0.5)
    update = Update(classification(module), optax.sgd(0.0))
    row = np.ones((1, 5), np.float32)
    batch = {"inputs": np.repeat(row, 4, 0), "labels": np.zeros(4, np.int32)}
    state = create_train_state(module.init(jax.random.key(0), row), update, rng=jax.random.key(1))
    step = make_train_step(update)
    one_device = (
        4 * step(state, {name: array[:1] for name, array in batch.items()})[1]["loss"].total
    )
    state_1, metrics = pmap_step(step)(state, batch)
    _, metrics_1 = pmap_step(step)(state_1, batch)
    assert abs(float(metrics["loss"].total) - float(one_device)) > 1e-3
    assert float(metrics["loss"].total) != float(metrics_1["loss"].total)


def test_a_users_own_step_is_checked_too():
    def own_step(state, batch):
        params = jax.tree.map(lambda w: w - 0.1 * jnp.mean(batch["inputs"]) * w, state.params)
        return dataclasses.replace(state, step=state.step + 1, params=params), {}

    _, state, batch = problem("mlp", optax.sgd(0.1))
    report = check_equivalence(own_step, state, batch)
    assert report.largest < 1e-6
    assert "takes no axis_name" in report.skipped["pmap"]
    assert "make_train_step" in report.skipped["microbatched"]
    assert "largest of all" in str(report) and "pmap not run" in str(report)


@pytest.mark.four_devices
def test_a_step_that_forgets_to_reduce_is_found_out():
    step, state, batch = problem("mlp", optax.sgd(0.5))

    def forgetful(state, batch, *, axis_name=None):
        return step(state, batch)

    report = check_equivalence(forgetful, state, batch)
    assert max(report.differences["pmap"].values()) > 1e-3
    assert max(report.differences["jit"].values()) < 1e-6


def test_evaluation_with_padding_is_exact_and_compiles_once():
    _, state, batch = problem("conv_net_batch_norm", optax.sgd(0.1))
    objective = classification(NETWORKS["conv_net_batch_norm"][1](Precision()))
    data = {"inputs": batch["inputs"][:7], "labels": batch["labels"][:7]}
    whole = make_eval_step(objective)(state, data)
    eval_step = jax.jit(chex.assert_max_traces(n=1)(make_eval_step(objective)))
    parts = [eval_step(state, part) for part in sequential_batches(data, 4)(0)]
    for name, expected in whole.items():
        found = (parts[0][name] + parts[1][name]).compute()
        np.testing.assert_allclose(found, expected.compute(), rtol=1e-6)
