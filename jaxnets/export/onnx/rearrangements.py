"""Operations of JAX on shapes, reductions, sorting and padding in ONNX.

Each function takes the graph, the equation and the names of the operands with all axes broadcast,
and returns the name of the result, or a list of names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnets.export.onnx.arithmetic import wrapped
from jaxnets.export.onnx.graph import Graph, stored

_Rule = Callable[..., Any]


def _aval(eqn: Any, operand: int = 0) -> Any:
    return eqn.invars[operand].aval


def _out(eqn: Any, result: int = 0) -> Any:
    return eqn.outvars[result].aval


def _reshape(g: Graph, eqn: Any, x: str, *sizes: str) -> str:
    return g.reshape(x, _out(eqn).shape)


def _transpose(g: Graph, eqn: Any, x: str) -> str:
    return g.transpose(x, eqn.params["permutation"])


def _concatenate(g: Graph, eqn: Any, *operands: str) -> str:
    return g.add("Concat", *operands, axis=eqn.params["dimension"])


def _stack(g: Graph, eqn: Any, *operands: str) -> str:
    axis = eqn.params["axis"]
    return g.add("Concat", *(g.unsqueeze(x, axis) for x in operands), axis=axis)


def _split(g: Graph, eqn: Any, x: str) -> list[str]:
    sizes, axis = eqn.params["sizes"], eqn.params["axis"]
    return g.add_many("Split", (x, g.shape(sizes)), len(sizes), axis=axis)


def _slice(g: Graph, eqn: Any, x: str) -> str:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        whole = isinstance(start, int) and start == 0 and limit == _aval(eqn).shape[axis]
        if not whole or stride != 1:
            x = g.slice(x, axis, start, limit, stride)
    return x


def _rev(g: Graph, eqn: Any, x: str) -> str:
    return g.reverse(x, eqn.params["dimensions"]) if eqn.params["dimensions"] else x


def _pad(g: Graph, eqn: Any, x: str, value: str) -> str:
    config, shape = eqn.params["padding_config"], list(_aval(eqn).shape)
    for axis, (_, _, interior) in enumerate(config):
        if isinstance(interior, int) and interior == 0:
            continue
        x = spread(g, x, shape, axis, interior + 1, value)
        shape[axis] = (shape[axis] - 1) * (interior + 1) + 1
    is_bool = _aval(eqn).dtype == np.bool_
    if is_bool:
        x, value = g.cast(x, np.int32), g.cast(value, np.int32)
    x = g.pad(x, [low for low, _, _ in config], [high for _, high, _ in config], value)
    return g.cast(x, np.bool_) if is_bool else x


def spread(g: Graph, x: str, shape: Sequence[Any], axis: int, stride: int, value: str) -> str:
    """Put the elements of an axis `stride` apart, with a value between them."""
    rank = len(shape)
    low = [0] * (rank + 1)
    high = [0] * (axis + 1) + [stride - 1] + [0] * (rank - axis - 1)
    apart = g.pad(g.unsqueeze(x, axis + 1), low, high, value)
    # [.., size, stride, ..] -> [.., size * stride, ..]
    merged = g.reshape(apart, [*shape[:axis], shape[axis] * stride, *shape[axis + 1 :]])
    return g.slice(merged, axis, 0, (shape[axis] - 1) * stride + 1)


def _reduce(op: str) -> _Rule:
    def rule(g: Graph, eqn: Any, x: str) -> str:
        axes, dtype = eqn.params["axes"], _aval(eqn).dtype
        if eqn.primitive.name in ("reduce_and", "reduce_or") and dtype != np.bool_:
            raise ValueError("bits are not reduced")
        if not axes:  # ONNX takes no axes for all of them
            return x
        if dtype == np.bool_:
            return g.cast(g.add(op, g.cast(x, np.int32), g.integers(*axes), keepdims=0), np.bool_)
        if op in ("ReduceMax", "ReduceMin") or jnp.issubdtype(dtype, jnp.floating):
            return g.add(op, x, g.integers(*axes), keepdims=0)
        # onnxruntime's sums of int32 do not wrap around.
        total = g.add(op, g.cast(x, np.int64), g.integers(*axes), keepdims=0)
        return g.cast(g.cast(total, dtype), stored(dtype))

    return rule


def _argument(op: str) -> _Rule:
    """Return the rule of argmax or argmin; the first of equal ones in both."""

    def rule(g: Graph, eqn: Any, x: str) -> str:
        (axis,) = eqn.params["axes"]
        if _aval(eqn).dtype == np.bool_:
            x = g.cast(x, np.int32)
        return g.cast(g.add(op, x, axis=axis, keepdims=0), stored(eqn.params["index_dtype"]))

    return rule


def _cumsum(g: Graph, eqn: Any, x: str) -> str:
    total = g.add(
        "CumSum", x, g.constant(np.int64(eqn.params["axis"])), reverse=int(eqn.params["reverse"])
    )
    return wrapped(g, total, np.dtype(_aval(eqn).dtype))


def _top_k(g: Graph, eqn: Any, x: str) -> list[str]:
    axis = eqn.params.get("axis", -1)
    values, indices = g.add_many("TopK", (x, g.size(eqn.params["k"])), 2, axis=axis)
    return [values, g.cast(indices, stored(_out(eqn, 1).dtype))]


def _sort(g: Graph, eqn: Any, *operands: str) -> list[str]:
    """Sort by the last key first; TopK is stable, so that the first key decides at the end."""
    axis, num_keys = eqn.params["dimension"], eqn.params["num_keys"]
    size = g.size(_aval(eqn).shape[axis])
    sorted_operands = list(operands)
    for key in range(num_keys - 1, -1, -1):
        values = sorted_operands[key]
        if _aval(eqn, key).dtype == np.bool_:
            values = g.cast(values, np.int32)
        _, order = g.add_many("TopK", (values, size), 2, axis=axis, largest=0)
        sorted_operands = [g.add("GatherElements", x, order, axis=axis) for x in sorted_operands]
    return sorted_operands


def _dim_as_value(g: Graph, eqn: Any) -> str:
    return g.cast(g.squeeze(g.size(eqn.params["dim"]), 0), stored(_out(eqn).dtype))


def _bitcast(g: Graph, eqn: Any, x: str) -> str:
    """Reinterpret 32 bits: ONNX has no such operation, so the parts of a float are computed."""
    source, target = np.dtype(_aval(eqn).dtype), np.dtype(_out(eqn).dtype)
    if source.kind in "iu" and target.kind in "iu" and source.itemsize == target.itemsize:
        return g.cast(g.cast(g.cast(x, np.int64), target), stored(target))
    if source.kind not in "iu" or target != np.float32 or source.itemsize != 4:
        raise ValueError(f"bits of {source} cannot be read as {target}")
    bits = g.cast(x, np.int64)
    long = np.int64

    def part(shift: int, width: int) -> str:
        unsigned = g.cast(g.add("BitwiseAnd", bits, g.constant(long(0xFFFFFFFF))), np.uint64)
        moved = g.cast(
            g.add("BitShift", unsigned, g.constant(np.uint64(shift)), direction="RIGHT"), long
        )
        return g.add("BitwiseAnd", moved, g.constant(long(2**width - 1)))

    mantissa, exponent, sign = part(0, 23), part(23, 8), part(31, 1)
    normal = g.add("Greater", exponent, g.constant(long(0)))
    whole = g.add("Add", mantissa, g.add("Mul", g.cast(normal, long), g.constant(long(2**23))))
    power = g.add("Sub", g.add("Max", exponent, g.constant(long(1))), g.constant(long(150)))
    value = g.add(
        *("Mul", g.cast(whole, np.float64)),
        g.add("Pow", g.constant(np.float64(2)), g.cast(power, np.float64)),
    )
    special = g.add("Equal", exponent, g.constant(long(255)))
    is_zero = g.add("Equal", mantissa, g.constant(long(0)))
    infinite = g.add("Where", is_zero, g.constant(np.inf), g.constant(np.nan))
    value = g.cast(g.add("Where", special, infinite, value), np.float32)
    return g.add("Where", g.cast(sign, np.bool_), g.add("Neg", value), value)


RULES: dict[str, _Rule] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "stack": _stack,
    "split": _split,
    "slice": _slice,
    "rev": _rev,
    "pad": _pad,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_and": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "argmax": _argument("ArgMax"),
    "argmin": _argument("ArgMin"),
    "cumsum": _cumsum,
    "top_k": _top_k,
    "sort": _sort,
    "dim_as_value": _dim_as_value,
    "bitcast_convert_type": _bitcast,
}
