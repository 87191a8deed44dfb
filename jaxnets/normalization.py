"""The pure formulas of the norms: statistics in float32 or wider, the last axis normalised.

Both are reverse-mode differentiable any number of times; forward mode is not supported. Their
gradients keep the normalised array, which the scale needs anyway, and nothing else of its size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.channels import along_channels
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
    y = _shared_normalized(x, epsilon, True) * along_channels(scale, x)
    return y if bias is None else y + along_channels(bias, x)


def rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """Divide the last axis by its root mean square: scale x / sqrt(mean(x^2) + epsilon).

    Args:
        x: floating [..., channels].
        scale: [channels].
        epsilon: added to the mean square.

    Returns:
        [..., channels], float32 or wider.

    Example:
        >>> rms_norm(jnp.array([[1.0, 7.0]]), jnp.full(2, 5.0), epsilon=0.0).tolist()
        [[1.0, 7.0]]

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    x = at_least_float32(x)
    return _shared_normalized(x, epsilon, False) * along_channels(scale, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalized(x: jax.Array, epsilon: float, centre: bool) -> jax.Array:
    return _normalized_forward(x, epsilon, centre)[0]


def _normalized_forward(
    x: jax.Array, epsilon: float, centre: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    centred = x - _mean(x) if centre else x
    factor = lax.rsqrt(_mean(jnp.square(centred)) + epsilon)
    y = centred * factor
    return y, (y, factor)


def _normalized_backward(
    epsilon: float, centre: bool, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array]:
    y, factor = residuals
    dx = dy - y * _mean(dy * y)
    return (factor * (dx - _mean(dy) if centre else dx),)


_normalized.defvjp(_normalized_forward, _normalized_backward)
# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_normalized = jax.jit(_normalized, static_argnums=(1, 2))


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True)
