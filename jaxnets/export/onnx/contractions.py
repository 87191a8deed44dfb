"""Matrix products, convolutions and pooling of JAX in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxnets.export.onnx.arithmetic import converted, scalar, wrapped
from jaxnets.export.onnx.graph import Graph, stored
from jaxnets.export.onnx.rearrangements import spread
from jaxnets.export.onnx.sizes import is_known, product


def _dot_general(g: Graph, eqn: Any, x: str, y: str) -> str:
    ((x_contracted, y_contracted), (x_batch, y_batch)) = eqn.params["dimension_numbers"]
    x_aval, y_aval = (v.aval for v in eqn.invars)
    out = eqn.outvars[0].aval
    if stored(x_aval.dtype) != stored(out.dtype) or stored(y_aval.dtype) != stored(out.dtype):
        x = g.cast(x, stored(out.dtype))
        y = g.cast(y, stored(out.dtype))
    x_free = [d for d in range(len(x_aval.shape)) if d not in (*x_batch, *x_contracted)]
    y_free = [d for d in range(len(y_aval.shape)) if d not in (*y_batch, *y_contracted)]
    x = g.transpose(x, [*x_batch, *x_free, *x_contracted])  # [batch, free, contracted]
    y = g.transpose(y, [*y_batch, *y_contracted, *y_free])  # [batch, contracted, free]

    def sizes(aval: Any, axes: Sequence[int]) -> list[Any]:
        return [aval.shape[d] for d in axes]

    batch = sizes(x_aval, x_batch)
    inner = product(sizes(x_aval, x_contracted))
    rows, columns = sizes(x_aval, x_free), sizes(y_aval, y_free)
    # MatMul takes any number of axes before the last two; without a batch they may be rows.
    x_is_matrix = len(x_contracted) == 1 and len(rows) >= 1 and (not batch or len(rows) == 1)
    y_is_matrix = len(y_contracted) == 1 and len(columns) == 1
    x_shape = [*batch, *rows, inner] if x_is_matrix else [*batch, product(rows), inner]
    x = x if x_is_matrix else g.reshape(x, x_shape)
    y = y if y_is_matrix else g.reshape(y, [*batch, inner, product(columns)])
    result = g.add("MatMul", x, y)
    if not (x_is_matrix and y_is_matrix):
        result = g.reshape(result, out.shape)
    return wrapped(g, result, np.dtype(out.dtype))


def _convolution(g: Graph, eqn: Any, x: str, kernel: str) -> str:
    params = eqn.params
    numbers = params["dimension_numbers"]
    x_aval, kernel_aval = (v.aval for v in eqn.invars)
    out = eqn.outvars[0].aval
    if params["batch_group_count"] != 1:
        raise ValueError("groups of a batch occur in gradients only")
    groups = params["feature_group_count"]
    x = g.transpose(x, numbers.lhs_spec)
    kernel = g.transpose(kernel, numbers.rhs_spec)
    x_shape = [x_aval.shape[d] for d in numbers.lhs_spec]  # [batch, channels, *space]
    kernel_shape = [kernel_aval.shape[d] for d in numbers.rhs_spec]  # [out, in / groups, *space]
    rank = len(x_shape) - 2
    padding = [tuple(pair) for pair in params["padding"]]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    if x_aval.dtype != out.dtype and stored(x_aval.dtype) != stored(out.dtype):
        x, kernel = (converted(g, v, x_aval.dtype, out.dtype) for v in (x, kernel))
    attributes = {"dilations": list(dilation), "group": groups, "kernel_shape": kernel_shape[2:]}
    if any(step != 1 for step in params["lhs_dilation"]):
        transposed = _transposed_convolution(g, x, kernel, kernel_shape, padding, eqn)
        if transposed is not None:
            return g.transpose(transposed, _inverse(numbers.out_spec))
        zero = scalar(g, 0, x_aval.dtype)
        for axis, step in enumerate(params["lhs_dilation"], start=2):
            if step != 1:
                x = spread(g, x, x_shape, axis, step, zero)
                x_shape[axis] = (x_shape[axis] - 1) * step + 1
    if not is_known(*sum(padding, ())) or min(sum(padding, ()), default=0) < 0:
        low, high = zip(*padding, strict=True)
        x = g.pad(x, [0, 0, *low], [0, 0, *high], scalar(g, 0, x_aval.dtype))
        padding = [(0, 0)] * rank
    pads = [low for low, _ in padding] + [high for _, high in padding]
    result = g.add("Conv", x, kernel, strides=list(strides), pads=pads, **attributes)
    return g.transpose(result, _inverse(numbers.out_spec))


def _inverse(permutation: Sequence[int]) -> list[int]:
    return [list(permutation).index(d) for d in range(len(permutation))]


def _transposed_convolution(
    g: Graph,
    x: str,
    kernel: str,
    kernel_shape: Sequence[int],
    padding: Sequence[tuple[Any, Any]],
    eqn: Any,
) -> str | None:
    """Write a convolution of spread out inputs, if a ConvTranspose computes it, else None."""
    params, rank = eqn.params, len(padding)
    groups = params["feature_group_count"]
    extents = [
        (size - 1) * step + 1
        for size, step in zip(kernel_shape[2:], params["rhs_dilation"], strict=True)
    ]
    if any(step != 1 for step in params["window_strides"]) or not is_known(*sum(padding, ())):
        return None
    low = [extent - 1 - pad[0] for extent, pad in zip(extents, padding, strict=True)]
    high = [extent - 1 - pad[1] for extent, pad in zip(extents, padding, strict=True)]
    out, per_group = kernel_shape[0], kernel_shape[1]
    kernel = g.reverse(kernel, range(2, rank + 2))
    if groups > 1:
        split = g.reshape(kernel, [groups, out // groups, *kernel_shape[1:]])
        kernel = g.transpose(split, [0, 2, 1, *range(3, rank + 3)])
        kernel = g.reshape(kernel, [groups * per_group, out // groups, *kernel_shape[2:]])
    else:
        kernel = g.transpose(kernel, [1, 0, *range(2, rank + 2)])
    result = g.add(
        *("ConvTranspose", x, kernel),
        strides=list(params["lhs_dilation"]),
        dilations=list(params["rhs_dilation"]),
        group=groups,
        kernel_shape=list(kernel_shape[2:]),
        pads=[max(pad, 0) for pad in (*low, *high)],
    )
    # Windows that see nothing but padding.
    before, after = ([0, 0, *(max(-pad, 0) for pad in pads)] for pads in (low, high))
    return g.pad(result, before, after, scalar(g, 0, eqn.outvars[0].aval.dtype))


def _pool(op: str) -> Callable[..., str]:
    def rule(g: Graph, eqn: Any, x: str) -> str:
        params, aval = eqn.params, eqn.invars[0].aval
        rank = len(aval.shape)
        window, strides = params["window_dimensions"], params["window_strides"]
        dilation, padding = params["window_dilation"], params["padding"]
        if any(step != 1 for step in params["base_dilation"]):
            raise ValueError("pooling of spread out inputs has no counterpart")
        space = [
            d for d in range(rank) if (window[d], strides[d], tuple(padding[d])) != (1, 1, (0, 0))
        ] or [rank - 1]
        others = [d for d in range(rank) if d not in space]
        order = [*others, *space]
        dtype, kind = np.dtype(aval.dtype), stored(aval.dtype)
        if kind.kind in "iu":
            x, kind = g.cast(x, np.float64), np.dtype(np.float64)
        neutral = {"sum": 0.0, "max": -np.inf, "min": np.inf}[op]
        low = [padding[d][0] if d in space else 0 for d in range(rank)]
        high = [padding[d][1] if d in space else 0 for d in range(rank)]
        x = g.pad(x, low, high, g.constant(np.asarray(neutral, kind)))
        padded = [aval.shape[d] + low[d] + high[d] for d in range(rank)]
        x = g.transpose(x, order)
        # [images, 1, *space]
        x = g.reshape(x, [product([padded[d] for d in others]), 1, *(padded[d] for d in space)])
        attributes = {
            "strides": [strides[d] for d in space],
            "dilations": [dilation[d] for d in space],
        }
        size = [window[d] for d in space]
        if op == "sum":
            ones = g.constant(np.ones((1, 1, *size), kind))
            x = g.add("Conv", x, ones, kernel_shape=size, **attributes)
        else:
            x = g.add("Neg", x) if op == "min" else x
            x = g.add("MaxPool", x, kernel_shape=size, **attributes)
            x = g.add("Neg", x) if op == "min" else x
        out = eqn.outvars[0].aval
        x = g.transpose(g.reshape(x, [out.shape[d] for d in order]), _inverse(order))
        return g.cast(x, stored(dtype)) if kind != stored(dtype) else x

    return rule


RULES: dict[str, Callable[..., str]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "reduce_window_sum": _pool("sum"),
    "reduce_window_max": _pool("max"),
    "reduce_window_min": _pool("min"),
}
