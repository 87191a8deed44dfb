"""Doubling the size of feature maps: resize, sub-pixel or transposed convolution."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import functional
from jaxnets.core import Precision
from jaxnets.functional.channels import along_channels
from jaxnets.layers.linear import Convolution, Initializer

UpsamplingMethod: TypeAlias = Literal["resize", "subpixel", "transposed"]


def check_upsampling(method: str) -> None:
    """Refuse what `Upsampling` does not know.

    Raises:
        ValueError: the unknown method and the known ones.
    """
    if method not in get_args(UpsamplingMethod):
        raise ValueError(
            f"unknown upsampling {method!r}; choose from {', '.join(get_args(UpsamplingMethod))}"
        )


def enlarge(x: jax.Array) -> jax.Array:
    """Repeat every pixel twice along height and width.

    Args:
        x: [batch, height, width, channels].

    Returns:
        [batch, 2 height, 2 width, channels].
    """
    batch, height, width, channels = x.shape
    grid = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return grid.reshape(batch, 2 * height, 2 * width, channels)


def enlarged_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve the map with every pixel repeated: `convolution(enlarge(x), kernel)`.

    Taps of the kernel that fall on the same pixel are added up first, once for each of the four
    pixels of a square. What is left is one convolution of the small map, to four times the
    features: for 3 x 3 taps 4/9 of the products, and no large map of the channels in memory.

    Args:
        x: [batch, height, width, channels].
        kernel: [size, size, channels, features]; sums of its taps are rounded to its dtype.

    Returns:
        [batch, 2 height, 2 width, features], of the dtype of `x`.
    """
    size, low = kernel.shape[0], (kernel.shape[0] - 1) // 2
    # The first pixel that even and odd outputs see, from their own, and how many from there on.
    starts = [(parity - low) // 2 for parity in (0, 1)]
    reach = max((parity - low + size - 1) // 2 - starts[parity] + 1 for parity in (0, 1))
    sums = np.zeros((2, reach, size), kernel.dtype)
    for parity, tap in np.ndindex(2, size):
        sums[parity, (parity - low + tap) // 2 - starts[parity], tap] = 1
    summed = jnp.einsum("apt,bqu,tuio->pqiabo", sums, sums, kernel, precision="highest")
    y = functional.convolution(
        x,
        summed.reshape(reach, reach, x.shape[-1], -1).astype(x.dtype),
        padding=[(-starts[0], starts[1] + reach - 1)] * 2,
    )
    height, width = x.shape[1:3]
    skip = starts[1] - starts[0]  # odd outputs start so much later
    squares = [
        part[:, a * skip : a * skip + height, b * skip : b * skip + width]
        for part, (a, b) in zip(jnp.split(y, 4, axis=-1), np.ndindex(2, 2), strict=True)
    ]
    return depth_to_space(jnp.concatenate(squares, axis=-1))


def depth_to_space(x: jax.Array) -> jax.Array:
    """Lay groups of four channels out as squares of 2 x 2 pixels.

    Args:
        x: [batch, height, width, 4 features].

    Returns:
        [batch, 2 height, 2 width, features]; channel (2 i + j) features + f of a pixel is channel
        f of row i and column j of its square.
    """
    batch, height, width, channels = x.shape
    grid = x.reshape(batch, height, width, 2, 2, channels // 4)
    return jnp.swapaxes(grid, 2, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


class EnlargedConvolution(nn.Module):
    """Double height and width by repeating every pixel, then convolve.

    Attributes:
        features: number of output channels.
        kernel_size: extent of the kernel.
        use_bias: False in front of a norm, which subtracts any bias again.
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
        """Map [batch, height, width, channels] to [batch, 2 height, 2 width, features]."""
        policy = self.precision
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, policy.parameter)
        y = enlarged_convolution(x.astype(policy.compute), kernel)
        return _biased(self, y)


class TransposedConvolution(nn.Module):
    """Double height and width by the transpose of a convolution of stride 2.

    Where the kernel size is not a multiple of 2 its taps overlap unevenly and the images come out
    chequered (Odena et al. 2016, doi:10.23915/distill.00003).

    Every pixel of the output sees each second tap of the kernel only, along height and width: the
    layer is four ordinary convolutions, one for each pixel of a square of 2 x 2, and is
    initialized as these four.

    Attributes:
        features: number of output channels.
        kernel_size: extent of the kernel, 2 or more.
        use_bias: False in front of a norm, which subtracts any bias again.
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
                "three of four pixels see nothing"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, 2 height, 2 width, features]."""
        policy, (batch, height, width, channels) = self.precision, x.shape
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel = self.param("kernel", self._interleaved, shape, policy.parameter)
        x, kernel = x.astype(policy.compute), jnp.swapaxes(kernel, 2, 3).astype(policy.compute)
        zeros = jnp.zeros((batch, 2 * height, 2 * width, self.features), x.dtype)
        # The transpose is the input gradient of the convolution, with its lowerings.
        _, transpose = jax.vjp(lambda y: functional.convolution(y, kernel, strides=2), zeros)
        (y,) = transpose(x)
        return _biased(self, y)

    def _interleaved(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        kernel, size = jnp.zeros(shape, dtype), self.kernel_size
        for index in range(4):
            row, column = divmod(index, 2)
            taps = (len(range(row, size, 2)), len(range(column, size, 2)))
            part = self.kernel_init(jax.random.fold_in(key, index), taps + shape[2:], dtype)
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

    "resize" repeats the pixels and convolves the larger map; "subpixel" convolves the small map to
    four times the channels and lays them out as pixels; "transposed" is the transpose of a
    convolution of stride 2. The first two do not leave checkerboards by uneven overlap.

    Attributes:
        features: number of output channels.
        method: see above.
        kernel_size: extent of the kernel; None is 3, or 4 if transposed.
        use_bias: False in front of a norm, which subtracts any bias again.
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
        """Map [batch, height, width, channels] to [batch, 2 height, 2 width, features]."""
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
