"""Parameters whose shape depends on the inputs, with an error that says so."""

from __future__ import annotations

from typing import Any

import flax.errors
import flax.linen as nn
import jax

from jaxnets.core import drawn_in_float32


def parameter(
    module: nn.Module,
    name: str,
    initializer: Any,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    inputs: tuple[int, ...],
) -> jax.Array:
    """Declare a parameter of a module, as `module.param` does, drawn in float32 or wider.

    Args:
        module: in its compact method or `setup`.
        name: of the parameter.
        initializer: function of key, shape and dtype.
        shape: that the inputs need.
        dtype: in which the parameter is stored.
        inputs: shape of the inputs, for the error.

    Returns:
        The parameter, of that shape.

    Raises:
        ValueError: the network was initialized for inputs of another size.
    """
    try:
        return module.param(name, drawn_in_float32(initializer), shape, dtype)
    except flax.errors.ScopeParamShapeError:
        variable: Any = module.get_variable("params", name)
        own = f"has shape {variable.shape}"
    except flax.errors.ScopeParamNotFoundError:
        own = "does not exist"
    path = "/".join((*module.path, name))
    raise ValueError(
        f"parameter {path} {own}, but inputs of shape {inputs} need {shape}; give inputs of the "
        "size and the channels that the network was initialized with, or initialize it for these"
    )
