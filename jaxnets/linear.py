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
    product = _shared_narrow_product(rows, kernel) if narrow else rows @ kernel
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def laid_out_transpose(matrix: jax.Array) -> jax.Array:
    """Transpose; on CPU the result is laid out in memory, not read through strides.

    Args:
        matrix: [rows, columns].

    Returns:
        [columns, rows].
    """
    return lax.platform_dependent(
        matrix,
        cpu=lambda matrix: with_layout_constraint(matrix.T, Layout(major_to_minor=(0, 1))),
        default=jnp.transpose,
    )


@jax.custom_vjp
def _narrow_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # The CPU's bfloat16 kernels want the contracted axis innermost on the left.
    return dy @ kernel.T, laid_out_transpose(x) @ dy


_narrow_product.defvjp(_forward, _backward)
# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_narrow_product = jax.jit(_narrow_product)
