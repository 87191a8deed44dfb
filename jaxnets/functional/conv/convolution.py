"""Convolution over time, or over height and width, channels last.

It means the plain XLA operation. How it is computed differs, and only on CPU: 3x3 kernels of many
channels by `winograd`, few channels by `few_channels`, small maps of many channels as one matrix
product, and so the gradients, because inside a `lax.scan` XLA's kernel gradient is 20 to 150 times
slower than outside. What runs is chosen when the program is compiled for its platform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.conv import batch_innermost, offset_matmuls, winograd
from jaxnets.functional.lowering import layout
from jaxnets.functional.lowering.chunks import sum_over_chunks
from jaxnets.functional.lowering.layout import materialize
from jaxnets.functional.lowering.platforms import platform_dependent
from jaxnets.functional.matmul import kernel_gradient, linear
from jaxnets.functional.windows import (
    Axes,
    ConvSpec,
    Padding,
    Size,
    col2im,
    dilated_size,
    im2col,
    offsets_of,
    padded,
    padding_pairs,
    per_axis,
)

# Below this many channels, or features, one matrix product over all kernel offsets beats one
# product for each.
_JOIN_OFFSETS_BELOW = 16
# So many numbers of patches stay in the cache of a core between being copied and being multiplied:
# larger batches are summed chunk by chunk, which is up to twice as fast.
_CACHED_PATCHES = 2**20
# As one matrix product, a convolution copies each input once for every kernel offset. That is
# cheaper than the slow kernels which XLA has where an output map has at most this many positions
# for each channel (3 to 5 times with JAX 0.12), and for few channels and features, as long as the
# copies do not take too much memory.
_POSITIONS_PER_CHANNEL = 0.5
_MOST_PATCHES = 2**24
# Winograd's way pays where it saves so many products for each number that it sums (1.1 to 1.9 times
# as fast forward, 1.2 to 2 times for the kernel's gradient; below, XLA's convolution is faster).
_SAVED_FORWARD, _SAVED_KERNEL_GRADIENT = 130, 60
# In bfloat16 a product for each tap pays from so many channels and features on: 0.5 to 0.7 of the
# time (JAX 0.12: 0.6 to 1.1), the kernel's gradient 0.6 to 1.
_NARROW_FORWARD, _NARROW_KERNEL_GRADIENT = 128, 32
# The sums of the taps cost as much as so many numbers for each element of the kernel: few examples
# do not pay for them.
_TAPS = 8


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

    Reverse-mode differentiable any number of times; forward mode is not supported.

    Args:
        x: [batch, time, channels] or [batch, height, width, channels].
        kernel: [time, channels / groups, features] or [height, width, channels / groups,
            features], of the dtype of `x`.
        strides: step between outputs.
        padding: "SAME", "VALID", a width, or (low, high) pairs.
        dilation: step between the inputs that one output sees.
        groups: number of channel groups convolved apart; the number of channels is depthwise.

    Returns:
        [batch, ..., features], of the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together, or no 1-D or 2-D input.

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
    channels, features = x.shape[-1], kernel.shape[-1]
    if groups < 1 or channels != kernel.shape[-2] * groups or features % groups:
        raise ValueError(
            f"{channels} channels in {groups} groups do not fit a kernel of shape {kernel.shape}; "
            "kernel.shape[-2] must be channels / groups and groups must divide the features"
        )
    steps = per_axis(strides, spatial, "strides")
    gaps = per_axis(dilation, spatial, "dilation")
    pairs = padding_pairs(padding, x.shape[1:-1], dilated_size(kernel.shape[:-2], gaps), steps)
    spec = ConvSpec(steps, pairs, gaps, groups)
    if groups == 1 and math.prod(kernel.shape[:-2]) == 1 and not any(map(any, pairs)):
        if any(step > 1 for step in steps):
            return _shared_thinned_convolution(x, kernel, spec)
        return linear(x, kernel.reshape(channels, features))
    return _shared_convolution(x, kernel, spec)


def _plain_convolution(x: jax.Array, kernel: jax.Array, spec: ConvSpec) -> jax.Array:
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


def _thinned_convolution(x: jax.Array, kernel: jax.Array, spec: ConvSpec) -> jax.Array:
    """Convolve with one tap and strides."""

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        every = tuple(slice(None, None, step) for step in spec.strides)
        return linear(x[(slice(None), *every)], kernel.reshape(kernel.shape[-2:]))

    # Not on GPUs: XLA's compiler for them (JAX 0.11) aborts where a product reads such a slice.
    plain = functools.partial(_plain_convolution, spec=spec)
    return platform_dependent(x, kernel, cpu=product, default=plain)


_shared_thinned_convolution = jax.jit(_thinned_convolution, static_argnums=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x: jax.Array, kernel: jax.Array, spec: ConvSpec) -> jax.Array:
    plain = functools.partial(_plain_convolution, spec=spec)
    shape = jax.eval_shape(plain, x, kernel).shape
    if _winograd_saves(kernel, shape, spec) >= _SAVED_FORWARD:
        fewer = functools.partial(winograd.convolve, padding=spec.padding)
        return platform_dependent(x, kernel, cpu=fewer, default=plain)
    few = _has_few_channels(kernel, shape, spec)
    small = math.prod(shape[1:-1]) <= _POSITIONS_PER_CHANNEL * x.shape[-1]
    if _narrow_channels(kernel, spec) >= _NARROW_FORWARD:
        convolve = offset_matmuls.convolve
    elif (few or small) and _patches_fit(kernel, shape, spec):
        convolve = batch_innermost.convolve if few else _matrix_convolution
    else:
        return plain(x, kernel)
    own = functools.partial(convolve, sizes=tuple(shape[1:-1]), spec=spec)
    return platform_dependent(x, kernel, cpu=own, default=plain)


def _patches_fit(kernel: jax.Array, shape: Sequence[int], spec: ConvSpec) -> bool:
    patches = math.prod(shape[:-1]) * math.prod(kernel.shape[:-1])
    return spec.groups == 1 and 0 < patches <= _MOST_PATCHES


def _has_few_channels(kernel: jax.Array, shape: Sequence[int], spec: ConvSpec) -> bool:
    few = all(map(layout.is_few, kernel.shape[-2:]))
    return few and _patches_fit(kernel, shape, spec)


def _narrow_channels(kernel: jax.Array, spec: ConvSpec) -> int:
    """Return how many channels and features a bfloat16 product of each tap has at least."""
    narrow = kernel.dtype == jnp.bfloat16 and spec.groups == 1
    return min(kernel.shape[-2:]) if narrow else 0


def _winograd_saves(kernel: jax.Array, shape: Sequence[int], spec: ConvSpec) -> float:
    """Return how many products `winograd` saves for each number that it sums; 0 if it cannot."""
    (batch, *outputs, _), taps = shape, kernel.shape[:-2]
    channels, features = kernel.shape[-2:]
    ones = (1,) * len(taps)
    fits = spec.strides == spec.dilation == ones and spec.groups == 1
    # Sums in a narrower dtype would lose digits before they are multiplied.
    exact = kernel.dtype in (jnp.float32, jnp.float64)
    if not fits or not exact or set(taps) != {winograd.TAPS} or 0 in shape:
        return 0
    pairs = channels * features
    sums = channels + features + _TAPS * pairs / (batch * math.prod(outputs))
    return winograd.products_saved(tuple(outputs)) * pairs / sums


def _matrix_convolution(
    x: jax.Array, kernel: jax.Array, *, sizes: Axes, spec: ConvSpec
) -> jax.Array:
    """Convolve, without groups, as one product of all patches with all of the kernel."""
    seen = _patches(padded(x, spec), offsets_of(kernel.shape[:-2]), sizes, spec)
    return linear(seen, kernel.reshape(-1, kernel.shape[-1]))


def _patches(inputs: jax.Array, offsets: Sequence[Axes], sizes: Axes, spec: ConvSpec) -> jax.Array:
    """Return what kernel offsets see, [batch, *sizes, offsets * channels]."""
    seen = im2col(offsets, inputs, sizes, spec)
    return seen[0] if len(seen) == 1 else jnp.concatenate(seen, axis=-1)


def _keeping_operands(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Return the forward half of a derivative that needs both arrays and nothing else."""

    def forward(first: jax.Array, second: jax.Array, spec: ConvSpec) -> tuple[jax.Array, Any]:
        return function(first, second, spec), (first, second)

    return forward


def _convolution_backward(
    spec: ConvSpec, residuals: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals

    def plain_dx(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda v: _plain_convolution(v, kernel, spec), x)(dy)[0]

    def plain_dkernel(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda v: _plain_convolution(x, v, spec), kernel)(dy)[0]

    few = _has_few_channels(kernel, dy.shape, spec)
    to_input = batch_innermost.input_gradient if few else _input_gradient
    to_kernel = batch_innermost.kernel_gradient if few else _kernel_gradient
    if _narrow_channels(kernel, spec) >= _NARROW_KERNEL_GRADIENT:
        to_kernel = offset_matmuls.kernel_gradient
    own_dx = functools.partial(to_input, size=x.shape[1:-1], spec=spec)
    own_dkernel = functools.partial(to_kernel, size=kernel.shape[:-2], spec=spec)
    saved = _winograd_saves(kernel, dy.shape, spec)
    if saved >= _SAVED_KERNEL_GRADIENT:
        own_dkernel = functools.partial(winograd.kernel_gradient, padding=spec.padding)
    # Two choices, so that the compiler can drop the input gradient that nobody asks for.
    dx = platform_dependent(kernel, dy, cpu=own_dx, default=plain_dx)
    dkernel = platform_dependent(x, dy, cpu=own_dkernel, default=plain_dkernel)
    return dx, dkernel


_convolution.defvjp(_keeping_operands(_convolution), _convolution_backward)
# As a compiled function it is traced once, with its gradient, for all layers of a shape.
_shared_convolution = jax.jit(_convolution, static_argnums=2)


def _input_gradient(kernel: jax.Array, dy: jax.Array, *, size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient [batch, *size, channels] of the input of a convolution."""
    strides, padding, dilation, groups = spec
    taps, (width, features) = kernel.shape[:-2], kernel.shape[-2:]
    if _winograd_saves(kernel, (len(dy), *size, width), spec) >= _SAVED_FORWARD:
        return _input_gradient_by_winograd(kernel, dy, spec)
    if all(stride == 1 for stride in strides):
        # The transpose of a convolution of stride 1 is the convolution with the flipped kernel.
        spatial = tuple(range(len(taps)))
        flipped = jnp.flip(kernel, spatial).reshape(*taps, width, groups, features // groups)
        flipped = jnp.swapaxes(flipped, -1, -3).reshape(*taps, features // groups, groups * width)
        reach = dilated_size(taps, dilation)
        spans = zip(reach, padding, strict=True)
        pairs = tuple((r - 1 - low, r - 1 - high) for r, (low, high) in spans)
        return _shared_convolution(dy, flipped, ConvSpec(strides, pairs, dilation, groups))
    if groups > 1:
        ungrouped = spec._replace(groups=1)
        single = functools.partial(_input_gradient, size=size, spec=ungrouped)
        return _per_group(single, groups, kernel, dy)
    # Every output sends its share to every input it saw: one product, then a strided sum.
    shares = lax.dot_general(
        dy.reshape(-1, features),
        kernel.reshape(-1, features),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.promote_types(dy.dtype, jnp.float32),
    ).reshape(*dy.shape[:-1], math.prod(taps), width)
    total = col2im(jnp.moveaxis(shares, -2, 0), taps, size, spec)
    return total.astype(dy.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient_by_winograd(kernel: jax.Array, dy: jax.Array, spec: ConvSpec) -> jax.Array:
    return winograd.input_gradient(kernel, dy, padding=spec.padding)


def _input_gradient_backward(
    spec: ConvSpec, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kernel, dy = residuals
    # The gradient's product with the cotangent is that of `dy` with the cotangent's convolution.
    convolved, pull = jax.vjp(lambda k: _shared_convolution(cotangent, k, spec), kernel)
    return pull(dy)[0], convolved


_input_gradient_by_winograd.defvjp(
    _keeping_operands(_input_gradient_by_winograd), _input_gradient_backward
)


def _kernel_gradient(x: jax.Array, dy: jax.Array, *, size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient [*size, channels / groups, features] of the kernel of a convolution."""
    strides, padding, dilation, groups = spec
    channels, features = x.shape[-1], dy.shape[-1]
    if 1 < groups < channels:
        ungrouped = spec._replace(groups=1)
        single = functools.partial(_kernel_gradient, size=size, spec=ungrouped)
        return _per_group(single, groups, x, dy)
    unit = all(stride == 1 for stride in strides)
    if groups == 1 and unit and features < min(_JOIN_OFFSETS_BELOW, channels):
        # Seen from the inputs: the kernel gradient of the convolution that maps dy to x has the
        # same products, with as few channels as there are features.
        reach = dilated_size(size, dilation)
        spans = zip(reach, padding, strict=True)
        pairs = tuple((r - 1 - low, r - 1 - high) for r, (low, high) in spans)
        turned = _kernel_gradient(dy, x, size=size, spec=spec._replace(padding=pairs))
        spatial = tuple(range(len(size)))
        return jnp.swapaxes(jnp.flip(turned, spatial), -1, -2)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    offsets = offsets_of(size)
    inputs = padded(x, spec)
    if groups > 1:  # depthwise: each feature sees one channel
        outputs = _split_last(dy, channels)  # [batch, *outputs, channels, features / channels]
        summed = tuple(range(dy.ndim - 1))
        seen = [_patches(inputs, [offset], dy.shape[1:-1], spec) for offset in offsets]
        dkernel = jnp.stack([jnp.sum(p[..., None] * outputs, summed, wide) for p in seen])
        return dkernel.reshape(*size, channels // groups, features).astype(x.dtype)
    together = len(offsets) if channels < _JOIN_OFFSETS_BELOW else size[-1]

    def summed_products(inputs: jax.Array, dy: jax.Array) -> jax.Array:
        # Written down, where XLA would look for a chunk's place again in the loops of all offsets.
        inputs = materialize(inputs)
        gradients, products = dy.reshape(-1, features), []
        for first in range(0, len(offsets), together):
            seen = _patches(inputs, offsets[first : first + together], dy.shape[1:-1], spec)
            products.append(kernel_gradient(seen.reshape(-1, together * channels), gradients))
        return jnp.stack(products).reshape(*size, channels, features)

    patches = math.prod(dy.shape[:-1]) * len(offsets) * channels
    total = sum_over_chunks(
        summed_products, inputs, dy, num_elements=patches, chunk_elements=_CACHED_PATCHES
    )
    return total.astype(x.dtype)


def _per_group(function: Any, groups: int, first: jax.Array, second: jax.Array) -> jax.Array:
    """Apply `function` to each group of the last axes and join what it returns along its last."""
    arrays = (_split_last(first, groups), _split_last(second, groups))
    joined = jax.vmap(function, in_axes=-2, out_axes=-2)(*arrays)
    return joined.reshape(*joined.shape[:-2], groups * joined.shape[-1])


def _split_last(array: jax.Array, groups: int) -> jax.Array:
    return array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)
