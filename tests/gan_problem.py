"""Shared by the tests of adversarial training: tiny GANs, batches, states of two updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets.core import Precision, Update
from jaxnets.models.gan import GAN
from jaxnets.models.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from jaxnets.training.step import create_train_state

DOUBLE = Precision(jnp.float64, jnp.float64, jnp.float64)
RANDOM = np.random.default_rng(0)
BATCH = {
    "inputs": RANDOM.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32),
    "labels": RANDOM.integers(0, 3, 8).astype(np.int32),
    "latents": RANDOM.normal(size=(8, 5)).astype(np.float32),
    "weights": np.array([1, 1, 0.5, 1, 0, 1, 2, 1], np.float32),
}
# Small gradients, so that rounding stays below the tolerance in two competing networks.
INIT = {"kernel_init": jax.nn.initializers.normal(0.1)}
TINY = {"width": 2, "latent_size": 5, **INIT}


# Large enough for a discriminator with a batch norm, which starts at the second layer.
LARGER = {**BATCH, "inputs": RANDOM.uniform(-1, 1, (8, 16, 16, 1)).astype(np.float32)}


def without(batch, *names):
    return {name: array for name, array in batch.items() if name not in names}


def as_double(batch):
    return {
        name: np.asarray(array, np.float64) if array.dtype.kind == "f" else array
        for name, array in batch.items()
    }


@functools.cache
def initialized(module, seed, dtype):
    latents = jnp.zeros((1, module.latent_size), dtype)
    labels = None if module.num_classes is None else jnp.zeros(1, jnp.int32)
    return jax.jit(module.init)(jax.random.key(seed), latents, labels)


def problem(objectives, module, optimizers=None, num_discriminator_updates=1, seed=0):
    """Return the updates of a GAN and a train state whose parameters depend on the seed."""
    discriminator_update, generator_update = optimizers or (
        optax.sgd(0.05, momentum=0.9),
        optax.sgd(0.02, momentum=0.9),
    )
    updates = [
        Update(objectives.discriminator, discriminator_update, wrt="discriminator")
    ] * num_discriminator_updates
    updates.append(Update(objectives.generator, generator_update, wrt="generator"))
    variables = initialized(module, seed, jnp.result_type(float))
    return updates, create_train_state(variables, updates, rng=jax.random.key(1))


def plain(precision=Precision()):
    """Return a conditional GAN without batch norms, for which all executors agree."""
    shared = {"num_classes": 3, "width": 2, "precision": precision, **INIT}
    return GAN(
        DCGANGenerator((8, 8, 1), latent_size=5, norm=None, **shared),
        DCGANDiscriminator(norm=None, **shared),
    )
