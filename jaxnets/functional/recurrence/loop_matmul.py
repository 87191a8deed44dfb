"""Products of a few rows with the same large kernel, at every step of a loop.

On CPU a product packs its right operand anew at each call, which for a kernel of megabytes costs
more than a few rows' arithmetic. With the kernel on the left, as it lies, only the rows are packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering.layout import row_major
from jaxnets.functional.lowering.platforms import platform_dependent

# A kernel of fewer numbers goes on the right: packed, it stays in the nearest caches. From here on
# the left side takes 0.3 to 1 of the time for up to 128 rows (JAX 0.10 and 0.12, 2 cores).
_LARGE_KERNEL = 2**18
# Transposing a kernel costs as much as the left side saves in so many steps.
_STEPS_TO_TRANSPOSE = 8
# Rows a multiple of 8 KiB apart fall into the same sets of a cache, when columns are read.
_ALIASED_FEATURES = 2048


class LoopKernel(NamedTuple):
    """A kernel [hidden, columns] and its transpose, which is laid out once, not at every step."""

    plain: jax.Array
    transposed: jax.Array

    @classmethod
    def of(cls, kernel: jax.Array) -> LoopKernel:
        return cls(kernel, row_major(kernel.T))


def loop_matmuls(
    kernels: Sequence[jax.Array], *, steps: int
) -> list[Callable[[jax.Array], jax.Array]]:
    """Return the product with each of the kernels, for a loop of so many steps.

    Args:
        kernels: each [hidden, columns].
        steps: length of the loop.

    Returns:
        Functions of [rows, hidden] that give [rows, columns], float32 or wider.
    """
    if steps < _STEPS_TO_TRANSPOSE:
        return [functools.partial(multiply, kernel) for kernel in kernels]
    return [functools.partial(_multiply, *LoopKernel.of(kernel)) for kernel in kernels]


def multiply(kernel: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiply [rows, hidden] by [hidden, columns] once, in the kernel's dtype.

    Returns:
        [rows, columns], float32 or wider.
    """
    return _accumulating_matmul(rows.astype(kernel.dtype), kernel)


@jax.custom_vjp
def matmul_with_tap(kernel: LoopKernel, tap: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiply, with the cotangent of the product going to `tap` instead of to the kernel.

    Args:
        kernel: of [hidden, columns].
        tap: [rows, columns], of the product's dtype; has no influence on it.
        rows: [rows, hidden].

    Returns:
        [rows, columns], float32 or wider.
    """
    return _multiply(*kernel, rows)


def _matmul_with_tap_forward(
    kernel: LoopKernel, tap: jax.Array, rows: jax.Array
) -> tuple[jax.Array, LoopKernel]:
    return _multiply(*kernel, rows), kernel


def _matmul_with_tap_backward(
    kernel: LoopKernel, cotangent: jax.Array
) -> tuple[None, jax.Array, jax.Array]:
    return None, cotangent, _multiply(kernel.transposed, kernel.plain, cotangent)


matmul_with_tap.defvjp(_matmul_with_tap_forward, _matmul_with_tap_backward)


def kernel_gradient(rows: jax.Array, cotangents: jax.Array) -> jax.Array:
    """Sum the products of all steps' rows with the cotangents of their products.

    Args:
        rows: [time, batch, hidden].
        cotangents: [time, batch, columns].

    Returns:
        [hidden, columns].
    """
    rows, cotangents = (array.reshape(-1, array.shape[-1]) for array in (rows, cotangents))
    columns = rows.T
    if cotangents.shape[-1] % _ALIASED_FEATURES == 0 or rows.dtype == jnp.bfloat16:
        columns = row_major(columns)
    return _accumulating_matmul(columns, cotangents).astype(rows.dtype)


def _accumulating_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    # Of bfloat16 too: the CPU's kernels are fast for a float32 result only (JAX 0.10).
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, y, preferred_element_type=wide)


def _multiply(kernel: jax.Array, transposed: jax.Array, rows: jax.Array) -> jax.Array:
    if kernel.size < _LARGE_KERNEL or kernel.dtype != jnp.float32:
        return multiply(kernel, rows)
    return platform_dependent(
        kernel,
        transposed,
        rows,
        cpu=lambda _, transposed, rows: _on_the_left(transposed, rows),
        default=lambda kernel, _, rows: multiply(kernel, rows),
    )


def _on_the_left(transposed: jax.Array, rows: jax.Array) -> jax.Array:
    # Behind a barrier, as XLA would turn the product of transposes round again.
    product = lax.optimization_barrier(transposed @ rows.astype(transposed.dtype).T)
    return product.T
