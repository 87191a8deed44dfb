"""The classic recurrent cells as pure step functions: Elman, LSTM, GRU, minimal gated unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxnets.functional.channels import along_channels
from jaxnets.functional.matmul import linear
from jaxnets.functional.normalization import layer_norm
from jaxnets.functional.recurrence.scan import Carry, Cell, Gates, Initializer, Products, Weights


@dataclasses.dataclass(frozen=True)
class ElmanCell(Cell):
    """The simple recurrent cell: h' = activation(x W + h U + b).

    Corresponds to `flax.linen.SimpleCell` and `torch.nn.RNNCell`, which has two biases.

    Attributes:
        activation: elementwise function.

    References:
        Elman 1990, Cognitive Science 14(2).
    """

    activation: Callable[[jax.Array], jax.Array] = jnp.tanh

    num_gates: ClassVar[int] = 1

    def advance(self, weights: Weights, carry: Carry, x: Gates, products: Products) -> Carry:
        (hidden,), (projected,) = carry, x
        (recurrent,) = products[0](hidden)
        return (self.activation(projected + recurrent),)


@dataclasses.dataclass(frozen=True)
class LSTMCell(Cell):
    """Long short-term memory; gates packed as input, forget, candidate, output.

    i, f, o = sigmoid(x W + h U + b), g = tanh(x W + h U + b), each with its own W, U and b;
    c' = f c + i g; h' = o tanh(c'). Corresponds to `flax.linen.OptimizedLSTMCell`, whose kernels
    are separate parameters, and to `torch.nn.LSTMCell`, which has two biases.

    Attributes:
        forget_bias: initial bias of the forget gate; 1 lets gradients through from the start.
        peephole: add c to the input and forget gates and c' to the output gate, each scaled by
            one weight per unit.
        layer_norm: normalize x W, h U and, in h' only, c'.

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
            projected = layer_norm(projected, weights["input_scale"]).astype(projected.dtype)
        return projected + along_channels(weights["bias"], projected)

    def advance(self, weights: Weights, carry: Carry, x: Gates, products: Products) -> Carry:
        hidden, memory = carry
        recurrent = products[0](hidden)
        if self.layer_norm:
            packed = jnp.concatenate(recurrent, axis=-1)
            recurrent = jnp.split(layer_norm(packed, weights["recurrent_scale"]), 4, axis=-1)
        input_gate, forget_gate, candidate, output_gate = map(jnp.add, x, recurrent)
        if self.peephole:
            input_gate = input_gate + weights["peephole"][:1] * memory
            forget_gate = forget_gate + weights["peephole"][1:2] * memory
        update = jax.nn.sigmoid(input_gate) * jnp.tanh(candidate)
        memory = jax.nn.sigmoid(forget_gate) * memory + update
        if self.peephole:
            output_gate = output_gate + weights["peephole"][2:] * memory
        normalized = memory
        if self.layer_norm:
            normalized = layer_norm(memory, weights["memory_scale"], weights["memory_bias"])
        return jax.nn.sigmoid(output_gate) * jnp.tanh(normalized), memory

    def _initial_bias(
        self, key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        return jnp.repeat(jnp.array([0, self.forget_bias, 0, 0], dtype), shape[0] // 4)


@dataclasses.dataclass(frozen=True)
class GRUCell(Cell):
    """Gated recurrent unit; gates packed as reset, update, candidate.

    r, z = sigmoid(x W + h U + b); h' = z h + (1 - z) n. The candidate n is
    tanh(x W + (r h) U + b) if the reset comes before the matmul, as in the paper, and
    tanh(x W + r (h U + b') + b) if it comes after it, as in `torch.nn.GRUCell`,
    `flax.linen.GRUCell` and cuDNN, which is faster.

    Attributes:
        reset: "before" or "after" the matmul with U.

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

    @property
    def products(self) -> tuple[int, ...]:
        return (3,) if self.reset == "after" else (2, 1)

    def parameters(
        self, num_channels: int, hidden_size: int
    ) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        listed = super().parameters(num_channels, hidden_size)
        if self.reset == "after":
            listed["candidate_bias"] = (jax.nn.initializers.zeros, (hidden_size,))
        return listed

    def advance(self, weights: Weights, carry: Carry, x: Gates, products: Products) -> Carry:
        (hidden,) = carry
        recurrent = products[0](hidden)
        reset = jax.nn.sigmoid(x[0] + recurrent[0])
        update = jax.nn.sigmoid(x[1] + recurrent[1])
        if self.reset == "after":
            candidate = reset * (recurrent[2] + weights["candidate_bias"][None])
        else:
            (candidate,) = products[1](reset * hidden)
        return (update * hidden + (1 - update) * jnp.tanh(x[2] + candidate),)


@dataclasses.dataclass(frozen=True)
class MinimalGatedCell(Cell):
    """Minimal gated unit, with two thirds of a GRU's weights; gates packed as forget, candidate.

    f = sigmoid(x W + h U + b); h' = (1 - f) h + f tanh(x W + (f h) U + b).

    References:
        Zhou, Wu, Zhang and Zhou 2016, arXiv:1603.09420, Table 1.
    """

    num_gates: ClassVar[int] = 2

    @property
    def products(self) -> tuple[int, ...]:
        return (1, 1)

    def advance(self, weights: Weights, carry: Carry, x: Gates, products: Products) -> Carry:
        (hidden,), (recurrent,) = carry, products[0](carry[0])
        forget = jax.nn.sigmoid(x[0] + recurrent)
        (recurrent,) = products[1](forget * hidden)
        candidate = jnp.tanh(x[1] + recurrent)
        return ((1 - forget) * hidden + forget * candidate,)
