"""The product of the last axis with a matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply the last axis by a matrix, as one product of two matrices.

    Args:
        x: [..., channels].
        kernel: [channels, features].

    Returns:
        [..., features].
    """
    # On CPU the gradient of a product with more leading axes copies both operands transposed.
    rows = x.reshape(-1, x.shape[-1])
    narrow = x.dtype == kernel.dtype == jnp.bfloat16
    product = _narrow_product(rows, kernel) if narrow else rows @ kernel
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _narrow_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dkernel = lax.platform_dependent(x, dy, cpu=_transposed_product, default=_plain_transposed)
    return dy @ kernel.T, dkernel


_narrow_product.defvjp(_forward, _backward)


def _plain_transposed(x: jax.Array, dy: jax.Array) -> jax.Array:
    return x.T @ dy


def _transposed_product(x: jax.Array, dy: jax.Array) -> jax.Array:
    # The CPU's bfloat16 kernels want the contracted axis innermost on the left: really transpose.
    return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1))) @ dy
