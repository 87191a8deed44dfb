"""Which algorithm computes a convolution on CPU: one table for each of its three computations.

The rows of a table are tried in order; the first whose condition holds runs. Other platforms run
XLA's convolution and its gradients. An algorithm is a module of this package that has one or more
of these functions:

    convolve(x, kernel, *, output_size, spec) -> y
    input_gradient(kernel, dy, *, input_size, spec) -> dx
    kernel_gradient(x, dy, *, kernel_size, spec) -> dkernel

Shapes: x and dx [batch, *input_size, channels], kernel and dkernel
[*kernel_size, channels / groups, features], y and its cotangent dy [batch, *output_size, features].
`convolution` maps the names in the tables to these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.functional.conv import im2col_matmul, winograd
from jaxnets.functional.lowering import layout
from jaxnets.functional.windows import Axes, ConvSpec, output_size

# im2col copies each input once for every kernel offset. That is cheaper than XLA's slow kernels for
# outputs of at most this many positions per channel (3 to 5 times with JAX 0.12), and for few
# channels and features, as long as the copies do not take too much memory.
_POSITIONS_PER_CHANNEL = 0.5
_MAX_PATCH_ELEMENTS = 2**24
# Use Winograd where multiplications saved / additions introduced reaches this: 1.1 to 1.9 times as
# fast forward, 1.2 to 2 times for the kernel gradient. Below, XLA's convolution is faster.
_WINOGRAD_GAIN, _WINOGRAD_KERNEL_GRADIENT_GAIN = 130, 60
# Transforming the kernel costs as much as this many additions per element of the kernel: small
# batches do not pay for it.
_KERNEL_TRANSFORM_COST = 8
# In bfloat16 one matmul per kernel offset pays from this many channels and features on: 0.5 to 0.7
# of the time (JAX 0.12: 0.6 to 1.1), the kernel gradient 0.6 to 1.
_BFLOAT16_CHANNELS, _BFLOAT16_KERNEL_GRADIENT_CHANNELS = 128, 32


class ConvProblem(NamedTuple):
    """The shapes, dtype and static arguments that decide which algorithm runs.

    Attributes:
        batch: number of examples.
        input_size: spatial shape of the input.
        kernel_size: spatial shape of the kernel.
        channels: of the input, of all groups.
        features: channels of the output.
        dtype: of input and kernel.
        spec: static arguments.
    """

    batch: int
    input_size: Axes
    kernel_size: Axes
    channels: int
    features: int
    dtype: Any
    spec: ConvSpec

    @property
    def output_size(self) -> Axes:
        """Spatial shape of the output."""
        return output_size(self.input_size, self.kernel_size, self.spec)


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        algorithm: name.
        condition: whether it runs, unless an earlier row's condition holds.
        reason: why.
    """

    algorithm: str
    condition: Callable[[ConvProblem], bool]
    reason: str


def describe(x: jax.Array, kernel: jax.Array, spec: ConvSpec) -> ConvProblem:
    """Return the problem of convolving `x` with `kernel`."""
    *kernel_size, _, features = kernel.shape
    batch, *input_size, channels = x.shape
    return ConvProblem(
        batch, tuple(input_size), tuple(kernel_size), channels, features, kernel.dtype, spec
    )


def select(table: tuple[Row, ...], problem: ConvProblem) -> str:
    """Return the algorithm of the first row whose condition holds."""
    return next(row.algorithm for row in table if row.condition(problem))


def winograd_gain(problem: ConvProblem, size: Axes) -> float:
    """Return multiplications saved / additions introduced by Winograd; 0 where it does not apply.

    Args:
        problem: the convolution.
        size: spatial shape of the array that is tiled: the outputs, or the inputs for the
            gradient with respect to them.
    """
    spec, positions = problem.spec, problem.batch * math.prod(size)
    ones = (1,) * len(size)
    plain = spec.strides == spec.dilation == ones and spec.groups == 1
    # Additions in a narrower dtype would lose digits before the multiplication.
    exact = problem.dtype in (jnp.float32, jnp.float64)
    if not plain or not exact or set(problem.kernel_size) != {winograd.KERNEL_SIZE}:
        return 0
    pairs = problem.channels * problem.features
    if positions * pairs == 0:
        return 0
    additions = problem.channels + problem.features + _KERNEL_TRANSFORM_COST * pairs / positions
    return winograd.multiplications_saved(size) * pairs / additions


def is_pointwise(problem: ConvProblem) -> bool:
    """Whether the convolution is a matmul over the channels: the condition of "pointwise"."""
    single = math.prod(problem.kernel_size) == 1
    return single and problem.spec.groups == 1 and not any(map(any, problem.spec.padding))


def _patches_fit(problem: ConvProblem) -> bool:
    positions = problem.batch * math.prod(problem.output_size)
    elements = positions * math.prod(problem.kernel_size) * problem.channels
    return problem.spec.groups == 1 and 0 < elements <= _MAX_PATCH_ELEMENTS


def _has_few_channels(problem: ConvProblem) -> bool:
    few = layout.is_few(problem.channels) and layout.is_few(problem.features)
    return few and _patches_fit(problem)


def _has_small_outputs(problem: ConvProblem) -> bool:
    positions = math.prod(problem.output_size)
    return positions <= _POSITIONS_PER_CHANNEL * problem.channels and _patches_fit(problem)


def _bfloat16_channels(problem: ConvProblem) -> int:
    """Return the smaller of channels and features, 0 where bfloat16 matmuls do not apply."""
    applies = problem.dtype == jnp.bfloat16 and problem.spec.groups == 1
    return min(problem.channels, problem.features) if applies else 0


def _has_unit_strides(problem: ConvProblem) -> bool:
    return all(stride == 1 for stride in problem.spec.strides)


def _has_fewer_features(problem: ConvProblem) -> bool:
    groups = problem.spec.groups
    most = min(im2col_matmul.JOIN_OFFSETS_BELOW, problem.channels // groups)
    return _has_unit_strides(problem) and problem.features // groups < most


FORWARD = (
    Row("pointwise", is_pointwise, "a 1x1 kernel is a matmul over the channels"),
    Row(
        "winograd",
        lambda p: winograd_gain(p, p.output_size) >= _WINOGRAD_GAIN,
        "3x3 kernels of many channels: 16 multiplications in place of 36",
    ),
    Row(
        "offset_matmuls",
        lambda p: _bfloat16_channels(p) >= _BFLOAT16_CHANNELS,
        "bfloat16 of many channels: XLA convolves it as float32, but has bfloat16 matmuls",
    ),
    Row(
        "batch_innermost",
        _has_few_channels,
        "channels that do not fill a SIMD register: the batch does",
    ),
    Row("im2col_matmul", _has_small_outputs, "small maps of many channels: XLA's kernels are slow"),
    Row("xla", lambda p: True, "everything else"),
)

INPUT_GRADIENT = (
    Row("batch_innermost", _has_few_channels, "as forward"),
    Row(
        "winograd",
        lambda p: winograd_gain(p, p.input_size) >= _WINOGRAD_GAIN,
        "as forward; the tiled array is the input's gradient",
    ),
    Row(
        "flipped_kernel",
        _has_unit_strides,
        "the transpose is a convolution of dy with the flipped kernel, selected by FORWARD",
    ),
    Row("im2col_matmul", lambda p: True, "strides: one matmul and col2im"),
)

# Never XLA's kernel gradient: inside a `lax.scan` it is 20 to 150 times slower than outside.
KERNEL_GRADIENT = (
    Row(
        "winograd",
        lambda p: winograd_gain(p, p.output_size) >= _WINOGRAD_KERNEL_GRADIENT_GAIN,
        "as forward, from a lower gain on",
    ),
    Row(
        "offset_matmuls",
        lambda p: _bfloat16_channels(p) >= _BFLOAT16_KERNEL_GRADIENT_CHANNELS,
        "as forward, from fewer channels on",
    ),
    Row("batch_innermost", _has_few_channels, "as forward"),
    Row(
        "depthwise",
        lambda p: 1 < p.spec.groups == p.channels,
        "one channel per group is no matmul",
    ),
    Row(
        "im2col_matmul_of_dy",
        _has_fewer_features,
        "few features and stride 1: im2col of dy copies less than im2col of x",
    ),
    Row("im2col_matmul", lambda p: True, "everything else"),
)
