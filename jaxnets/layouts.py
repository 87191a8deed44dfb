"""How arrays lie in memory where a product reads them.

XLA's CPU compiler makes a transpose part of the product behind it, which then reads one operand
through strides: in bfloat16 not by its fast kernels at all, but converted to float32 (a layer of
attention with its gradient takes up to twice the time).
"""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxnets.fusion import computed_once
from jaxnets.platforms import by_platform


def laid_out(x: jax.Array) -> jax.Array:
    """On CPU, write an array down in the order of its axes before it is read.

    Args:
        x: of any shape, usually a transpose.

    Returns:
        `x`.
    """

    # A constraint of the layout gathers an array that is split over devices. A result that is
    # written down lies in that order, too, but is a copy more where a loop could write it.
    return by_platform(x, cpu=_row_by_row, default=_as_it_is, partitioned=computed_once)


# Not inside of `laid_out`: of one and the same function JAX remembers what it traced.
def _as_it_is(x: jax.Array) -> jax.Array:
    return x


def _row_by_row(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
