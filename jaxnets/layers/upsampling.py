"""Upsampling of feature maps by 2: nearest neighbor, sub-pixel or transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import functional
from jaxnets.core import Precision
from jaxnets.functional.channels import along_channels
from jaxnets.layers.linear import Convolution, Initializer
from jaxnets.layers.parameters import parameter

UpsamplingMethod: TypeAlias = Literal["resize", "subpixel", "transposed"]


def check_upsampling(method: str) -> None:
    """Refuse a method that `Upsampling` does not have.

    Raises:
        ValueError: an unknown method; the message lists the known ones.
    """
    if method not in get_args(UpsamplingMethod):
        raise ValueError(
            f"unknown upsampling {method!r}; choose from {', '.join(get_args(UpsamplingMethod))}"
        )


def enlarge(x: jax.Array) -> jax.Array:
    """Repeat every pixel twice along height and width: nearest-neighbor upsampling by 2.

    Args:
        x: [batch, height, width, channels].

    Returns:
        [batch, 2 height, 2 width, channels].
    """
    batch, height, width, channels = x.shape
    # [batch, height, 2, width, 2, channels]
    grid = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return grid.reshape(batch, 2 * height, 2 * width, channels)


def enlarged_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve the map with every pixel repeated: `convolution(enlarge(x), kernel)`.

    Elements of the kernel that are multiplied with the same pixel are added first, separately for
    the four outputs of a pixel. What remains is one convolution of the small map with four times
    the features: for a 3x3 kernel 4/9 of the multiplications, and no large map in memory.

    Args:
        x: [batch, height, width, channels].
        kernel: [size, size, channels, features]; sums of its elements are rounded to its dtype.

    Returns:
        [batch, 2 height, 2 width, features], of the dtype of `x`.
    """
    size, low = kernel.shape[0], (kernel.shape[0] - 1) // 2
    # The first pixel in the window of even and odd outputs, relative to their own, and the number
    # of pixels in a window.
    starts = [(parity - low) // 2 for parity in (0, 1)]
    span = max((parity - low + size - 1) // 2 - starts[parity] + 1 for parity in (0, 1))
    # [parity, pixel in the window, kernel offset]: which offsets fall on a pixel
    sums = np.zeros((2, span, size), kernel.dtype)
    for parity, offset in np.ndindex(2, size):
        sums[parity, (parity - low + offset) // 2 - starts[parity], offset] = 1
    # [span, span, channels, row parity, column parity, features]
    summed = jnp.einsum("apt,bqu,tuio->pqiabo", sums, sums, kernel, precision="highest")
    y = functional.convolution(
        x,
        summed.reshape(span, span, x.shape[-1], -1).astype(x.dtype),
        padding=[(-starts[0], starts[1] + span - 1)] * 2,
    )
    height, width = x.shape[1:3]
    skip = starts[1] - starts[0]  # the windows of odd outputs start later by this
    parts = [
        part[:, a * skip : a * skip + height, b * skip : b * skip + width]
        for part, (a, b) in zip(jnp.split(y, 4, axis=-1), np.ndindex(2, 2), strict=True)
    ]
    return depth_to_space(jnp.concatenate(parts, axis=-1))


def depth_to_space(x: jax.Array) -> jax.Array:
    """Rearrange groups of four channels into squares of 2 x 2 pixels.

    Corresponds to `torch.nn.PixelShuffle(2)`, which orders the channels as features x square, not
    square x features; to TensorFlow's `depth_to_space` with the same order.

    Args:
        x: [batch, height, width, 4 features].

    Returns:
        [batch, 2 height, 2 width, features]; channel (2 i + j) features + f of a pixel is channel
        f of row i and column j of its square.
    """
    batch, height, width, channels = x.shape
    grid = x.reshape(batch, height, width, 2, 2, channels // 4)
    grid = jnp.swapaxes(grid, 2, 3)  # [batch, height, 2, width, 2, features]
    return grid.reshape(batch, 2 * height, 2 * width, channels // 4)


class EnlargedConvolution(nn.Module):
    """Double height and width by repeating every pixel, then convolve.

    Corresponds to `torch.nn.Upsample(scale_factor=2)` and a convolution with "SAME" padding.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel.
        use_bias: add a bias; False before a norm, which subtracts any bias again.
        kernel_init: initializer of the kernel.
        precision: dtypes of parameters and arithmetic.
    """

    features: int
    kernel_size: int = 3
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, 2 height, 2 width, features].

        Raises:
            ValueError: another number of channels than at initialization.
        """
        policy = self.precision
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = parameter(
            self, "kernel", self.kernel_init, shape, policy.parameter, inputs=x.shape
        )
        y = enlarged_convolution(x.astype(policy.compute), kernel)
        return _biased(self, y)


class TransposedConvolution(nn.Module):
    """Double height and width by the transpose of a convolution of stride 2.

    If the kernel size is not a multiple of 2 the windows overlap unevenly, which leaves
    checkerboard artifacts (Odena et al. 2016, doi:10.23915/distill.00003).

    A pixel of the output depends on every second element of the kernel along height and width: the
    layer is four ordinary convolutions, one for each pixel of a square of 2 x 2, and is
    initialized as these four.

    Corresponds to `flax.linen.ConvTranspose` with strides (2, 2) and `transpose_kernel=True`, whose
    kernel has its last two axes exchanged and another scale at the start; with a kernel of 4 to
    `torch.nn.ConvTranspose2d(channels, features, 4, stride=2, padding=1)`.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel, 2 or more.
        use_bias: add a bias; False before a norm, which subtracts any bias again.
        kernel_init: initializer of the kernels of the four convolutions.
        precision: dtypes of parameters and arithmetic.

    Raises:
        ValueError: a kernel of less than 2.
    """

    features: int
    kernel_size: int = 4
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        if self.kernel_size < 2:
            raise ValueError(
                f"kernel_size is {self.kernel_size}; a transposed convolution needs 2 or more, or "
                "three of four pixels depend on no input"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, 2 height, 2 width, features].

        Raises:
            ValueError: another number of channels than at initialization.
        """
        policy, (batch, height, width, channels) = self.precision, x.shape
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel = parameter(
            self, "kernel", self._interleaved, shape, policy.parameter, inputs=x.shape
        )
        x, kernel = x.astype(policy.compute), jnp.swapaxes(kernel, 2, 3).astype(policy.compute)
        zeros = jnp.zeros((batch, 2 * height, 2 * width, self.features), x.dtype)
        # The transpose is the input gradient of the convolution, with its CPU algorithms.
        _, transpose = jax.vjp(lambda y: functional.convolution(y, kernel, strides=2), zeros)
        (y,) = transpose(x)
        return _biased(self, y)

    def _interleaved(self, key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        kernel, size = jnp.zeros(shape, dtype), self.kernel_size
        for index in range(4):
            row, column = divmod(index, 2)
            sizes = (len(range(row, size, 2)), len(range(column, size, 2)))
            part = self.kernel_init(jax.random.fold_in(key, index), (*sizes, *shape[2:]), dtype)
            kernel = kernel.at[row::2, column::2].set(part)
        return kernel


def _biased(module: EnlargedConvolution | TransposedConvolution, y: jax.Array) -> jax.Array:
    if not module.use_bias:
        return y
    shape, dtype = (module.features,), module.precision.parameter
    bias = module.param("bias", nn.initializers.zeros, shape, dtype)
    return y + along_channels(bias.astype(y.dtype), y)


class Upsampling(nn.Module):
    """A convolution whose output has twice the height and width of its input.

    "resize" is `EnlargedConvolution`; "subpixel" convolves the small map to four times the features
    and rearranges them by `depth_to_space`; "transposed" is `TransposedConvolution`. The first two
    have no uneven overlap, which leaves checkerboard artifacts.

    Attributes:
        features: number of output channels.
        method: see above.
        kernel_size: height and width of the kernel; None is 3, or 4 if transposed.
        use_bias: add a bias; False before a norm, which subtracts any bias again.
        kernel_init: initializer of the kernel; None is Lecun's.
        precision: dtypes of parameters and arithmetic.

    Raises:
        ValueError: an unknown method.

    References:
        Odena et al. 2016, "Deconvolution and Checkerboard Artifacts", Distill (resize); Shi et al.
        2016, arXiv:1609.05158 (sub-pixel convolution).
    """

    features: int
    method: UpsamplingMethod = "resize"
    kernel_size: int | None = None
    use_bias: bool = True
    kernel_init: Initializer | None = None
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_upsampling(self.method)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, 2 height, 2 width, features].

        Raises:
            ValueError: another number of channels than at initialization.
        """
        fields: dict[str, Any] = {"use_bias": self.use_bias, "precision": self.precision}
        if self.kernel_init is not None:
            fields["kernel_init"] = self.kernel_init
        if self.method == "transposed":
            size = 4 if self.kernel_size is None else self.kernel_size
            return TransposedConvolution(self.features, size, name="conv", **fields)(x)
        size = 3 if self.kernel_size is None else self.kernel_size
        if self.method == "resize":
            return EnlargedConvolution(self.features, size, name="conv", **fields)(x)
        return depth_to_space(Convolution(4 * self.features, size, name="conv", **fields)(x))
