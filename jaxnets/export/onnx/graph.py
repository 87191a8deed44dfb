"""A graph of ONNX operations while it is built, without the `onnx` package."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.export.onnx.sizes import OPERATIONS, evaluate, is_known

#: What is computed in another type, because onnxruntime has few operations in it.
_STORED: dict[np.dtype[Any], np.dtype[Any]] = {
    jnp.dtype(jnp.bfloat16): np.dtype(np.float32),
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(np.int8): np.dtype(np.int32),
    np.dtype(np.int16): np.dtype(np.int32),
    np.dtype(np.uint8): np.dtype(np.int32),
    np.dtype(np.uint16): np.dtype(np.int32),
    np.dtype(np.uint32): np.dtype(np.int64),
}
_PLAIN = {np.dtype(t) for t in (np.float32, np.float64, np.int32, np.int64, np.bool_)}


def stored(dtype: Any) -> np.dtype[Any]:
    """Return the type in which values of a type are computed.

    Raises:
        ValueError: a type that graphs do not have, such as a complex one or a random key.
    """
    own = np.dtype(dtype) if not jnp.issubdtype(dtype, jax.dtypes.extended) else None
    if own in _STORED:
        return _STORED[own]
    if own in _PLAIN:
        return own
    raise ValueError(f"values of type {dtype} have no place in an ONNX graph")


def boundary(dtype: Any) -> np.dtype[Any]:
    """Return the type of inputs and outputs of a graph: NumPy has no bfloat16."""
    return np.dtype(np.float32) if dtype == jnp.bfloat16 else np.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the graph.

    Attributes:
        name: in the graph.
        shape: numbers and symbolic sizes.
        dtype: that of the network; the graph computes in `stored(dtype)`.
        thin: axes whose size is 1 in the graph, because nothing was broadcast along them yet.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: np.dtype[Any]
    thin: frozenset[int] = frozenset()


class Node(NamedTuple):
    """An operation; its attributes may be graphs."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class _Shared:
    """What a graph shares with the bodies of its loops and branches."""

    def __init__(self) -> None:
        self.count = 0
        self.scope = ""
        self.constants: dict[str, np.ndarray] = {}
        self.constant_names: dict[Any, str] = {}
        self.size_names: dict[str, str] = {}
        self.symbols: dict[str, tuple[str, int, int, int]] = {}
        self.prelude: list[Node] = []  # sizes, which are known before anything else is computed


class Graph:
    """Operations in order; graphs of loops and branches use the names of those around them.

    Attributes:
        nodes: in order.
        inputs: of the graph.
        outputs: names.
    """

    def __init__(self, around: Graph | None = None) -> None:
        self.shared: _Shared = around.shared if around else _Shared()
        self.nodes: list[Node] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[str] = []

    @property
    def scope(self) -> str:
        """Where in the network the operations belong: the first part of their names."""
        return self.shared.scope

    @scope.setter
    def scope(self, scope: str) -> None:
        self.shared.scope = scope

    def new_name(self, what: str) -> str:
        """Return a name that is used nowhere."""
        self.shared.count += 1
        return (
            f"{self.scope}/{what}_{self.shared.count}"
            if self.scope
            else (f"{what}_{self.shared.count}")
        )

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add an operation with one result, and return its name."""
        return self.add_many(op, inputs, 1, **attributes)[0]

    def add_many(
        self, op: str, inputs: Sequence[str], num_outputs: int, **attributes: Any
    ) -> list[str]:
        """Add an operation, and return the names of its results."""
        name = self.new_name(op)
        outputs = [name] if num_outputs == 1 else [f"{name}:{i}" for i in range(num_outputs)]
        self.nodes.append(Node(op, name, tuple(inputs), tuple(outputs), attributes))
        return outputs

    def name_result(self, op: str, inputs: Sequence[str], result: str, **attributes: Any) -> None:
        """Add an operation whose result has a name of the caller's."""
        self.nodes.append(Node(op, self.new_name(op), tuple(inputs), (result,), attributes))

    def constant(self, array: Any, dtype: Any = None) -> str:
        """Return the name of a constant; equal small ones are the same."""
        array = np.ascontiguousarray(np.asarray(array, dtype)).reshape(np.shape(array))
        constants, names = self.shared.constants, self.shared.constant_names
        name = f"constant_{len(constants)}"
        if array.size <= 64:
            name = names.setdefault((array.dtype.str, array.shape, array.tobytes()), name)
        constants[name] = array
        return name

    def integers(self, *values: int) -> str:
        """Return the name of a constant vector of int64, the type of sizes and axes."""
        return self.constant(np.array(values, np.int64))

    # Sizes

    def size(self, size: Any) -> str:
        """Return the name of a size, int64 of shape [1]."""
        if isinstance(size, int):
            return self.integers(size)
        names = self.shared.size_names
        if str(size) not in names:
            # Sizes belong to the outermost graph, where every graph finds them.
            prelude = Graph(self)
            prelude.nodes = self.shared.prelude
            scope, prelude.scope = prelude.scope, "sizes"
            value = evaluate(size, prelude._symbol, prelude._size_operation)
            names[str(size)] = value if isinstance(value, str) else self.integers(value)
            prelude.scope = scope
        return names[str(size)]

    def _symbol(self, name: str) -> str:
        names = self.shared.size_names
        if name not in names:
            array, axis, factor, offset = self.shared.symbols[name]
            size = self.add("Shape", array, start=axis, end=axis + 1)
            names[name] = str(
                self._size_operation("FloorDiv", self._size_operation("Sub", size, offset), factor)
            )
        return names[name]

    def _size_operation(self, op: str, a: str | int, b: str | int) -> str | int:
        if isinstance(a, int) and isinstance(b, int):
            return OPERATIONS[op](a, b)
        if (op, b) in (("Add", 0), ("Sub", 0), ("Mul", 1), ("FloorDiv", 1)):
            return a
        if (op, a) in (("Add", 0), ("Mul", 1)):
            return b
        x, y = (self.integers(v) if isinstance(v, int) else v for v in (a, b))
        if op == "FloorDiv":  # Div truncates, and Mod has the sign of the divisor
            return self.add("Div", self.add("Sub", x, self.add("Mod", x, y)), y)
        return self.add(op, x, y)

    def shape(self, sizes: Sequence[Any]) -> str:
        """Return the name of a vector of sizes."""
        if is_known(*sizes):
            return self.integers(*sizes)
        if len(sizes) == 1:
            return self.size(sizes[0])
        key = f"[{', '.join(map(str, sizes))}]"
        names = self.shared.size_names
        if key not in names:
            parts = [self.size(size) for size in sizes]
            prelude = Graph(self)
            prelude.nodes = self.shared.prelude
            scope, prelude.scope = prelude.scope, "sizes"
            names[key] = prelude.add("Concat", *parts, axis=0)
            prelude.scope = scope
        return names[key]

    # Rearrangements

    def cast(self, x: str, dtype: Any) -> str:
        """Convert to a type of NumPy."""
        return self.add("Cast", x, to=np.dtype(dtype))

    def reshape(self, x: str, sizes: Sequence[Any]) -> str:
        """Reshape to sizes, of which one may be symbolic without being computed."""
        symbolic = [size for size in sizes if not isinstance(size, int)]
        if len(symbolic) == 1 and 0 not in [size for size in sizes if isinstance(size, int)]:
            sizes = [size if isinstance(size, int) else -1 for size in sizes]
            return self.add("Reshape", x, self.integers(*sizes))
        return self.add("Reshape", x, self.shape(sizes), allowzero=1)

    def transpose(self, x: str, permutation: Sequence[int]) -> str:
        """Permute the axes."""
        if list(permutation) == list(range(len(permutation))):
            return x
        return self.add("Transpose", x, perm=list(permutation))

    def expand(self, x: str, sizes: Sequence[Any]) -> str:
        """Broadcast to sizes."""
        return self.add("Expand", x, self.shape(sizes))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """Insert axes of size 1."""
        return self.add("Unsqueeze", x, self.integers(*axes)) if axes else x

    def squeeze(self, x: str, *axes: int) -> str:
        """Remove axes of size 1."""
        return self.add("Squeeze", x, self.integers(*axes)) if axes else x

    def slice(self, x: str, axis: int, start: Any, end: Any, step: int = 1) -> str:
        """Slice one axis; the bounds are sizes."""
        bounds = self.size(start), self.size(end)
        return self.add("Slice", x, *bounds, self.integers(axis), self.integers(step))

    def reverse(self, x: str, axes: Sequence[int]) -> str:
        """Reverse axes."""
        count = len(axes)
        ends = (np.iinfo(np.int64).min,) * count
        return self.add(
            "Slice",
            *(x, self.integers(*(-1,) * count), self.integers(*ends)),
            *(self.integers(*axes), self.integers(*(-1,) * count)),
        )

    def range(self, size: Any) -> str:
        """Count from 0 to a size, int64."""
        if isinstance(size, int) and size <= 4096:
            return self.constant(np.arange(size))
        start, step = self.constant(np.int64(0)), self.constant(np.int64(1))
        return self.add("Range", start, self.squeeze(self.size(size), 0), step)

    def pad(self, x: str, low: Sequence[Any], high: Sequence[Any], value: str) -> str:
        """Pad each axis by sizes, of which negative ones cut off."""
        if all(isinstance(n, int) and n == 0 for n in (*low, *high)):
            return x
        return self.add("Pad", x, self.shape((*low, *high)), value, mode="constant")

    def full(self, tensor: Tensor) -> str:
        """Return the name of a value with all its axes broadcast."""
        return self.expand(tensor.name, tensor.shape) if tensor.thin else tensor.name

    # Results

    def used(self) -> set[str]:
        """Return the names that this graph takes from the graphs around it, and drop what is idle.

        Operations whose results nothing uses are removed.
        """
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if not needed.intersection(node.outputs):
                continue
            kept.append(node)
            needed.update(name for name in node.inputs if name)
            for graph in self._graphs(node):
                needed |= graph.used()
        self.nodes[:] = reversed(kept)
        own = {name for node in self.nodes for name in node.outputs}
        return needed - own - {tensor.name for tensor in self.inputs}

    def _graphs(self, node: Node) -> Iterator[Graph]:
        return (value for value in node.attributes.values() if isinstance(value, Graph))
