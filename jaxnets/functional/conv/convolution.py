"""Convolution over time, or over height and width, channels last.

Equivalent to `lax.conv_general_dilated`; only the CPU lowering differs. There `selection` chooses
an algorithm for the outputs and one for each gradient. The choice applies when the program is
lowered for its platform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.checks import check_sizes
from jaxnets.functional.conv import (
    batch_innermost,
    depthwise,
    im2col_matmul,
    offset_matmuls,
    selection,
    winograd,
)
from jaxnets.functional.lowering.platforms import platform_dependent, sizes_are_known
from jaxnets.functional.matmul import linear
from jaxnets.functional.windows import (
    Axes,
    ConvSpec,
    Padding,
    Size,
    broadcast_to_axes,
    dilated_size,
    padding_pairs,
    transposed_padding,
)


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Size = 1,
    padding: Padding = "SAME",
    dilation: Size = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolve over time, or over height and width.

    Reverse-mode differentiable any number of times; forward mode is not supported. Corresponds to
    `lax.conv_general_dilated` and `torch.nn.functional.conv2d`, with channels last.

    Args:
        x: [batch, time, channels] or [batch, height, width, channels].
        kernel: [time, channels / groups, features] or [height, width, channels / groups,
            features], of the dtype of `x`.
        strides: step between the windows of neighboring outputs.
        padding: "SAME", "VALID", one padding for all ends, or (low, high) pairs.
        dilation: step between the inputs of one window.
        groups: number of channel groups convolved separately; the number of channels is depthwise.

    Returns:
        [batch, ..., features], of the dtype of `x`.

    Raises:
        ValueError: shapes or types that do not fit together, no 1-D or 2-D input, or options out
            of range.

    Example:
        >>> image, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
        >>> convolution(image, kernel, padding="VALID").shape
        (1, 2, 2, 2)
    """
    spatial = x.ndim - 2
    if spatial not in (1, 2) or kernel.ndim != x.ndim:
        raise ValueError(
            f"convolution got x of shape {x.shape} and a kernel of shape {kernel.shape}; give "
            "[batch, time, channels] with a rank 3 kernel, or [batch, height, width, channels] "
            "with a rank 4 kernel"
        )
    if x.dtype != kernel.dtype:
        raise ValueError(f"x has type {x.dtype} and the kernel {kernel.dtype}; give both the same")
    if 0 in kernel.shape[:-2]:
        raise ValueError(f"a kernel of shape {kernel.shape} has no elements; give sizes above 0")
    check_sizes(groups=groups)
    channels, features = x.shape[-1], kernel.shape[-1]
    if channels != kernel.shape[-2] * groups or features % groups:
        raise ValueError(
            f"{channels} channels in {groups} groups do not fit a kernel of shape {kernel.shape}; "
            "kernel.shape[-2] must be channels / groups and groups must divide the features"
        )
    steps = broadcast_to_axes(strides, spatial, "strides")
    rates = broadcast_to_axes(dilation, spatial, "dilation")
    pairs = padding_pairs(padding, x.shape[1:-1], dilated_size(kernel.shape[:-2], rates), steps)
    spec = ConvSpec(steps, pairs, rates, groups)
    if selection.is_pointwise(selection.describe(x, kernel, spec)):
        if any(step > 1 for step in steps):
            return _shared_strided_pointwise(x, kernel, spec)
        return linear(x, kernel.reshape(channels, features))
    return _shared_convolution(x, kernel, spec)


def _xla_convolution(x: jax.Array, kernel: jax.Array, spec: ConvSpec) -> jax.Array:
    axes = "HW"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=spec.strides,
        padding=spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=spec.groups,
    )


def _strided_pointwise(x: jax.Array, kernel: jax.Array, spec: ConvSpec) -> jax.Array:
    """Convolve with a 1x1 kernel and strides: slice the positions, then multiply."""

    def sliced_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
        every = tuple(slice(None, None, step) for step in spec.strides)
        return linear(x[(slice(None), *every)], kernel.reshape(kernel.shape[-2:]))

    # Not on GPUs: XLA's compiler for them (JAX 0.11) aborts where a matmul reads such a slice.
    xla = functools.partial(_xla_convolution, spec=spec)
    return platform_dependent(x, kernel, cpu=sliced_matmul, default=xla)


_shared_strided_pointwise = jax.jit(_strided_pointwise, static_argnums=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x: jax.Array, kernel: jax.Array, spec: ConvSpec) -> jax.Array:
    xla = functools.partial(_xla_convolution, spec=spec)
    if not sizes_are_known(x.shape):
        return xla(x, kernel)
    problem = selection.describe(x, kernel, spec)
    algorithm = selection.select(selection.FORWARD, problem)
    if algorithm == "xla":
        return xla(x, kernel)
    cpu = functools.partial(FORWARD[algorithm], output_size=problem.output_size, spec=spec)
    return platform_dependent(x, kernel, cpu=cpu, default=xla)


def _save_operands(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return the forward half of a derivative whose residuals are both arrays."""

    def forward(first: jax.Array, second: jax.Array, *static: Any) -> tuple[jax.Array, Any]:
        return function(first, second, *static), (first, second)

    return forward


def _convolution_backward(
    spec: ConvSpec, residuals: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals

    def xla_dx(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda v: _xla_convolution(v, kernel, spec), x)(dy)[0]

    def xla_dkernel(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda v: _xla_convolution(x, v, spec), kernel)(dy)[0]

    if not sizes_are_known(x.shape):
        return xla_dx(kernel, dy), xla_dkernel(x, dy)
    problem = selection.describe(x, kernel, spec)
    input_gradient = INPUT_GRADIENT[selection.select(selection.INPUT_GRADIENT, problem)]
    kernel_gradient = KERNEL_GRADIENT[selection.select(selection.KERNEL_GRADIENT, problem)]
    cpu_dx = functools.partial(input_gradient, input_size=problem.input_size, spec=spec)
    cpu_dkernel = functools.partial(kernel_gradient, kernel_size=problem.kernel_size, spec=spec)
    # One choice each, so that the compiler can drop an input gradient that is not used.
    dx = platform_dependent(kernel, dy, cpu=cpu_dx, default=xla_dx)
    dkernel = platform_dependent(x, dy, cpu=cpu_dkernel, default=xla_dkernel)
    return dx, dkernel


_convolution.defvjp(_save_operands(_convolution), _convolution_backward)
# Jitted, so that all layers of a shape, and their gradients, are traced once.
_shared_convolution = jax.jit(_convolution, static_argnums=2)


def _flipped_kernel_input_gradient(
    kernel: jax.Array, dy: jax.Array, *, input_size: Axes, spec: ConvSpec
) -> jax.Array:
    """Convolve `dy` with the flipped kernel, channels and features exchanged in each group."""
    *kernel_size, channels, features = kernel.shape
    groups, spatial = spec.groups, tuple(range(len(kernel_size)))
    # [*kernel_size, channels / groups, groups, features / groups]
    flipped = jnp.flip(kernel, spatial).reshape(*kernel_size, channels, groups, features // groups)
    # [*kernel_size, features / groups, groups, channels / groups]
    flipped = jnp.swapaxes(flipped, -1, -3)
    flipped = flipped.reshape(*kernel_size, features // groups, groups * channels)
    pairs = transposed_padding(tuple(kernel_size), spec)
    return _shared_convolution(dy, flipped, spec._replace(padding=pairs))


def _winograd_input_gradient(
    kernel: jax.Array, dy: jax.Array, *, input_size: Axes, spec: ConvSpec
) -> jax.Array:
    return _differentiable_winograd(kernel, dy, input_size, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _differentiable_winograd(
    kernel: jax.Array, dy: jax.Array, input_size: Axes, spec: ConvSpec
) -> jax.Array:
    return winograd.input_gradient(kernel, dy, input_size=input_size, spec=spec)


def _differentiable_winograd_backward(
    input_size: Axes, spec: ConvSpec, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kernel, dy = residuals
    # <input gradient of dy, cotangent> = <dy, convolution of the cotangent>.
    convolved, pull = jax.vjp(lambda k: _shared_convolution(cotangent, k, spec), kernel)
    return pull(dy)[0], convolved


_differentiable_winograd.defvjp(
    _save_operands(_differentiable_winograd), _differentiable_winograd_backward
)

#: The functions behind the names in the tables of `selection`, but "pointwise" and "xla".
FORWARD: dict[str, Callable[..., jax.Array]] = {
    "winograd": winograd.convolve,
    "offset_matmuls": offset_matmuls.convolve,
    "batch_innermost": batch_innermost.convolve,
    "im2col_matmul": im2col_matmul.convolve,
}
INPUT_GRADIENT: dict[str, Callable[..., jax.Array]] = {
    "batch_innermost": batch_innermost.input_gradient,
    "winograd": _winograd_input_gradient,
    "flipped_kernel": _flipped_kernel_input_gradient,
    "im2col_matmul": im2col_matmul.input_gradient,
}
KERNEL_GRADIENT: dict[str, Callable[..., jax.Array]] = {
    "winograd": winograd.kernel_gradient,
    "offset_matmuls": offset_matmuls.kernel_gradient,
    "batch_innermost": batch_innermost.kernel_gradient,
    "depthwise": depthwise.kernel_gradient,
    "im2col_matmul_of_dy": im2col_matmul.kernel_gradient_from_dy,
    "im2col_matmul": im2col_matmul.kernel_gradient,
}
