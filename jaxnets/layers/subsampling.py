"""Convolutions with a stride that shorten a sound in front of the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import Precision
from jaxnets.functional.activations import activation
from jaxnets.functional.lengths import clear_padding
from jaxnets.layers.linear import Convolution, Initializer


def subsample(
    x: jax.Array,
    lengths: Any,
    *,
    features: int,
    strides: Sequence[int],
    activation_name: str,
    kernel_init: Initializer,
    precision: Precision,
) -> tuple[jax.Array, Any]:
    """Convolve a sound once for each stride, inside a compact module.

    Args:
        x: [batch, frames, channels]; what lies beyond the lengths has no influence.
        lengths: integer [batch] in [0, frames]; None counts all frames.
        features: channels of each convolution, of kernel size 3; its name is conv_0, conv_1, ...
        strides: by what each convolution shortens the sound.
        activation_name: behind each convolution.
        kernel_init: initializer of the kernels.
        precision: dtypes.

    Returns:
        [batch, fewer frames, features], 0 beyond the new lengths, and these; see
        `subsampled_lengths`. A length that is wrong stays wrong.
    """
    lengths = None if lengths is None else jnp.asarray(lengths)
    x, _ = clear_padding(x.astype(precision.compute), lengths)
    for index, stride in enumerate(strides):
        # Padded alike on both sides whatever the number of frames, so that a step sees the same
        # frames however long the array is. "SAME" pads by the number of frames.
        convolution = Convolution(
            features,
            3,
            strides=stride,
            padding=1,
            kernel_init=kernel_init,
            precision=precision,
            name=f"conv_{index}",
        )
        x = activation(activation_name)(convolution(x))
        if lengths is not None:
            lengths = jnp.where(lengths < 0, lengths, subsampled_lengths(lengths, (stride,)))
        # The next convolution sees beyond the end, where this one has left its bias.
        x, _ = clear_padding(x, lengths)
    return x, lengths


def subsampled_lengths(lengths: Any, strides: Sequence[int]) -> Any:
    """Divide lengths by each of the strides and round up.

    Args:
        lengths: an integer or an integer array [...].
        strides: of `subsample`.

    Example:
        >>> subsampled_lengths(31, (2, 3))
        6
    """
    for stride in strides:
        lengths = -(-lengths // stride)
    return lengths
