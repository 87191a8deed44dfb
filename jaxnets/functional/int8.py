"""Arrays of floats stored as int8, for inference."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale"],
    meta_fields=["axis", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Int8Array:
    """An array as int8 values and a scale for each group of them: values * scale.

    A module takes it in place of an array, and converts it where it is used.

    Attributes:
        values: int8 of the shape of the array.
        scale: float32, of that shape with one element per group on `axis`.
        axis: negative index of the axis that is divided into groups.
        dtype: of the array that was quantized.
    """

    values: jax.Array
    scale: jax.Array
    axis: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return int(self.values.nbytes + self.scale.nbytes)

    def astype(self, dtype: Any) -> jax.Array:
        """Return the array of floats, multiplied in float32 and then converted.

        Args:
            dtype: floating.

        Returns:
            [...], the shape of `values`.
        """
        grouped = _grouped(self.values, self.axis, self.scale.shape[self.axis])
        scale = jnp.expand_dims(self.scale, self.axis)
        return (grouped.astype(jnp.float32) * scale).reshape(self.shape).astype(dtype)

    @property
    def T(self) -> jax.Array:
        """The transposed array of floats."""
        return self.astype(self.dtype).T

    def __getitem__(self, index: Any) -> jax.Array:
        return self.astype(self.dtype)[index]

    def __jax_array__(self) -> jax.Array:
        return self.astype(self.dtype)


def quantize_int8_array(
    array: jax.Array, *, axis: int = -2, group_size: int | None = None
) -> Int8Array:
    """Round an array to int8, with the largest absolute value of each group as 127.

    scale = max |x| / 127 over the group (1 where all are 0) and values = round(x / scale), ties to
    even. So |x - values * scale| <= scale / 2, up to the rounding of float32.

    Args:
        array: floating [...], finite and known, so outside of a compiled function.
        axis: negative index of the axis along which elements share a scale; -2 for a kernel
            [channels, features], which gives scales [1, features], one per output channel.
        group_size: elements of a group; None takes the whole axis. It divides the axis.

    Returns:
        Int8Array with about 1 + 4 / group_size bytes an element.

    Raises:
        ValueError: `group_size` does not divide the axis.

    Example:
        >>> kernel = quantize_int8_array(jnp.array([[1.0, -0.5], [0.25, 1.0]]))
        >>> kernel.values.tolist(), kernel.scale.shape
        ([[127, -64], [32, 127]], (1, 2))
    """
    size = array.shape[axis]
    group_size = size if group_size is None else group_size
    if group_size < 1 or size % group_size:
        raise ValueError(
            f"group_size {group_size} does not divide axis {axis} of an array of shape "
            f"{array.shape}; give a divisor of {size}"
        )
    # By NumPy, because XLA divides by a broadcast number as a product with its reciprocal, which
    # rounds twice: some ties would become another integer.
    grouped = _grouped(np.asarray(array, np.float32), axis, size // group_size)
    largest = np.max(np.abs(grouped), axis=axis, keepdims=True)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(127))
    values = np.clip(np.rint(grouped / scale), -127, 127).astype(np.int8)
    return Int8Array(
        values=jnp.asarray(values.reshape(array.shape)),
        scale=jnp.asarray(np.squeeze(scale, axis)),
        axis=axis,
        dtype=jnp.dtype(array.dtype),
    )


def cast_kernel(kernel: Any, dtype: Any) -> Any:
    """Convert a kernel for `linear`, which converts an `Int8Array` itself, where it multiplies.

    Args:
        kernel: [channels, features], or an `Int8Array`.
        dtype: of the arithmetic.

    Returns:
        The kernel in that dtype; an `Int8Array` as it is.
    """
    return kernel if isinstance(kernel, Int8Array) else kernel.astype(dtype)


def _grouped(array: Any, axis: int, groups: int) -> Any:
    """Split `axis`, negative, into groups and their elements: [..., groups, elements, ...]."""
    split = array.ndim + axis
    shape = array.shape
    size = shape[split] // groups
    return array.reshape(*shape[:split], groups, size, *shape[split + 1 :])
