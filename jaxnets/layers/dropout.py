"""Dropout of elements, channels or whole examples."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxnets.checks import check_rate


class Dropout(nn.Module):
    """Zero elements at random in training and divide the rest by 1 - rate; stream "dropout".

    Corresponds to `flax.linen.Dropout`, with `train` in place of `deterministic`, and to
    `torch.nn.Dropout`; `shared_axes=(1,)` of [batch, time, channels] to `torch.nn.Dropout1d`.

    Attributes:
        rate: probability of zero, in [0, 1).
        per_example: drop whole examples of the batch instead of elements: on the branch of a
            residual block this is stochastic depth (Huang et al. 2016, arXiv:1603.09382).
        shared_axes: axes along which the mask is broadcast (`broadcast_dims` of Flax): (1,) drops
            the same channels at every step of [batch, time, channels] (Gal and Ghahramani 2016,
            arXiv:1512.05287).

    Raises:
        ValueError: a rate outside of [0, 1).
    """

    rate: float
    per_example: bool = False
    shared_axes: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_rate(self.rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return an array of the shape of `x`, [batch, ...]; `x` itself in evaluation."""
        shared = tuple(range(1, x.ndim)) if self.per_example else tuple(self.shared_axes)
        return nn.Dropout(self.rate, broadcast_dims=shared)(x, deterministic=not train)
