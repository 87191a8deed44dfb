"""Convolution of few channels, computed with the batch as the innermost axis in memory.

XLA's CPU kernels vectorize over the innermost axis. Eight channels, the innermost axis of
[batch, height, width, channels], fill half a SIMD register and a quarter of a GEMM tile; the batch
fills all of it: a step of a small convolutional network takes 0.6 of the time. The functions
transpose their arguments and results; XLA's layout assignment implements these transposes without
moving data, and propagates the layout through elementwise operations in between.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering.layout import swap_batch_and_channels
from jaxnets.functional.windows import Axes, ConvSpec, col2im, im2col, kernel_offsets, pad_spatial


def convolve(x: jax.Array, kernel: jax.Array, *, output_size: Axes, spec: ConvSpec) -> jax.Array:
    """Convolve, without groups, as one matmul of the kernel with all patches.

    Args:
        x: [batch, *input_size, channels].
        kernel: [*kernel_size, channels, features].
        output_size: spatial shape of the outputs.
        spec: static arguments of the convolution.

    Returns:
        [batch, *output_size, features].
    """
    patches = _patches(x, kernel.shape[:-2], output_size, spec)
    matrix = kernel.reshape(len(patches), -1)  # [offsets * channels, features]
    product = lax.dot_general(matrix, patches, (((0,), (0,)), ((), ())))
    return swap_batch_and_channels(product)  # from [features, *output_size, batch]


def input_gradient(
    kernel: jax.Array, dy: jax.Array, *, input_size: Axes, spec: ConvSpec
) -> jax.Array:
    """Return the gradient [batch, *input_size, channels] of the input of `convolve`.

    Args:
        kernel: [*kernel_size, channels, features].
        dy: cotangent of the outputs, [batch, *output_size, features].
        input_size: spatial shape of the inputs.
        spec: static arguments of the convolution.
    """
    *kernel_size, channels, features = kernel.shape
    columns = lax.dot_general(
        kernel.reshape(-1, features),
        swap_batch_and_channels(dy),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.promote_types(dy.dtype, jnp.float32),
    )
    # [offsets, channels, *output_size, batch]
    columns = columns.reshape(-1, channels, *columns.shape[1:])
    dx = col2im(columns, tuple(kernel_size), input_size, spec)  # [channels, *input_size, batch]
    return swap_batch_and_channels(dx).astype(dy.dtype)


def kernel_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient [*kernel_size, channels, features] of the kernel of `convolve`.

    Args:
        x: [batch, *input_size, channels].
        dy: cotangent of the outputs, [batch, *output_size, features].
        kernel_size: spatial shape of the kernel.
        spec: static arguments of the convolution.
    """
    patches = _patches(x, kernel_size, dy.shape[1:-1], spec)
    positions = tuple(range(1, dy.ndim))
    product = lax.dot_general(  # [offsets * channels, features]
        patches,
        swap_batch_and_channels(dy),
        ((positions, positions), ((), ())),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return product.reshape(*kernel_size, x.shape[-1], dy.shape[-1]).astype(x.dtype)


def _patches(x: jax.Array, kernel_size: Axes, output_size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the transposed im2col matrix, [offsets * channels, *output_size, batch]."""
    padded = pad_spatial(swap_batch_and_channels(x), spec)
    return jnp.concatenate(im2col(kernel_offsets(kernel_size), padded, output_size, spec))
