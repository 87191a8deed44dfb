"""Arrays of few channels, computed with the examples of the batch side by side in memory.

XLA's CPU kernels take neighboring numbers into one vector. Of 8 channels, the innermost axis of
[batch, height, width, channels], they fill half of one, and a quarter of what a matrix product
takes at once. With the batch innermost all are full: a step of a small convolutional network takes
0.6 of the time. Functions here transpose what they get and give; XLA's compiler assigns
layouts so that neither moves a number, and carries them through what is elementwise in between.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering.layout import swap_batch_and_channels
from jaxnets.functional.windows import Axes, ConvSpec, col2im, im2col, offsets_of, padded


def convolve(x: jax.Array, kernel: jax.Array, *, sizes: Axes, spec: ConvSpec) -> jax.Array:
    """Convolve, without groups, as one product of the kernel with all patches.

    Args:
        x: [batch, *inputs, channels].
        kernel: [*taps, channels, features].
        sizes: of the outputs.
        spec: of the convolution.

    Returns:
        [batch, *sizes, features].
    """
    seen = _patches(x, kernel.shape[:-2], sizes, spec)
    product = lax.dot_general(kernel.reshape(len(seen), -1), seen, (((0,), (0,)), ((), ())))
    return swap_batch_and_channels(product)


def input_gradient(kernel: jax.Array, dy: jax.Array, *, size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient [batch, *size, channels] of the input of `convolve`.

    Args:
        kernel: [*taps, channels, features].
        dy: cotangent of the outputs, [batch, *outputs, features].
        size: of the inputs.
        spec: of the convolution.
    """
    *taps, channels, features = kernel.shape
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    shares = lax.dot_general(
        kernel.reshape(-1, features),
        swap_batch_and_channels(dy),
        (((1,), (0,)), ((), ())),
        preferred_element_type=wide,
    )
    shares = shares.reshape(-1, channels, *shares.shape[1:])
    return swap_batch_and_channels(col2im(shares, tuple(taps), size, spec)).astype(dy.dtype)


def kernel_gradient(x: jax.Array, dy: jax.Array, *, size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient [*size, channels, features] of the kernel of `convolve`.

    Args:
        x: [batch, *inputs, channels].
        dy: cotangent of the outputs, [batch, *outputs, features].
        size: of the kernel.
        spec: of the convolution.
    """
    seen, received = _patches(x, size, dy.shape[1:-1], spec), swap_batch_and_channels(dy)
    everywhere = tuple(range(1, dy.ndim))
    product = lax.dot_general(
        seen,
        received,
        ((everywhere, everywhere), ((), ())),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return product.reshape(*size, x.shape[-1], dy.shape[-1]).astype(x.dtype)


def _patches(x: jax.Array, taps: Axes, sizes: Axes, spec: ConvSpec) -> jax.Array:
    """Return what the outputs see, [taps * channels, *outputs, batch]."""
    return jnp.concatenate(
        im2col(offsets_of(taps), padded(swap_batch_and_channels(x), spec), sizes, spec)
    )
