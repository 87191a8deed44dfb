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

    Raises:
        ValueError: a scale or bias of another shape.

    Example:
        >>> layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.ones(2), epsilon=0.0).tolist()
        [[0.0, 2.0]]

    References:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4.
    """
    _check_channels(x, scale=scale, bias=bias)
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

    Raises:
        ValueError: a scale of another shape.

    Example:
        >>> rms_norm(jnp.array([[1.0, 7.0]]), jnp.full(2, 5.0), epsilon=0.0).tolist()
        [[1.0, 7.0]]

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    _check_channels(x, scale=scale)
    x = at_least_float32(x)
    return _shared_normalized(x, epsilon, False) * along_channels(scale, x)


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    weights: jax.Array | None = None,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalize each channel over all positions, as `layer_norm` does over the last axis.

    With `weights` mean and variance are weighted: an example of weight 2 counts as two equal ones.
    An example of weight 0 does not count, even if it is NaN or infinite; its output is the bias,
    and its gradient is 0.

    Args:
        x: floating [..., channels].
        scale: [channels].
        bias: [channels].
        weights: 0 or more, [batch] or any other leading part of the shape of `x` without its
            channels; by default every position has weight 1.
        epsilon: added to the biased variance.
        axis_name: of a mapped axis over which the batch is split.

    Returns:
        The normalized array, [..., channels], float32 or wider; mean and variance, [channels],
        both 0 where all weights are 0.

    Raises:
        ValueError: a scale or bias of another shape, or weights whose shape is not a leading part
            of the shape of `x`.

    Example:
        >>> y, mean, variance = batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.ones(1))
        >>> y[:, 0].round().tolist(), float(mean[0]), float(variance[0])
        ([0.0, 2.0], 2.0, 1.0)
        >>> padded, weights = jnp.array([[1.0], [3.0], [7.0]]), jnp.array([1.0, 1.0, 0.0])
        >>> y, mean, variance = batch_norm(padded, jnp.ones(1), jnp.ones(1), weights=weights)
        >>> y[:, 0].round().tolist(), float(mean[0]), float(variance[0])
        ([0.0, 2.0, 1.0], 2.0, 1.0)

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1; the gradient is that of section 3.
    """
    _check_channels(x, scale=scale, bias=bias)
    if weights is not None:
        weights = jnp.asarray(weights, jnp.promote_types(x.dtype, jnp.float32))
        if weights.ndim >= x.ndim or weights.shape != x.shape[: weights.ndim]:
            raise ValueError(
                f"weights of shape {weights.shape} do not fit an array of shape {x.shape}; give "
                f"weights of shape {x.shape[:1]}, one for each row, so repeat them where a "
                "network merges another axis into that of the batch"
            )
        # [batch, 1, ...]
        weights = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
    return _shared_batch_norm(x, scale, bias, weights, epsilon, axis_name)


def _check_channels(x: jax.Array, **vectors: jax.Array | None) -> None:
    for name, vector in vectors.items():
        if vector is not None and (not x.ndim or vector.shape != x.shape[-1:]):
            raise ValueError(
                f"a {name} of shape {vector.shape} does not fit inputs of shape {x.shape}; give "
                "[channels] and [..., channels]"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    weights: jax.Array | None,
    epsilon: float,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _batch_norm_forward(x, scale, bias, weights, epsilon, axis_name)[0]


def _batch_norm_forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    weights: jax.Array | None,
    epsilon: float,
    axis_name: str | None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    wide = _where_counted(at_least_float32(x), weights)
    mean = _mean_of_batch(wide, weights, axis_name)
    centered = _where_counted(wide - along_channels(mean, x), weights)
    # In two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    variance = _mean_of_batch(jnp.square(centered), weights, axis_name)
    inverse = lax.rsqrt(variance + epsilon)
    y = centered * along_channels(scale * inverse, x) + along_channels(bias, x)
    return (y, mean, variance), (x, scale, bias, weights, mean, inverse)


def _batch_norm_backward(
    epsilon: float, axis_name: str | None, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    x, scale, bias, weights, mean, inverse = residuals
    dy, to_mean, to_variance = cotangents
    dbias, dy = channel_sum(dy), _where_counted(dy, weights)
    centered = _where_counted(at_least_float32(x) - along_channels(mean, x), weights)
    products = channel_sum(dy * centered)
    # The derivative of the variance with respect to the mean is 0.
    to_mean = to_mean - scale * inverse * (dbias if weights is None else channel_sum(dy))
    to_variance = to_variance - scale * inverse**3 * products / 2
    shift = _per_weight(to_mean, x, weights, axis_name)
    slope = 2 * _per_weight(to_variance, x, weights, axis_name)
    dweights = None
    to_squares, to_sums = along_channels(slope, x), along_channels(shift, x)
    if weights is not None:
        # The derivatives of mean and variance by a weight are x - mean and (x - mean)^2 - variance,
        # divided by the total weight.
        variance = along_channels(inverse**-2 - epsilon, x)
        effect = centered * to_sums + (jnp.square(centered) - variance) * to_squares / 2
        axes = [axis for axis, size in enumerate(weights.shape) if size == 1]
        dweights = jnp.sum(_where_counted(effect, weights), axis=axes, keepdims=True)
        to_squares, to_sums = to_squares * weights, to_sums * weights
    dx = dy * along_channels(scale * inverse, x) + centered * to_squares + to_sums
    dscale = (inverse * products).astype(scale.dtype)
    return dx.astype(x.dtype), dscale, dbias.astype(bias.dtype), dweights


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
_shared_batch_norm = jax.jit(_batch_norm, static_argnums=(4, 5))


def _where_counted(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Replace positions of weight 0 by 0."""
    return x if weights is None else jnp.where(weights == 0, jnp.zeros_like(x), x)


def _mean_of_batch(x: jax.Array, weights: jax.Array | None, axis_name: str | None) -> jax.Array:
    """Average [..., channels] over all positions of all devices, [channels]."""
    if weights is None:
        return _per_weight(channel_sum(x), x, None, axis_name)
    return _per_weight(channel_sum(x * weights), x, weights, axis_name)


def _per_weight(
    sums: jax.Array, x: jax.Array, weights: jax.Array | None, axis_name: str | None
) -> jax.Array:
    """Add sums of all devices and divide by the weight of all positions of `x`, [channels]."""
    if weights is None:
        mean = sums / (x.size // x.shape[-1])
        return mean if axis_name is None else lax.pmean(mean, axis_name)
    total = jnp.sum(weights) * (x.size // x.shape[-1] // weights.size)
    if axis_name is not None:
        sums, total = lax.psum((sums, total), axis_name)
    return sums / jnp.where(total == 0, jnp.ones_like(total), total)


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
