"""Equations of a jaxpr computed by JAX one by one, with their symbolic sizes replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.export.onnx.sizes import concrete, number
from jaxnets.export.onnx.walk import called, scan_counts


def evaluate(eqn: Any, inputs: Sequence[Any], sizes: Mapping[str, int]) -> list[Any]:
    """Compute one equation by JAX, with its symbolic sizes replaced."""

    def function(closed: Any) -> Callable[..., list[Any]]:
        return lambda *values: _of_jaxpr(closed, values, sizes)

    name, params = eqn.primitive.name, eqn.params
    if name == "dim_as_value":
        return [np.asarray(number(params["dim"], sizes), eqn.outvars[0].aval.dtype)]
    if name == "scan":
        num_consts, num_carry = scan_counts(eqn)
        consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]

        def step(carry: Any, x: Any) -> Any:
            results = function(params["jaxpr"])(*consts, *carry, *x)
            return results[:num_carry], results[num_carry:]

        last, stacked = jax.lax.scan(
            step,
            list(map(jnp.asarray, carry)),
            list(map(jnp.asarray, inputs[num_consts + num_carry :])),
            length=number(params["length"], sizes),
            reverse=params["reverse"],
        )
        return [*last, *stacked]
    if name == "while":
        first, second = params["cond_nconsts"], params["body_nconsts"]
        of_condition, of_body = inputs[:first], inputs[first : first + second]
        return jax.lax.while_loop(
            lambda values: function(params["cond_jaxpr"])(*of_condition, *values)[0],
            lambda values: function(params["body_jaxpr"])(*of_body, *values),
            list(map(jnp.asarray, inputs[first + second :])),
        )
    if name == "cond":
        return jax.lax.switch(inputs[0], [function(one) for one in params["branches"]], *inputs[1:])
    bound = {key: concrete(value, sizes) for key, value in params.items()}
    results = eqn.primitive.bind(*map(jnp.asarray, inputs), **bound)
    return list(results) if eqn.primitive.multiple_results else [results]


def _of_jaxpr(closed: Any, arguments: Sequence[Any], sizes: Mapping[str, int]) -> list[Any]:
    """Compute a jaxpr with its symbolic sizes replaced."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else values[variable]

    for eqn in jaxpr.eqns:
        inputs = [read(variable) for variable in eqn.invars]
        body = called(eqn)
        if body is not None:
            outputs = _of_jaxpr(body, inputs, sizes)
        else:
            outputs = evaluate(eqn, inputs, sizes)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]
