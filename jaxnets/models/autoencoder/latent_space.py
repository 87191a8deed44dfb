"""What can be done with a trained autoencoder, of whichever kind, as pure functions.

All take a module, its variables (`TrainState.variables`) and arrays, and can be compiled. Images
whose values are outside of the likelihood's range are refused where they are known and give NaN
where they are known only when the program runs; a conditional module needs labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.objectives.image_range import check_images


def encode(
    module: Any, variables: Mapping[str, Any], images: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Return the codes of images.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        labels: integer [batch], of a conditional module.

    Returns:
        [batch, latent_size], for a VAE the posterior means; for a VQVAE the vectors in front of
        the quantization, [batch, rows, columns, embedding_size].

    Raises:
        ValueError: images or labels that do not fit.
    """
    return module.apply(variables, _checked(module, images), labels, method="encode")


def decode(
    module: Any, variables: Mapping[str, Any], code: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Return the images that codes stand for.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        code: of the shape that `encode` returns.
        labels: integer [batch], of a conditional module.

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
        labels: integer [batch], of a conditional module.

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
        labels: integer [num_images], of a conditional module.

    Returns:
        Expected images [num_images, height, width, channels]; pixels are not drawn.

    Raises:
        ValueError: a module without a prior, or labels that do not fit.
    """
    if not hasattr(module, "posterior"):
        raise ValueError(
            f"{type(module).__name__} has no distribution of codes to draw from; train a VAE, or "
            "interpolate between images"
        )
    code = jax.random.normal(rng, (num_images, module.latent_size), module.precision.output)
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
    """Walk from one image to another on the straight line between their codes.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        first: where the walks start, [batch, height, width, channels].
        second: where they end, likewise.
        num_steps: images on the way, both ends included; 2 or more.
        labels: integer [batch], of a conditional module: the same along a walk.

    Returns:
        [batch, num_steps, height, width, channels].

    Raises:
        ValueError: images or labels that do not fit, or fewer than 2 steps.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; give 2 or more, both ends included")
    if first.shape != second.shape:
        raise ValueError(
            f"first has shape {first.shape} and second {second.shape}; give as many of each"
        )
    start, end = (encode(module, variables, images, labels) for images in (first, second))
    shares = jnp.linspace(0, 1, num_steps, dtype=start.dtype)
    shares = shares.reshape(1, num_steps, *(1,) * (start.ndim - 1))
    codes = (1 - shares) * start[:, None] + shares * end[:, None]
    repeated = None if labels is None else jnp.repeat(jnp.asarray(labels), num_steps)
    images = decode(module, variables, codes.reshape(-1, *start.shape[1:]), repeated)
    return images.reshape(len(first), num_steps, *images.shape[1:])


def anomaly_score(
    module: Any, variables: Mapping[str, Any], images: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    """Say how badly images fit to what an autoencoder was trained on.

    Args:
        module: `Autoencoder`, `VAE` or `VQVAE`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        labels: integer [batch], of a conditional module.

    Returns:
        [batch], the reconstruction loss, to which a VAE, decoding its mean code, adds the
        divergence of the posterior from the prior. High is unusual.

    Raises:
        ValueError: images or labels that do not fit.
    """
    return module.apply(variables, _checked(module, images), labels, method="score")


def _checked(module: Any, images: jax.Array) -> jax.Array:
    images, inside = check_images(images, module.likelihood.image_range)
    inside = inside.reshape(-1, *(1,) * (images.ndim - 1))
    return jnp.where(inside, images, jnp.asarray(jnp.nan, images.dtype))
