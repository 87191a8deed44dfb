"""The pure formulas of the norms: statistics in float32 or wider, the last axis normalised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.core import at_least_float32


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, epsilon: float = 1e-6
) -> jax.Array:
    """Normalise the last axis: scale (x - mean) / sqrt(variance + epsilon) + bias.

    Args:
        x: floating [..., channels].
        scale: [channels].
        bias: [channels]; nothing is added by default.
        epsilon: added to the variance, which is the biased one.

    Returns:
        [..., channels], float32 or wider.

    Example:
        >>> layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.ones(2), epsilon=0.0).tolist()
        [[0.0, 2.0]]

    References:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4.
    """
    x = at_least_float32(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    row = (1,) * (x.ndim - 1) + scale.shape
    y = centred * lax.rsqrt(variance + epsilon) * scale.reshape(row)
    return y if bias is None else y + bias.reshape(row)
