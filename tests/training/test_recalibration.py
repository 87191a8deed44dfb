"""Running statistics of batch norms for parameters of another step, such as their average."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal
from checks import assert_trees_near

import jaxnets as jn
from jaxnets.core import Update
from jaxnets.models.feedforward import MLP
from jaxnets.training.executors import jit_step, pmap_step, population_step
from jaxnets.training.optimizers import averaged_parameters, with_parameter_average
from jaxnets.training.recalibration import recalibrate_batch_norm
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step

RANDOM = np.random.default_rng(0)
BATCHES = [
    {
        "inputs": RANDOM.normal(size=(8, 3)).astype(np.float32) + 1,
        "labels": RANDOM.integers(0, 2, 8).astype(np.int32),
    }
    for _ in range(3)
]
ALIKE = itertools.repeat(BATCHES[0])


@functools.cache
def problem():
    """Return an update, and a state after steps long enough to tell the average from the last."""
    module = MLP((4,), num_outputs=2, norm="batch", dropout_rate=0.5)
    update = Update(jn.classification(module), with_parameter_average(optax.sgd(0.5), 0.9))
    variables = jax.jit(module.init)(jax.random.key(0), BATCHES[0]["inputs"])
    state = create_train_state(variables, update, rng=jax.random.key(1))
    run = jit_step(make_train_step(update))
    for batch in BATCHES:
        state, _ = run(state, batch)
    return update, state, dataclasses.replace(state, params=averaged_parameters(state))


def statistics(state):
    return state.model_state["batch_stats"]["norm_0"]


def test_the_statistics_become_those_of_the_given_parameters():
    update, state, average = problem()
    recalibrated = recalibrate_batch_norm(update, average, ALIKE, num_batches=200)
    before = BATCHES[0]["inputs"] @ np.asarray(average.params["hidden_0"]["kernel"])
    found = statistics(recalibrated)
    np.testing.assert_allclose(found["mean"], before.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["var"], before.var(axis=0), rtol=1e-5, atol=1e-6)
    assert np.abs(found["mean"] - statistics(state)["mean"]).max() > 0.05
    # Evaluation then normalizes as training does on this batch.
    evaluate = jax.jit(make_eval_step(update.objective))
    loss = {
        name: evaluate(s, BATCHES[0])["loss"]
        for name, s in [("old", average), ("new", recalibrated)]
    }
    y = (before - before.mean(axis=0)) / np.sqrt(before.var(axis=0) + 1e-5)
    params = jax.tree.map(np.asarray, average.params)
    norm, head = params["norm_0"], params["head"]
    hidden = np.maximum(norm["scale"] * y + norm["bias"], 0)
    logits = hidden @ head["kernel"] + head["bias"]
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, BATCHES[0]["labels"])
    np.testing.assert_allclose(loss["new"].compute(), expected.mean(), rtol=1e-5)
    assert abs(loss["old"].compute() - expected.mean()) > 1e-3


def test_each_batch_moves_the_running_averages_once_and_nothing_else():
    update, _, average = problem()
    recalibrated = recalibrate_batch_norm(update, average, BATCHES, num_batches=3)
    kernel = np.asarray(average.params["hidden_0"]["kernel"])
    mean = np.asarray(statistics(average)["mean"])
    for batch in BATCHES:
        mean = 0.9 * mean + 0.1 * (batch["inputs"] @ kernel).mean(axis=0)
    np.testing.assert_allclose(statistics(recalibrated)["mean"], mean, rtol=1e-5)
    for name in ("step", "rng", "params", "opt_state"):
        assert_bitwise_equal(getattr(recalibrated, name), getattr(average, name))


def test_other_collections_stay_as_they_are():
    config = jn.EncoderDecoderConfig((4, 4, 1), "convolutional", (3,), norm="batch")
    module = jn.VQVAE(config, codebook_size=4, embedding_size=2)
    update = Update(jn.vq_vae(module), optax.sgd(0.1))
    batch = {"inputs": RANDOM.uniform(size=(4, 4, 4, 1)).astype(np.float32)}
    variables = jax.jit(module.init)(jax.random.key(0), batch["inputs"])
    state = create_train_state(variables, update, rng=jax.random.key(0))
    after = recalibrate_batch_norm(update, state, [batch], num_batches=1)
    assert_bitwise_equal(after.model_state["codebook"], state.model_state["codebook"])
    moved = jax.tree.map(np.array_equal, after.model_state, state.model_state)["batch_stats"]
    assert not any(jax.tree.leaves(moved))


def test_only_the_network_of_the_update_is_recalibrated():
    module = jn.dcgan((8, 8, 1), width=2, latent_size=5)
    module = dataclasses.replace(
        module, discriminator=jn.gan.ResNetDiscriminator(1, 1, 2, norm="batch")
    )
    updates = [
        Update(objective, optax.sgd(0.1), wrt=name)
        for name, objective in jn.adversarial(module)._asdict().items()
    ]
    latents = RANDOM.normal(size=(3, 4, 5)).astype(np.float32)
    images = RANDOM.uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), latents[0])
    state = create_train_state(variables, updates, rng=jax.random.key(0))
    batches = [{"inputs": images, "latents": each} for each in latents]
    after = recalibrate_batch_norm(updates[1], state, batches, num_batches=3)
    expected = jax.jit(jn.gan.recalibrate_batch_norm, static_argnums=0)(module, variables, latents)
    assert_trees_near(after.model_state["batch_stats"], expected["batch_stats"], 1e-6)
    name = "discriminator"
    assert_bitwise_equal(
        after.model_state["batch_stats"][name], state.model_state["batch_stats"][name]
    )


@pytest.mark.four_devices
def test_devices_and_populations_are_recalibrated_alike():
    update, _, average = problem()
    # Without dropout, of which each device draws its own.
    update = dataclasses.replace(
        update, objective=jn.classification(MLP((4,), num_outputs=2, norm="batch"))
    )
    expected = recalibrate_batch_norm(update, average, BATCHES, num_batches=3)
    on_devices = recalibrate_batch_norm(update, average, BATCHES, num_batches=3, executor=pmap_step)
    assert_trees_near(statistics(on_devices), statistics(expected), 1e-6)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), average)
    population = recalibrate_batch_norm(
        update,
        states,
        BATCHES,
        num_batches=3,
        executor=lambda step: jit_step(population_step(step)),
    )
    twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), statistics(expected))
    assert_trees_near(statistics(population), twice, 1e-6)
    assert population.step.shape == (2,)


def test_a_state_without_batch_statistics_is_returned_as_it_is():
    update, _, average = problem()
    without = dataclasses.replace(average, model_state={})
    assert recalibrate_batch_norm(update, without, BATCHES, num_batches=3) is without


def test_too_few_batches_are_refused():
    update, _, average = problem()
    with pytest.raises(ValueError, match="there are 3 batches, fewer than num_batches, 50"):
        recalibrate_batch_norm(update, average, BATCHES, num_batches=50)
    with pytest.raises(ValueError, match="num_batches is 0"):
        recalibrate_batch_norm(update, average, BATCHES, num_batches=0)
