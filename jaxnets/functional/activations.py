"""The named activation functions: rounded once, with the input as the only residual.

In bfloat16 each step of a formula is rounded, which costs an XLA program on CPU more than the step
does. The intermediate results that JAX saves for the gradient are each as large as the input;
reading them takes longer than recomputing them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxnets.core import at_least_float32

_Function = Callable[[jax.Array], jax.Array]


def _recomputed(function: _Function) -> _Function:
    @jax.jit
    @jax.checkpoint
    def rounded_once(x: jax.Array) -> jax.Array:
        return function(at_least_float32(x)).astype(x.dtype)

    def apply(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        return rounded_once(x) if jnp.issubdtype(x.dtype, jnp.floating) else function(x)

    return apply


# name -> elementwise function, which returns the dtype of its input. Those that only select among
# their operands are exact without rounding.
ACTIVATIONS: dict[str, _Function] = {
    "celu": _recomputed(jax.nn.celu),
    "elu": _recomputed(jax.nn.elu),
    "gelu": _recomputed(functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": _recomputed(functools.partial(jax.nn.gelu, approximate=True)),
    "hard_sigmoid": _recomputed(jax.nn.hard_sigmoid),
    "hard_swish": _recomputed(jax.nn.hard_swish),
    "identity": lambda x: x,
    "leaky_relu": _recomputed(jax.nn.leaky_relu),
    "mish": _recomputed(jax.nn.mish),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": _recomputed(jax.nn.selu),
    "sigmoid": _recomputed(jax.nn.sigmoid),
    "silu": _recomputed(jax.nn.silu),
    "softplus": _recomputed(jax.nn.softplus),
    "softsign": _recomputed(jax.nn.soft_sign),
    "squared_relu": _recomputed(lambda x: jnp.square(jax.nn.relu(x))),
    "tanh": _recomputed(jnp.tanh),
}
Activation: TypeAlias = str | Callable[[jax.Array], jax.Array]


def activation(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """Look an activation function up by name.

    Args:
        name: "relu", "gelu" (exact), "gelu_tanh", "silu", "tanh", ..., or any callable.

    Returns:
        An elementwise function; a callable is returned unchanged. The others compute in float32 or
        wider, and return the dtype of their input.

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
