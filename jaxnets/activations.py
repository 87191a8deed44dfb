"""The named activation functions: rounded once, with gradients that need nothing but the input.

In bfloat16 each step of a formula is rounded, which costs an XLA program on CPU more than the step
does. And the intermediate results that JAX keeps for a gradient are each as large as the input;
to read them takes longer than to compute them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.core import at_least_float32

_Function = Callable[[jax.Array], jax.Array]


def _from_its_input(function: _Function) -> _Function:
    @jax.jit
    @jax.checkpoint
    def rounded_once(x: jax.Array) -> jax.Array:
        return function(at_least_float32(x)).astype(x.dtype)

    def apply(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        return rounded_once(x) if jnp.issubdtype(x.dtype, jnp.floating) else function(x)

    return apply


# name -> element-wise function, which returns the dtype that it gets. Those that choose between
# numbers are exact as they are.
ACTIVATIONS: dict[str, _Function] = {
    "celu": _from_its_input(nn.celu),
    "elu": _from_its_input(nn.elu),
    "gelu": _from_its_input(functools.partial(nn.gelu, approximate=False)),
    "gelu_tanh": _from_its_input(functools.partial(nn.gelu, approximate=True)),
    "hard_sigmoid": _from_its_input(nn.hard_sigmoid),
    "hard_swish": _from_its_input(nn.hard_swish),
    "identity": lambda x: x,
    "leaky_relu": _from_its_input(nn.leaky_relu),
    "mish": _from_its_input(jax.nn.mish),
    "relu": nn.relu,
    "relu6": nn.relu6,
    "selu": _from_its_input(nn.selu),
    "sigmoid": _from_its_input(nn.sigmoid),
    "silu": _from_its_input(nn.silu),
    "softplus": _from_its_input(nn.softplus),
    "softsign": _from_its_input(nn.soft_sign),
    "squared_relu": _from_its_input(lambda x: jnp.square(nn.relu(x))),
    "tanh": _from_its_input(jnp.tanh),
}
