"""Files compared with their networks: inputs at the edges, and the first operation that differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.export.onnx.graph import Tensor, boundary
from jaxnets.export.onnx.reference import evaluate
from jaxnets.export.onnx.serialize import model
from jaxnets.export.onnx.sizes import concrete, holds, solve, symbols_of
from jaxnets.export.onnx.walk import Record, Written

_AT_ONCE = 64  # operations whose results are kept at the same time


class Case(NamedTuple):
    """Inputs of a check.

    Attributes:
        description: such as "batch=1, time=6, all 0".
        sizes: of the symbols.
        inputs: flat.
    """

    description: str
    sizes: dict[str, int]
    inputs: list[np.ndarray]


def edge_cases(
    examples: Sequence[Any], shapes: Sequence[tuple[Any, ...]], constraints: Sequence[str]
) -> Iterator[Case]:
    """Yield inputs at the edges: sizes from the smallest on, and extreme values.

    Args:
        examples: arrays, or shapes and types.
        shapes: with symbolic sizes.
        constraints: on them.
    """
    arrays = [_values(example) for example in examples]
    symbols = symbols_of(*(size for shape in shapes for size in shape))
    sources = solve(shapes)
    given = {}
    for name in symbols:
        array, axis, factor, offset = sources[name]
        given[name] = (arrays[array].shape[axis] - offset) // factor
    smallest = dict.fromkeys(symbols, 1)

    def is_allowed(sizes: Mapping[str, int]) -> bool:
        return all(holds(text, sizes) for text in constraints)

    largest = given
    for name, size in given.items():
        larger = ({**largest, name: each} for each in (2 * size + 1, 2 * size, size + 1))
        largest = next(filter(is_allowed, larger), largest)
    sizes = [given, smallest, largest, *({**given, name: 1} for name in symbols)]
    allowed = list(filter(is_allowed, sizes))
    tried: list[dict[str, int]] = []
    for each in allowed or [given]:
        if each not in tried:
            tried.append(each)
            resized = [_resized(x, concrete(s, each)) for x, s in zip(arrays, shapes, strict=True)]
            yield Case(_described(each, "the example"), each, resized)
    for what, values in _EXTREMES.items():
        inputs = [
            _resized(values(x), concrete(s, given)) for x, s in zip(arrays, shapes, strict=True)
        ]
        yield Case(_described(given, what), given, inputs)


def _values(example: Any) -> np.ndarray:
    if isinstance(example, jax.ShapeDtypeStruct):
        count = int(np.prod(example.shape))
        if jnp.issubdtype(example.dtype, jnp.floating):
            values: np.ndarray = np.random.default_rng(0).normal(size=count)
        else:
            values = np.arange(count) % 2
        return values.reshape(example.shape).astype(example.dtype)
    return np.asarray(example)


def _resized(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat or cut along each axis."""
    for axis, size in enumerate(shape):
        x = np.take(x, np.arange(size) % x.shape[axis], axis)
    return x


def _of_type(floats: Callable[[np.ndarray], Any], integers: Callable[[np.ndarray], Any]) -> Any:
    def change(x: np.ndarray) -> np.ndarray:
        if x.dtype == np.bool_ or not x.size:
            return x
        change_values = floats if jnp.issubdtype(x.dtype, jnp.floating) else integers
        return np.broadcast_to(np.asarray(change_values(x)).astype(x.dtype), x.shape)

    return change


_EXTREMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeros and the smallest integers": _of_type(np.zeros_like, np.min),
    "values times 100 and the largest integers": _of_type(lambda x: x * 100, np.max),
}


def _described(sizes: Mapping[str, int], values: str) -> str:
    return ", ".join([*(f"{name}={size}" for name, size in sizes.items()), values])


def compare(
    written: Written,
    arrays: Mapping[str, np.ndarray],
    network: Callable[..., Sequence[Any]],
    cases: Iterable[Case],
    tolerance: float,
) -> float:
    """Compare the graph, as onnxruntime computes it, with the network.

    Args:
        written: the graph.
        arrays: its weights by name.
        network: flat inputs -> flat outputs.
        cases: inputs.
        tolerance: of the errors, relative to the largest element of an output in this case or one
            before.

    Returns:
        The largest error, in that measure.

    Raises:
        ValueError: they differ, with the first operation that does by itself.
    """

    def session(more: Sequence[Tensor] = ()) -> Any:
        return _session(model(written.graph, arrays, written.outputs, {}, more=more), arrays)

    run, largest = session(), 0.0
    scales = [0.0] * len(written.outputs)
    for case in cases:
        try:
            expected = [_at_boundary(x) for x in network(*case.inputs)]
        except (ValueError, TypeError) as refusal:
            raise ValueError(
                f"the network refuses inputs of these sizes ({case.description}): {refusal}; "
                "give constraints such as ['batch >= 2'], or fix the sizes"
            ) from refusal
        feeds = {
            one.name: _at_boundary(x)
            for one, x in zip(written.graph.inputs, case.inputs, strict=True)
        }
        try:
            actual = run.run([one.name for one in written.outputs], feeds)
        except Exception as failure:
            raise ValueError(
                f"onnxruntime does not compute the graph ({case.description}): {failure}"
            ) from failure
        scales = [max(pair) for pair in zip(scales, _scale(expected), strict=True)]
        errors = _differences(expected, actual)
        for one, error, scale in zip(written.outputs, errors, scales, strict=True):
            if error > tolerance * scale:

                def inside(tensors: Sequence[Tensor], feeds: Any = feeds) -> list[np.ndarray]:
                    return session(tensors).run([one.name for one in tensors], feeds)

                found = _first_wrong(written.records, inside, case.sizes, tolerance)
                raise ValueError(
                    f"the ONNX graph differs from the network ({case.description}): "
                    f"{one.name!r} by {error:.3g} where values reach {scale:.3g}; {found}"
                )
            largest = max(largest, error / scale if scale else 0.0)
    return largest


def _session(proto: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    outside = [one.name for one in proto.graph.initializer if one.external_data]
    if outside:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(arrays[name]) for name in outside]
        options.add_external_initializers(outside, values)
    try:
        return onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ValueError(f"onnxruntime does not load the graph: {error}") from error


def _at_boundary(x: Any) -> np.ndarray:
    """Return an array as a graph takes and returns it."""
    array = np.asarray(x)
    return array.astype(boundary(array.dtype))


def _differences(expected: Sequence[Any], actual: Sequence[np.ndarray]) -> list[float]:
    """Return the largest error of each array; infinite if types, shapes or NaNs differ."""
    errors = []
    for want, got in zip(map(np.asarray, expected), actual, strict=True):
        if want.shape != got.shape or want.dtype != got.dtype:
            errors.append(np.inf)
            continue
        a, b = (x.astype(np.float64) for x in (want, got))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0, np.abs(a - b))
        errors.append(float(np.where(np.isnan(apart), np.inf, apart).max(initial=0)))
    return errors


def _scale(arrays: Sequence[Any]) -> list[float]:
    """Return the largest finite size of the elements of each array."""
    sizes = []
    for array in arrays:
        values = np.abs(np.asarray(array).astype(np.float64))
        sizes.append(float(values[np.isfinite(values)].max(initial=0)))
    return sizes


def _first_wrong(
    records: Sequence[Record],
    run: Callable[[Sequence[Tensor]], list[np.ndarray]],
    sizes: Mapping[str, int],
    tolerance: float,
) -> str:
    """Find the first operation whose results differ although its operands are the same.

    Args:
        records: of the graph.
        run: returns values inside the graph.
        sizes: of the symbols.
        tolerance: of the error, relative to the largest element of a result.

    Returns:
        Name and place of the operation, and its error.
    """
    for start in range(0, len(records), _AT_ONCE):
        part = records[start : start + _AT_ONCE]
        tensors = {
            value.name: value
            for record in part
            for value in (*record.inputs, *record.outputs)
            if isinstance(value, Tensor)
        }
        stored = dict(zip(tensors, run(list(tensors.values())), strict=True))

        def value_of(value: Any, stored: Mapping[str, np.ndarray] = stored) -> Any:
            if not isinstance(value, Tensor):
                return value
            shape = concrete(value.shape, sizes)
            return np.broadcast_to(stored[value.name], shape).astype(value.dtype)

        for record in part:
            with jax.numpy_rank_promotion("allow"):
                expected = evaluate(record.eqn, [value_of(value) for value in record.inputs], sizes)
            actual = [value_of(value) for value in record.outputs]
            for error, size in zip(_differences(expected, actual), _scale(expected), strict=True):
                if error > tolerance * size:
                    return (
                        f"the first operation that differs is {record.description}, by "
                        f"{error:.3g} where values reach {size:.3g}"
                    )
    return "no operation differs by itself: their errors add up, so give a larger tolerance"
