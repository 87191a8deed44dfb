"""The generative networks in plain Flax Linen and Optax, with handwritten updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.benchmark.architectures import AdversarialPair, VariationalAutoencoder
from experiments.benchmark.flax_state import State, create_states
from experiments.benchmark.workloads import (
    ADVERSARIAL_BETA1,
    ADVERSARIAL_RATE,
    LEARNING_RATE,
    Workload,
)

#: (state or states, images) -> (next state or states, loss)
Step = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


class PlainVAE(nn.Module):
    """A dense variational autoencoder."""

    network: VariationalAutoencoder

    @nn.compact
    def __call__(
        self, images: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        network = self.network
        hidden = nn.relu(nn.Dense(network.hidden)(images.reshape(len(images), -1)))
        mean, log_variance = nn.Dense(network.latent)(hidden), nn.Dense(network.latent)(hidden)
        code = mean + jnp.exp(log_variance / 2) * noise
        hidden = nn.relu(nn.Dense(network.hidden)(code))
        logits = nn.Dense(network.num_pixels)(hidden)
        return logits.reshape(images.shape), mean, log_variance


class PlainGenerator(nn.Module):
    """Latents to images by nearest-neighbor upsampling and convolutions."""

    network: AdversarialPair

    @nn.compact
    def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
        network, small = self.network, nn.initializers.normal(0.02)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=small)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        (height, width), (first, *others) = network.smallest, reversed(network.channels)
        x = nn.Dense(height * width * first, use_bias=False, kernel_init=small)(latents)
        x = nn.relu(norm()(x.reshape(-1, height, width, first)))
        for channels in others:
            x = nn.relu(norm()(conv(channels, use_bias=False)(_upsample(x))))
        return nn.tanh(conv(network.image[2])(_upsample(x)))


class PlainDiscriminator(nn.Module):
    """Images to logits: convolutions of stride 2."""

    network: AdversarialPair

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x, small = images, nn.initializers.normal(0.02)
        for index, channels in enumerate(self.network.channels):
            first = index == 0
            x = nn.Conv(channels, (4, 4), strides=2, use_bias=first, kernel_init=small)(x)
            if not first:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Dense(1, kernel_init=small)(x.reshape(len(x), -1))[:, 0]


def _upsample(x: jax.Array) -> jax.Array:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def update_autoencoder(
    state: State, images: jax.Array, noise: jax.Array
) -> tuple[State, jax.Array]:
    """Train on the negative evidence lower bound.

    Args:
        state: of `PlainVAE`.
        images: in [0, 1], [batch, height, width, channels].
        noise: of the codes, [batch, latent].

    Returns:
        The next state, and the mean loss in nats per image.
    """

    def loss_fn(params: Any) -> jax.Array:
        logits, mean, log_variance = state.apply_fn({"params": params}, images, noise)
        errors = optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=(1, 2, 3))
        divergence = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(axis=1)
        return (errors + divergence).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


def update_discriminator(
    discriminator: State, generator: State, images: jax.Array, latents: jax.Array
) -> tuple[State, jax.Array]:
    """Train the discriminator; real and generated images are two separate batches.

    Args:
        discriminator: its state.
        generator: its state, constant here.
        images: real images in [-1, 1], [batch, height, width, channels].
        latents: of the generated images, [batch, latent].

    Returns:
        The discriminator's next state, and its loss.
    """
    fakes, _ = _apply(generator, generator.params, generator.batch_stats, latents)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        real, stats = _apply(discriminator, params, discriminator.batch_stats, images)
        fake, stats = _apply(discriminator, params, stats, fakes)
        return (nn.softplus(-real) + nn.softplus(fake)).mean(), stats

    (loss, stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(discriminator.params)
    return discriminator.apply_gradients(grads=gradients, batch_stats=stats), loss


def update_generator(
    discriminator: State, generator: State, latents: jax.Array
) -> tuple[State, jax.Array]:
    """Train the generator.

    Args:
        discriminator: its state, constant here.
        generator: its state.
        latents: [batch, latent].

    Returns:
        The generator's next state, and its loss.
    """

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        fakes, stats = _apply(generator, params, generator.batch_stats, latents)
        fake, _ = _apply(discriminator, discriminator.params, discriminator.batch_stats, fakes)
        return nn.softplus(-fake).mean(), stats

    (loss, stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(generator.params)
    return generator.apply_gradients(grads=gradients, batch_stats=stats), loss


def _apply(state: State, params: Any, stats: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
    variables = {"params": params, "batch_stats": stats}
    outputs, changes = state.apply_fn(variables, inputs, train=True, mutable=["batch_stats"])
    return outputs, changes.get("batch_stats", {})


def create(workload: Workload) -> tuple[Any, Step]:
    """Return the initial state, or those of (discriminator, generator), and the step."""
    network = workload.network
    if isinstance(network, VariationalAutoencoder):
        return _create_autoencoder(network, workload)
    assert isinstance(network, AdversarialPair)
    return _create_adversaries(network, workload)


def _create_autoencoder(network: VariationalAutoencoder, workload: Workload) -> tuple[State, Step]:
    noise = jnp.zeros((1, network.latent))
    (state,) = create_states(
        PlainVAE(network), optax.adam(LEARNING_RATE), workload.inputs()[:1], noise
    )
    root = jax.random.key(1)

    def step(state: State, images: jax.Array) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(root, state.step)
        noise = jax.random.normal(key, (len(images), network.latent))
        return update_autoencoder(state, images, noise)

    return state, step


def _create_adversaries(
    network: AdversarialPair, workload: Workload
) -> tuple[tuple[State, State], Step]:
    adam = optax.adam(ADVERSARIAL_RATE, b1=ADVERSARIAL_BETA1)
    (discriminator,) = create_states(PlainDiscriminator(network), adam, workload.inputs()[:1])
    (generator,) = create_states(PlainGenerator(network), adam, jnp.zeros((1, network.latent)))
    root = jax.random.key(1)

    def step(
        states: tuple[State, State], images: jax.Array
    ) -> tuple[tuple[State, State], jax.Array]:
        discriminator, generator = states
        keys = jax.random.split(jax.random.fold_in(root, generator.step))
        first, second = (jax.random.normal(key, (len(images), network.latent)) for key in keys)
        discriminator, loss = update_discriminator(discriminator, generator, images, first)
        generator, other_loss = update_generator(discriminator, generator, second)
        return (discriminator, generator), loss + other_loss

    return (discriminator, generator), step
