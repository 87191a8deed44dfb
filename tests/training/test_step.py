import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets.core import Mean, ObjectiveOutput, Update
from jaxnets.objectives.supervised import regression
from jaxnets.training.optimizers import decay_mask, with_parameter_average
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step


class Linear(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train=False):
        return nn.Dense(1, name="output")(inputs)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train=False):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(inputs))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(8, 3)).astype(np.float32)
    labels = rng.normal(size=(8, 1)).astype(np.float32)
    return {"inputs": inputs, "labels": labels}


@functools.cache
def initialize(module):
    return jax.jit(module.init)(jax.random.key(0), np.zeros((8, 3), np.float32))


def make(module, optimizer, batch, objective=None):
    update = Update(objective or regression(module), optimizer)
    return update, create_train_state(initialize(module), update, rng=jax.random.key(1))


def jitted(updates, **options):
    return jax.jit(make_train_step(updates, **options))


def close(first, second, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), first, second)


def test_one_gradient_descent_step_equals_the_formula_by_hand(batch):
    update, state = make(Linear(), optax.sgd(0.1), batch)
    kernel, bias = (np.array(state.params["output"][n]) for n in ("kernel", "bias"))
    residual = batch["inputs"] @ kernel + bias - batch["labels"]
    new, metrics = jitted(update)(state, batch)
    close(new.params["output"]["kernel"], kernel - 0.1 * 2 * batch["inputs"].T @ residual / 8)
    close(new.params["output"]["bias"], bias - 0.1 * 2 * residual.mean(0))
    np.testing.assert_allclose(metrics["loss"].compute(), (residual**2).mean(), rtol=1e-6)
    assert int(new.step) == 1


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.05),
        optax.sgd(0.02, momentum=0.9, nesterov=True),
        optax.rmsprop(0.03),
        optax.adam(0.05),
        optax.adamw(0.05, mask=decay_mask),
        optax.lion(0.02),
        optax.contrib.muon(0.05),
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.1, 50))
        ),
        with_parameter_average(optax.adam(0.05), 0.9),
    ],
    ids=["sgd", "momentum", "rmsprop", "adam", "adamw", "lion", "muon", "clip-schedule", "average"],
)
def test_every_optimizer_of_optax_learns_least_squares(optimizer, batch):
    true = np.array([[1.0], [-2.0], [0.5]], np.float32)
    batch = {**batch, "labels": batch["inputs"] @ true}
    update, state = make(Linear(), optimizer, batch)
    step = jitted(update)
    _, first = step(state, batch)
    for _ in range(60):
        state, last = step(state, batch)
    assert last["loss"].compute() < 0.2 * first["loss"].compute()


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_microbatches_with_uneven_weights_equal_the_whole_batch(num_microbatches, batch):
    batch["weights"] = np.array([1, 0, 2, 0.5, 0, 0, 3, 1], np.float32)
    update, state = make(Linear(), optax.sgd(0.1), batch)
    whole, metrics = jitted(update)(state, batch)
    split, split_metrics = jitted(update, num_microbatches=num_microbatches)(state, batch)
    close(whole.params, split.params)
    close(metrics, split_metrics)


def test_padding_with_weight_zero_changes_nothing(batch):
    update, state = make(Linear(), optax.sgd(0.1), batch)
    padded = {name: np.concatenate([array, 99 * array[:3]]) for name, array in batch.items()}
    padded["weights"] = np.array([1.0] * 8 + [0.0] * 3, np.float32)
    expected, metrics = jitted(update)(state, batch)
    padded_state, padded_metrics = jitted(update)(state, padded)
    close(expected.params, padded_state.params)
    close(metrics, padded_metrics)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(
            optax.sgd(0.1),
            optax.contrib.reduce_on_plateau(patience=1, accumulation_size=2),
        ),
        optax.contrib.momo(weight_decay=0.1, adapt_lower_bound=True),
        with_parameter_average(
            optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.momo_adam()), 0.9
        ),
    ],
    ids=["plateau", "momo", "momo_adam"],
)
def test_a_batch_of_padding_only_is_no_loss_for_an_optimizer_that_reads_it(optimizer, batch):
    update, state = make(Linear(), optimizer, batch)
    step = jitted(update)
    state, _ = step(state, batch)
    padding, _ = step(state, {**batch, "weights": np.zeros(8, np.float32)})
    close(padding.opt_state, state.opt_state, 0)
    close(padding.params, state.params, 0)
    assert int(padding.step) == 2


def test_a_batch_of_padding_only_leaves_finite_parameters(batch):
    update, state = make(Linear(), optax.sgd(0.1), batch)
    new, metrics = jitted(update)(state, {**batch, "weights": np.zeros(8, np.float32)})
    close(new.params, state.params)
    assert float(metrics["loss"].count) == 0


def test_keys_are_a_function_of_the_seed_and_the_step(batch):
    update, state = make(Noisy(), optax.sgd(0.0), batch)
    step = jitted(update)
    state_1, loss_0 = step(state, batch)
    _, loss_1 = step(state_1, batch)
    assert loss_0["loss"].total != loss_1["loss"].total
    _, again = step(state, batch)
    assert loss_0["loss"].total == again["loss"].total


def test_microbatches_draw_different_noise(batch):
    rows = {name: np.repeat(array[:1], 8, axis=0) for name, array in batch.items()}
    draws = []

    def objective(params, model_state, batch, rng, *, train):
        noise = jax.random.normal(rng, batch["inputs"].shape[:1])
        return ObjectiveOutput(Mean.of(params["w"] * noise), model_state, {"draw": Mean.of(noise)})

    update = Update(objective, optax.sgd(0.0))
    state = create_train_state({"params": {"w": jnp.ones(())}}, update, rng=jax.random.key(0))
    for parts in (1, 2):
        _, metrics = jitted(update, num_microbatches=parts)(state, rows)
        draws.append(float(metrics["draw"].total))
    one_half = jax.random.normal(
        jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.rng, 0), 0), 0), (4,)
    )
    assert draws[1] != pytest.approx(2 * float(one_half.sum()))


def two_networks():
    optimizer = optax.sgd(0.1)

    def objective(sign):
        def loss(params, model_state, batch, rng, *, train):
            value = sign * params["first"]["w"] * params["second"]["w"] * jnp.ones(2)
            counters = jax.tree.map(lambda x: x + 1, model_state)
            return ObjectiveOutput(Mean.of(value), counters, {})

        return loss

    updates = (
        Update(objective(1.0), optimizer, wrt="first"),
        Update(objective(-1.0), optimizer, wrt="second"),
    )
    params = {"first": {"w": jnp.array(2.0)}, "second": {"w": jnp.array(3.0)}}
    stats = {"first": jnp.zeros(()), "second": jnp.zeros(())}
    variables = {"params": params, "batch_stats": stats}
    return updates, variables


def test_each_update_starts_from_the_result_of_the_previous_one():
    updates, variables = two_networks()
    state = create_train_state(variables, updates, rng=jax.random.key(0))
    state, metrics = jitted(updates)(state, {"inputs": jnp.ones(2)})
    first = 2.0 - 0.1 * 3.0
    np.testing.assert_allclose(state.params["first"]["w"], first, rtol=1e-6)
    np.testing.assert_allclose(state.params["second"]["w"], 3.0 + 0.1 * first, rtol=1e-6)
    assert set(metrics) == {"first/loss", "second/loss"}


def test_an_update_writes_only_what_its_network_owns():
    updates, variables = two_networks()
    step = jitted([updates[0]] * 3)
    state = create_train_state(variables, updates, rng=jax.random.key(0))
    new, metrics = step(state, {"inputs": jnp.ones(2)})
    assert float(new.params["second"]["w"]) == 3.0
    assert float(new.model_state["batch_stats"]["first"]) == 3.0
    assert float(new.model_state["batch_stats"]["second"]) == 0.0
    assert float(metrics["first/loss"].count) == 6.0


def test_updates_that_do_not_fit_are_refused_with_the_names():
    updates, variables = two_networks()
    wrong = dataclasses.replace(updates[0], wrt="third")
    with pytest.raises(ValueError, match=r"'third', but params has \['first', 'second'\]"):
        create_train_state(variables, wrong, rng=jax.random.key(0))
    other = dataclasses.replace(updates[0], optimizer=optax.sgd(0.2))
    with pytest.raises(ValueError, match="different optimizers"):
        create_train_state(variables, [updates[0], other], rng=jax.random.key(0))
    nameless = dataclasses.replace(updates[0], wrt=None)
    with pytest.raises(ValueError, match="set wrt in all"):
        create_train_state(variables, [updates[0], nameless], rng=jax.random.key(0))
    with pytest.raises(ValueError, match="no 'params'"):
        create_train_state({"kernel": 1}, updates, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="at least one"):
        make_train_step([])
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"num_microbatches={wrong} must be a positive"):
            make_train_step(updates, num_microbatches=wrong)


def test_a_batch_that_does_not_split_is_refused(batch):
    update, state = make(Linear(), optax.sgd(0.1), batch)
    with pytest.raises(ValueError, match="batch size 8 is not divisible by num_microbatches 3"):
        make_train_step(update, num_microbatches=3)(state, batch)


def test_an_objective_that_loses_a_collection_is_refused():
    def forgetful(params, model_state, batch, rng, *, train):
        return ObjectiveOutput(Mean.of(params["w"] * jnp.ones(2)), {}, {})

    update = Update(forgetful, optax.sgd(0.1))
    variables = {"params": {"w": jnp.ones(())}, "batch_stats": {"mean": jnp.ones(())}}
    state = create_train_state(variables, update, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="changed the structure of model_state"):
        make_train_step(update)(state, {"inputs": jnp.ones(2)})


def test_an_unsummed_loss_is_refused():
    def unsummed(params, model_state, batch, rng, *, train):
        ones = params["w"] * jnp.ones(2)
        return ObjectiveOutput(Mean(ones, jnp.ones(())), model_state, {})

    update = Update(unsummed, optax.sgd(0.1))
    state = create_train_state({"params": {"w": jnp.ones(())}}, update, rng=jax.random.key(0))
    with pytest.raises(ValueError, match=r"loss.total has shape \(2,\)"):
        make_train_step(update)(state, {"inputs": jnp.ones(2)})


@pytest.mark.parametrize(
    ("its_own", "another"),
    [
        (optax.sgd(0.1), optax.adam(0.1)),
        (optax.adam(0.1), optax.sgd(0.1)),  # ran in silence: SGD reads no state
        (optax.adam(0.1), optax.lion(0.1)),  # ran in silence: Lion reads a part of Adam's state
        (optax.adam(0.1), with_parameter_average(optax.adam(0.1), 0.9)),
    ],
)
def test_the_state_of_another_optimizer_is_refused(its_own, another, batch):
    update, state = make(Linear(), its_own, batch)
    step = jitted(dataclasses.replace(update, optimizer=another))
    with pytest.raises(ValueError, match=r"opt_state holds .*State.*the same updates"):
        step(state, batch)
    two = make_train_step(Update(update.objective, another, wrt="output"))
    with pytest.raises(ValueError, match=r"need \{output: "):
        two(state, batch)


def test_a_number_is_no_key_and_a_module_no_objective():
    update = Update(regression(Linear()), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"rng is 0; give one key"):
        create_train_state(initialize(Linear()), update, rng=0)
    with pytest.raises(TypeError, match="is the module Linear"):
        make_eval_step(Linear())
    with pytest.raises(
        TypeError, match=r"updates is <function .*give Update\(objective, optimizer"
    ):
        make_train_step(update.objective)
    with pytest.raises(TypeError, match=r"an element of updates is .*give Update\("):
        make_train_step([update, update.objective])
    with pytest.raises(TypeError, match=r"updates is \(?GradientTransformation|an element of up"):
        create_train_state(initialize(Linear()), optax.sgd(0.1), rng=jax.random.key(0))


def test_evaluation_is_reproducible_and_without_noise(batch):
    module = Noisy()
    _, state = make(module, optax.sgd(0.1), batch)
    eval_step = make_eval_step(regression(module))
    first, second = eval_step(state, batch), eval_step(state, batch)
    assert first["loss"].total == second["loss"].total
    outputs = module.apply(state.variables, batch["inputs"])
    np.testing.assert_allclose(
        first["loss"].compute(), np.mean((outputs - batch["labels"]) ** 2), rtol=1e-6
    )


def test_a_donated_state_leaves_the_callers_key_alone(batch):
    key = jax.random.key(7)
    update = Update(regression(Linear()), optax.sgd(0.1))
    variables = Linear().init(key, batch["inputs"])
    state = create_train_state(variables, update, rng=key)
    jax.jit(make_train_step(update), donate_argnums=0)(state, batch)
    jax.random.normal(key)
