"""Symbolic sizes of `jax.export`, such as `2*time` or `floordiv(time + 1, 2)`, as formulas."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Operations on sizes, by the names that ONNX has for them; FloorDiv it does not have.
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "Max": max,
    "Min": min,
}
_BINARY = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_CALLS = {"floordiv": "FloorDiv", "mod": "Mod", "max": "Max", "min": "Min"}
_COMPARISONS = {ast.LtE: operator.le, ast.GtE: operator.ge, ast.Eq: operator.eq}


def is_known(*sizes: Any) -> bool:
    """Whether all sizes are numbers."""
    return all(isinstance(size, int) for size in sizes)


def evaluate(size: Any, symbol: Callable[[str], Any], apply: Callable[[str, Any, Any], Any]) -> Any:
    """Evaluate a size by its text.

    Args:
        size: a number, a symbolic size, or the text of one.
        symbol: {name: value} as a function.
        apply: (name in OPERATIONS, value, value) -> value; values are also integers.
    """
    if isinstance(size, int):
        return size

    def of(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                return symbol(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return apply("Mul", of(operand), -1)
            case ast.BinOp(op=ast.Pow(), left=base, right=ast.Constant(value=int(exponent))):
                value = result = of(base)
                for _ in range(exponent - 1):
                    result = apply("Mul", result, value)
                return result
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _BINARY:
                return apply(_BINARY[type(op)], of(left), of(right))
            case ast.Call(func=ast.Name(id=name), args=[left, right]) if name in _CALLS:
                return apply(_CALLS[name], of(left), of(right))
        raise ValueError(f"the size {size} has no formula; fix the sizes in it by shapes=")

    # JAX writes powers as `^`, which binds less than `*` in Python.
    return of(ast.parse(str(size).strip().replace("^", "**"), mode="eval").body)


def number(size: Any, values: Mapping[str, int]) -> int:
    """Return a size as a number, given the values of its symbols."""
    return evaluate(size, values.__getitem__, lambda name, a, b: OPERATIONS[name](a, b))


def symbols_of(*sizes: Any) -> list[str]:
    """Return the names of the symbols, in the order in which they occur."""
    names: dict[str, None] = {}

    def symbol(name: str) -> int:
        names[name] = None
        return 1

    for size in sizes:
        evaluate(size, symbol, lambda name, a, b: 1)
    return list(names)


def solve(shapes: Sequence[tuple[Any, ...]]) -> dict[str, tuple[int, int, int, int]]:
    """Find where the symbols can be read: {symbol: (array, axis, factor, offset)}.

    The size of that axis is `factor * symbol + offset`. An axis whose size is the symbol is
    preferred.

    Raises:
        ValueError: a symbol that occurs in no such size.
    """
    sources: dict[str, tuple[int, int, int, int]] = {}
    wanted: dict[str, None] = {}
    for array, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            names = symbols_of(size)
            wanted |= dict.fromkeys(names)
            if len(names) != 1:
                continue
            zero, one, two = (number(size, {names[0]: value}) for value in range(3))
            source = (array, axis, one - zero, zero)
            linear = one != zero and two - one == one - zero
            if linear and (names[0] not in sources or source[2:] == (1, 0)):
                sources.setdefault(names[0], source)
                if sources[names[0]][2:] != (1, 0):
                    sources[names[0]] = source
    missing = sorted(wanted.keys() - sources.keys())
    if missing:
        raise ValueError(
            f"the sizes {missing} cannot be read from the inputs, whose shapes are "
            f"{[tuple(map(str, shape)) for shape in shapes]}; give each an axis of its own"
        )
    return sources


def holds(constraint: str, values: Mapping[str, int]) -> bool:
    """Whether a constraint such as "time <= 512" holds."""
    match ast.parse(constraint.strip().replace("^", "**"), mode="eval").body:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            sides = [ast.unparse(side) for side in (left, right)]
            if values.keys() >= set(symbols_of(*sides)):
                return bool(_COMPARISONS[type(op)](*(number(side, values) for side in sides)))
    return True  # of a kind or of a symbol that is not in the inputs


def concrete(tree: Any, values: Mapping[str, int]) -> Any:
    """Replace the symbolic sizes in nested tuples and lists by numbers."""
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(concrete(value, values) for value in tree)
    if isinstance(tree, list):
        return [concrete(value, values) for value in tree]
    if type(tree).__name__ == "_DimExpr":
        return number(tree, values)
    return tree


def product(sizes: Sequence[Any]) -> Any:
    """Multiply sizes, numbers first."""
    known = math.prod(size for size in sizes if isinstance(size, int))
    result: Any = known
    for size in sizes:
        if not isinstance(size, int):
            result = size if isinstance(result, int) and result == 1 else result * size
    return result
