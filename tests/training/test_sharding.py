"""Device meshes and sharding rules: every family on every mesh equals one device."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_trees_near, mostly_exhaustive, slow_or_exhaustive
from jax.sharding import Mesh, PartitionSpec
from process_run import NETWORKS, SIZE, data_of, updates_of

import jaxnets as jn
from jaxnets.core import tree_path
from jaxnets.models.registry import MODELS
from jaxnets.training.executors import jit_step, sharded_step
from jaxnets.training.sharding import batch_partition

P = PartitionSpec
MESHES = [{"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2}]


def mesh_of(sizes):
    return jn.device_mesh(**{"data": 1, **sizes}, devices=jax.devices()[:4])


def problem(name, optimizer=None):
    """Return updates, state and a batch of a tiny network of a family."""
    module, objective, shapes = NETWORKS[name]()
    updates, data = updates_of(module, objective), data_of(shapes)
    if optimizer is not None:
        one = updates if isinstance(updates, jn.Update) else updates[0]
        updates = jn.Update(one.objective, optimizer)
    example = jnp.zeros((1, 4)) if name == "gan" else data["inputs"][:1]
    key = jax.random.key(0)
    variables = jax.jit(module.init)({"params": key, "latent": key}, example)
    state = jn.create_train_state(variables, updates, rng=key)
    return updates, state, next(jn.data.shuffled_batches(data, SIZE, seed=0)(0))


@pytest.mark.four_devices
@pytest.mark.parametrize(
    ("name", "sizes"),
    mostly_exhaustive(
        itertools.product(NETWORKS, MESHES), zip(NETWORKS, itertools.cycle(MESHES), strict=False)
    ),
)
def test_a_step_on_every_mesh_is_that_of_one_device(name, sizes):
    updates, state, batch = problem(name)
    step = jn.make_train_step(updates)
    mesh = mesh_of(sizes)
    sharding = jn.state_sharding(state, mesh, jn.sharding_rules(name))
    run, one = sharded_step(step, mesh, sharding), jit_step(step)
    expected, metrics = one(one(state, batch)[0], batch)
    found, sums = run(run(jax.device_put(state, sharding), batch)[0], batch)
    assert_trees_near(found.params, expected.params, 2e-6)
    assert_trees_near(found.opt_state, expected.opt_state, 2e-6)
    assert_trees_near(sums, metrics, 2e-6)


@pytest.mark.parametrize(
    "name",
    mostly_exhaustive(
        MODELS, ["mlp", "mixer_s32", "resnet18", "recurrent_translator", "gemma3_1b", "t5_small"]
    ),
)
def test_the_rules_of_its_family_cover_every_parameter_of_a_model(name):
    model = MODELS[name]
    module = model.network()
    family = type(module).__module__.split(".")[2]
    batch = model.task.batch(2, model.input_shape)
    inputs = [batch[name] for name in model.task.inputs]
    key = jax.random.key(0)
    rngs = {"params": key, "latent": key, "mask": key}
    variables = jax.eval_shape(lambda *inputs: module.init(rngs, *inputs), *inputs)
    update = jn.Update(lambda *_: None, optax.identity())
    state = jax.eval_shape(lambda v: jn.create_train_state(v, update, rng=key), variables)
    sharding = jn.state_sharding(state, jn.device_mesh(), jn.sharding_rules(family))
    specs = jax.tree.map(lambda leaf, place: (leaf.ndim, place.spec), state.params, sharding.params)
    for ndim, spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, tuple)):
        assert ndim < 2 or any(spec) or jax.device_count() == 1


@pytest.mark.four_devices
def test_the_state_of_the_optimizer_follows_its_parameters():
    optimizer = jn.with_parameter_average(optax.chain(optax.clip(1.0), optax.adam(1e-3)), 0.9)
    _, state, _ = problem("transformer", optimizer)
    sharding = jn.state_sharding(
        state, mesh_of({"fsdp": 2, "tensor": 2}), [("kernel$", P("fsdp", "tensor")), ("", P())]
    )
    split = {
        tree_path(path)
        for path, place in jax.tree_util.tree_leaves_with_path(sharding)
        if place.spec == P("fsdp", "tensor")
    }
    kernels = {path for path in split if path.startswith("params/")}
    assert len(kernels) == 6
    followers = [path for path in split if path.startswith("opt_state/")]
    assert len(followers) == 3 * len(kernels)  # two moments and the average
    assert sharding.step.spec == sharding.rng.spec == P()


@pytest.mark.four_devices
def test_a_partition_is_that_of_the_last_axes_and_of_sizes_that_divide():
    params = {"layers": {"kernel": np.ones((3, 4, 8))}, "head": {"kernel": np.ones((4, 7))}}
    state = jn.create_train_state(
        {"params": params}, jn.Update(lambda *_: None, optax.sgd(0.1)), rng=jax.random.key(0)
    )
    rules = [("kernel$", P("fsdp", "tensor"))]
    specs = jn.state_sharding(state, mesh_of({"fsdp": 2, "tensor": 2}), rules).params
    assert specs["layers"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert specs["head"]["kernel"].spec == P("fsdp", None)
    several = [("kernel$", P(("fsdp", "tensor"), None))]
    specs = jn.state_sharding(state, mesh_of({"fsdp": 2, "tensor": 2}), several).params
    assert specs["head"]["kernel"].spec == P(("fsdp", "tensor"), None)


def test_a_parameter_without_a_rule_is_named():
    params = {"dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}
    state = jn.create_train_state(
        {"params": params}, jn.Update(lambda *_: None, optax.sgd(0.1)), rng=jax.random.key(0)
    )
    mesh = jn.device_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"no sharding rule matches dense/bias \[2\]"):
        jn.state_sharding(state, mesh, [("kernel$", P())])
    with pytest.raises(ValueError, match=r"for dense/bias \[2\] is .* of 2 axes; give at most 1"):
        jn.state_sharding(state, mesh, [("", P("fsdp", "tensor"))])
    for rules, message in {
        "feedforward": "'feedforward' is no sharding rule; give a list",
        (("(", P()),): "has no valid pattern: missing",
        (("kernel$", ("fsdp", None)),): "is no sharding rule",
        (("", P("model")),): "names the axis 'model'; the mesh has data, fsdp",
    }.items():
        with pytest.raises(ValueError, match=message):
            jn.state_sharding(state, mesh, rules)
    with pytest.raises(TypeError, match="state is a dict; give a TrainState"):
        jn.state_sharding(params, mesh, [])
    with pytest.raises(ValueError, match="no sharding rules for 'llama'; give one of feedforward"):
        jn.sharding_rules("llama")


@pytest.mark.four_devices
def test_sizes_of_a_mesh_are_computed_or_refused():
    devices = jax.devices()[:4]
    assert dict(jn.device_mesh(fsdp=2, devices=devices).shape) == {
        "data": 2,
        "fsdp": 2,
        "sequence": 1,
        "tensor": 1,
    }
    with pytest.raises(ValueError, match="fsdp='2' is no number"):
        jn.device_mesh(fsdp="2", devices=devices)
    with pytest.raises(ValueError, match="tensor=0 is no number of devices"):
        jn.device_mesh(tensor=0, devices=devices)
    with pytest.raises(ValueError, match="data and fsdp are -1; leave one"):
        jn.device_mesh(fsdp=-1, devices=devices)
    with pytest.raises(ValueError, match="of 3 does not use 4 devices"):
        jn.device_mesh(fsdp=3, devices=devices)
    with pytest.raises(ValueError, match="of fsdp 2 does not use 4 devices"):
        jn.device_mesh(data=1, fsdp=2, devices=devices)


@pytest.mark.four_devices
def test_rows_over_data_before_fsdp_are_refused_where_features_are_split():
    mesh, step = mesh_of({"fsdp": 2, "tensor": 2}), lambda state, batch: (state, {})
    with pytest.raises(ValueError, match="name 'fsdp' before 'data'"):
        sharded_step(step, mesh, batch_spec=P(("data", "fsdp")))
    sharded_step(step, mesh, batch_spec=batch_partition(mesh))
    with pytest.raises(ValueError, match="batch_spec names the axis 'rows'; the mesh has data"):
        sharded_step(step, mesh, batch_spec=P("rows"))
    sharded_step(step, mesh_of({"data": 2, "fsdp": 2}), batch_spec=P(("data", "fsdp")))
    other = Mesh(np.array(jax.devices()[:4]).reshape(4), ("rows",))
    with pytest.raises(ValueError, match="the mesh has the axes rows"):
        sharded_step(step, other)


@pytest.mark.four_devices
def test_a_description_tells_the_bytes_and_the_devices_of_each_block():
    mesh = mesh_of({"fsdp": 2, "tensor": 2})
    _, state, _ = problem("feedforward")
    sharding = jn.state_sharding(state, mesh, jn.sharding_rules("feedforward"))
    placed = jax.device_put(state, sharding)
    summary = jn.describe_sharding(placed)
    assert jn.describe_sharding(state, sharding).rows == summary.rows
    leaves = [leaf for leaf in jax.tree.leaves(placed) if leaf.ndim]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    others = sum(row[3] for row in summary.rows if row[1] == ())
    assert summary.device_bytes == held + others
    ids = [[device.id for device in row] for row in mesh.devices.reshape(2, 2)]
    lines = [f"| {row[0]} | {row[1]} |" for row in ids]
    assert summary.blocks["fsdp x tensor"] == lines
    assert "bytes on each device; mesh: fsdp 2 x tensor 2" in str(summary)
    with pytest.raises(ValueError, match="params is not placed on a mesh"):
        jn.describe_sharding({"params": jnp.ones(2)})


@pytest.mark.four_devices
@pytest.mark.parametrize(("one", "other"), [(MESHES[0], MESHES[2]), (MESHES[2], MESHES[0])])
def test_a_checkpoint_of_one_mesh_is_restored_onto_another(tmp_path, one, other):
    _, state, _ = problem("transformer")
    rules = jn.sharding_rules("transformer")
    saved, wanted = (jn.state_sharding(state, mesh_of(sizes), rules) for sizes in (one, other))
    jn.checkpoint.save(tmp_path / "checkpoint", jax.device_put(state, saved))
    target = jax.device_put(jax.tree.map(lambda leaf: leaf, state), wanted)
    restored, _ = jn.checkpoint.restore(tmp_path / "checkpoint", target)
    for leaf, place, original in zip(
        jax.tree.leaves(restored.params),
        jax.tree.leaves(wanted.params),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        np.testing.assert_array_equal(leaf, original)


@pytest.mark.four_devices
def test_batches_are_placed_over_time_too_and_labels_over_rows_alone():
    mesh = mesh_of({"data": 2, "sequence": 2})
    spec = P(("fsdp", "data"), "sequence")
    data = {"inputs": np.arange(32).reshape(8, 4), "labels": np.arange(8)}
    source = jn.data.sequential_batches(data, 4)
    batch = next(jn.data.sharded_batches(source, mesh, batch_spec=spec)(0))
    assert batch["inputs"].addressable_shards[0].data.shape == (2, 2)
    assert batch["labels"].addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(batch["inputs"], data["inputs"][:4])
    step = sharded_step(
        lambda state, batch: (state, {"sum": jnp.sum(batch["inputs"]) + jnp.sum(batch["labels"])}),
        mesh,
        batch_spec=spec,
    )
    _, metrics = step({}, batch)
    assert metrics["sum"] == data["inputs"][:4].sum() + data["labels"][:4].sum()


@pytest.mark.parametrize("name", slow_or_exhaustive(NETWORKS, ["autoencoder", "transformer"]))
def test_fifty_steps_on_eight_devices_are_those_of_one(name, optimized_processes):
    script = Path(__file__).parents[1] / "sharded_run.py"
    path = os.pathsep.join([str(script.parents[1]), str(script.parent)])
    done = subprocess.run(
        [sys.executable, script, "50", name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    for meshes in json.loads(done.stdout).values():
        for found in meshes.values():
            assert found["float32 SGD"] < 1e-5
            assert found["float64 Adam"] < 1e-10
