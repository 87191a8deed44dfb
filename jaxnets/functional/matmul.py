"""Matmul of the last axis with a matrix.

The gradient of the matrix is a matmul with a transposed left operand, for which XLA's CPU backend
has slow kernels: 190 us for the 128 x 512 inputs of ten classes. Computed as the transpose of
dy^T x it takes 14.

In bfloat16 that backend has fast kernels for a float32 result only (JAX 0.10), and for a left
operand whose contracted axis is innermost.

In float32 a matmul can be made of three bfloat16 matmuls, which matrix units compute faster: the
algorithm "BF16_BF16_F32_X3" of `jax.default_matmul_precision`. XLA's CPU backend ignores it; here
it is implemented.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxnets.functional.channels import along_channels
from jaxnets.functional.int8 import Int8Array
from jaxnets.functional.low_rank import LowRankKernel
from jaxnets.functional.lowering.layout import materialize, row_major
from jaxnets.functional.lowering.platforms import platform_dependent, sizes_are_known

# Transposing a kernel gradient pays for the copies of dy and of the result where features are few,
# and rows and channels at least this many times as many: it takes 0.02 to 0.9 of the time (JAX 0.10
# and 0.12). With more features it gains nothing, with fewer rows it takes up to three times as
# long. A matrix-vector product is as fast as it can be.
_FEW_FEATURES, _MIN_ROWS_AND_CHANNELS_PER_FEATURE = 128, 2
# XLA's CPU backend transposes a whole table in memory for the matmul that reads it, at every token
# that is generated; and for a single row it recomputes the norm in front of the matmul for every
# feature. As a batched matmul of slices of the table, 49,152 x 576 takes 0.5 of the time for 1 row
# behind a norm, 0.15 for 2 rows, 0.2 for 8, 0.35 for 32, 0.6 for 64, 1.2 for 128.
_MOST_ROWS_OF_A_TABLE, _MOST_SLICES = 32, 32
_BF16_X3 = lax.DotAlgorithmPreset.BF16_BF16_F32_X3

#: Which matmul of a linear layer: "forward" [..., channels] by [channels, features],
#: "input_gradient" [..., features] by [channels, features], or "kernel_gradient" [..., channels] by
#: [..., features].
_Role: TypeAlias = Literal["forward", "input_gradient", "kernel_gradient"]
#: The contracted axis of each of two matrices.
_Axes: TypeAlias = tuple[int, int]
_Pair: TypeAlias = tuple[jax.Array, jax.Array]


def linear(x: jax.Array, kernel: Any) -> jax.Array:
    """Multiply the last axis by a matrix.

    Equivalent to `jnp.matmul`; only the CPU lowering differs: leading axes are flattened.

    Args:
        x: [..., channels].
        kernel: [channels, features]; also a `LowRankKernel`, which is applied factor by factor, or
            an `Int8Array`.

    Returns:
        [..., features].

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> x, kernel = jnp.full((2, 3), 1.001), jnp.ones((3, 1))
        >>> with jax.default_matmul_precision("BF16_BF16_F32_X3"):
        ...     round(float(linear(x, kernel)[0, 0]), 4)
        3.003
    """
    if not x.ndim or kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"inputs of shape {x.shape} do not fit a kernel of shape {kernel.shape}; give "
            "[..., channels] and [channels, features]"
        )
    if isinstance(kernel, LowRankKernel):
        y = linear(x, kernel.base) + linear(linear(x, kernel.scaled_a), kernel.b)
        return y if kernel.columns is None else y * along_channels(kernel.columns, y)
    if isinstance(kernel, Int8Array):
        return platform_dependent(
            *(x, kernel),
            cpu=_separate_int8_matmul,
            default=_int8_matmul,
            partitioned=_int8_matmul,
        )
    dtypes = {x.dtype, kernel.dtype}
    if dtypes == {jnp.dtype(jnp.bfloat16)}:
        return _shared_bf16_matmul(x, kernel)
    if dtypes == {jnp.dtype(jnp.float32)} and _bf16_x3_requested():
        return _shared_bf16_x3_matmul(x, kernel)
    rows = (math.prod(x.shape[:-1]), x.shape[-1])
    if x.dtype == jnp.float32 and _transposing_pays(rows, kernel.shape[-1]):
        return _shared_few_features_matmul(x, kernel)
    return _shared_matmul(x, kernel)


def transposed_linear(x: jax.Array, table: jax.Array) -> jax.Array:
    """Multiply the last axis by the transpose of a matrix, such as a table of embeddings.

    Equivalent to `jnp.matmul(x, table.T)`; only the CPU lowering of few float32 rows differs: no
    transpose of the table is materialized.

    Args:
        x: [..., channels].
        table: [features, channels].

    Returns:
        [..., features].

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> transposed_linear(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[3.0, 7.0]]
    """
    rows = math.prod(x.shape[:-1]) if sizes_are_known(x.shape) else _MOST_ROWS_OF_A_TABLE + 1
    fits = x.ndim and table.ndim == 2 and x.shape[-1] == table.shape[1]
    dtypes = {x.dtype, table.dtype}
    plain = dtypes != {jnp.dtype(jnp.float32)} or _bf16_x3_requested()
    if not fits or plain or rows > _MOST_ROWS_OF_A_TABLE or _num_slices(table) == 1:
        return linear(x, table.T)
    if any(jax.typeof(table).sharding.spec):  # partitioned by its type (explicit sharding)
        return linear(x, table.T)
    return _shared_few_rows_matmul(x, table)


def _few_rows_matmul(x: jax.Array, table: jax.Array) -> jax.Array:
    def plain(x: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.matmul(x, table.T)

    cpu = _flatten_leading(_matmul_by_slices)
    # Slices of a table that is partitioned over devices would be gathered.
    return platform_dependent(x, table, cpu=cpu, default=plain, partitioned=plain)


def _matmul_by_slices(x: jax.Array, table: jax.Array) -> jax.Array:
    """Multiply by the transpose, as a batched matmul whose left operands are slices of the table.

    Args:
        x: [rows, channels].
        table: [features, channels].

    Returns:
        [rows, features].
    """
    (rows, channels), count = x.shape, _num_slices(table)
    slices = table.reshape(count, -1, channels)
    copies = jnp.broadcast_to(x[None], (count, rows, channels))
    axes = (((2,), (2,)), ((0,), (0,)))
    products = lax.dot_general(slices, copies, axes)  # [slices, features of a slice, rows]
    return jnp.moveaxis(products, 2, 0).reshape(rows, -1)


def _num_slices(table: jax.Array) -> int:
    """Return the number of slices of a table, the largest one that divides its rows."""
    return max(count for count in range(1, _MOST_SLICES + 1) if not table.shape[0] % count)


_shared_few_rows_matmul = jax.jit(_few_rows_matmul)


def _int8_matmul(x: jax.Array, kernel: Int8Array) -> jax.Array:
    return linear(x, kernel.astype(x.dtype))


_shared_int8_matmul = jax.jit(_int8_matmul)


def _separate_int8_matmul(x: jax.Array, kernel: Int8Array) -> jax.Array:
    # In a call that is not inlined, because the CPU's scheduler would convert the kernels of all
    # layers to floats before the first matmul, and keep them.
    with set_xla_metadata(inlineable="false"):
        return _shared_int8_matmul(x, kernel)


def transposed_lhs_matmul(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Return x^T dy, accumulated in float32 or wider; for programs on CPU.

    Args:
        x: [rows, channels].
        dy: [rows, features], of the dtype of `x`.

    Returns:
        [channels, features], float32 or wider.
    """
    if x.dtype == jnp.float32 and _transposing_pays(x.shape, dy.shape[-1]):
        return materialize(materialize(dy.T) @ x).T
    if x.dtype == jnp.bfloat16:
        return bfloat16_matmul(x, dy, (0, 0))
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    return _dot(x, dy, (0, 0), preferred_element_type=accumulator)


def bfloat16_matmul(x: jax.Array, y: jax.Array, axes: _Axes = (1, 0)) -> jax.Array:
    """Multiply bfloat16 matrices with float32 accumulation, by the CPU's fast kernels.

    Args:
        x: [rows, columns].
        y: [rows, columns].
        axes: the contracted axis of each.

    Returns:
        [remaining axis of `x`, remaining axis of `y`], float32.
    """
    if axes[0] == 0:  # The kernels need the contracted axis innermost in the left operand.
        x, axes = row_major(x.T), (1, axes[1])
    # Bfloat16 multiplications, whatever the default precision.
    kind = {"precision": lax.Precision.DEFAULT, "preferred_element_type": jnp.float32}
    return _dot(x, y, axes, **kind)


def _transposing_pays(rows_and_channels: tuple[int, ...], features: int) -> bool:
    if not sizes_are_known(rows_and_channels):
        return False
    fewest = min(rows_and_channels)
    return 1 < features <= min(_FEW_FEATURES, fewest / _MIN_ROWS_AND_CHANNELS_PER_FEATURE)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if x.ndim == 2:
        return x @ kernel
    cpu = _flatten_leading(jnp.matmul)
    return platform_dependent(x, kernel, cpu=cpu, default=jnp.matmul, partitioned=jnp.matmul)


def _flatten_leading(
    matmul: Callable[..., jax.Array],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Extend a matmul of two matrices to a left operand with more leading axes.

    For programs on CPU: there the gradient of a matmul with such axes copies both operands
    transposed. In a program for a mesh, flattening gathers an array that is sharded along an inner
    axis, as the batch of [time, batch, features] in a recurrent network: float32 is not flattened
    there, and bfloat16 is, because its kernels are fast for matrices only.
    """

    def apply(x: jax.Array, y: jax.Array) -> jax.Array:
        result = matmul(x.reshape(-1, x.shape[-1]), y)  # [rows, features]
        return result.reshape(*x.shape[:-1], result.shape[-1])

    return apply


@jax.custom_jvp
def _few_features_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply; the kernel gradient is computed transposed."""
    return _matmul(x, kernel)


@_few_features_matmul.defjvp
def _few_features_matmul_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # A JVP rule, so that forward mode works too. Reverse mode transposes it.
    (x, kernel), (dx, dkernel) = primals, tangents
    cpu = _flatten_leading(_matmul_by_transposed_kernel)
    by_kernel = platform_dependent(x, dkernel, cpu=cpu, default=jnp.matmul, partitioned=jnp.matmul)
    return _few_features_matmul(x, kernel), _matmul(dx, kernel) + by_kernel


def _matmul_by_transposed_kernel(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply so that the transpose is the program of `transposed_lhs_matmul`."""
    transposed = materialize(kernel.T)
    return materialize(lax.dot_general(x, transposed, (((1,), (1,)), ((), ()))).T).T


# Jitted, so that all layers of a shape, and their gradients, are traced once.
_shared_matmul = jax.jit(_matmul)
_shared_few_features_matmul = jax.jit(_few_features_matmul)


def _bf16_x3_requested() -> bool:
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return bool(precision == _BF16_X3.name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _bf16_x3_matmul(x: jax.Array, y: jax.Array, role: _Role = "forward") -> jax.Array:
    """Multiply float32 matrices as high and low bfloat16 parts, without low times low.

    The two parts hold 16 of the 24 bits of an element. The error is about 5e-6 of the largest
    output (1e-5 for a few channels), that of a float32 matmul 5e-7, that of a bfloat16 matmul 2e-3.
    Infinite elements become NaN.

    References:
        Henry, Tang and Heinecke 2019, arXiv:1904.06376 (three products of two parts).
    """
    default = functools.partial(_contract, role=role, precision=_BF16_X3)
    return platform_dependent(x, y, cpu=_as_matrices(_three_matmuls, role), default=default)


def _three_matmuls(x: jax.Array, y: jax.Array, axes: _Axes) -> jax.Array:
    (x_high, x_low), (y_high, y_low) = map(_high_and_low, (x, y))
    matmul = functools.partial(bfloat16_matmul, axes=axes)
    return matmul(x_high, y_high) + (matmul(x_high, y_low) + matmul(x_low, y_high))


def _high_and_low(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Rounded by `reduce_precision`, because XLA removes a cast to bfloat16 and back. Materialized,
    # because XLA would move a part through a transpose, or multiply it as float32.
    high = lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    high, low = high.astype(jnp.bfloat16), (array - high).astype(jnp.bfloat16)
    return materialize(high), materialize(low)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _bf16_matmul(x: jax.Array, y: jax.Array, role: _Role = "forward") -> jax.Array:
    """Multiply bfloat16 arrays, rounding once."""

    def rounded(x: jax.Array, y: jax.Array, axes: _Axes) -> jax.Array:
        return bfloat16_matmul(x, y, axes).astype(x.dtype)

    default = functools.partial(_contract, role=role)
    return platform_dependent(x, y, cpu=_as_matrices(rounded, role), default=default)


def _contract(x: jax.Array, y: jax.Array, role: _Role, **kind: Any) -> jax.Array:
    """Multiply with all leading axes; see `_Role`."""
    last, leading = (x.ndim - 1,), tuple(range(x.ndim - 1))
    axes = {
        "forward": (last, (0,)),
        "input_gradient": (last, (1,)),
        "kernel_gradient": (leading, leading),
    }
    return lax.dot_general(x, y, (axes[role], ((), ())), **kind)


def _as_matrices(
    matmul: Callable[..., jax.Array], role: _Role
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make a matmul of two matrices compute what `_contract` does."""
    if role == "kernel_gradient":
        return lambda x, y: matmul(*(a.reshape(-1, a.shape[-1]) for a in (x, y)), (0, 0))
    return _flatten_leading(functools.partial(matmul, axes=(1, int(role == "input_gradient"))))


def _dot(x: jax.Array, y: jax.Array, axes: _Axes, **kind: Any) -> jax.Array:
    return lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), **kind)


def _with_gradient(matmul: Any) -> Any:
    """Give a matmul gradients that are matmuls of the same kind, and jit it."""

    def forward(x: jax.Array, y: jax.Array, role: _Role) -> tuple[jax.Array, _Pair]:
        return matmul(x, y, role), (x, y)

    def backward(role: _Role, residuals: _Pair, cotangent: jax.Array) -> _Pair:
        x, y = residuals
        match role:
            case "forward":
                dx = matmul(cotangent, y, "input_gradient")
                dy = matmul(x, cotangent, "kernel_gradient")
            case "input_gradient":
                dx = matmul(cotangent, y, "forward")
                dy = matmul(cotangent, x, "kernel_gradient")
            case "kernel_gradient":
                dx = matmul(y, cotangent, "input_gradient")
                dy = matmul(x, cotangent, "forward")
        return dx, dy

    matmul.defvjp(forward, backward)
    # Jitted, so that all layers of a shape, and their gradients, are traced once.
    return jax.jit(matmul, static_argnums=2)


_shared_bf16_x3_matmul, _shared_bf16_matmul = map(_with_gradient, (_bf16_x3_matmul, _bf16_matmul))
