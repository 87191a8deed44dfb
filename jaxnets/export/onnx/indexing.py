"""Gathers, scatters and dynamic slices of JAX in ONNX.

JAX clamps the start of a slice, or ignores slices out of bounds; ONNX refuses them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.export.onnx.arithmetic import scalar
from jaxnets.export.onnx.graph import Graph

_REDUCTIONS = {
    "scatter": "none",
    "scatter-add": "add",
    "scatter-mul": "mul",
    "scatter-min": "min",
    "scatter-max": "max",
}


@dataclasses.dataclass(frozen=True)
class _Slices:
    """Where the slices of a gather or a scatter are in the operand.

    An axis of the operand is `whole` where every slice spans it, else `indexed`. The axes of the
    index tensors are those of the batch, then one for each window along an indexed axis.

    Attributes:
        whole: axes of the operand.
        indexed: axes of the operand; one of -1 is an axis of size 1 to be inserted.
        windows: indexed axes along which a slice extends.
        indices: names of int64 tensors, one for each indexed axis; each broadcasts to `sizes`.
        sizes: of the batch and of the windows.
        valid: name of a tensor of the shape of the batch, whether a slice is in bounds; None where
            all are.
    """

    whole: list[int]
    indexed: list[int]
    windows: list[int]
    indices: list[str]
    sizes: list[Any]
    valid: str | None


def _slices(
    g: Graph,
    indices: Any,
    index_shape: Sequence[Any],
    operand_shape: Sequence[Any],
    slice_sizes: Sequence[Any],
    *,
    removed: Sequence[int],
    operand_batching: Sequence[int],
    index_batching: Sequence[int],
    index_map: Sequence[int],
    mode: Any,
) -> _Slices:
    """Describe the slices; `indices` is the name of a tensor, or an array if it is known."""
    batch = list(index_shape[:-1])
    rank = len(operand_shape)
    apart = {*removed, *operand_batching}
    whole = [d for d in range(rank) if d not in apart and slice_sizes[d] == operand_shape[d]]
    indexed = [d for d in range(rank) if d not in whole]
    windows = [d for d in indexed if d not in apart]
    known = isinstance(indices, np.ndarray)
    long = None if known else g.cast(indices, np.int64)

    def spread_out(name: str) -> str:
        first = len(batch)
        return g.unsqueeze(name, *range(first, first + len(windows)))

    starts: dict[int, str] = {}
    checks: list[str] = []
    for column, d in enumerate(index_map):
        last = operand_shape[d] - slice_sizes[d]
        if known:
            values = np.asarray(indices[..., column], np.int64)
            start, inside = g.constant(values), _all_within(values, last)
        else:
            assert long is not None
            start = g.add("Gather", long, g.constant(np.int64(column)), axis=len(batch))
            inside = False
        if not inside:
            zero = g.constant(np.int64(0))
            end = g.squeeze(g.size(last), 0)
            if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
                checks.append(
                    g.add(
                        "And",
                        g.add("GreaterOrEqual", start, zero),
                        g.add("LessOrEqual", start, end),
                    )
                )
            start = g.add("Min", g.add("Max", start, zero), end)
        starts[d] = start
    names = []
    for d in indexed:
        if d in starts:
            name = spread_out(starts[d])
        elif d in operand_batching:
            axis = list(index_batching)[list(operand_batching).index(d)]
            others = [i for i in range(len(batch) + len(windows)) if i != axis]
            name = g.unsqueeze(g.range(operand_shape[d]), *others)
        else:
            name = g.constant(np.zeros((1,) * (len(batch) + len(windows)), np.int64))
        if d in windows:
            axis = len(batch) + windows.index(d)
            others = [i for i in range(len(batch) + len(windows)) if i != axis]
            name = g.add("Add", name, g.unsqueeze(g.range(slice_sizes[d]), *others))
        names.append(name)
    if not indexed:
        indexed, names = [-1], [g.constant(np.zeros((1,) * len(batch), np.int64))]
    valid = None
    for check in checks:
        valid = g.add("And", valid, check) if valid else check
    sizes = [*batch, *(slice_sizes[d] for d in windows)]
    return _Slices(whole, indexed, windows, names, sizes, valid)


def _all_within(values: np.ndarray, last: Any) -> bool:
    """Whether all indices are known to be in bounds, for every size that a symbol stands for."""
    if values.size == 0:
        return True
    try:
        return bool(values.min() >= 0 and last >= int(values.max()))
    except Exception:  # JAX cannot decide it, and the class of its error is private
        return False


def _index_tensor(g: Graph, slices: _Slices) -> str:
    """Return the indices as one tensor, the indexed axes last."""
    rank = len(slices.sizes)
    expanded = [g.unsqueeze(g.expand(name, slices.sizes), rank) for name in slices.indices]
    return expanded[0] if len(expanded) == 1 else g.add("Concat", *expanded, axis=rank)


def gather(g: Graph, eqn: Any, indices: Any, x: str) -> str:
    """Write a gather; `indices` is a name, or an array if they are known."""
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    operand, index = (v.aval for v in eqn.invars)
    out = eqn.outvars[0].aval
    slices = _slices(
        *(g, indices, index.shape, operand.shape, eqn.params["slice_sizes"]),
        removed=numbers.collapsed_slice_dims,
        operand_batching=numbers.operand_batching_dims,
        index_batching=numbers.start_indices_batching_dims,
        index_map=numbers.start_index_map,
        mode=mode,
    )
    num_batch = len(index.shape) - 1
    batch = [("batch", i) for i in range(num_batch)]
    windows = [("operand", d) for d in slices.windows]
    whole = [("operand", d) for d in slices.whole]
    if len(slices.indices) == 1:
        (axis,) = slices.indexed
        before = [label for label in whole if label[1] < axis]
        labels = [*before, *batch, *windows, *whole[len(before) :]]
        if axis < 0:
            x, axis = g.unsqueeze(x, 0), 0
        positions = g.expand(slices.indices[0], slices.sizes)
        result = g.add("Gather", x, positions, axis=axis)
    else:
        x = g.transpose(x, [*slices.indexed, *slices.whole])
        labels = [*batch, *windows, *whole]
        result = g.add("GatherND", x, _index_tensor(g, slices))
    rest, offsets = iter(batch), iter(sorted([*windows, *whole]))
    wanted = [
        next(offsets) if i in numbers.offset_dims else next(rest) for i in range(len(out.shape))
    ]
    result = g.transpose(result, [labels.index(label) for label in wanted])
    if slices.valid is None:
        return result
    fill = eqn.params["fill_value"]
    if fill is None:
        fill = _fill_value(np.dtype(out.dtype))
    valid = g.unsqueeze(slices.valid, *numbers.offset_dims)
    return g.add("Where", valid, result, scalar(g, fill, out.dtype))


def _fill_value(dtype: np.dtype[Any]) -> Any:
    """What JAX fills slices with that are out of bounds."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.nan
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max


def scatter(g: Graph, eqn: Any, indices: Any, x: str, updates: str) -> str:
    """Write a scatter; `indices` is a name, or an array if they are known."""
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    operand, index, update = (v.aval for v in eqn.invars)
    apart = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window_axes = [d for d in range(len(operand.shape)) if d not in apart]
    slice_sizes = [1] * len(operand.shape)
    for d, axis in zip(window_axes, numbers.update_window_dims, strict=True):
        slice_sizes[d] = update.shape[axis]
    slices = _slices(
        *(g, indices, index.shape, operand.shape, slice_sizes),
        removed=numbers.inserted_window_dims,
        operand_batching=numbers.operand_batching_dims,
        index_batching=numbers.scatter_indices_batching_dims,
        index_map=numbers.scatter_dims_to_operand_dims,
        mode=mode,
    )
    # The updates as [batch, windows, whole axes].
    position = dict(zip(window_axes, numbers.update_window_dims, strict=True))
    batch = [i for i in range(len(update.shape)) if i not in numbers.update_window_dims]
    updates = g.transpose(
        updates, [*batch, *(position[d] for d in (*slices.windows, *slices.whole))]
    )
    is_inserted = slices.indexed == [-1]
    order = list(slices.whole) if is_inserted else [*slices.indexed, *slices.whole]
    x = g.unsqueeze(x, 0) if is_inserted else g.transpose(x, order)
    shape = [1, *operand.shape] if is_inserted else [operand.shape[d] for d in order]
    if slices.valid is not None:
        # What is out of bounds goes to one more element of the first axis, which is cut off.
        valid = g.unsqueeze(
            slices.valid, *range(len(index.shape) - 1, len(index.shape) - 1 + len(slices.windows))
        )
        beyond = g.squeeze(g.size(shape[0]), 0)
        first = g.add("Where", valid, slices.indices[0], beyond)
        slices = dataclasses.replace(slices, indices=[first, *slices.indices[1:]])
        one_more = g.expand(scalar(g, 0, operand.dtype), [1, *shape[1:]])
        x = g.add("Concat", x, one_more, axis=0)
    name = eqn.primitive.name
    if operand.dtype == np.bool_ and name != "scatter":
        raise ValueError("truth values are only scattered by assignment")
    x = g.add("ScatterND", x, _index_tensor(g, slices), updates, reduction=_REDUCTIONS[name])
    if slices.valid is not None:
        x = g.slice(x, 0, 0, shape[0])
    if is_inserted:
        return g.squeeze(x, 0)
    return g.transpose(x, [order.index(d) for d in range(len(order))])


def _start(g: Graph, start: str, size: Any, slice_size: Any) -> str:
    """Return the start of a slice, clamped so that the slice is in bounds; int64 of shape [1]."""
    start = g.reshape(g.cast(start, np.int64), [1])
    return g.add("Max", g.add("Min", start, g.size(size - slice_size)), g.integers(0))


def _dynamic_slice(g: Graph, eqn: Any, x: str, *starts: str) -> str:
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    axes = [d for d in range(len(shape)) if shape[d] != sizes[d]]
    if not axes:
        return g.add("Identity", x)
    first = [_start(g, starts[d], shape[d], sizes[d]) for d in axes]
    last = [g.add("Add", s, g.size(sizes[d])) for s, d in zip(first, axes, strict=True)]
    begin, end = (
        names[0] if len(names) == 1 else g.add("Concat", *names, axis=0) for names in (first, last)
    )
    return g.add("Slice", x, begin, end, g.integers(*axes), g.integers(*(1,) * len(axes)))


def _dynamic_update_slice(g: Graph, eqn: Any, x: str, update: str, *starts: str) -> str:
    shape, sizes = (v.aval.shape for v in eqn.invars[:2])
    axes = [d for d in range(len(shape)) if shape[d] != sizes[d]]

    def updated(x: str, axes: Sequence[int]) -> str:
        """Update along the first axis what lies between the parts before and after it."""
        if not axes:
            return update
        axis, *rest = axes
        begin = _start(g, starts[axis], shape[axis], sizes[axis])
        end = g.add("Add", begin, g.size(sizes[axis]))
        at, step = g.integers(axis), g.integers(1)
        before = g.add("Slice", x, g.integers(0), begin, at, step)
        after = g.add("Slice", x, end, g.integers(np.iinfo(np.int64).max), at, step)
        inside = g.add("Slice", x, begin, end, at, step) if rest else x
        return g.add("Concat", before, updated(inside, rest), after, axis=axis)

    return updated(x, axes) if axes else g.add("Identity", update)


RULES: dict[str, Callable[..., str]] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}

#: Rules that also take the indices as an array, if they are known: {name: (rule, operand)}.
WITH_INDICES: dict[str, Callable[..., str]] = {
    "gather": gather,
    **dict.fromkeys(_REDUCTIONS, scatter),
}
