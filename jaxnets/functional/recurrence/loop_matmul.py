"""Loop-invariant matmuls: a few rows times the same large kernel at every step of a loop.

On CPU a matmul packs its right operand at each call, which for a kernel of megabytes costs more
than the arithmetic of a few rows. With the kernel as the left operand only the rows are packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering.layout import row_major
from jaxnets.functional.lowering.platforms import platform_dependent, sizes_are_known

# A smaller kernel is the right operand: packed, it stays in the innermost caches. From this size on
# the left side takes 0.3 to 1 of the time for up to 128 rows (JAX 0.10 and 0.12, 2 cores).
_LARGE_KERNEL = 2**18
# Transposing the kernel costs as much as the left side saves in this many steps.
_STEPS_TO_TRANSPOSE = 8
# Reading columns of rows that are a multiple of 8 KiB apart hits the same cache sets.
_ALIASED_FEATURES = 2048


class LoopKernel(NamedTuple):
    """A kernel [hidden, columns] and its row-major transpose, materialized once before the loop."""

    plain: jax.Array
    transposed: jax.Array

    @classmethod
    def of(cls, kernel: jax.Array) -> LoopKernel:
        return cls(kernel, row_major(kernel.T))


def loop_matmuls(
    kernels: Sequence[jax.Array], *, steps: int
) -> list[Callable[[jax.Array], jax.Array]]:
    """Return matmuls with each of the kernels, for the steps of a loop.

    Args:
        kernels: each [hidden, columns].
        steps: length of the loop.

    Returns:
        Functions from [rows, hidden] to [rows, columns], float32 or wider.
    """
    if not sizes_are_known((steps,)) or steps < _STEPS_TO_TRANSPOSE:
        return [functools.partial(multiply, kernel) for kernel in kernels]
    return [functools.partial(_loop_matmul, *LoopKernel.of(kernel)) for kernel in kernels]


def multiply(kernel: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiply [rows, hidden] by [hidden, columns], in the kernel's dtype.

    Returns:
        [rows, columns], float32 or wider.
    """
    return _accumulating_matmul(rows.astype(kernel.dtype), kernel)


@jax.custom_vjp
def perturbed_matmul(kernel: LoopKernel, perturbation: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiply rows by a kernel whose gradient `kernel_gradient_over_time` computes later.

    The kernel itself gets no gradient. Instead the cotangent of the result becomes that of the
    perturbation, an input of zeros, as with `flax.linen.Module.perturb`.

    Args:
        kernel: of [hidden, columns].
        perturbation: zeros [rows, columns], of the dtype of the result; not read.
        rows: [rows, hidden].

    Returns:
        [rows, columns], float32 or wider.
    """
    return _loop_matmul(*kernel, rows)


def _perturbed_matmul_forward(
    kernel: LoopKernel, perturbation: jax.Array, rows: jax.Array
) -> tuple[jax.Array, LoopKernel]:
    return _loop_matmul(*kernel, rows), kernel


def _perturbed_matmul_backward(
    kernel: LoopKernel, cotangent: jax.Array
) -> tuple[None, jax.Array, jax.Array]:
    return None, cotangent, _loop_matmul(kernel.transposed, kernel.plain, cotangent)


perturbed_matmul.defvjp(_perturbed_matmul_forward, _perturbed_matmul_backward)


def kernel_gradient_over_time(rows: jax.Array, cotangents: jax.Array) -> jax.Array:
    """Return the gradient of a kernel that multiplies rows at every step, as one matmul.

    Args:
        rows: of all steps, [time, batch, hidden].
        cotangents: of the results of all steps, [time, batch, columns].

    Returns:
        [hidden, columns].
    """

    def flattened(rows: jax.Array, cotangents: jax.Array) -> jax.Array:
        rows, cotangents = (
            x.reshape(-1, x.shape[-1]) for x in (rows, cotangents)
        )  # [time * batch, ...]
        columns = rows.T
        if cotangents.shape[-1] % _ALIASED_FEATURES == 0 or rows.dtype == jnp.bfloat16:
            columns = row_major(columns)
        return _accumulating_matmul(columns, cotangents)

    def contracted(rows: jax.Array, cotangents: jax.Array) -> jax.Array:
        # Flattening would gather a batch that is split over devices.
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        axes = (((0, 1), (0, 1)), ((), ()))
        return lax.dot_general(rows, cotangents, axes, preferred_element_type=wide)

    gradient = platform_dependent(
        rows, cotangents, cpu=flattened, default=contracted, partitioned=contracted
    )
    return gradient.astype(rows.dtype)


def _accumulating_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    # For bfloat16 operands too: the CPU kernels are fast only for a float32 result (JAX 0.10).
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, y, preferred_element_type=wide)


def _loop_matmul(kernel: jax.Array, transposed: jax.Array, rows: jax.Array) -> jax.Array:
    if kernel.size < _LARGE_KERNEL or kernel.dtype != jnp.float32:
        return multiply(kernel, rows)
    return platform_dependent(
        kernel,
        transposed,
        rows,
        cpu=lambda _, transposed, rows: _kernel_on_the_left(transposed, rows),
        default=lambda kernel, _, rows: multiply(kernel, rows),
    )


def _kernel_on_the_left(transposed: jax.Array, rows: jax.Array) -> jax.Array:
    # Without the barrier XLA would rewrite the product of transposes as rows @ kernel.
    product = lax.optimization_barrier(transposed @ rows.astype(transposed.dtype).T)
    return product.T
