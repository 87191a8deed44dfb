"""Convolutional subsampling: strided convolutions that shorten a sound before other layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_rank
from jaxnets.core import Precision, at_least_int32
from jaxnets.functional.activations import activation
from jaxnets.functional.lengths import clear_padding
from jaxnets.layers.linear import Convolution, Initializer


def subsample(
    inputs: jax.Array,
    lengths: Any,
    *,
    caller: nn.Module,
    features: int,
    strides: Sequence[int],
    activation_name: str,
    kernel_init: Initializer,
    precision: Precision,
) -> tuple[jax.Array, Any]:
    """Shorten a sound by one convolution per stride, inside a compact module.

    Args:
        inputs: [batch, frames, channels]; frames beyond the lengths have no influence.
        lengths: integer [batch] in [0, frames]; None means that all frames are valid.
        caller: the module, for messages.
        features: channels of each convolution, of kernel size 3; its name is conv_0, conv_1, ...
        strides: of each convolution.
        activation_name: applied after each convolution.
        kernel_init: initializer of the kernels.
        precision: dtypes.

    Returns:
        [batch, fewer frames, features], 0 beyond the new lengths, and the new lengths, which are
        `subsampled_lengths`. A length out of range stays out of range.

    Raises:
        ValueError: inputs of another rank or without a frame, or lengths that do not fit.
    """
    check_rank(inputs, caller, layouts=["[batch, frames, channels]"])
    if not inputs.shape[1]:
        raise ValueError(f"inputs of shape {inputs.shape} have no frame; give at least 1")
    lengths = None if lengths is None else at_least_int32(jnp.asarray(lengths))
    x, _ = clear_padding(inputs.astype(precision.compute), lengths)
    for index, stride in enumerate(strides):
        # The same padding on both sides for every number of frames, so that an output depends on
        # the same frames whatever the length of the array. "SAME" depends on the number of frames.
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
        # The window of the next convolution reaches beyond the end, where this one left its bias.
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
    lengths = at_least_int32(lengths)
    for stride in strides:
        lengths = -(-lengths // stride)
    return lengths
