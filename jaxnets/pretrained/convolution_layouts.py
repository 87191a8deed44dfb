"""Layouts of the kernels of convolutions, channels first in the file and last here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxnets.pretrained.layouts import Array, AxisOrder


@dataclasses.dataclass(frozen=True)
class ConvolutionKernel(AxisOrder):
    """A convolution's kernel: [out, in, *window] in the file, [*window, in, out] here.

    Example:
        >>> import numpy as np
        >>> ConvolutionKernel().from_file([np.zeros((8, 3, 5, 5))])[0].shape
        (5, 5, 3, 8)
    """

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Return (2, ..., 1, 0).

        Raises:
            ValueError: fewer than 3 axes.
        """
        _check_window(ndim)
        return (*range(2, ndim), 1, 0)


@dataclasses.dataclass(frozen=True)
class TransposedConvolutionKernel:
    """The kernel of torch's transposed convolution: [in, out / groups, *window] in the file.

    Here it is [*window, in / groups, out], as `jax.lax.conv_general_dilated` takes it with an input
    dilation: it slides a window over the outputs, so the kernel is flipped.

    Attributes:
        groups: of channels.
        flip: flip the window; False for `layers.TransposedConvolution`, which flips it itself.

    Example:
        >>> import numpy as np
        >>> TransposedConvolutionKernel(groups=2).from_file([np.zeros((4, 3, 5))])[0].shape
        (5, 2, 6)
    """

    groups: int = 1
    flip: bool = True

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Bring the axes of each kernel to the order here."""
        return [self._from_file(array) for array in arrays]

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Undo it."""
        return [self._to_file(array) for array in arrays]

    def _from_file(self, array: Array) -> Array:
        _check_window(array.ndim)
        inputs, outputs, *window = array.shape
        if inputs % self.groups:
            raise ValueError(f"{inputs} channels do not split into {self.groups} groups")
        # [groups, in / groups, out / groups, *window]
        grouped = array.reshape(self.groups, inputs // self.groups, outputs, *window)
        ndim = grouped.ndim
        # [*window, in / groups, groups, out / groups]
        kernel = grouped.transpose(*range(3, ndim), 1, 0, 2)
        kernel = _flipped(kernel, channels=3) if self.flip else kernel
        return kernel.reshape(*window, inputs // self.groups, self.groups * outputs)

    def _to_file(self, array: Array) -> Array:
        *window, inputs, outputs = array.shape
        kernel = _flipped(array) if self.flip else array
        # [*window, in / groups, groups, out / groups]
        kernel = kernel.reshape(*window, inputs, self.groups, outputs // self.groups)
        rank = len(window)
        kernel = kernel.transpose(rank + 1, rank, rank + 2, *range(rank))
        return kernel.reshape(self.groups * inputs, outputs // self.groups, *window)


@dataclasses.dataclass(frozen=True)
class DepthwiseKernel:
    """A depthwise kernel of Keras: [*window, in, multiplier] in the file, [*window, 1, out] here.

    Attributes:
        multiplier: outputs of each input channel. It is not needed for reading.

    Example:
        >>> import numpy as np
        >>> DepthwiseKernel(2).from_file([np.zeros((3, 3, 5, 2))])[0].shape
        (3, 3, 1, 10)
    """

    multiplier: int = 1

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Bring the channels of each kernel to one axis."""
        results = []
        for array in arrays:
            _check_window(array.ndim)
            *window, inputs, multiplier = array.shape
            results.append(array.reshape(*window, 1, inputs * multiplier))
        return results

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Undo it."""
        return [array.reshape(*array.shape[:-2], -1, self.multiplier) for array in arrays]


@dataclasses.dataclass(frozen=True)
class KerasTransposedKernel:
    """The kernel of Keras' transposed convolution: [*window, out, in] in the file.

    Here it is [*window, in, out].

    Attributes:
        flip: flip the window; False for `layers.TransposedConvolution`, which flips it itself.

    Example:
        >>> import numpy as np
        >>> KerasTransposedKernel().from_file([np.zeros((4, 5, 8, 3))])[0].shape
        (4, 5, 3, 8)
    """

    flip: bool = True

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Exchange the channels of each kernel, and flip its window."""
        results = []
        for array in arrays:
            _check_window(array.ndim)
            kernel = array.swapaxes(-2, -1)
            results.append(_flipped(kernel) if self.flip else kernel)
        return results

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Undo it, which is the same."""
        return self.from_file(arrays)


@dataclasses.dataclass(frozen=True)
class PatchKernel:
    """A convolution of patches: [out, in, *window] in the file, a dense kernel of patches here.

    `functional.patches.patchify` flattens a patch row by row, channels last: [*window, in].

    Attributes:
        window: height and width of a patch.

    Example:
        >>> import numpy as np
        >>> PatchKernel((4, 4)).from_file([np.zeros((8, 3, 4, 4))])[0].shape
        (48, 8)
    """

    window: tuple[int, ...]

    def from_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Flatten each kernel.

        Raises:
            ValueError: another window, or fewer than 3 axes.
        """
        results = []
        for array in ConvolutionKernel().from_file(arrays):
            if array.shape[:-2] != self.window:
                raise ValueError(f"a patch of {array.shape[:-2]}, not {self.window}")
            results.append(array.reshape(math.prod(array.shape[:-1]), array.shape[-1]))
        return results

    def to_file(self, arrays: Sequence[Array]) -> list[Array]:
        """Bring each dense kernel to that of a convolution."""
        kernels = [array.reshape(*self.window, -1, array.shape[-1]) for array in arrays]
        return ConvolutionKernel().to_file(kernels)


def _flipped(kernel: Array, *, channels: int = 2) -> Array:
    """Flip the window of a kernel, whose last axes are those of channels."""
    return kernel[(slice(None, None, -1),) * (kernel.ndim - channels)]


def _check_window(ndim: int) -> None:
    if ndim < 3:
        raise ValueError(f"{ndim} axes, and a convolution's kernel has 3 or more")
