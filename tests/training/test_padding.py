"""Examples of weight 0 change no loss, gradient or running statistic, under every executor."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from checks import assert_trees_near, mostly_slow

import jaxnets as jn
from jaxnets import autoencoder, convolutional, gan
from jaxnets.core import Update, apply_module
from jaxnets.data import pad_batch
from jaxnets.models.feedforward import MLP
from jaxnets.training.executors import (
    jit_step,
    pmap_step,
    population_step,
    scan_steps,
    sharded_step,
)
from jaxnets.training.sharding import data_mesh
from jaxnets.training.step import create_train_state, make_train_step

RANDOM = np.random.default_rng(0)
ROWS, CLASSES, PADDED = 6, 3, 8
LABELS = RANDOM.integers(0, CLASSES, ROWS).astype(np.int32)
CONFIG = functools.partial(autoencoder.EncoderDecoderConfig, norm="batch", activation="tanh")
DENSE = CONFIG((4, 4, 1), features=(6,))
CONVOLUTIONAL = CONFIG((4, 4, 1), "convolutional", (3,))
BLOCK = jn.BlockConfig(features=4, num_heads=1, mlp_dim=4)
TINY = {"width": 2, "latent_size": 5, "kernel_init": nn.initializers.normal(0.1)}


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def images(side, channels=1):
    return RANDOM.uniform(size=(ROWS, side, side, channels)).astype(np.float32)


def classified(inputs):
    return {"inputs": inputs, "labels": LABELS}


def tokens(time):
    return RANDOM.integers(1, 5, (ROWS, time)).astype(np.int32)


# name -> (module, objective, batch); all but the first have a batch norm in their own code
BATCH_NORMS = {
    "mlp": (MLP((5, 4), CLASSES, norm="batch"), jn.classification, classified(normal(ROWS, 3))),
    "convnet": (
        jn.ConvNet((2,), hidden_features=(4,), num_outputs=CLASSES, norm="batch"),
        jn.classification,
        classified(images(4)),
    ),
    "resnet": (
        jn.ResNet((1, 1), num_outputs=CLASSES, stem="cifar", width=2),
        jn.classification,
        classified(normal(ROWS, 6, 2)),
    ),
    "bottleneck": (
        jn.ResNet((1,), bottleneck=True, num_outputs=CLASSES, width=2),
        jn.classification,
        classified(normal(ROWS, 16, 2)),
    ),
    "wide_resnet": (
        convolutional.WideResNet(10, 1, num_outputs=CLASSES),
        jn.classification,
        classified(normal(ROWS, 8, 2)),
    ),
    "resnet9": (
        convolutional.ResNet9(CLASSES, width=2),
        jn.classification,
        classified(normal(ROWS, 8, 2)),
    ),
    "whitened": (
        convolutional.WhitenedConvNet((2,), CLASSES),
        jn.classification,
        classified(images(4)),
    ),
    "dense_autoencoder": (
        jn.Autoencoder(DENSE, latent_size=2),
        jn.reconstruction,
        {"inputs": images(4)},
    ),
    "convolutional_autoencoder": (
        jn.Autoencoder(CONVOLUTIONAL, latent_size=2),
        jn.reconstruction,
        {"inputs": images(4)},
    ),
    "vae": (jn.VAE(CONVOLUTIONAL, latent_size=2), jn.vae, {"inputs": images(4)}),
    "vq_vae": (
        jn.VQVAE(CONVOLUTIONAL, codebook_size=4, embedding_size=2, restart_below=0.0),
        jn.vq_vae,
        {"inputs": images(4)},
    ),
    "dcgan": (
        gan.dcgan((16, 16, 1), **TINY),
        jn.adversarial,
        {"inputs": images(16), "latents": normal(ROWS, 5)},
    ),
    "resnet_gan": (
        gan.resnet_gan(
            (8, 8, 1), generator_width=2, discriminator_width=2, latent_size=5, norm="batch"
        ),
        jn.adversarial,
        {"inputs": images(8), "latents": normal(ROWS, 5)},
    ),
}
# Objectives whose derivatives might be infinite at the zeros of padding.
OTHERS = {
    "regression": (
        MLP((4,), 2),
        jn.regression,
        {"inputs": normal(ROWS, 3), "labels": normal(ROWS, 2)},
    ),
    "gaussian": (
        MLP((4,), 4),
        lambda module: jn.head_regression(module, jn.GaussianHead(2)),
        {"inputs": normal(ROWS, 3), "labels": normal(ROWS, 2)},
    ),
    "recurrent": (
        jn.SequenceClassifier(CLASSES, 4),
        jn.classification,
        {**classified(normal(ROWS, 5, 2)), "lengths": np.array([5, 3, 1, 5, 2, 4], np.int32)},
    ),
    "transformer": (
        jn.TransformerLM(5, 1, BLOCK),
        jn.language_modeling,
        {"inputs": tokens(4), "labels": tokens(4)},
    ),
    "speech": (
        jn.SpeechRecognizer(4, hidden_size=3, num_layers=1),
        jn.ctc,
        {
            "inputs": normal(ROWS, 16, 3),
            "lengths": np.full(ROWS, 16, np.int32),
            "labels": RANDOM.integers(1, 4, (ROWS, 2)).astype(np.int32),
            "label_lengths": np.array([2, 1, 2, 0, 1, 1], np.int32),
        },
    ),
    "contractive": (
        jn.Autoencoder(autoencoder.EncoderDecoderConfig((4, 4, 1), features=(6,)), latent_size=2),
        lambda module: jn.contractive(module, weight=0.1),
        {"inputs": images(4)},
    ),
    "discretized_logistic": (
        jn.VAE(
            autoencoder.EncoderDecoderConfig((4, 4, 1), features=(6,)),
            latent_size=2,
            likelihood=jn.DiscretizedLogistic(),
        ),
        jn.vae,
        {"inputs": images(4)},
    ),
    "sparse": (
        jn.Autoencoder(
            autoencoder.EncoderDecoderConfig((4, 4, 1), features=(6,)), latent_size=4, num_active=2
        ),
        lambda module: jn.sparse_reconstruction(module, weight=0.1),
        {"inputs": images(4)},
    ),
    "discretized": (
        MLP((4,), 2 * 5),
        lambda module: jn.head_regression(
            module, jn.DiscretizedHead(((-1.0, 1.0), (0.0, 1.0)), num_bins=5)
        ),
        {"inputs": normal(ROWS, 3), "labels": normal(ROWS, 2)},
    ),
    "masked": (
        jn.MaskedAutoencoder(1, 1, BLOCK, decoder_num_layers=1, decoder_config=BLOCK),
        jn.masked_reconstruction,
        {"inputs": images(4)},
    ),
    "wgan_gp": (
        gan.dcgan((8, 8, 1), norm=None, **TINY),
        lambda module: jn.adversarial(module, "wasserstein", gradient_penalty=10.0),
        {"inputs": images(8), "latents": normal(ROWS, 5)},
    ),
}


@functools.cache
def problem(name):
    """Return a step, its initial state, and a batch without weights."""
    module, make_objective, batch = {**BATCH_NORMS, **OTHERS}[name]
    objective, optimizer = make_objective(module), optax.sgd(1.0)  # the change is the gradient
    if isinstance(module, gan.GAN):
        optimizer = optax.sgd(0.1)  # a longer step would let rounding grow in the second update
        updates = [
            Update(objective.discriminator, optimizer, wrt="discriminator"),
            Update(objective.generator, optimizer, wrt="generator"),
        ]
        variables = jax.jit(module.init)(jax.random.key(0), batch["latents"])
    else:
        updates = [Update(objective, optimizer)]
        lengths = [batch["lengths"]] if "lengths" in batch else []
        variables = jax.jit(module.init)(jax.random.key(0), batch["inputs"], *lengths)
    step = make_train_step(updates)
    state = create_train_state(variables, updates, rng=jax.random.key(1))
    return step, state, batch


def means(metrics):
    return {name: mean.compute() for name, mean in metrics.items()}


def check_padding(name):
    step, state, batch = problem(name)
    run = jit_step(step)
    expected, metrics = run(state, batch)
    found, found_metrics = run(state, pad_batch(batch, PADDED))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found.params))
    assert_trees_near(found.params, expected.params, 1e-5)
    assert_trees_near(found.model_state, expected.model_state, 1e-5)
    assert_trees_near(means(found_metrics), means(metrics), 1e-5)
    return state, expected


@pytest.mark.parametrize(
    "name", mostly_slow(BATCH_NORMS, ["mlp", "convolutional_autoencoder", "dcgan"])
)
def test_padding_does_not_count_in_batch_norms(name):
    state, after = check_padding(name)
    moved = jax.tree.map(np.array_equal, state.model_state, after.model_state)
    assert not any(jax.tree.leaves(moved["batch_stats"]))


@pytest.mark.parametrize("name", mostly_slow(OTHERS, ["gaussian"]))
def test_padding_changes_no_gradient(name):
    check_padding(name)


def stacked(tree, count):
    return jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * count), tree)


@pytest.mark.four_devices
@pytest.mark.parametrize("name", mostly_slow(["mlp", "convnet", "vq_vae", "dcgan"], ["mlp"]))
def test_padding_does_not_count_in_batch_norms_under_any_executor(name):
    step, state, batch = problem(name)
    padded = pad_batch(batch, PADDED)  # of four devices one has padding only
    expected, _ = jit_step(step)(state, batch)
    mesh = data_mesh()
    for run in (pmap_step(step), sharded_step(step, mesh)):
        assert_trees_near(run(state, padded)[0].params, expected.params)
        assert_trees_near(run(state, padded)[0].model_state, expected.model_state)

    # One after the other, so that the second starts from running averages of its own.
    expected, _ = jit_step(step)(expected, batch)
    found, _ = jit_step(scan_steps(step))(state, stacked(padded, 2))
    assert_trees_near(found.model_state, expected.model_state, 1e-4)


@pytest.mark.parametrize("strategy", ["vmap", "map"])
def test_padding_does_not_count_in_the_batch_norms_of_a_population(strategy):
    step, state, batch = problem("mlp")
    expected, _ = jit_step(step)(state, batch)
    states = jax.tree.map(lambda leaf: jax.numpy.stack([leaf, leaf]), state)
    found, _ = jit_step(population_step(step, strategy=strategy))(states, pad_batch(batch, PADDED))
    for index in range(2):
        member = jax.tree.map(lambda leaf, index=index: leaf[index], found)
        assert_trees_near(member.params, expected.params)
        assert_trees_near(member.model_state, expected.model_state)


def test_padding_does_not_count_in_the_batch_norms_of_microbatches():
    step, state, batch = problem("mlp")
    # Parts k, k + parts, ... so the padded parts hold the examples of the others, and one has none.
    parts = dataclasses.replace(step, num_microbatches=2)
    expected, _ = jit_step(parts)(state, batch)
    found, _ = jit_step(parts)(state, pad_batch(batch, PADDED))
    assert_trees_near(found.params, expected.params)
    assert_trees_near(found.model_state, expected.model_state)

    first = {name: array[:1] for name, array in batch.items()}
    expected, _ = jit_step(step)(state, first)
    found, _ = jit_step(parts)(state, pad_batch(first, 4))  # the second part is padding only
    assert_trees_near(found.params, expected.params)
    assert_trees_near(found.model_state, expected.model_state)


def test_a_batch_of_padding_only_changes_no_running_average():
    step, state, batch = problem("mlp")
    batch = {**batch, "weights": np.zeros(ROWS, np.float32)}
    after, _ = jit_step(step)(state, batch)
    assert_trees_near(after.params, state.params, 0)
    assert_trees_near(after.model_state, state.model_state, 0)


def test_an_example_of_weight_two_counts_as_two_in_batch_norms():
    step, state, batch = problem("mlp")
    counts = np.array([1, 2, 1, 0, 2, 2])
    twice = {name: np.repeat(array, counts, axis=0) for name, array in batch.items()}
    expected, _ = jit_step(step)(state, twice)
    found, _ = jit_step(step)(state, {**batch, "weights": counts.astype(np.float32)})
    assert_trees_near(found.params, expected.params)
    assert_trees_near(found.model_state, expected.model_state)


class CountsPadding(nn.Module):
    """A network of a user, with the batch norm of Flax."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(CLASSES)(nn.relu(x))


class TakesWeights(nn.Module):
    """The same, as its author has to write it for padding."""

    @nn.compact
    def __call__(self, x, *, train=False, weights=None):
        mask = None if weights is None else weights[:, None] > 0
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x), mask=mask)
        return nn.Dense(CLASSES)(nn.relu(x))


def of_a_user(module, batch):
    update = Update(jn.classification(module), optax.sgd(1.0))
    variables = jax.jit(module.init)(jax.random.key(0), batch["inputs"])
    return make_train_step(update), create_train_state(variables, update, rng=jax.random.key(0))


def test_a_network_whose_batch_norms_would_count_padding_is_refused():
    batch = problem("mlp")[2]
    step, state = of_a_user(CountsPadding(), batch)
    jax.eval_shape(step, state, batch)
    with pytest.raises(ValueError, match="CountsPadding has batch statistics and takes no weights"):
        jax.eval_shape(step, state, pad_batch(batch, PADDED))


def test_a_network_that_takes_weights_gets_those_of_the_batch():
    batch = problem("mlp")[2]
    step, state = of_a_user(TakesWeights(), batch)
    expected, _ = jit_step(step)(state, batch)
    found, _ = jit_step(step)(state, pad_batch(batch, PADDED))
    assert_trees_near(found.params, expected.params)
    assert_trees_near(found.model_state, expected.model_state)


class Generator(nn.Module):
    """Without a batch norm it needs no weights."""

    latent_size = 5

    @nn.compact
    def __call__(self, latents, *, train=False):
        return jax.numpy.tanh(nn.Dense(16)(latents)).reshape(-1, 4, 4, 1)


class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.Dense(4)(inputs.reshape(len(inputs), -1))
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))[:, 0]


def test_a_discriminator_whose_batch_norms_would_count_padding_is_refused():
    module = gan.GAN(Generator(), Discriminator())
    variables = jax.eval_shape(module.init, jax.random.key(0), np.ones((2, 5), np.float32))
    weights = np.array([1, 0], np.float32)

    def apply(method, inputs):
        model_state = {"batch_stats": variables["batch_stats"]}
        call = functools.partial(apply_module, module, train=True, weights=weights, method=method)
        return jax.eval_shape(call, variables["params"], model_state, inputs)

    images, _ = apply("generate", np.ones((2, 5), np.float32))
    with pytest.raises(ValueError, match="Discriminator has batch statistics and takes no weights"):
        apply("discriminate", images)
