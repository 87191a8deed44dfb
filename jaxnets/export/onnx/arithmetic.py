"""Elementwise operations of JAX in ONNX.

Each function takes the graph, the equation and the names of the operands, and returns the name of
the result. Operands broadcast as in NumPy, and are of the types in which the graph computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnets.export.onnx.graph import Graph, stored

_Rule = Callable[..., str]


def _type(eqn: Any, operand: int = 0) -> np.dtype[Any]:
    return np.dtype(eqn.invars[operand].aval.dtype)


def _one(op: str) -> _Rule:
    """Return the rule of one ONNX operation with the same operands."""
    return lambda g, eqn, *operands: g.add(op, *operands)


def _wrapping(op: str) -> _Rule:
    """Return the rule of an operation on integers that wraps around in their own type."""

    def rule(g: Graph, eqn: Any, *operands: str) -> str:
        dtype = np.dtype(eqn.outvars[0].aval.dtype)
        return wrapped(g, g.add(op, *operands), dtype)

    return rule


def wrapped(g: Graph, x: str, dtype: np.dtype[Any]) -> str:
    """Wrap integers around that are computed in a wider type than their own."""
    if dtype.kind in "iu" and dtype != stored(dtype):
        return g.cast(g.cast(x, dtype), stored(dtype))
    return x


def scalar(g: Graph, value: Any, like: Any) -> str:
    """Return the name of a constant of the type in which a type is computed."""
    return g.constant(np.asarray(value, stored(like)))


def _logical(op: str, bitwise: str) -> _Rule:
    """Return the rule of an operation on truth values or bits."""

    def rule(g: Graph, eqn: Any, *operands: str) -> str:
        dtype = _type(eqn)
        if dtype.kind == "b":
            return g.add(op, *operands)
        return wrapped(g, g.add(bitwise, *operands), dtype)

    return rule


def _compare(op: str, *, negate: bool = False) -> _Rule:
    def rule(g: Graph, eqn: Any, x: str, y: str) -> str:
        if _type(eqn).kind == "b" and op != "Equal":
            x, y = g.cast(x, np.int32), g.cast(y, np.int32)
        result = g.add(op, x, y)
        return g.add("Not", result) if negate else result

    return rule


def _extreme(op: str, logical: str) -> _Rule:
    """Return the rule of the larger or the smaller of two."""

    def rule(g: Graph, eqn: Any, x: str, y: str) -> str:
        if _type(eqn).kind == "b":
            return g.add(logical, x, y)
        return g.add(op, x, y)

    return rule


def _div(g: Graph, eqn: Any, x: str, y: str) -> str:
    dtype = _type(eqn)
    if dtype.kind not in "iu":
        return g.add("Div", x, y)
    # Division by zero would end the process; XLA returns -1, all bits set.
    zero = g.add("Equal", y, scalar(g, 0, dtype))
    quotient = g.add("Div", x, g.add("Where", zero, scalar(g, 1, dtype), y))
    return wrapped(g, g.add("Where", zero, scalar(g, -1, dtype), quotient), dtype)


def _rem(g: Graph, eqn: Any, x: str, y: str) -> str:
    dtype = _type(eqn)
    if dtype.kind not in "iu":
        return g.add("Mod", x, y, fmod=1)
    zero = g.add("Equal", y, scalar(g, 0, dtype))
    rest = g.add("Mod", x, g.add("Where", zero, scalar(g, 1, dtype), y), fmod=1)
    return g.add("Where", zero, x, rest)


def _integer_pow(g: Graph, eqn: Any, x: str) -> str:
    exponent, dtype = eqn.params["y"], _type(eqn)
    if exponent == 2:
        return wrapped(g, g.add("Mul", x, x), dtype)
    return wrapped(g, g.add("Pow", x, scalar(g, exponent, dtype)), dtype)


def _rsqrt(g: Graph, eqn: Any, x: str) -> str:
    return g.add("Reciprocal", g.add("Sqrt", x))


def _cbrt(g: Graph, eqn: Any, x: str) -> str:
    root = g.add("Pow", g.add("Abs", x), scalar(g, 1 / 3, _type(eqn)))
    return g.add("Mul", g.add("Sign", x), root)


def _exp2(g: Graph, eqn: Any, x: str) -> str:
    return g.add("Pow", scalar(g, 2, _type(eqn)), x)


def _expm1(g: Graph, eqn: Any, x: str) -> str:
    # exp(x) - 1 = tanh(x / 2) (exp(x) + 1), which cancels nothing for small x.
    half = g.add("Tanh", g.add("Mul", x, scalar(g, 0.5, _type(eqn))))
    return g.add("Mul", half, g.add("Add", g.add("Exp", x), scalar(g, 1, _type(eqn))))


def _log1p(g: Graph, eqn: Any, x: str) -> str:
    # log(u) x / (u - 1) with u = 1 + x as rounded: the errors of u cancel (Goldberg, 1991, theorem
    # 4). Where u is 1 or infinite the quotient is not defined.
    one = scalar(g, 1, _type(eqn))
    u = g.add("Add", one, x)
    log, rest = g.add("Log", u), g.add("Sub", u, one)
    is_one = g.add("Equal", rest, scalar(g, 0, _type(eqn)))
    quotient = g.add("Div", x, g.add("Where", is_one, one, rest))
    scaled = g.add("Where", g.add("IsInf", u), log, g.add("Mul", log, quotient))
    return g.add("Where", is_one, x, scaled)


def _erfc(g: Graph, eqn: Any, x: str) -> str:
    return g.add("Sub", scalar(g, 1, _type(eqn)), g.add("Erf", x))


def _is_finite(g: Graph, eqn: Any, x: str) -> str:
    return g.add("Not", g.add("Or", g.add("IsNaN", x), g.add("IsInf", x)))


def _round(g: Graph, eqn: Any, x: str) -> str:
    if int(eqn.params["rounding_method"]) == 1:
        return g.add("Round", x)  # half to even, in both
    # Half away from zero; the fraction is compared because x + 0.5 may round up.
    size = g.add("Abs", x)
    floor = g.add("Floor", size)
    half = g.add("GreaterOrEqual", g.add("Sub", size, floor), scalar(g, 0.5, _type(eqn)))
    return g.add("Mul", g.add("Sign", x), g.add("Add", floor, g.cast(half, stored(_type(eqn)))))


def _select_n(g: Graph, eqn: Any, which: str, *cases: str) -> str:
    if len(cases) == 1:
        return g.add("Identity", cases[0])
    if _type(eqn).kind == "b":
        return g.add("Where", which, cases[1], cases[0])
    result = cases[-1]
    for index in range(len(cases) - 2, -1, -1):
        before = g.add("LessOrEqual", which, scalar(g, index, _type(eqn)))
        result = g.add("Where", before, cases[index], result)
    return result


def _clamp(g: Graph, eqn: Any, low: str, x: str, high: str) -> str:
    return g.add("Min", g.add("Max", x, low), high)


def _convert(g: Graph, eqn: Any, x: str) -> str:
    source, target = _type(eqn), np.dtype(eqn.params["new_dtype"])
    return converted(g, x, source, target)


def converted(g: Graph, x: str, source: np.dtype[Any], target: np.dtype[Any]) -> str:
    """Convert values from one type of the network to another one, as XLA does."""
    if source == target:  # as stored in a file
        return g.add("Cast", x, to=stored(target))
    floating = jnp.issubdtype(source, jnp.floating)
    if floating and target.kind in "iu":
        # ONNX leaves it open what a value out of range becomes; XLA saturates, and NaN is 0.
        bounds = np.iinfo(target)
        low, high = (np.asarray(bound, stored(source)) for bound in (bounds.min, bounds.max))
        inside = high if int(high) <= bounds.max else np.nextafter(high, np.zeros_like(high))
        whole = g.add("Min", g.add("Max", x, g.constant(low)), g.constant(inside))
        whole = g.add("Where", g.add("IsNaN", x), g.constant(np.zeros_like(low)), whole)
        whole = g.cast(whole, stored(target))
        beyond = g.add("GreaterOrEqual", x, g.constant(high))
        return g.add("Where", beyond, scalar(g, bounds.max, target), whole)
    if target.kind in "iu":
        return wrapped(g, g.cast(x, stored(target)), target)
    result = x if stored(source) == stored(target) else g.cast(x, stored(target))
    if jnp.issubdtype(target, jnp.floating) and stored(target) != target:
        narrower = not floating or jnp.finfo(source).bits > jnp.finfo(target).bits
        if narrower:
            return g.cast(g.cast(result, target), stored(target))
    return result if result != x else g.add("Identity", x)


def _reduce_precision(g: Graph, eqn: Any, x: str) -> str:
    bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    own = jnp.finfo(_type(eqn))
    if bits == (own.nexp, own.nmant):
        return g.add("Identity", x)
    types = {(8, 7): jnp.bfloat16, (5, 10): np.float16, (8, 23): np.float32}
    if bits not in types:
        raise ValueError(f"there is no type with {bits[0]} bits of exponent and {bits[1]} others")
    return g.cast(g.cast(x, types[bits]), stored(_type(eqn)))


def _shift_left(g: Graph, eqn: Any, x: str, amount: str) -> str:
    # A product in int64, whose low bits are those of the shifted value.
    bits = np.iinfo(_type(eqn)).bits
    long, by = g.cast(x, np.int64), g.cast(amount, np.int64)
    inside = g.add("Less", by, g.constant(np.int64(bits)))
    by = g.add("Where", inside, by, g.constant(np.int64(0)))
    shifted = g.cast(g.add("BitShift", *_unsigned(g, long, by), direction="LEFT"), np.int64)
    result = g.add("Where", inside, shifted, g.constant(np.int64(0)))
    return _from_int64(g, result, _type(eqn))


def _shift_right(g: Graph, eqn: Any, x: str, amount: str, *, arithmetic: bool) -> str:
    bits = np.iinfo(_type(eqn)).bits
    long, by = g.cast(x, np.int64), g.cast(amount, np.int64)
    last = g.constant(np.int64(bits - 1))
    inside = g.add("LessOrEqual", by, last)
    by = g.add("Where", inside, by, last)
    if arithmetic:
        # Rounded down; Mod has the sign of its divisor.
        power = g.cast(
            g.add("BitShift", *_unsigned(g, g.constant(np.int64(1)), by), direction="LEFT"),
            np.int64,
        )
        result = g.add("Div", g.add("Sub", long, g.add("Mod", long, power)), power)
        return _from_int64(g, result, _type(eqn))
    if bits < 64:
        long = g.add("BitwiseAnd", long, g.constant(np.int64(2**bits - 1)))
    shifted = g.cast(g.add("BitShift", *_unsigned(g, long, by), direction="RIGHT"), np.int64)
    result = g.add("Where", inside, shifted, g.constant(np.int64(0)))
    return _from_int64(g, result, _type(eqn))


def _unsigned(g: Graph, *values: str) -> list[str]:
    return [g.cast(value, np.uint64) for value in values]


def _from_int64(g: Graph, x: str, dtype: np.dtype[Any]) -> str:
    return wrapped(g, g.cast(g.cast(x, dtype), stored(dtype)), dtype)


RULES: dict[str, _Rule] = {
    **{
        name: _one(op)
        for name, op in {
            **{name: name.capitalize() for name in ("exp", "log", "tanh", "sin", "cos", "tan")},
            **{name: name.capitalize() for name in ("asin", "acos", "atan", "sinh", "cosh")},
            **{name: name.capitalize() for name in ("asinh", "acosh", "atanh", "sqrt", "erf")},
            **{name: name.capitalize() for name in ("abs", "floor", "ceil", "sign", "pow")},
            "logistic": "Sigmoid",
        }.items()
    },
    **dict.fromkeys(("copy", "copy_p", "name", "stop_gradient"), _one("Identity")),
    "add": _wrapping("Add"),
    "add_any": _wrapping("Add"),
    "sub": _wrapping("Sub"),
    "mul": _wrapping("Mul"),
    "neg": _wrapping("Neg"),
    "square": lambda g, eqn, x: wrapped(g, g.add("Mul", x, x), _type(eqn)),
    "div": _div,
    "rem": _rem,
    "max": _extreme("Max", "Or"),
    "min": _extreme("Min", "And"),
    "and": _logical("And", "BitwiseAnd"),
    "or": _logical("Or", "BitwiseOr"),
    "xor": _logical("Xor", "BitwiseXor"),
    "not": _logical("Not", "BitwiseNot"),
    "eq": _compare("Equal"),
    "ne": _compare("Equal", negate=True),
    "lt": _compare("Less"),
    "le": _compare("LessOrEqual"),
    "gt": _compare("Greater"),
    "ge": _compare("GreaterOrEqual"),
    "integer_pow": _integer_pow,
    "rsqrt": _rsqrt,
    "cbrt": _cbrt,
    "exp2": _exp2,
    "expm1": _expm1,
    "log1p": _log1p,
    "erfc": _erfc,
    "is_finite": _is_finite,
    "reduce_precision": _reduce_precision,
    "round": _round,
    "select_n": _select_n,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "shift_left": _shift_left,
    "shift_right_logical": functools.partial(_shift_right, arithmetic=False),
    "shift_right_arithmetic": functools.partial(_shift_right, arithmetic=True),
}
