"""The array of a state that is not finite: which one is named, and what may be infinite."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.core import Mean, TrainState, Update
from jaxnets.layers.normalization import BatchNorm
from jaxnets.objectives import classification
from jaxnets.training.checkpoint import all_steps
from jaxnets.training.executors import jit_step, population_step, scan_steps
from jaxnets.training.history import NonFiniteError
from jaxnets.training.hooks import Checkpointing, resume
from jaxnets.training.loop import fit
from jaxnets.training.nonfinite import first_nonfinite, order_of_use
from jaxnets.training.step import create_train_state, make_train_step

OPTIMIZER = optax.adam(0.1)
LAYERS = ("stem", "block_9", "block_10", "a_norm", "head")  # the order of the network


def make_state():
    params = {name: {"kernel": jnp.eye(3)} for name in LAYERS}
    stats = {"batch_stats": {"a_norm": {"var": jnp.ones(3)}}}
    rng = jax.random.key(0)
    return TrainState(jnp.int32(0), rng, params, stats, OPTIMIZER.init(params))


def step(state, batch, *, axis_name=None):
    def loss(params):
        # Converted all at once, and in the order of the alphabet, as some networks do.
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).T, params)
        x = batch["inputs"].astype(jnp.bfloat16)
        for name in LAYERS:
            x = jax.checkpoint(lambda x, kernel: jnp.tanh(x @ kernel))(x, params[name]["kernel"])
            if name == "a_norm":
                x = x / state.model_state["batch_stats"]["a_norm"]["var"][None].astype(x.dtype)
        return jnp.sum(x.astype(jnp.float32))

    total, gradients = jax.value_and_grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
    changed = {"params": optax.apply_updates(state.params, updates), "opt_state": opt_state}
    after = dataclasses.replace(state, step=state.step + 1, **changed)
    return after, {"loss": Mean(total, jnp.float32(2))}


BATCH = {"inputs": np.ones((2, 3), np.float32)}


def poison(state, *paths, value=jnp.nan):
    def changed(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full_like(leaf, value) if name in paths else leaf

    return jax.tree_util.tree_map_with_path(changed, state)


@pytest.mark.parametrize("executor", ["plain", "compiled", "scanned", "population"])
def test_the_first_bad_layer_is_that_of_the_forward_pass_under_every_executor(executor):
    make = {
        "plain": lambda step: step,
        "compiled": jit_step,
        "scanned": lambda step: jit_step(scan_steps(step)),
        "population": population_step,
    }[executor]
    batch = jax.tree.map(lambda leaf: leaf[None], BATCH) if executor == "scanned" else BATCH
    state = make_state()
    if executor == "population":
        state = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    order = order_of_use(make(step), state, batch)
    kernels = [path for path in order if path.startswith("params/")]
    assert kernels == [f"params/{name}/kernel" for name in LAYERS]
    for bad in (LAYERS[1:], LAYERS[::2], ("head", "a_norm")):
        first = min(bad, key=LAYERS.index)
        named = first_nonfinite(poison(state, *(f"params/{name}/kernel" for name in bad)), order)
        assert named == f"{first}/kernel"


def test_statistics_stand_where_their_layer_does_and_after_its_parameters():
    state = make_state()
    order = order_of_use(step, state, BATCH)
    nu, var = "opt_state/0/nu/{}/kernel", "model_state/batch_stats/a_norm/var"
    for bad, first in (
        ([nu.format("head"), var], var),
        ([nu.format("block_10"), var, nu.format("head")], nu.format("block_10")),
        ([nu.format("stem"), "params/stem/kernel"], "stem/kernel"),
        ([nu.format("stem"), "params/head/kernel"], nu.format("stem")),
    ):
        assert first_nonfinite(poison(state, *bad, value=jnp.inf), order) == first


def test_a_step_that_cannot_be_traced_leaves_the_order_of_the_names():
    state = poison(make_state(), "params/block_9/kernel", "params/block_10/kernel")
    order = order_of_use(lambda state, batch: float(batch["inputs"][0, 0]), state, BATCH)
    assert order == [] and first_nonfinite(state, order) == "block_9/kernel"


def test_a_number_beside_the_parameters_may_be_infinite_and_not_nan():
    optimizer = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())
    state = dataclasses.replace(make_state(), opt_state=optimizer.init(make_state().params))
    state = dataclasses.replace(state, model_state={"hyperparameters": {"limit": jnp.float32(3)}})
    infinite = poison(state, "model_state/hyperparameters/limit", value=jnp.inf)
    assert np.isinf(state.opt_state[1].best_value) and first_nonfinite(state) is None
    assert first_nonfinite(infinite) is None
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), infinite)
    assert first_nonfinite(members) is None
    nan = poison(state, "model_state/hyperparameters/limit")
    assert first_nonfinite(nan) == "model_state/hyperparameters/limit"
    scalar = dataclasses.replace(state, params={"scale": jnp.float32(jnp.inf)})
    assert first_nonfinite(scalar) == "scale"


@pytest.mark.four_devices
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_arrays_on_several_devices_and_of_every_dtype_are_checked(dtype):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    good = jnp.ones(8, dtype)
    for leaf in (good, jax.device_put(good, split)):
        assert first_nonfinite({"a": leaf, "b": jnp.arange(3)}) is None
        assert first_nonfinite({"a": leaf, "b": leaf.at[3].set(jnp.inf)}) == "b"


def test_first_nonfinite_ignores_integers():
    assert first_nonfinite({"a": jnp.arange(3), "b": jnp.ones(2)}) is None
    assert first_nonfinite({"a": jnp.arange(3), "b": {"c": jnp.array([1, jnp.inf])}}) == "b/c"


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(4, name="z_first")(x)
        return nn.Dense(2, name="head")(nn.relu(BatchNorm(name="norm")(x, train=train)))


def batches(first):
    rng = np.random.default_rng(0)
    for number in range(first, 100):
        inputs = rng.normal(size=(4, 3)).astype(np.float32)
        scale = np.float32(1e20 if number == 4 else 1)
        yield {"inputs": inputs * scale, "labels": np.array([0, 1, 0, 1])}


def test_a_batch_that_makes_the_statistics_of_a_norm_infinite_is_not_saved(tmp_path):
    """The loss stays finite, because the norm divides by the statistics of the batch."""
    module = Normalized()
    variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    update = Update(classification(module), optax.sgd(1e-3))
    state = create_train_state(variables, update, rng=jax.random.key(0))
    train = jit_step(make_train_step(update))
    with pytest.raises(NonFiniteError) as caught:
        fit(train, state, batches, num_steps=9, hooks=[Checkpointing(tmp_path, every=3)])
    message = str(caught.value)
    assert message.startswith("the state at step 6 is not finite (model_state/batch_stats/norm/var")
    assert "a step after 3 made it so" in message
    assert all_steps(tmp_path) == [3]


@pytest.mark.parametrize("part", ["nu", "mu"])
def test_a_moment_of_the_optimizer_that_is_infinite_is_not_saved(tmp_path, part):
    compiled = jax.jit(step)

    def overflowing(state, batch):
        after, metrics = compiled(state, batch)
        path = f"opt_state/0/{part}/block_9/kernel"
        return poison(after, path, value=jnp.inf) if after.step == 2 else after, metrics

    def source(first):
        while True:
            yield BATCH

    hooks = [Checkpointing(tmp_path, every=1)]
    with pytest.raises(NonFiniteError, match=rf"state at step 2 .*0/{part}/block_9/kernel is NaN"):
        fit(overflowing, make_state(), source, num_steps=9, hooks=hooks)
    assert int(resume(tmp_path, make_state())[0].step) == 1


def test_a_metric_names_the_first_bad_layer_and_the_steps_that_made_it_so():
    def source(first):
        for number in range(first, 9):
            yield {"inputs": BATCH["inputs"] * np.float32(np.nan if number == 3 else 1)}

    message = r"loss at step 4 is .*\(parameter stem/kernel is NaN.*: this step or the one before"
    with pytest.raises(NonFiniteError, match=message):
        fit(jit_step(step), make_state(), source, num_steps=9)
