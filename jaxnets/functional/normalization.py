"""Normalization as pure functions, with statistics in float32 or wider.

All are reverse-mode differentiable any number of times; forward mode is not supported. The norms of
the last axis save the normalized array, which the scale's gradient needs anyway, as the only
residual of its size. A batch norm saves its input, over which its gradient takes two sums.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.core import at_least_float32
from jaxnets.functional.channels import along_channels, channel_sum


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, epsilon: float = 1e-6
) -> jax.Array:
    """Normalize the last axis: scale (x - mean) / sqrt(variance + epsilon) + bias.

    Args:
        x: floating [..., channels].
        scale: [channels].
        bias: [channels]; nothing is added by default.
        epsilon: added to the biased variance.

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


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalize each channel over all positions, as `layer_norm` does over the last axis.

    Args:
        x: floating [..., channels].
        scale: [channels].
        bias: [channels].
        epsilon: added to the biased variance.
        axis_name: of a mapped axis over which the batch is split.

    Returns:
        The normalized array, [..., channels], float32 or wider; mean and variance, [channels].

    Example:
        >>> y, mean, variance = batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.ones(1))
        >>> y[:, 0].round().tolist(), float(mean[0]), float(variance[0])
        ([0.0, 2.0], 2.0, 1.0)

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1; the gradient is that of section 3.
    """
    return _shared_batch_norm(x, scale, bias, epsilon, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _batch_norm_forward(x, scale, bias, epsilon, axis_name)[0]


def _batch_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    wide = at_least_float32(x)
    mean = _mean_over_devices(channel_sum(wide) / _num_positions(x), axis_name)
    centered = wide - along_channels(mean, x)
    # In two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    squares = channel_sum(jnp.square(centered))
    variance = _mean_over_devices(squares / _num_positions(x), axis_name)
    inverse = lax.rsqrt(variance + epsilon)
    y = centered * along_channels(scale * inverse, x) + along_channels(bias, x)
    return (y, mean, variance), (x, scale, bias, mean, inverse)


def _batch_norm_backward(
    epsilon: float, axis_name: str | None, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, bias, mean, inverse = residuals
    dy, to_mean, to_variance = cotangents
    centered = at_least_float32(x) - along_channels(mean, x)
    dbias, products = channel_sum(dy), channel_sum(dy * centered)
    # The derivative of the variance with respect to the mean is 0.
    to_mean = to_mean - scale * inverse * dbias
    to_variance = to_variance - scale * inverse**3 * products / 2
    shift = _mean_over_devices(to_mean, axis_name) / _num_positions(x)
    slope = 2 * _mean_over_devices(to_variance, axis_name) / _num_positions(x)
    dx = (
        dy * along_channels(scale * inverse, x)
        + centered * along_channels(slope, x)
        + along_channels(shift, x)
    )
    dscale = (inverse * products).astype(scale.dtype)
    return dx.astype(x.dtype), dscale, dbias.astype(bias.dtype)


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
_shared_batch_norm = jax.jit(_batch_norm, static_argnums=(3, 4))


def _num_positions(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _mean_over_devices(mean: jax.Array, axis_name: str | None) -> jax.Array:
    return mean if axis_name is None else lax.pmean(mean, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalized(x: jax.Array, epsilon: float, center: bool) -> jax.Array:
    return _normalized_forward(x, epsilon, center)[0]


def _normalized_forward(
    x: jax.Array, epsilon: float, center: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    centered = x - _mean(x) if center else x
    factor = lax.rsqrt(_mean(jnp.square(centered)) + epsilon)
    y = centered * factor
    return y, (y, factor)


def _normalized_backward(
    epsilon: float, center: bool, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array]:
    y, factor = residuals
    dx = dy - y * _mean(dy * y)
    return (factor * (dx - _mean(dy) if center else dx),)


_normalized.defvjp(_normalized_forward, _normalized_backward)
# Jitted, so that all layers of a shape, and their gradients, are traced once.
_shared_normalized = jax.jit(_normalized, static_argnums=(1, 2))


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True)
