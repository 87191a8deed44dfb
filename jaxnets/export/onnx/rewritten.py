"""Operations of JAX that are written by others of its operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _cumulative(
    combine: Callable[[jax.Array, jax.Array], jax.Array], neutral: float
) -> Callable[..., jax.Array]:
    def function(x: jax.Array, *, axis: int, reverse: bool) -> jax.Array:
        start: Any = neutral
        if np.isinf(neutral) and not jnp.issubdtype(x.dtype, jnp.floating):
            start = jnp.iinfo(x.dtype).min if neutral < 0 else jnp.iinfo(x.dtype).max
        steps = jnp.moveaxis(x, axis, 0)

        def step(total: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            total = combine(total, value)
            return total, total

        _, totals = lax.scan(step, jnp.full_like(steps[0], start), steps, reverse=reverse)
        return jnp.moveaxis(totals, 0, axis)

    return function


#: {name of an operation: function of its operands and its parameters}.
REWRITTEN: dict[str, Callable[..., jax.Array]] = {
    "cummax": _cumulative(lax.max, -np.inf),
    "cummin": _cumulative(lax.min, np.inf),
    "cumprod": _cumulative(lax.mul, 1),
    "cumlogsumexp": _cumulative(jnp.logaddexp, -np.inf),
}
