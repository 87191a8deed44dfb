"""What the tests of adversarial training share: tiny pairs, batches, states of two updates."""

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
# Small gradients, so that rounding stays below the tolerance in two networks that chase each other.
INIT = {"kernel_init": jax.nn.initializers.normal(0.1)}
TINY = {"width": 2, "latent_size": 5, **INIT}


# Large enough for a discriminator with a batch norm, which its first layer has not.
LARGER = {**BATCH, "inputs": RANDOM.uniform(-1, 1, (8, 16, 16, 1)).astype(np.float32)}


def without(batch, *names):
    return {name: array for name, array in batch.items() if name not in names}


def as_double(batch):
    return {
        name: np.asarray(array, np.float64) if array.dtype.kind == "f" else array
        for name, array in batch.items()
    }


def problem(objectives, module, optimizers=None, num_critics=1, seed=0):
    discriminator_update, generator_update = optimizers or (
        optax.sgd(0.05, momentum=0.9),
        optax.sgd(0.02, momentum=0.9),
    )
    updates = [
        Update(objectives.discriminator, discriminator_update, wrt="discriminator")
    ] * num_critics
    updates.append(Update(objectives.generator, generator_update, wrt="generator"))
    latents = jnp.zeros((1, module.latent_size), jnp.result_type(float))
    labels = None if module.num_classes is None else jnp.zeros(1, jnp.int32)
    variables = jax.jit(module.init)(jax.random.key(seed), latents, labels)
    return updates, create_train_state(variables, updates, rng=jax.random.key(1))


def plain(precision=Precision()):
    """A conditional pair without batch norms, on which every executor agrees."""
    shared = {"num_classes": 3, "width": 2, "precision": precision, **INIT}
    return GAN(
        DCGANGenerator((8, 8, 1), latent_size=5, norm=None, **shared),
        DCGANDiscriminator(norm=None, **shared),
    )
