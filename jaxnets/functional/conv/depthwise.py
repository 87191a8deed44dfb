"""The kernel gradient of depthwise convolutions: products of channels, summed over positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnets.functional.windows import Axes, ConvSpec, im2col, kernel_offsets, pad_spatial


def kernel_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient of the kernel of a convolution with one channel per group.

    Args:
        x: [batch, *input_size, channels].
        dy: cotangent of the outputs, [batch, *output_size, features].
        kernel_size: spatial shape of the kernel.
        spec: static arguments of the convolution.

    Returns:
        [*kernel_size, 1, features], of the dtype of `x`; accumulated in float32 or wider.
    """
    channels, features, positions = x.shape[-1], dy.shape[-1], tuple(range(dy.ndim - 1))
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    padded = pad_spatial(x, spec)
    # [batch, *output_size, channels, features / channels]
    dy_per_channel = dy.reshape(*dy.shape[:-1], channels, features // channels)
    columns = im2col(kernel_offsets(kernel_size), padded, dy.shape[1:-1], spec)
    gradients = [
        jnp.sum(column[..., None] * dy_per_channel, positions, accumulator) for column in columns
    ]
    # [offsets, channels, features / channels]
    return jnp.stack(gradients).reshape(*kernel_size, 1, features).astype(x.dtype)
