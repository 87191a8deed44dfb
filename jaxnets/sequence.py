"""Pure recurrent arithmetic: cells as step functions, and the one scan that runs any of them.

A cell says which weights it has, how it projects its inputs and how it makes one step. The scan
projects the inputs of all time steps as one matrix product in front of the loop, so that only the
product with the hidden state is left inside. Time comes first: [time, batch, features].
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.core import at_least_float32
from jaxnets.functional import linear

Initializer: TypeAlias = Callable[..., jax.Array]
#: The states of a cell, each [batch, hidden_size]; the first one is its output.
Carry: TypeAlias = tuple[jax.Array, ...]
#: Name -> array, as listed by `Cell.parameters`.
Weights: TypeAlias = Mapping[str, jax.Array]


class Cell(abc.ABC):
    """One step of a recurrent layer, as a pure function of weights, carry and projected input.

    The kernels and the bias of all gates are packed side by side, in the order that the cell
    names. A subclass defines `step`; one with further weights extends `parameters`.

    Attributes:
        num_gates: number of gates, candidates included.
        states: names of the arrays of the carry.
    """

    num_gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]] = ("hidden",)

    def parameters(
        self, num_channels: int, hidden_size: int
    ) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """List the weights: {name: (initializer, shape)}.

        Recurrent kernels start orthogonal, gate by gate (Saxe et al. 2013, arXiv:1312.6120).
        """
        packed, initializers = self.num_gates * hidden_size, jax.nn.initializers
        orthogonal = _each_gate(initializers.orthogonal(), self.num_gates)
        return {
            "input_kernel": (initializers.lecun_normal(), (num_channels, packed)),
            "recurrent_kernel": (orthogonal, (hidden_size, packed)),
            "bias": (initializers.zeros, (packed,)),
        }

    def project(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Map inputs [..., channels] of any number of steps to [..., num_gates * hidden_size]."""
        return _add(linear(x, weights["input_kernel"]), weights["bias"])

    @abc.abstractmethod
    def step(self, weights: Weights, carry: Carry, projected: jax.Array) -> Carry:
        """Advance one step.

        Args:
            weights: as listed by `parameters`.
            carry: states before the step, each [batch, hidden_size].
            projected: [batch, num_gates * hidden_size], from `project`.

        Returns:
            The states after the step.
        """


@dataclasses.dataclass(frozen=True)
class ElmanCell(Cell):
    """The simple recurrent cell: h' = activation(x W + h U + b).

    Attributes:
        activation: element-wise function.

    References:
        Elman 1990, Cognitive Science 14(2).
    """

    activation: Callable[[jax.Array], jax.Array] = jnp.tanh

    num_gates: ClassVar[int] = 1

    def step(self, weights: Weights, carry: Carry, projected: jax.Array) -> Carry:
        (hidden,) = carry
        return (self.activation(projected + _product(hidden, weights["recurrent_kernel"])),)


@dataclasses.dataclass(frozen=True)
class LSTMCell(Cell):
    """Long short-term memory; gates packed as input, forget, candidate, output.

    i, f, o = sigmoid(x W + h U + b), g = tanh(x W + h U + b), each with its own W, U and b;
    c' = f c + i g; h' = o tanh(c').

    Attributes:
        forget_bias: initial bias of the forget gate; 1 lets gradients through from the start.
        peephole: let the input and forget gates see c and the output gate see c', each through
            one weight per unit.
        layer_norm: normalise x W, h U and the c' that the output sees.

    Differs from the paper of the layer norm: the biases of the first two norms, which would be
    added to b, are left out.

    References:
        Hochreiter and Schmidhuber 1997, Neural Computation 9(8); Gers, Schraudolph and
        Schmidhuber 2002, JMLR 3 (peephole); Jozefowicz, Zaremba and Sutskever 2015, ICML (forget
        bias); Ba, Kiros and Hinton 2016, arXiv:1607.06450, equations 20 to 22.
    """

    forget_bias: float = 1.0
    peephole: bool = False
    layer_norm: bool = False

    num_gates: ClassVar[int] = 4
    states: ClassVar[tuple[str, ...]] = ("hidden", "memory")

    def parameters(
        self, num_channels: int, hidden_size: int
    ) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        listed = super().parameters(num_channels, hidden_size)
        zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
        (packed,) = listed["bias"][1]
        listed["bias"] = (self._initial_bias, (packed,))
        if self.peephole:
            listed["peephole"] = (zeros, (3, hidden_size))
        if self.layer_norm:
            listed["input_scale"] = listed["recurrent_scale"] = (ones, (packed,))
            listed["memory_scale"] = (ones, (hidden_size,))
            listed["memory_bias"] = (zeros, (hidden_size,))
        return listed

    def project(self, weights: Weights, x: jax.Array) -> jax.Array:
        projected = linear(x, weights["input_kernel"])
        if self.layer_norm:
            projected = _normalize(projected, weights["input_scale"]).astype(projected.dtype)
        return _add(projected, weights["bias"])

    def step(self, weights: Weights, carry: Carry, projected: jax.Array) -> Carry:
        hidden, memory = carry
        recurrent = _product(hidden, weights["recurrent_kernel"])
        if self.layer_norm:
            recurrent = _normalize(recurrent, weights["recurrent_scale"])
        write, forget, candidate, read = jnp.split(projected + recurrent, 4, axis=-1)
        if self.peephole:
            write = write + weights["peephole"][:1] * memory
            forget = forget + weights["peephole"][1:2] * memory
        written = jax.nn.sigmoid(write) * jnp.tanh(candidate)
        memory = jax.nn.sigmoid(forget) * memory + written
        if self.peephole:
            read = read + weights["peephole"][2:] * memory
        seen = memory
        if self.layer_norm:
            seen = _add(_normalize(memory, weights["memory_scale"]), weights["memory_bias"])
        return jax.nn.sigmoid(read) * jnp.tanh(seen), memory

    def _initial_bias(
        self, key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        return jnp.repeat(jnp.array([0, self.forget_bias, 0, 0], dtype), shape[0] // 4)


@dataclasses.dataclass(frozen=True)
class GRUCell(Cell):
    """Gated recurrent unit; gates packed as reset, update, candidate.

    r, z = sigmoid(x W + h U + b); h' = z h + (1 - z) n, where the candidate n is
    tanh(x W + (r h) U + b) if the reset comes before the product, as in the paper, and
    tanh(x W + r (h U + b') + b) if it comes after it, as in cuDNN and torch, which is faster.

    Attributes:
        reset: "before" or "after".

    Raises:
        ValueError: another `reset`.

    References:
        Cho et al. 2014, arXiv:1406.1078, equations 5 to 8.
    """

    reset: Literal["before", "after"] = "after"

    num_gates: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.reset not in ("before", "after"):
            raise ValueError(f"reset is {self.reset!r}; choose 'before' or 'after'")

    def parameters(
        self, num_channels: int, hidden_size: int
    ) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        listed = super().parameters(num_channels, hidden_size)
        if self.reset == "after":
            listed["candidate_bias"] = (jax.nn.initializers.zeros, (hidden_size,))
        return listed

    def step(self, weights: Weights, carry: Carry, projected: jax.Array) -> Carry:
        (hidden,) = carry
        kernel, size = weights["recurrent_kernel"], hidden.shape[-1]
        gates, candidate = projected[:, : 2 * size], projected[:, 2 * size :]
        if self.reset == "after":
            recurrent = _product(hidden, kernel)
            reset, update = _gates(gates + recurrent[:, : 2 * size])
            seen = reset * _add(recurrent[:, 2 * size :], weights["candidate_bias"])
        else:
            reset, update = _gates(gates + _product(hidden, kernel[:, : 2 * size]))
            seen = _product(reset * hidden, kernel[:, 2 * size :])
        return (update * hidden + (1 - update) * jnp.tanh(candidate + seen),)


@dataclasses.dataclass(frozen=True)
class MinimalGatedCell(Cell):
    """Minimal gated unit, two thirds of a GRU; gates packed as forget, candidate.

    f = sigmoid(x W + h U + b); h' = (1 - f) h + f tanh(x W + (f h) U + b).

    References:
        Zhou, Wu, Zhang and Zhou 2016, arXiv:1603.09420, Table 1.
    """

    num_gates: ClassVar[int] = 2

    def step(self, weights: Weights, carry: Carry, projected: jax.Array) -> Carry:
        (hidden,) = carry
        kernel, size = weights["recurrent_kernel"], hidden.shape[-1]
        forget = jax.nn.sigmoid(projected[:, :size] + _product(hidden, kernel[:, :size]))
        seen = _product(forget * hidden, kernel[:, size:])
        candidate = jnp.tanh(projected[:, size:] + seen)
        return ((1 - forget) * hidden + forget * candidate,)


_CELLS: dict[str, Cell] = {
    "rnn": ElmanCell(),
    "lstm": LSTMCell(),
    "gru": GRUCell(),
    "mgu": MinimalGatedCell(),
}


def find_cell(cell: str | Cell) -> Cell:
    """Look a cell up by name.

    Args:
        cell: "rnn", "lstm", "gru" or "mgu", each with its default options, or a `Cell`.

    Returns:
        The cell; a `Cell` comes back as it is.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.

    Example:
        >>> find_cell("gru")
        GRUCell(reset='after')
    """
    if isinstance(cell, Cell):
        return cell
    if cell not in _CELLS:
        raise ValueError(
            f"unknown cell {cell!r}; choose from {', '.join(_CELLS)}, or give a Cell such as "
            "LSTMCell(peephole=True)"
        )
    return _CELLS[cell]


def recurrent_scan(
    cell: Cell,
    weights: Weights,
    x: jax.Array,
    carry: Carry,
    *,
    valid: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, Carry]:
    """Run a cell over a sequence.

    Args:
        cell: the step.
        weights: of the dtype of the matrix products.
        x: [time, batch, channels]; finite at the steps that are not valid, see `mask_padding`.
        carry: states before the first step, each [batch, hidden_size], float32 or wider: the
            rounding of a narrower state would add up over time.
        valid: bool [time, batch]; the other steps leave the carry as it is and give 0. All are
            valid by default.
        reverse: go from the last step to the first, so that with padding at the end each
            sequence starts at its own last step.

    Returns:
        Outputs [time, batch, hidden_size], in the order of `x` and the dtype of the weights, and
        the carry after the last step taken.

    Example:
        >>> cell, x = ElmanCell(), jnp.ones((4, 2, 3))
        >>> weights = {
        ...     name: initializer(jax.random.key(0), shape, jnp.float32)
        ...     for name, (initializer, shape) in cell.parameters(3, 5).items()
        ... }
        >>> outputs, (hidden,) = recurrent_scan(cell, weights, x, (jnp.zeros((2, 5)),))
        >>> outputs.shape, bool(jnp.all(outputs[-1] == hidden))
        ((4, 2, 5), True)
    """

    def advance(
        carry: Carry, inputs: tuple[jax.Array, jax.Array | None]
    ) -> tuple[Carry, jax.Array]:
        projected, now = inputs
        after = cell.step(weights, carry, at_least_float32(projected))
        if now is not None:
            taken = now[:, None]
            after = tuple(jnp.where(taken, a, b) for a, b in zip(after, carry, strict=True))
        return after, after[0].astype(projected.dtype)

    projected = cell.project(weights, x)
    carry, outputs = lax.scan(advance, carry, (projected, valid), reverse=reverse)
    if valid is not None:
        outputs = jnp.where(valid[..., None], outputs, jnp.zeros((), outputs.dtype))
    return outputs, carry


def mask_padding(x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Clear what lies beyond the end of each sequence.

    Args:
        x: [time, batch, channels], floating.
        lengths: integer [batch] in [0, time].

    Returns:
        `x` with 0 beyond each length, whatever stood there, and the mask of the valid steps, bool
        [time, batch]. Where a length that is known only when the program runs is out of range,
        the whole sequence is NaN, so that it stops training instead of being cut in silence.

    Raises:
        ValueError: lengths of another shape or dtype, or known to be out of range.
    """
    time, batch = x.shape[:2]
    if jnp.shape(lengths) != (batch,) or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise ValueError(
            f"lengths of shape {jnp.shape(lengths)} and type {jnp.result_type(lengths)} do not "
            f"fit {batch} sequences; give one integer for each, shape ({batch},)"
        )
    if not isinstance(lengths, jax.core.Tracer):
        wrong = [int(n) for n in np.asarray(lengths) if not 0 <= n <= time]
        if wrong:
            raise ValueError(
                f"length {wrong[0]} is not in [0, {time}]; lengths count the steps of each "
                f"sequence, and the inputs have {time}"
            )
    lengths = jnp.asarray(lengths)
    wrong_length = (lengths < 0) | (lengths > time)
    valid = (jnp.arange(time)[:, None] < lengths[None]) | wrong_length[None]
    kept = jnp.where(wrong_length[None, :, None], jnp.asarray(jnp.nan, x.dtype), x)
    return jnp.where(valid[..., None], kept, jnp.zeros((), x.dtype)), valid


def _product(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return at_least_float32(hidden.astype(kernel.dtype) @ kernel)


def _gates(packed: jax.Array) -> list[jax.Array]:
    return jnp.split(jax.nn.sigmoid(packed), 2, axis=-1)


def _add(x: jax.Array, vector: jax.Array) -> jax.Array:
    return x + vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = at_least_float32(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * lax.rsqrt(variance + 1e-6) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def _each_gate(initializer: Initializer, num_gates: int) -> Initializer:
    def initialize(
        key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        gate = (shape[0], shape[1] // num_gates)
        keys = jax.random.split(key, num_gates)
        return jnp.concatenate([initializer(key, gate, dtype) for key in keys], axis=1)

    return initialize
