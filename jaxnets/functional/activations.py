"""The named activation functions: rounded once, with gradients that need nothing but the input.

In bfloat16 each step of a formula is rounded, which costs an XLA program on CPU more than the step
does. And the intermediate results that JAX keeps for a gradient are each as large as the input;
to read them takes longer than to compute them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

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
    "celu": _from_its_input(jax.nn.celu),
    "elu": _from_its_input(jax.nn.elu),
    "gelu": _from_its_input(functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": _from_its_input(functools.partial(jax.nn.gelu, approximate=True)),
    "hard_sigmoid": _from_its_input(jax.nn.hard_sigmoid),
    "hard_swish": _from_its_input(jax.nn.hard_swish),
    "identity": lambda x: x,
    "leaky_relu": _from_its_input(jax.nn.leaky_relu),
    "mish": _from_its_input(jax.nn.mish),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": _from_its_input(jax.nn.selu),
    "sigmoid": _from_its_input(jax.nn.sigmoid),
    "silu": _from_its_input(jax.nn.silu),
    "softplus": _from_its_input(jax.nn.softplus),
    "softsign": _from_its_input(jax.nn.soft_sign),
    "squared_relu": _from_its_input(lambda x: jnp.square(jax.nn.relu(x))),
    "tanh": _from_its_input(jnp.tanh),
}
Activation: TypeAlias = str | Callable[[jax.Array], jax.Array]


def activation(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """Look an activation function up by name.

    Args:
        name: "relu", "gelu" (exact), "gelu_tanh", "silu", "tanh", ..., or any callable.

    Returns:
        An element-wise function; a callable comes back as it is. The others compute in float32 or
        wider, and return the dtype that they got.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.

    Example:
        >>> activation("relu")(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
