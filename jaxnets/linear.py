"""The product of the last axis with a matrix.

The gradient of the matrix is a product whose left operand is read down its columns, for which
XLA's CPU backend has slow kernels: 190 us for the 128 x 512 inputs of ten classes. Turned round,
with the transposed cotangents on the left, it takes 14.

In bfloat16 its kernels are fast for a float32 result only (JAX 0.10), and for operands that are not
transposed apart.

In float32 it can be made of three products of bfloat16, which matrix units compute faster: inside
`jax.default_matmul_precision("BF16_BF16_F32_X3")`. XLA's CPU backend ignores that wish by itself.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.fusion import computed_once
from jaxnets.layouts import laid_out
from jaxnets.platforms import by_platform

# Turned round, a kernel's gradient pays for the copies of cotangents and result where features are
# few, and rows and channels so many times as many: it takes 0.02 to 0.9 of the time (JAX 0.10 and
# 0.12). With more features it gains nothing, with fewer rows it takes up to three times as long. A
# vector is multiplied as fast as it can be.
_FEW_FEATURES, _ROWS_AND_CHANNELS_FOR_A_FEATURE = 128, 2
_THREE_PRODUCTS = lax.DotAlgorithmPreset.BF16_BF16_F32_X3


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply the last axis by a matrix, as one product of two matrices.

    Args:
        x: [..., channels].
        kernel: [channels, features].

    Returns:
        [..., features].

    Example:
        >>> x, kernel = jnp.full((2, 3), 1.001), jnp.ones((3, 1))
        >>> with jax.default_matmul_precision("BF16_BF16_F32_X3"):
        ...     round(float(linear(x, kernel)[0, 0]), 4)
        3.003
    """
    # On CPU the gradient of a product with more leading axes copies both operands transposed.
    rows = x.reshape(-1, x.shape[-1])
    dtypes = {x.dtype, kernel.dtype}
    if dtypes == {jnp.dtype(jnp.bfloat16)}:
        product = _shared_narrow_product(rows, kernel)
    elif dtypes == {jnp.dtype(jnp.float32)} and _three_products_wanted():
        product = _shared_split_product(rows, kernel)
    elif _better_turned(rows, kernel.shape[-1]):
        product = _shared_product(rows, kernel)
    else:
        product = rows @ kernel
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Return the gradient of a kernel by which rows were multiplied; for programs on CPU.

    Args:
        x: [rows, channels].
        dy: cotangents of the products, [rows, features], of the dtype of `x`.

    Returns:
        [channels, features], float32 or wider.
    """
    if _better_turned(x, dy.shape[-1]):
        return computed_once(computed_once(dy.T) @ x).T
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=wide)


def _better_turned(x: jax.Array, features: int) -> bool:
    few = 1 < features <= min(_FEW_FEATURES, min(x.shape) / _ROWS_AND_CHANNELS_FOR_A_FEATURE)
    return few and x.dtype == jnp.float32


@jax.custom_jvp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


@_product.defjvp
def _product_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # A rule for tangents, so that forward mode is there too. Reverse mode transposes it.
    (x, kernel), (to_x, to_kernel) = primals, tangents
    by_kernel = by_platform(x, to_kernel, cpu=_turned_product, default=jnp.matmul)
    return _product(x, kernel), to_x @ kernel + by_kernel


def _turned_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply so that the transposed program is `kernel_gradient`'s."""
    turned = computed_once(kernel.T)
    return computed_once(lax.dot_general(x, turned, (((1,), (1,)), ((), ()))).T).T


# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_product = jax.jit(_product)


@jax.custom_vjp
def _narrow_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _narrow_matmul(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow_matmul(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    # The CPU's bfloat16 kernels want the contracted axis innermost on the left.
    return _narrow_matmul(dy, kernel, turned=True), _narrow_matmul(laid_out(x.T), dy)


def _narrow_matmul(x: jax.Array, y: jax.Array, *, turned: bool = False) -> jax.Array:
    """Multiply bfloat16 matrices, the second transposed if `turned`; on CPU see the module."""
    axes = (((1,), (1 if turned else 0,)), ((), ()))

    def by_wide_result(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32).astype(x.dtype)

    plain = functools.partial(lax.dot_general, dimension_numbers=axes)
    return by_platform(x, y, cpu=by_wide_result, default=plain)


_narrow_product.defvjp(_forward, _backward)
# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_narrow_product = jax.jit(_narrow_product)


def _three_products_wanted() -> bool:
    wish = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return bool(wish == _THREE_PRODUCTS.name)


@jax.custom_vjp
def _split_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply float32 matrices as sums of two bfloat16 numbers, without the smallest product.

    Of 24 bits of a factor the two have 16. The error is about 5e-6 of the largest output (1e-5
    for a few channels), that of a float32 product 5e-7, that of one bfloat16 product 2e-3.
    What is infinite becomes NaN.

    References:
        Henry, Tang and Heinecke 2019, arXiv:1904.06376 (three products of two parts).
    """
    plain = functools.partial(jnp.matmul, precision=_THREE_PRODUCTS)
    return by_platform(x, kernel, cpu=_three_products, default=plain)


def _three_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    (x_high, x_low), (kernel_high, kernel_low) = map(_halves, (x, kernel))
    product = functools.partial(
        jnp.matmul, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
    small = product(x_high, kernel_low) + product(x_low, kernel_high)
    return product(x_high, kernel_high) + small


def _halves(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Rounded by `reduce_precision`: XLA removes a cast to bfloat16 and back.
    high = lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (array - high).astype(jnp.bfloat16)


def _split_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _split_product(x, kernel), (x, kernel)


def _split_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return _split_product(dy, kernel.T), _split_product(laid_out(x.T), dy)


_split_product.defvjp(_split_forward, _split_backward)
_shared_split_product = jax.jit(_split_product)
