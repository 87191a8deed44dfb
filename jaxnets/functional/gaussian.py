"""Diagonal Gaussian latents: reparameterized samples and their divergence from the prior."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnets.core import at_least_float32


def draw_code(mean: jax.Array, log_variance: jax.Array, noise: jax.Array) -> jax.Array:
    """Draw by the reparameterization trick: mean + exp(log_variance / 2) noise.

    Args:
        mean: [batch, latent_size].
        log_variance: likewise.
        noise: likewise, standard normal.

    Returns:
        [batch, latent_size], of the dtype of `mean`.
    """
    return mean + jnp.exp(log_variance / 2) * noise.astype(mean.dtype)


def normal_divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Kullback-Leibler divergence of N(mean, exp(log_variance)) from N(0, 1), for each element.

    (mean^2 + exp(log_variance) - 1 - log_variance) / 2

    Args:
        mean: [...].
        log_variance: [...].

    Returns:
        Nats, [...], float32 or wider.

    Example:
        >>> float(normal_divergence(jnp.array(2.0), jnp.array(0.0)))
        2.0

    References:
        Kingma and Welling 2014, arXiv:1312.6114, appendix B.
    """
    mean, log_variance = at_least_float32(mean), at_least_float32(log_variance)
    # expm1: near a variance of 1 the plain difference loses its digits.
    return (jnp.square(mean) + jnp.expm1(log_variance) - log_variance) / 2


def log_prior_ratio(code: jax.Array, log_variance: jax.Array, noise: jax.Array) -> jax.Array:
    """Return log p(z) - log q(z | x) of codes drawn by `draw_code`.

    Args:
        code: [..., latent_size].
        log_variance: of q, likewise.
        noise: that the code was drawn with, likewise.

    Returns:
        Nats, [...], float32 or wider.
    """
    code, log_variance, noise = map(at_least_float32, (code, log_variance, noise))
    # The constants of the two densities cancel.
    return jnp.sum(jnp.square(noise) + log_variance - jnp.square(code), axis=-1) / 2
