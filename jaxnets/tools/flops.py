"""Floating point operations of a function, counted in its traced program without compiling it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# One operation for each element of the result.
_ELEMENTWISE = _names(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil cos cosh digamma div erf erfc"
    " erf_inv exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min mul neg pow rem"
    " round rsqrt sign sin sinh sqrt square sub tan tanh"
)
# One for each element of the argument.
_REDUCTIONS = _names(
    "cumlogsumexp cummax cummin cumprod cumsum reduce_max reduce_min reduce_prod reduce_sum"
)

#: (FLOPs, which of the arguments are read).
_Cost = tuple[float, list[bool]]


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Count the floating point operations of a function.

    Two for a multiply-add of a matrix product or a convolution, positions of padding included, and
    one for each element of an elementwise operation or a reduction. They are those of the
    definition: the same on every platform, whichever algorithm computes it there. What does not
    affect the result is not counted, a `lax.scan` counts all its steps, a `lax.cond` its most
    expensive branch, and the body of a `lax.while_loop` once.

    Args:
        function: of arrays; it is traced, not run.
        arguments: arrays, `jax.ShapeDtypeStruct`s or trees of them.

    Returns:
        The number of operations.

    Example:
        >>> matrices = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(4, 8), (8, 2)]]
        >>> count_flops(lambda x, y: jnp.maximum(x @ y, 0), *matrices)  # 2 * 4 * 8 * 2 + 4 * 2
        136.0
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _Counter().of_program(jaxpr, [True] * len(jaxpr.outvars))[0]


class _Counter:
    """Counts programs, each that is called several times once."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, tuple[bool, ...]], _Cost] = {}

    def of_program(self, jaxpr: Jaxpr, live: Sequence[bool]) -> _Cost:
        """Count the equations on which the live results depend."""
        key = id(jaxpr), tuple(live)
        if key not in self.known:
            self.known[key] = self._of_program(jaxpr, live)
        return self.known[key]

    def _of_program(self, jaxpr: Jaxpr, live: Sequence[bool]) -> _Cost:
        pairs = zip(jaxpr.outvars, live, strict=True)
        needed = {var for var, used in pairs if used and not isinstance(var, Literal)}
        total = 0.0
        for equation in reversed(jaxpr.eqns):
            used = [var in needed for var in equation.outvars]
            if any(used):
                flops, read = self._of_equation(equation, used)
                total += flops
                arguments = zip(equation.invars, read, strict=True)
                needed |= {var for var, yes in arguments if yes and not isinstance(var, Literal)}
        return total, [var in needed for var in jaxpr.invars]

    def _of_equation(self, equation: Any, live: list[bool]) -> _Cost:
        name, params = equation.primitive.name, equation.params
        everything = [True] * len(equation.invars)
        if name == "scan":
            return self._of_scan(equation, live)
        if name == "cond":
            costs = [self.of_program(branch.jaxpr, live) for branch in params["branches"]]
            read = [any(each) for each in zip(*(read for _, read in costs), strict=True)]
            return max(flops for flops, _ in costs), [True, *read]
        if name == "while":
            parts = (params["cond_jaxpr"], params["body_jaxpr"])
            return sum(self._whole(part) for part in parts), everything
        if name == "platform_dependent":
            return self.of_program(params["default"].jaxpr, live)
        if name == "optimization_barrier":
            return 0.0, live
        inside = [value for value in params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
        if inside:
            jaxpr = _opened(inside[0])
            if len(inside) == 1 and len(jaxpr.invars) == len(everything):
                return self.of_program(jaxpr, live)
            return sum(self._whole(part) for part in inside), everything
        return _of_operation(name, equation), everything

    def _whole(self, jaxpr: Jaxpr | ClosedJaxpr) -> float:
        opened = _opened(jaxpr)
        return self.of_program(opened, [True] * len(opened.outvars))[0]

    def _of_scan(self, equation: Any, live: list[bool]) -> _Cost:
        params = equation.params
        body = params["jaxpr"].jaxpr
        # The parameters that count constants and states differ between versions of JAX. Both have
        # as many axes outside as inside of the loop; what it scans has one more outside.
        states = _num_unscanned(equation.outvars, body.outvars)
        constants = _num_unscanned(equation.invars, body.invars) - states
        carried, outputs = live[:states], live[states:]
        while True:  # a state is live if a later step reads it
            flops, read = self.of_program(body, [*carried, *outputs])
            again = read[constants : constants + states]
            wider = [one or other for one, other in zip(carried, again, strict=True)]
            if wider == carried:
                break
            carried = wider
        return params["length"] * flops, [*read[:constants], *carried, *read[constants + states :]]


def _num_unscanned(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(x.aval.shape) == len(y.aval.shape) for x, y in zip(outside, inside, strict=True))


def _opened(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _of_operation(name: str, equation: Any) -> float:
    result = equation.outvars[0].aval
    if not jnp.issubdtype(getattr(result, "dtype", jnp.int32), jnp.inexact):
        return 0.0
    first, params = equation.invars[0].aval, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        return 2.0 * result.size * math.prod(first.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # Of a dilated input only every dilation-th position is not 0.
        products = kernel.size / features / math.prod(params["lhs_dilation"])
        return 2.0 * result.size * products
    if name in _ELEMENTWISE:
        return float(result.size)
    if name in _REDUCTIONS:
        return float(first.size)
    if name.startswith("reduce_window"):
        return float(result.size * math.prod(params["window_dimensions"]))
    if name == "scatter-add":
        return float(equation.invars[2].aval.size)
    return 0.0
