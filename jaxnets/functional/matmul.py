"""The product of the last axis with a matrix.

The gradient of the matrix is a product whose left operand is read down its columns, for which
XLA's CPU backend has slow kernels: 190 us for the 128 x 512 inputs of ten classes. Turned round,
with the transposed cotangents on the left, it takes 14.

In bfloat16 its kernels are fast for a float32 result only (JAX 0.10), and for a left operand whose
summed axis is innermost.

In float32 it can be made of three products of bfloat16, which matrix units compute faster: inside
`jax.default_matmul_precision("BF16_BF16_F32_X3")`. XLA's CPU backend ignores that wish by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering.layout import materialize, row_major
from jaxnets.functional.lowering.platforms import platform_dependent

# Turned round, a kernel's gradient pays for the copies of cotangents and result where features are
# few, and rows and channels so many times as many: it takes 0.02 to 0.9 of the time (JAX 0.10 and
# 0.12). With more features it gains nothing, with fewer rows it takes up to three times as long. A
# vector is multiplied as fast as it can be.
_FEW_FEATURES, _ROWS_AND_CHANNELS_FOR_A_FEATURE = 128, 2
_THREE_PRODUCTS = lax.DotAlgorithmPreset.BF16_BF16_F32_X3

#: The product of a layer, [..., channels] by [channels, features], and those of its gradients,
#: [..., features] by [channels, features] and [..., channels] by [..., features].
_Role: TypeAlias = Literal["forward", "to_input", "to_kernel"]
#: The axis of each of two matrices over which their product adds up.
_Axes: TypeAlias = tuple[int, int]
_Pair: TypeAlias = tuple[jax.Array, jax.Array]


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply the last axis by a matrix; on CPU as one product of two matrices.

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
    dtypes = {x.dtype, kernel.dtype}
    if dtypes == {jnp.dtype(jnp.bfloat16)}:
        return _shared_narrow_product(x, kernel)
    if dtypes == {jnp.dtype(jnp.float32)} and _three_products_wanted():
        return _shared_split_product(x, kernel)
    rows = (math.prod(x.shape[:-1]), x.shape[-1])
    if x.dtype == jnp.float32 and _better_turned(rows, kernel.shape[-1]):
        return _shared_turned_product(x, kernel)
    return _shared_plain_product(x, kernel)


def kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Return the gradient of a kernel by which rows were multiplied; for programs on CPU.

    Args:
        x: [rows, channels].
        dy: cotangents of the products, [rows, features], of the dtype of `x`.

    Returns:
        [channels, features], float32 or wider.
    """
    if x.dtype == jnp.float32 and _better_turned(x.shape, dy.shape[-1]):
        return materialize(materialize(dy.T) @ x).T
    if x.dtype == jnp.bfloat16:
        return accumulating_matmul(x, dy, (0, 0))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return _product_over(x, dy, (0, 0), preferred_element_type=wide)


def accumulating_matmul(x: jax.Array, y: jax.Array, axes: _Axes = (1, 0)) -> jax.Array:
    """Multiply bfloat16 matrices by the CPU's fast kernels.

    Args:
        x: [rows, columns].
        y: [rows, columns].
        axes: of each of them, the one over which the products are summed.

    Returns:
        [rows or columns of `x`, rows or columns of `y`], float32.
    """
    if axes[0] == 0:  # The kernels want the summed axis innermost on the left.
        x, axes = row_major(x.T), (1, axes[1])
    # Nothing but bfloat16 products, whatever precision is asked for.
    kind = {"precision": lax.Precision.DEFAULT, "preferred_element_type": jnp.float32}
    return _product_over(x, y, axes, **kind)


def _better_turned(rows: tuple[int, ...], features: int) -> bool:
    most = min(_FEW_FEATURES, min(rows) / _ROWS_AND_CHANNELS_FOR_A_FEATURE)
    return 1 < features <= most


def _plain_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if x.ndim == 2:
        return x @ kernel
    return platform_dependent(x, kernel, cpu=_with_rows(jnp.matmul), default=jnp.matmul)


def _with_rows(product: Callable[..., jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make a product of two matrices one that takes more leading axes.

    On CPU the gradient of a product with such axes copies both operands transposed. On a mesh
    the rows of an array that is split over devices along an inner axis, as the batch is behind the
    steps of a recurrent network, are gathered, so this is for programs on CPU.
    """

    def apply(x: jax.Array, y: jax.Array) -> jax.Array:
        result = product(x.reshape(-1, x.shape[-1]), y)
        return result.reshape(*x.shape[:-1], result.shape[-1])

    return apply


@jax.custom_jvp
def _turned_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _plain_product(x, kernel)


@_turned_product.defjvp
def _turned_product_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # A rule for tangents, so that forward mode is there too. Reverse mode transposes it.
    (x, kernel), (to_x, to_kernel) = primals, tangents
    by_kernel = platform_dependent(x, to_kernel, cpu=_with_rows(_turned_matmul), default=jnp.matmul)
    return _turned_product(x, kernel), _plain_product(to_x, kernel) + by_kernel


def _turned_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply so that the transposed program is `kernel_gradient`'s."""
    turned = materialize(kernel.T)
    return materialize(lax.dot_general(x, turned, (((1,), (1,)), ((), ()))).T).T


# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_plain_product = jax.jit(_plain_product)
_shared_turned_product = jax.jit(_turned_product)


def _three_products_wanted() -> bool:
    wish = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return bool(wish == _THREE_PRODUCTS.name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _split_product(x: jax.Array, y: jax.Array, role: _Role = "forward") -> jax.Array:
    """Multiply float32 matrices as sums of two bfloat16 numbers, without the smallest product.

    Of 24 bits of a factor the two have 16. The error is about 5e-6 of the largest output (1e-5
    for a few channels), that of a float32 product 5e-7, that of one bfloat16 product 2e-3.
    What is infinite becomes NaN.

    References:
        Henry, Tang and Heinecke 2019, arXiv:1904.06376 (three products of two parts).
    """
    plain = functools.partial(_contract, role=role, precision=_THREE_PRODUCTS)
    return platform_dependent(x, y, cpu=_of_matrices(_three_products, role), default=plain)


def _three_products(x: jax.Array, y: jax.Array, axes: _Axes) -> jax.Array:
    (x_high, x_low), (y_high, y_low) = map(_halves, (x, y))
    product = functools.partial(accumulating_matmul, axes=axes)
    return product(x_high, y_high) + (product(x_high, y_low) + product(x_low, y_high))


def _halves(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Rounded by `reduce_precision`: XLA removes a cast to bfloat16 and back. Written down, where
    # XLA would take a part through a transpose, or multiply it as float32.
    high = lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    high, low = high.astype(jnp.bfloat16), (array - high).astype(jnp.bfloat16)
    return materialize(high), materialize(low)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_product(x: jax.Array, y: jax.Array, role: _Role = "forward") -> jax.Array:
    """Multiply bfloat16 numbers."""

    def rounded(x: jax.Array, y: jax.Array, axes: _Axes) -> jax.Array:
        return accumulating_matmul(x, y, axes).astype(x.dtype)

    plain = functools.partial(_contract, role=role)
    return platform_dependent(x, y, cpu=_of_matrices(rounded, role), default=plain)


def _contract(x: jax.Array, y: jax.Array, role: _Role, **kind: Any) -> jax.Array:
    """Multiply with all leading axes; see `_Role`."""
    last, leading = (x.ndim - 1,), tuple(range(x.ndim - 1))
    axes = {"forward": (last, (0,)), "to_input": (last, (1,)), "to_kernel": (leading, leading)}
    return lax.dot_general(x, y, (axes[role], ((), ())), **kind)


def _of_matrices(
    product: Callable[..., jax.Array], role: _Role
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make a product of two matrices do what `_contract` does."""
    if role == "to_kernel":
        return lambda x, y: product(*(a.reshape(-1, a.shape[-1]) for a in (x, y)), (0, 0))
    return _with_rows(functools.partial(product, axes=(1, int(role == "to_input"))))


def _product_over(x: jax.Array, y: jax.Array, axes: _Axes, **kind: Any) -> jax.Array:
    return lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), **kind)


def _with_gradient(product: Any) -> Any:
    """Give a product gradients that are products of the same kind."""

    def forward(x: jax.Array, y: jax.Array, role: _Role) -> tuple[jax.Array, _Pair]:
        return product(x, y, role), (x, y)

    def backward(role: _Role, saved: _Pair, cotangent: jax.Array) -> _Pair:
        x, y = saved
        match role:
            case "forward":
                return product(cotangent, y, "to_input"), product(x, cotangent, "to_kernel")
            case "to_input":
                return product(cotangent, y, "forward"), product(cotangent, x, "to_kernel")
            case "to_kernel":
                return product(y, cotangent, "to_input"), product(x, cotangent, "forward")

    product.defvjp(forward, backward)
    # As a compiled function it is traced once, with its gradient, for all layers of a shape.
    return jax.jit(product, static_argnums=2)


_shared_split_product, _shared_narrow_product = map(
    _with_gradient, (_split_product, _narrow_product)
)
