"""Recurrences that are parallel in time: minGRU and minLSTM.

Their gates depend only on the inputs. So the state is a linear recurrence h' = a h + b, whose
coefficients are known for all steps in advance. An associative scan computes it in O(log time)
parallel steps.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxnets.core import at_least_float32
from jaxnets.functional.recurrence.scan import (
    Carry,
    Cell,
    Gates,
    Initializer,
    Products,
    Weights,
    split_gates,
)


def linear_recurrence(
    decay: jax.Array, update: jax.Array, start: jax.Array, *, reverse: bool = False
) -> jax.Array:
    """Compute h_t = decay_t h_(t-1) + update_t for all t, by an associative scan.

    Stable for decays in [0, 1]: their products can only underflow to 0. Reverse-mode
    differentiable any number of times; forward mode is not supported.

    Args:
        decay: floating [time, ...].
        update: floating [time, ...], same shape.
        start: h before the first step, floating [...].
        reverse: run from the last step to the first.

    Returns:
        h after each step, [time, ...], of the widest of the three types.

    Raises:
        ValueError: shapes or types that do not fit, or no step.

    Example:
        >>> half, ones = jnp.full(3, 0.5), jnp.ones(3)
        >>> linear_recurrence(half, ones, jnp.array(2.0)).tolist()
        [2.0, 2.0, 2.0]

    References:
        Blelloch 1990, "Prefix Sums and Their Applications", section 1.4.
    """
    shapes = f"decay {decay.shape}, update {update.shape} and start {start.shape}"
    if not decay.ndim or decay.shape != update.shape or decay.shape[1:] != start.shape:
        raise ValueError(f"{shapes} do not fit; give [time, ...], [time, ...] and [...]")
    if not len(decay):
        raise ValueError(f"{shapes} have no step; give at least 1")
    dtype = jnp.result_type(decay, update, start)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"decay, update and start have type {dtype}; give floats")
    operands = (x.astype(dtype) for x in (decay, update, start))
    return _linear_recurrence(reverse, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_recurrence(
    reverse: bool, decay: jax.Array, update: jax.Array, start: jax.Array
) -> jax.Array:
    def compose(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    first = -1 if reverse else 0
    update = update.at[first].add(decay[first] * start)
    return lax.associative_scan(compose, (decay, update), reverse=reverse)[1]


def _recurrence_forward(
    reverse: bool, decay: jax.Array, update: jax.Array, start: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    states = _linear_recurrence(reverse, decay, update, start)
    return states, (decay, start, states)


def _recurrence_backward(
    reverse: bool, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the same recurrence in the other direction: g_t = cotangent_t + decay_(t+1) g_(t+1)."""
    decay, start, states = residuals
    first = -1 if reverse else 0
    zero, previous = jnp.zeros_like(start), _shift(states, start, reverse=reverse)
    next_decay = _shift(decay, zero, reverse=not reverse)
    gradient = _linear_recurrence(not reverse, next_decay, cotangent, zero)
    return gradient * previous, gradient, decay[first] * gradient[first]


_linear_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _shift(x: jax.Array, start: jax.Array, *, reverse: bool) -> jax.Array:
    """Shift by one step: each step's value becomes that of the step before it, at first `start`."""
    pieces = [x[1:], start[None]] if reverse else [start[None], x[:-1]]
    return jnp.concatenate(pieces)


@dataclasses.dataclass(frozen=True)
class ParallelCell(Cell):
    """A cell whose gates depend only on the inputs: h' = decay h + update.

    Attributes:
        candidate: "positive" passes the candidate through g(x) = x + 0.5 where x >= 0 and
            sigmoid(x) elsewhere, as the paper's log-space version does; "identity" leaves it
            unchanged.

    Raises:
        ValueError: another `candidate`.
    """

    candidate: Literal["positive", "identity"] = "positive"

    def __post_init__(self) -> None:
        if self.candidate not in ("positive", "identity"):
            raise ValueError(f"candidate is {self.candidate!r}; choose 'positive' or 'identity'")

    @abc.abstractmethod
    def coefficients(self, x: Gates) -> tuple[jax.Array, jax.Array]:
        """Map the projected inputs of all gates, each [..., hidden_size], to decay and update."""

    @property
    def products(self) -> tuple[int, ...]:
        return ()

    def parameters(
        self, num_channels: int, hidden_size: int
    ) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        listed = super().parameters(num_channels, hidden_size)
        del listed["recurrent_kernel"]
        return listed

    def kernels(self, weights: Weights) -> list[jax.Array]:
        return []

    def advance(self, weights: Weights, carry: Carry, x: Gates, products: Products) -> Carry:
        decay, update = self.coefficients(x)
        return (decay * carry[0] + update,)

    def scan(
        self,
        weights: Weights,
        projected: jax.Array,
        carry: Carry,
        valid: jax.Array | None,
        *,
        reverse: bool,
    ) -> tuple[jax.Array, Carry]:
        decay, update = self.coefficients(split_gates(self, at_least_float32(projected)))
        if valid is not None:
            decay = jnp.where(valid[..., None], decay, jnp.ones((), decay.dtype))
            update = jnp.where(valid[..., None], update, jnp.zeros((), update.dtype))
        states = linear_recurrence(decay, update, carry[0], reverse=reverse)
        return states.astype(projected.dtype), (states[0 if reverse else -1],)

    def _candidate(self, x: jax.Array) -> jax.Array:
        if self.candidate == "identity":
            return x
        return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


@dataclasses.dataclass(frozen=True)
class MinGRUCell(ParallelCell):
    """The GRU without its dependence on the state; gates packed as update, candidate.

    z = sigmoid(x W + b), h' = (1 - z) h + z g(x W + b), each with its own W and b.

    Differs from the paper: no logarithms, because the associative scan multiplies only decays in
    (0, 1). So the initial state may be zero or negative.

    References:
        Feng et al. 2024, arXiv:2410.01201, section 3.1 and appendix B.
    """

    num_gates: ClassVar[int] = 2

    def coefficients(self, x: Gates) -> tuple[jax.Array, jax.Array]:
        update, candidate = x
        return jax.nn.sigmoid(-update), jax.nn.sigmoid(update) * self._candidate(candidate)


@dataclasses.dataclass(frozen=True)
class MinLSTMCell(ParallelCell):
    """The LSTM without its dependence on the state; gates packed as forget, input, candidate.

    f, i = sigmoid(x W + b); h' = f / (f + i) h + i / (f + i) g(x W + b).

    Differs from the paper as `MinGRUCell` does.

    References:
        Feng et al. 2024, arXiv:2410.01201, section 3.2 and appendix B.
    """

    num_gates: ClassVar[int] = 3

    def coefficients(self, x: Gates) -> tuple[jax.Array, jax.Array]:
        forget, input_gate, candidate = x
        # f / (f + i) = sigmoid(log f - log i), which stays exact where both gates underflow.
        log_ratio = jax.nn.softplus(-input_gate) - jax.nn.softplus(-forget)
        return jax.nn.sigmoid(log_ratio), jax.nn.sigmoid(-log_ratio) * self._candidate(candidate)
