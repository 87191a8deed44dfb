"""Convolution as the matmul of an im2col matrix with the kernel, for programs on CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.functional.lowering.chunks import sum_over_chunks
from jaxnets.functional.lowering.layout import materialize
from jaxnets.functional.matmul import linear, transposed_lhs_matmul
from jaxnets.functional.windows import (
    Axes,
    ConvSpec,
    col2im,
    im2col,
    kernel_offsets,
    pad_spatial,
    transposed_padding,
)

#: Below this many channels, or features, one matmul over all kernel offsets beats several.
JOIN_OFFSETS_BELOW = 16
# An im2col matrix of at most this many elements stays in the cache of a core between its copy and
# its matmul: larger batches are summed chunk by chunk, which is up to twice as fast.
_CACHED_PATCHES = 2**20


def convolve(x: jax.Array, kernel: jax.Array, *, output_size: Axes, spec: ConvSpec) -> jax.Array:
    """Convolve, without groups, as one matmul of all patches with the whole kernel.

    Args:
        x: [batch, *input_size, channels].
        kernel: [*kernel_size, channels, features].
        output_size: spatial shape of the outputs.
        spec: static arguments of the convolution.

    Returns:
        [batch, *output_size, features].
    """
    patches = _patches(pad_spatial(x, spec), kernel_offsets(kernel.shape[:-2]), output_size, spec)
    return linear(patches, kernel.reshape(-1, kernel.shape[-1]))


def input_gradient(
    kernel: jax.Array, dy: jax.Array, *, input_size: Axes, spec: ConvSpec
) -> jax.Array:
    """Return the gradient of the input: one matmul per group, then col2im.

    Args:
        kernel: [*kernel_size, channels / groups, features].
        dy: cotangent of the outputs, [batch, *output_size, features].
        input_size: spatial shape of the inputs.
        spec: static arguments of the convolution.

    Returns:
        [batch, *input_size, channels], of the dtype of `dy`.
    """
    if spec.groups > 1:
        one = functools.partial(input_gradient, input_size=input_size, spec=spec._replace(groups=1))
        return _per_group(one, spec.groups, kernel, dy)
    *kernel_size, channels, features = kernel.shape
    # [batch * output positions, offsets * channels]
    products = lax.dot_general(
        dy.reshape(-1, features),
        kernel.reshape(-1, features),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.promote_types(dy.dtype, jnp.float32),
    )
    columns = products.reshape(*dy.shape[:-1], math.prod(kernel_size), channels)
    columns = jnp.moveaxis(columns, -2, 0)  # [offsets, batch, *output_size, channels]
    return col2im(columns, tuple(kernel_size), input_size, spec).astype(dy.dtype)


def kernel_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: Axes, spec: ConvSpec) -> jax.Array:
    """Return the gradient of the kernel: im2col of `x` transposed, times `dy`.

    Args:
        x: [batch, *input_size, channels].
        dy: cotangent of the outputs, [batch, *output_size, features].
        kernel_size: spatial shape of the kernel.
        spec: static arguments of the convolution.

    Returns:
        [*kernel_size, channels / groups, features], of the dtype of `x`.
    """
    if spec.groups > 1:
        one = functools.partial(
            kernel_gradient, kernel_size=kernel_size, spec=spec._replace(groups=1)
        )
        return _per_group(one, spec.groups, x, dy)
    channels, features = x.shape[-1], dy.shape[-1]
    offsets, output_size = kernel_offsets(kernel_size), dy.shape[1:-1]
    # Offsets that share one matmul: all, or those of one row of the kernel.
    joined = len(offsets) if channels < JOIN_OFFSETS_BELOW else kernel_size[-1]

    def gradient_of_chunk(inputs: jax.Array, dy: jax.Array) -> jax.Array:
        # Materialized, or XLA would recompute the slice of the chunk in the loops of all offsets.
        inputs = materialize(inputs)
        rows, products = dy.reshape(-1, features), []  # [batch * output positions, features]
        for first in range(0, len(offsets), joined):
            patches = _patches(inputs, offsets[first : first + joined], output_size, spec)
            products.append(transposed_lhs_matmul(patches.reshape(-1, joined * channels), rows))
        # [offsets / joined, joined * channels, features]
        return jnp.stack(products).reshape(*kernel_size, channels, features)

    elements = math.prod(dy.shape[:-1]) * len(offsets) * channels
    total = sum_over_chunks(
        gradient_of_chunk,
        pad_spatial(x, spec),
        dy,
        num_elements=elements,
        chunk_elements=_CACHED_PATCHES,
    )
    return total.astype(x.dtype)


def kernel_gradient_from_dy(
    x: jax.Array, dy: jax.Array, *, kernel_size: Axes, spec: ConvSpec
) -> jax.Array:
    """Return the gradient of the kernel by im2col of `dy` in place of `x`; for stride 1.

    The convolution that maps `dy` to `x` has the kernel gradient of the same products, flipped
    and transposed.

    Args:
        x: [batch, *input_size, channels].
        dy: cotangent of the outputs, [batch, *output_size, features].
        kernel_size: spatial shape of the kernel.
        spec: static arguments of the convolution.

    Returns:
        [*kernel_size, channels / groups, features], of the dtype of `x`.
    """
    if spec.groups > 1:
        one = functools.partial(
            kernel_gradient_from_dy, kernel_size=kernel_size, spec=spec._replace(groups=1)
        )
        return _per_group(one, spec.groups, x, dy)
    pairs = transposed_padding(kernel_size, spec)
    flipped = kernel_gradient(
        dy, x, kernel_size=kernel_size, spec=spec._replace(padding=pairs)
    )  # [*kernel_size, features, channels]
    return jnp.swapaxes(jnp.flip(flipped, tuple(range(len(kernel_size)))), -1, -2)


def _patches(
    padded: jax.Array, offsets: Sequence[Axes], output_size: Axes, spec: ConvSpec
) -> jax.Array:
    """Return the im2col matrix of some offsets, [batch, *output_size, offsets * channels]."""
    columns = im2col(offsets, padded, output_size, spec)
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)


def _per_group(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    groups: int,
    first: jax.Array,
    second: jax.Array,
) -> jax.Array:
    """Apply a function to each group of the last axes and concatenate its results along theirs."""
    # [..., groups, size / groups]
    split = (a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups) for a in (first, second))
    results = jax.vmap(function, in_axes=-2, out_axes=-2)(*split)
    return results.reshape(*results.shape[:-2], groups * results.shape[-1])
