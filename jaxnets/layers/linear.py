"""Dense layers and convolutions.

Like all layers they follow one `Precision`: parameters are stored in `precision.parameter` and cast
to `precision.compute` where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import flax.linen as nn
import jax

from jaxnets import functional
from jaxnets.core import Precision
from jaxnets.functional.channels import along_channels
from jaxnets.functional.int8 import cast_kernel
from jaxnets.functional.lowering.partitioning import split_rows
from jaxnets.layers.parameters import parameter

Initializer: TypeAlias = Callable[..., jax.Array]


class Dense(nn.Module):
    """Multiply the last axis by a matrix and add a bias: y = x W + b.

    Corresponds to `flax.linen.Dense`, with the same parameters and initializers; `precision` takes
    the place of `param_dtype` and `dtype`. `torch.nn.Linear` stores the transposed kernel and draws
    kernel and bias from U(-1 / sqrt(channels), 1 / sqrt(channels)).

    Attributes:
        features: size of the last axis of the output.
        use_bias: add a bias; False before a norm, which subtracts any bias again.
        kernel_init: initializer of the matrix.
        bias_init: initializer of the bias.
        precision: dtypes of parameters and arithmetic.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., channels] to [..., features] in the compute dtype.

        Raises:
            ValueError: other channels than the layer was initialized with.
        """
        shape, policy = (x.shape[-1], self.features), self.precision
        kernel = parameter(
            self, "kernel", self.kernel_init, shape, policy.parameter, inputs=x.shape
        )
        y = functional.linear(x.astype(policy.compute), cast_kernel(kernel, policy.compute))
        if self.use_bias:
            bias = parameter(
                self, "bias", self.bias_init, (self.features,), policy.parameter, inputs=x.shape
            )
            y = y + along_channels(bias.astype(policy.compute), y)
        return split_rows(y)


class Convolution(nn.Module):
    """Convolve over time or over height and width, whichever the input has.

    Corresponds to `flax.linen.Conv`, with the same parameters and initializers; `dilation` is its
    `kernel_dilation`, `groups` its `feature_group_count`, and an int `kernel_size` holds for every
    spatial axis. Differs from `torch.nn.Conv1d` and `Conv2d` in the order of axes, the padding,
    which is 0 there, and the initializers. With strides, "SAME" may pad the high end only, where
    torch's `padding=1` pads both.

    Attributes:
        features: number of output channels.
        kernel_size: spatial shape of the kernel, one int for every spatial axis or one per axis.
        strides: step between the windows of neighboring outputs.
        padding: "SAME", "VALID", one padding for all ends, or (low, high) pairs.
        dilation: step between the inputs of one window.
        groups: number of channel groups convolved separately.
        use_bias: add a bias; False before a norm, which subtracts any bias again.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.
        precision: dtypes of parameters and arithmetic.
    """

    features: int
    kernel_size: functional.Size = 3
    strides: functional.Size = 1
    padding: functional.Padding = "SAME"
    dilation: functional.Size = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, ..., channels] to [batch, ..., features] in the compute dtype.

        Raises:
            ValueError: other channels than the layer was initialized with, groups that do not
                divide them, or inputs that are too small.
        """
        size, channels, policy = self.kernel_size, x.shape[-1], self.precision
        kernel_size = (size,) * (x.ndim - 2) if isinstance(size, int) else tuple(size)
        if channels % self.groups:
            raise ValueError(
                f"{channels} channels do not split into {self.groups} groups; "
                "choose groups that divide the channels"
            )
        shape = (*kernel_size, channels // self.groups, self.features)
        kernel = parameter(
            self, "kernel", self.kernel_init, shape, policy.parameter, inputs=x.shape
        )
        y = functional.convolution(
            x.astype(policy.compute),
            kernel.astype(policy.compute),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if self.use_bias:
            bias = parameter(
                self, "bias", self.bias_init, (self.features,), policy.parameter, inputs=x.shape
            )
            y = y + along_channels(bias.astype(policy.compute), y)
        return split_rows(y)
