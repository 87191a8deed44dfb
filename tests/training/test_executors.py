"""One definition, every executor: equal to rounding.

The default group proves each code path on one network: dense with dropout, batch norm, recurrent
carry, transformer (`test_executors_sequences`), two updates (`models/gan/test_training`). All
other networks belong to the slow group.
"""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import mostly_exhaustive, mostly_slow, slow_or_exhaustive
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets import convolutional, recurrent
from jaxnets.core import DATA_AXIS, Mean, ObjectiveOutput, Precision, Update
from jaxnets.data import chunked, index_batches, sequential_batches, shuffled_batches
from jaxnets.models import feedforward
from jaxnets.objectives.supervised import classification
from jaxnets.training.equivalence import check_equivalence
from jaxnets.training.executors import (
    jit_step,
    pmap_step,
    population_step,
    resident_steps,
    scan_steps,
    sharded_step,
)
from jaxnets.training.loop import fit
from jaxnets.training.sharding import data_mesh, fsdp_sharding, replicate
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
    "elman": (
        True,
        lambda p: recurrent.SequenceClassifier(3, 4, cell="rnn", precision=p),
        (5, 2),
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


def problem(name, optimizer, precision=Precision()):
    module, variables, batch = network_and_batch(name, precision)
    update = Update(classification(module), optimizer)
    state = create_train_state(variables, update, rng=jax.random.key(1))
    return make_train_step(update), state, batch


@functools.cache
def network_and_batch(name, precision):
    _, make_module, shape = NETWORKS[name]
    module = make_module(precision)
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.normal(size=(8, *shape)).astype(precision.parameter),
        "labels": rng.integers(0, 3, 8).astype(np.int32),
        "weights": np.array([1, 1, 0.5, 1, 0, 1, 2, 1], precision.parameter),
    }
    if isinstance(module, recurrent.SequenceClassifier):
        batch["lengths"] = np.array([5, 3, 1, 5, 0, 2, 4, 5], np.int32)
    return module, jax.jit(module.init)(jax.random.key(0), batch["inputs"]), batch


def linear_objective(params, model_state, batch, rng, *, train):
    """A linear classifier with a running mean, which compiles in a moment."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        batch["inputs"] @ params["kernel"], batch["labels"]
    )
    mean = jnp.mean(batch["inputs"], axis=0)
    moved = {"mean": 0.9 * model_state["statistics"]["mean"] + 0.1 * mean}
    loss = Mean.of(losses, batch.get("weights"))
    return ObjectiveOutput(loss, {"statistics": moved}, {})


def linear_problem(optimizer=None):
    update = Update(linear_objective, optimizer or optax.sgd(0.1, momentum=0.9))
    rng = np.random.default_rng(0)
    variables = {
        "params": {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)},
        "statistics": {"mean": jnp.zeros(8)},
    }
    batch = {
        "inputs": rng.normal(size=(8, 8)).astype(np.float32),
        "labels": rng.integers(0, 3, 8).astype(np.int32),
        "weights": np.array([1, 1, 0.5, 1, 0, 1, 2, 1], np.float32),
    }
    state = create_train_state(variables, update, rng=jax.random.key(1))
    return make_train_step(update), state, batch


def distance(first, second):
    def leaf(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        return np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0)

    return max(jax.tree.leaves(jax.tree.map(leaf, first, second)))


def stacked(*states):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


#: The networks of the default group; see above.
PATHS = ["mlp_batch_norm", "elman"]


def check_report(report, name):
    if not NETWORKS[name][0]:  # batch norm computes the statistics of each microbatch separately
        report.differences.pop("microbatched")
    expected = {"scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert set(report.differences) >= expected - {"microbatched"}
    assert report.num_devices == jax.device_count() and not report.skipped


@pytest.mark.parametrize("name", mostly_exhaustive(NETWORKS, PATHS))
def test_executors_agree_in_float32_under_momentum(name):
    step, state, batch = problem(name, optax.sgd(0.1, momentum=0.9))
    # check_module shows for each network that jit = eager; for a whole step one case does.
    reference = "eager" if name == "mlp" else "jit"
    report = check_equivalence(step, state, batch, num_steps=3, reference=reference)
    assert ("jit" in report.differences) == (reference == "eager")
    check_report(report, name)
    # The loss is a sum over the batch, about 10, where neighboring float32 numbers are 1e-6 apart:
    # compare its mean. Everything else is compared as it is.
    for differences in report.differences.values():
        differences["metrics/loss"] /= batch["weights"].sum()
    assert report.largest < 1e-6, report.table()


@pytest.mark.parametrize("name", slow_or_exhaustive(NETWORKS, ["mlp_batch_norm", "resnet", "lstm"]))
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
    mostly_slow(["mlp", "mlp_batch_norm", "conv_net_batch_norm", "elman", "lstm"], PATHS),
)
def test_each_member_equals_its_solo_run(name, strategy):
    check_population(name, strategy, optax.sgd, Precision(), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_batch_norm", "conv_net_batch_norm"])
def test_members_equal_their_solo_runs_in_float64_under_adam(name, enable_x64):
    check_population(name, "vmap", optax.adam, DOUBLE, 1e-10)


def check_population(name, strategy, make_optimizer, precision, tolerance):
    step, states, batch, expected = solo_runs(name, make_optimizer, precision)
    run = jit_step(scan_steps(population_step(step, strategy=strategy)))
    found, metrics = run(states, jax.tree.map(lambda x: np.stack([x] * 3), batch))
    assert metrics["loss"].count.shape == (8,)
    assert distance(expected, found) < tolerance


@functools.cache
def solo_runs(name, make_optimizer, precision):
    """Train eight members of their own seeds and rates, each alone, for three steps."""
    _, make_module, _ = NETWORKS[name]
    module = make_module(precision)
    batch = problem(name, optax.sgd(0.1), precision)[2]
    update = Update(
        classification(module), optax.inject_hyperparams(make_optimizer)(learning_rate=0.1)
    )

    def create(seed, rate):
        key = jax.random.key(seed)
        state = create_train_state(module.init(key, batch["inputs"]), update, rng=key)
        return dataclasses.replace(
            state, opt_state=optax.tree.set(state.opt_state, learning_rate=rate)
        )

    step, seeds = make_train_step(update), np.arange(8)
    rates = np.linspace(0.01, 0.2, 8, dtype=precision.parameter)
    create_one, train_one = jax.jit(create), jit_step(step)
    solo = []
    for seed, rate in zip(seeds, rates, strict=True):
        state = create_one(seed, rate)
        for _ in range(3):
            state, _ = train_one(state, batch)
        solo.append(state)
    return step, jax.jit(jax.vmap(create))(seeds, rates), batch, stacked(*solo)


@pytest.mark.parametrize("strategy", ["vmap", "map"])
def test_members_with_batches_of_their_own(strategy):
    step, state, batch = linear_problem()
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1]]), batch)
    run = jit_step(population_step(step, shared_batch=False, strategy=strategy))
    results, _ = run(stacked(state, state), batches)
    expected, _ = jit_step(step)(state, batch)  # the order of examples does not matter
    assert distance(stacked(expected, expected), results) < 1e-6


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy is 'for'"):
        population_step(linear_problem()[0], strategy="for")


def test_populations_run_on_a_mesh_and_under_pmap():
    step, state, batch = problem("mlp_batch_norm", optax.sgd(0.1))
    states = stacked(state, state)
    expected, _ = jit_step(population_step(step))(states, batch)
    for run in (
        pmap_step(population_step(step)),
        pmap_step(population_step(step, strategy="map")),
        sharded_step(population_step(step), data_mesh()),
    ):
        assert distance(expected, run(states, batch)[0]) < 1e-6


def test_scans_nest_under_pmap_and_mesh():
    step, state, batch = linear_problem()
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
    step, state, batch = linear_problem()
    run = jax.jit(chex.assert_max_traces(n=1)(lambda state, batch: step(state, batch)))
    state, _ = run(state, batch)
    run(state, {**batch, "weights": np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)})


def test_resident_data_gives_the_batches_of_the_host_in_the_same_order():
    rng = np.random.default_rng(0)
    data = {
        "inputs": rng.integers(0, 255, (30, 8)).astype(np.uint8),
        "labels": rng.integers(0, 3, 30).astype(np.int32),
    }
    host, device = shuffled_batches(data, 8, seed=3), index_batches(30, 8, seed=3)
    for _, batch, selection in zip(range(10), host(2), device(2), strict=False):
        for name in data:
            np.testing.assert_array_equal(batch[name], data[name][selection["indices"]])

    step, state, _ = linear_problem(optax.sgd(0.01, momentum=0.9))
    resident, on_host = state, state
    selection = next(iter(chunked(device, 5)(0)))
    resident, metrics = resident_steps(step, data)(resident, selection)
    run = jit_step(step)
    for _, batch in zip(range(5), host(0), strict=False):
        on_host, _ = run(on_host, batch)
    assert int(resident.step) == 5 and float(metrics["loss"].count) == 40
    assert distance(resident, on_host) < 1e-6


def test_other_arrays_of_a_batch_reach_the_step_of_resident_data():
    data = {"inputs": np.arange(12.0, dtype=np.float32)}
    _, state, _ = linear_problem()

    def step(state, batch, *, axis_name=None):
        return state, {"weighted": jnp.sum(batch["inputs"] * batch["epochs"])}

    selection = {
        "indices": np.array([[1, 2], [3, 4]], np.int32),
        "epochs": np.array([[1, 1], [2, 2]], np.int32),
    }
    _, metrics = resident_steps(step, data)(state, selection)
    assert float(metrics["weighted"]) == 1 + 2 + 2 * (3 + 4)


def test_donation_does_not_change_the_result():
    step, state, batch = linear_problem(optax.adam(0.1))
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
def test_hundreds_of_calls_in_a_row_do_not_deadlock():
    step, state, batch = problem("mlp_batch_norm", optax.sgd(0.1))
    for run in (pmap_step(step), sharded_step(step, data_mesh())):
        final, _ = fit(run, state, lambda first: itertools.repeat(batch), num_steps=300)
        assert int(final.step) == 300


@pytest.mark.four_devices
def test_fsdp_partitions_the_largest_divisible_axis_of_large_arrays_only():
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
def test_fsdp_leaves_the_state_partitioned_after_a_step():
    step, state, batch = linear_problem(optax.adam(0.1))
    mesh = data_mesh()
    shardings = fsdp_sharding(state, mesh, min_bytes=0)
    state = jax.device_put(state, shardings)
    state, _ = sharded_step(step, mesh, shardings)(state, batch)
    kernels = [x for x in jax.tree.leaves(state.params) if x.ndim == 2 and x.shape[0] % 4 == 0]
    assert kernels and not any(x.is_fully_replicated for x in kernels)


@pytest.mark.four_devices
def test_replicated_arrays_are_on_every_device():
    placed = replicate({"w": jnp.ones(3)}, data_mesh())
    assert isinstance(placed["w"].sharding, NamedSharding)
    assert placed["w"].is_fully_replicated and len(placed["w"].addressable_shards) == 4


@pytest.mark.four_devices
def test_a_batch_that_does_not_divide_is_refused_with_the_remedy():
    step, state, batch = linear_problem()
    batch = {name: array[:6] for name, array in batch.items()}
    for run in (pmap_step(step), sharded_step(step, data_mesh())):
        with pytest.raises(ValueError, match=r"batch size 6 is not divisible by 4 devices; pad"):
            run(state, batch)


@pytest.mark.four_devices
def test_a_member_that_fails_in_the_part_of_one_device_freezes_on_all_of_them():
    def objective(params, model_state, batch, rng, *, train):
        fails = (batch["inputs"] > 6) & (model_state["fails"]["flag"] > 0)
        losses = jnp.where(fails, jnp.inf, batch["inputs"] * params["w"] ** 2)
        return ObjectiveOutput(Mean.of(losses), model_state, {})

    update = Update(objective, optax.sgd(0.01))
    state = create_train_state(
        {"params": {"w": jnp.ones(())}, "fails": {"flag": jnp.zeros(())}},
        update,
        rng=jax.random.key(0),
    )
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)
    states.model_state["fails"]["flag"] = jnp.array([0.0, 1.0, 0.0])
    step = population_step(make_train_step(update), on_non_finite="freeze")
    batch = {"inputs": np.arange(8, dtype=np.float32)}
    for run in (jit_step(step), pmap_step(step), sharded_step(step, data_mesh())):
        after, metrics = run(*run(states, batch)[:1], batch)
        assert after.step.tolist() == [2, 0, 2] and after.params["w"][1] == 1
        assert metrics["frozen"].compute().tolist() == [0, 1, 0]
        # The gradient of the mean loss is 2 w mean(inputs) = 7 w.
        np.testing.assert_allclose(after.params["w"][::2], (1 - 0.07) ** 2, rtol=1e-6)


def dropout_problem():
    module = feedforward.MLP((8,), num_outputs=3, dropout_rate=0.5)
    update = Update(classification(module), optax.sgd(0.1))
    rows = np.ones((4, 5), np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), rows)
    state = create_train_state(variables, update, rng=jax.random.key(1))
    return make_train_step(update), state, {"inputs": rows, "labels": np.zeros(4, np.int32)}


def test_executors_that_keep_a_batch_whole_draw_the_same_dropout_masks():
    step, state, batch = dropout_problem()
    report = check_equivalence(step, state, batch, reference="jit")
    for name in ("scan", "replicated", "fsdp"):
        assert max(report.differences[name].values()) < 1e-6, report.table()
    # Devices and microbatches have keys of their own.
    for name in ("pmap", "microbatched"):
        assert max(report.differences[name].values()) > 1e-3, report.table()


def test_dropout_differs_between_devices_and_steps():
    step, state, batch = dropout_problem()
    run = pmap_step(step)
    next_state, metrics = run(state, batch)
    _, with_next_key = run(dataclasses.replace(state, step=next_state.step), batch)
    # All rows are equal. On one device alone the loss is that of device 0 of the four.
    row = jax.tree.map(lambda x: x[:1], batch)
    _, alone = pmap_step(step, devices=jax.local_devices()[:1])(state, row)
    assert abs(float(metrics["loss"].total) - 4 * float(alone["loss"].total)) > 1e-3
    assert float(metrics["loss"].total) != float(with_next_key["loss"].total)


def test_a_users_own_step_is_checked_too():
    def own_step(state, batch):
        params = jax.tree.map(lambda w: w - 0.1 * jnp.mean(batch["inputs"]) * w, state.params)
        return dataclasses.replace(state, step=state.step + 1, params=params), {}

    _, state, batch = linear_problem()
    report = check_equivalence(own_step, state, batch)
    assert report.largest < 1e-6
    assert "takes no axis_name" in report.skipped["pmap"]
    assert "make_train_step" in report.skipped["microbatched"]
    assert "largest of all" in str(report) and "pmap not run" in str(report)
    assert f"({len(report.differences['jit']) - 1} more leaves differ less)" in report.table(1)


@pytest.mark.four_devices
def test_a_step_that_does_not_reduce_differs_under_pmap():
    step, state, batch = linear_problem(optax.sgd(0.5))

    def forgetful(state, batch, *, axis_name=None):
        return step(state, batch)

    report = check_equivalence(forgetful, state, batch)
    assert max(report.differences["pmap"].values()) > 1e-3
    assert max(report.differences["jit"].values()) < 1e-6


def test_evaluation_with_padding_is_exact_and_compiles_once():
    _, state, batch = problem("mlp_batch_norm", optax.sgd(0.1))
    objective = classification(NETWORKS["mlp_batch_norm"][1](Precision()))
    data = {"inputs": batch["inputs"][:7], "labels": batch["labels"][:7]}
    whole = jax.jit(make_eval_step(objective))(state, data)
    eval_step = jax.jit(chex.assert_max_traces(n=1)(make_eval_step(objective).__call__))
    parts = [eval_step(state, part) for part in sequential_batches(data, 4)(0)]
    for name, expected in whole.items():
        found = (parts[0][name] + parts[1][name]).compute()
        np.testing.assert_allclose(found, expected.compute(), rtol=1e-6)


def test_a_step_of_one_network_and_a_population_say_what_state_they_need():
    step, state, batch = linear_problem()
    states = stacked(state, state)
    for one in (step, make_eval_step(linear_objective)):
        with pytest.raises(
            ValueError, match=r"holds 2 networks.* wrap the step in population_step"
        ):
            one(states, batch)
        with pytest.raises(ValueError, match=r"holds one network.* by jax.vmap over keys"):
            population_step(one)(state, batch)
