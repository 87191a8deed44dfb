"""A kernel with an update of low rank, which is never materialized in a dense layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import at_least_float32
from jaxnets.functional.int8 import cast_kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankKernel:
    """The kernel (base + a diag(scale) b) diag(columns), as its factors.

    A module takes it in place of the array. `functional.linear`, and so `layers.Dense`, multiplies
    by base, a and b in turn: nothing of the size of `base` is made, neither forward nor backward,
    and members of a population share one `base`. Any other layer gets `merged`, as an array: in
    float32 or wider, because an update may be smaller than half a step of a bfloat16 base.

    Attributes:
        base: [..., channels, features], an array or an `Int8Array`; leading axes are those of
            layers in a loop.
        a: [..., channels, rank].
        b: [..., rank, features].
        scale: [..., rank]; 0 where a rank is not used.
        columns: [..., features], or None for ones.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    columns: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        shape: tuple[int, ...] = self.base.shape
        return shape

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Type of its elements, float32 or wider."""
        return jnp.promote_types(self.base.dtype, jnp.float32)

    @property
    def scaled_a(self) -> jax.Array:
        """The matrix a diag(scale), [..., channels, rank]."""
        return self.a * self.scale[..., None, :]

    def astype(self, dtype: Any) -> LowRankKernel:
        """Convert the base, the factors and the scales.

        Args:
            dtype: of the arithmetic; a base in int8 stays so.

        Returns:
            The kernel, still in factors.
        """
        columns = None if self.columns is None else self.columns.astype(dtype)
        return LowRankKernel(
            base=cast_kernel(self.base, dtype),
            a=self.a.astype(dtype),
            b=self.b.astype(dtype),
            scale=self.scale.astype(dtype),
            columns=columns,
        )

    def merged(self) -> jax.Array:
        """Return the kernel as an array.

        Returns:
            [..., channels, features], in float32 or wider.
        """
        wide = jax.tree.map(at_least_float32, dataclasses.replace(self, base=None))
        update = wide.scaled_a @ wide.b
        kernel = self.base.astype(update.dtype) + update
        if wide.columns is not None:
            kernel = kernel * wide.columns[..., None, :]
        return kernel

    @property
    def T(self) -> jax.Array:
        """The transposed kernel, as an array."""
        return self.merged().T

    def __jax_array__(self) -> jax.Array:
        return self.merged()
