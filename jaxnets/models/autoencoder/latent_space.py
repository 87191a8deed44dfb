"""Pure functions of a trained autoencoder of any kind: encode, decode, sample, interpolate, score.

All take a module, its variables (`TrainState.variables`) and arrays, and can be compiled. Images
outside of the likelihood's range raise ValueError if concrete; in a compiled program they give NaN.
A conditional module needs labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.checks import check_key, check_same_shape
from jaxnets.core import drawn_in_float32
from jaxnets.objectives.image_range import check_images


def encode(
    module: Any, variables: Mapping[str, Any], images: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Return the codes of images.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        labels: integer [batch], for a conditional module.

    Returns:
        [batch, latent_size], for a VAE the posterior means; for a VQVAE the vectors before
        quantization, [batch, rows, columns, embedding_size].

    Raises:
        ValueError: images or labels that do not fit.
    """
    return module.apply(variables, _checked(module, images), labels, method="encode")


def decode(
    module: Any, variables: Mapping[str, Any], code: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Decode codes to images.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        code: of the shape that `encode` returns.
        labels: integer [batch], for a conditional module.

    Returns:
        Expected images [batch, height, width, channels].

    Raises:
        ValueError: codes or labels that do not fit.
    """
    return module.likelihood.mean(module.apply(variables, code, labels, method="decode"))


def reconstruct(
    module: Any, variables: Mapping[str, Any], images: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Encode images and decode the codes.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        labels: integer [batch], for a conditional module.

    Returns:
        Images of the same shape.

    Raises:
        ValueError: images or labels that do not fit.
    """
    return decode(module, variables, encode(module, variables, images, labels), labels)


def sample(
    module: Any,
    variables: Mapping[str, Any],
    num_images: int,
    *,
    rng: jax.Array,
    labels: jax.Array | None = None,
) -> jax.Array:
    """Draw codes from the prior N(0, I) and decode them.

    Args:
        module: `VAE`.
        variables: its parameters and other collections.
        num_images: how many.
        rng: random key.
        labels: integer [num_images], for a conditional module.

    Returns:
        Expected images [num_images, height, width, channels]; pixels are not sampled.

    Raises:
        ValueError: a module without a prior, or labels that do not fit.
        TypeError: `rng` is not a key.
    """
    if not hasattr(module, "posterior"):
        raise ValueError(
            f"{type(module).__name__} has no distribution of codes to draw from; train a VAE, or "
            "interpolate between images"
        )
    check_key(rng)
    code = drawn_in_float32(jax.random.normal)(
        rng, (num_images, module.latent_size), module.precision.output
    )
    return decode(module, variables, code, labels)


def interpolate(
    module: Any,
    variables: Mapping[str, Any],
    first: jax.Array,
    second: jax.Array,
    *,
    num_steps: int,
    labels: jax.Array | None = None,
) -> jax.Array:
    """Interpolate linearly between the codes of two images, and decode.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        first: start images, [batch, height, width, channels].
        second: end images, same shape.
        num_steps: number of images, both ends included; 2 or more.
        labels: integer [batch], for a conditional module; the same for all steps.

    Returns:
        [batch, num_steps, height, width, channels].

    Raises:
        ValueError: images or labels that do not fit, or fewer than 2 steps.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; give 2 or more, both ends included")
    check_same_shape(first=first, second=second)
    start, end = (encode(module, variables, images, labels) for images in (first, second))
    fractions = jnp.linspace(0, 1, num_steps, dtype=start.dtype)
    fractions = fractions.reshape(1, num_steps, *(1,) * (start.ndim - 1))  # [1, num_steps, 1, ...]
    codes = (1 - fractions) * start[:, None] + fractions * end[:, None]  # [batch, num_steps, ...]
    repeated = None if labels is None else jnp.repeat(jnp.asarray(labels), num_steps)
    # [batch * num_steps, height, width, channels]
    images = decode(module, variables, codes.reshape(-1, *start.shape[1:]), repeated)
    return images.reshape(len(first), num_steps, *images.shape[1:])


def anomaly_score(
    module: Any, variables: Mapping[str, Any], images: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Score how unlike the training images of an autoencoder images are; high is unusual.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        labels: integer [batch], for a conditional module.

    Returns:
        [batch], the reconstruction loss. A VAE decodes the posterior mean and adds the divergence
        of the posterior from the prior.

    Raises:
        ValueError: images or labels that do not fit.
    """
    return module.apply(variables, _checked(module, images), labels, method="score")


def _checked(module: Any, images: jax.Array) -> jax.Array:
    images, inside = check_images(images, module.likelihood.image_range)
    inside = inside.reshape(-1, *(1,) * (images.ndim - 1))  # [batch, 1, 1, 1]
    return jnp.where(inside, images, jnp.asarray(jnp.nan, images.dtype))
