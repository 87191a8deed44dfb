"""The generative networks of jaxnets with their objectives."""

from __future__ import annotations

import jax
import numpy as np
import optax

import jaxnets as jn
from experiments.benchmark.architectures import AdversarialPair, VariationalAutoencoder
from experiments.benchmark.workloads import (
    ADVERSARIAL_BETA1,
    ADVERSARIAL_RATE,
    LEARNING_RATE,
    Workload,
)


def create(workload: Workload) -> tuple[jn.TrainState, jn.StepFn]:
    """Return the initial state, and the step for batches with images as "inputs"."""
    module: jn.VAE | jn.GAN
    match network := workload.network:
        case VariationalAutoencoder():
            coder = jn.EncoderDecoderConfig(network.image, features=(network.hidden,))
            module = jn.VAE(coder, network.latent)
            updates = [jn.Update(jn.vae(module), optax.adam(LEARNING_RATE))]
            example = workload.inputs()[:1]
        case AdversarialPair():
            module = jn.dcgan(network.image, width=network.width, latent_size=network.latent)
            adam = optax.adam(ADVERSARIAL_RATE, b1=ADVERSARIAL_BETA1)
            objectives = jn.adversarial(module)
            updates = [
                jn.Update(objectives.discriminator, adam, wrt="discriminator"),
                jn.Update(objectives.generator, adam, wrt="generator"),
            ]
            example = np.zeros((1, network.latent), np.float32)
        case _:
            raise TypeError(f"no generative module for {network}")
    key = jax.random.key(0)
    variables = jn.initialize(module, key, example)
    state = jn.create_train_state(variables, updates, rng=key)
    return state, jn.make_train_step(updates)
