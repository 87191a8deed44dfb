"""The product of the last axis with a matrix."""

from __future__ import annotations

import jax


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply the last axis by a matrix, as one product of two matrices.

    Args:
        x: [..., channels].
        kernel: [channels, features].

    Returns:
        [..., features].
    """
    # On CPU the gradient of a product with more leading axes copies both operands transposed.
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])
