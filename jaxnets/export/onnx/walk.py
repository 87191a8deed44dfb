"""The walk through a jaxpr that writes its equations into a graph: calls, loops and branches."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxnets.export.onnx import arithmetic, contractions, indexing, rearrangements
from jaxnets.export.onnx.graph import Graph, Tensor, boundary, stored
from jaxnets.export.onnx.rewritten import REWRITTEN
from jaxnets.export.onnx.sizes import is_known, solve

#: A constant (an array of NumPy or random keys) or a tensor of the graph.
Value = Any

_RULES = {**rearrangements.RULES, **indexing.RULES, **contractions.RULES}
#: The parameter that holds the body of a call, which is written in its place.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "jaxpr",
    "platform_dependent": "default",  # of this library
}
#: Constants that an export computes are not larger than this, or than what they are made of.
_MAX_FOLDED = 1024


def called(eqn: Any) -> ClosedJaxpr | None:
    """Return the body of a call; None for other equations."""
    name = eqn.primitive.name
    if name not in _CALLS:
        return None
    body = eqn.params[_CALLS[name]]
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Return the numbers of constants and of carried values of a scan.

    Its parameters say so in other words in each version of JAX; what is scanned or stacked has one
    axis more outside the body.
    """
    body = eqn.params["jaxpr"].jaxpr
    outside, inside = ([v.aval.ndim for v in each] for each in (eqn.outvars, body.outvars))
    num_carry = sum(map(operator.eq, outside, inside))
    outside, inside = ([v.aval.ndim for v in each] for each in (eqn.invars, body.invars))
    return sum(map(operator.eq, outside, inside)) - num_carry, num_carry


class Record(NamedTuple):
    """An equation of the outermost graph, with its operands and results."""

    eqn: Any
    scope: str
    inputs: list[Value]
    outputs: list[Value]

    @property
    def description(self) -> str:
        """Name of the operation, and where in the network it is."""
        return described(self.eqn, self.scope)


def described(eqn: Any, scope: str) -> str:
    """Return the name of an operation, and where in the network it is."""
    return f"{eqn.primitive.name} in {scope or 'the function'}"


class Written(NamedTuple):
    """A graph, and where it came from.

    Attributes:
        graph: the outermost one.
        outputs: with the types of the network.
        records: its equations, in order.
    """

    graph: Graph
    outputs: list[Tensor]
    records: list[Record]


def write_graph(
    closed: ClosedJaxpr, weights: Sequence[str], inputs: Sequence[str], outputs: Sequence[str]
) -> Written:
    """Write a jaxpr of weights and inputs as a graph.

    Args:
        closed: its variables are the weights, then the inputs.
        weights: names, in order.
        inputs: names.
        outputs: names.

    Raises:
        ValueError: an operation without a counterpart, with its place in the network.
    """
    g, writer = Graph(), Writer()
    given = [
        Tensor(name, tuple(variable.aval.shape), np.dtype(variable.aval.dtype))
        for name, variable in zip((*weights, *inputs), closed.jaxpr.invars, strict=True)
    ]
    g.inputs = given[len(weights) :]
    for symbol, source in solve([one.shape for one in g.inputs]).items():
        g.shared.symbols[symbol] = (inputs[source[0]], *source[1:])

    def computed(one: Tensor, source: np.dtype[Any]) -> Tensor:
        """Return a value in the type in which the graph computes it."""
        if source == stored(one.dtype) == one.dtype:
            return one
        name = arithmetic.converted(g, one.name, source, one.dtype)
        return dataclasses.replace(one, name=name)

    of_weights = [computed(one, one.dtype) for one in given[: len(weights)]]
    of_inputs = [computed(one, boundary(one.dtype)) for one in g.inputs]
    results = writer.write(g, closed.jaxpr, closed.consts, [*of_weights, *of_inputs])
    returned = []
    for name, value in zip(outputs, results, strict=True):
        one = tensor(g, value)
        g.name_result("Cast", (g.full(one),), name, to=boundary(one.dtype))
        returned.append(Tensor(name, one.shape, one.dtype))
    return Written(g, returned, writer.records)


class Writer:
    """Writes jaxprs into graphs.

    Attributes:
        records: of the outermost graph, in order.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._depth = 0

    def write(
        self, g: Graph, jaxpr: Jaxpr, consts: Sequence[Value], arguments: Sequence[Value]
    ) -> list[Value]:
        """Write the equations of a jaxpr, and return its results.

        Raises:
            ValueError: an operation without a counterpart, with its place in the network.
        """
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        around = g.scope

        def read(variable: Any) -> Value:
            if isinstance(variable, Literal):
                aval: Any = variable.aval
                return np.asarray(variable.val, aval.dtype)
            return values[variable]

        for eqn in jaxpr.eqns:
            inputs = [read(variable) for variable in eqn.invars]
            own = str(eqn.source_info.name_stack)
            g.scope = "/".join(part for part in (around, own) if part)
            outputs = self._equation(g, eqn, inputs)
            g.scope = around
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, g: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        body = called(eqn)
        if body is not None:
            return self.write(g, body.jaxpr, body.consts, inputs)
        if name in REWRITTEN:
            body = jax.make_jaxpr(functools.partial(REWRITTEN[name], **eqn.params))(
                *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
            )
            return self.write(g, body.jaxpr, body.consts, inputs)
        if name == "platform_index":
            # The entry without platforms is the default.
            index = [not platforms for platforms in eqn.params["platforms"]].index(True)
            return [np.int32(index)]
        if name == "cond" and isinstance(inputs[0], np.ndarray | np.generic):
            branches = eqn.params["branches"]
            taken = branches[min(max(int(inputs[0]), 0), len(branches) - 1)]
            return self.write(g, taken.jaxpr, taken.consts, inputs[1:])
        if name == "optimization_barrier":
            return inputs
        if _is_foldable(eqn, inputs):
            return _folded(eqn, inputs)
        try:
            outputs = self._operation(g, eqn, inputs)
        except _AlreadyNamed:
            raise
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            reason = str(error) or type(error).__name__
            raise _AlreadyNamed(f"{described(eqn, g.scope)} has no ONNX form: {reason}") from error
        if self._depth == 0:
            self.records.append(Record(eqn, g.scope, inputs, outputs))
        return outputs

    def _operation(self, g: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        control: dict[str, Callable[..., list[Value]]] = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
        }
        if name in control:
            return control[name](g, eqn, inputs)
        if name == "broadcast_in_dim":
            return [_broadcast(g, eqn, inputs[0])]
        if name == "iota":
            return [_iota(g, eqn)]
        if name in arithmetic.RULES:
            tensors = [tensor(g, value) for value in inputs]
            elementwise = arithmetic.RULES[name](g, eqn, *(one.name for one in tensors))
            return [_elementwise(eqn.outvars[0].aval, elementwise, tensors)]
        names = [g.full(tensor(g, value)) for value in inputs]
        results: str | list[str]
        if name in indexing.WITH_INDICES:
            x, indices, *updates = names
            known = inputs[1] if isinstance(inputs[1], np.ndarray) else indices
            results = indexing.WITH_INDICES[name](g, eqn, known, x, *updates)
        elif name in _RULES:
            results = _RULES[name](g, eqn, *names)
        else:
            raise NotImplementedError(
                "this operation is not known to the export; compute it without, or open an issue"
            )
        return _tensors(eqn, [results] if isinstance(results, str) else results)

    # Loops and branches

    def _body(
        self, g: Graph, closed: ClosedJaxpr, outer: Sequence[Value], avals: Sequence[Any]
    ) -> tuple[Graph, list[str]]:
        """Write a body whose first operands are of the graph around, the others its inputs."""
        body = Graph(g)
        for aval in avals:
            name = body.new_name("input")
            body.inputs.append(Tensor(name, tuple(aval.shape), np.dtype(aval.dtype)))
        return body, self._branch(body, closed, [*outer, *body.inputs])

    def _branch(self, g: Graph, closed: ClosedJaxpr, operands: Sequence[Value]) -> list[str]:
        """Write a jaxpr whose equations are not compared one by one."""
        self._depth += 1
        results = self.write(g, closed.jaxpr, closed.consts, operands)
        self._depth -= 1
        # Results have names of their own, even where one is an operand or occurs twice.
        return [g.add("Identity", g.full(tensor(g, value))) for value in results]

    def _scan(self, g: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
        params = eqn.params
        closed, (num_consts, num_carry) = params["jaxpr"], scan_counts(eqn)
        consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
        sequences = inputs[num_consts + num_carry :]
        avals = [v.aval for v in closed.jaxpr.invars[num_consts:]]
        body, results = self._body(g, closed, consts, avals)
        operands = [g.full(tensor(g, value)) for value in (*carry, *sequences)]
        if not sequences:  # Scan takes its length from a sequence
            operands.append(g.range(params["length"]))
            body.inputs.append(Tensor(body.new_name("step"), (), np.dtype(np.int64)))
        body.outputs = results
        num_sequences, num_stacked = len(operands) - num_carry, len(results) - num_carry
        backwards = int(params["reverse"])
        outputs = g.add_many(
            *("Scan", operands, len(results)),
            body=body,
            num_scan_inputs=num_sequences,
            scan_input_directions=[backwards] * num_sequences,
            scan_output_directions=[backwards] * num_stacked,  # left out if it is empty
        )
        return _tensors(eqn, outputs)

    def _while(self, g: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
        params = eqn.params
        condition, body_jaxpr = params["cond_jaxpr"], params["body_jaxpr"]
        num_condition, num_body = params["cond_nconsts"], params["body_nconsts"]
        of_condition, rest = inputs[:num_condition], inputs[num_condition:]
        of_body, carry = rest[:num_body], rest[num_body:]

        def goes_on(graph: Graph, values: Sequence[Value]) -> str:
            return self._branch(graph, condition, [*of_condition, *values])[0]

        start = [tensor(g, value) for value in carry]
        start = [Tensor(g.full(one), one.shape, one.dtype) for one in start]
        first = goes_on(g, start)
        avals = [v.aval for v in body_jaxpr.jaxpr.invars[num_body:]]
        body, results = self._body(g, body_jaxpr, of_body, avals)
        values = [Tensor(r, t.shape, t.dtype) for r, t in zip(results, body.inputs, strict=True)]
        body.outputs = [goes_on(body, values), *results]
        count, before = body.new_name("count"), body.new_name("condition")
        body.inputs[:0] = [
            Tensor(count, (), np.dtype(np.int64)),
            Tensor(before, (), np.dtype(np.bool_)),
        ]
        operands = ["", first, *(one.name for one in start)]
        return _tensors(eqn, g.add_many("Loop", operands, len(results), body=body))

    def _cond(self, g: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
        index, *operands = inputs
        index_name = tensor(g, index).name
        branches = eqn.params["branches"]

        def choose(graph: Graph, first: int) -> list[str]:
            """Return the results of the branches from `first` on."""
            if first == len(branches) - 1:
                return self._branch(graph, branches[first], operands)
            taken = graph.add("LessOrEqual", index_name, graph.constant(np.int32(first)))
            here, rest = Graph(graph), Graph(graph)
            here.outputs = self._branch(here, branches[first], operands)
            rest.outputs = choose(rest, first + 1)
            return graph.add_many(
                "If", (taken,), len(eqn.outvars), then_branch=here, else_branch=rest
            )

        return _tensors(eqn, choose(g, 0))


class _AlreadyNamed(ValueError):
    """An error that says already where in the network it is."""


def _constant(value: Any) -> Value:
    """Return a constant of a jaxpr as an array of NumPy; random keys stay as they are."""
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return np.asarray(value)


def tensor(g: Graph, value: Value) -> Tensor:
    """Return a value as a tensor; constants become those of the graph."""
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    name = g.constant(array.astype(stored(array.dtype)))
    return Tensor(name, array.shape, array.dtype)


def _tensors(eqn: Any, names: Sequence[str]) -> list[Value]:
    return [
        Tensor(name, tuple(v.aval.shape), np.dtype(v.aval.dtype))
        for name, v in zip(names, eqn.outvars, strict=True)
    ]


def _elementwise(aval: Any, name: str, operands: Sequence[Tensor]) -> Tensor:
    """Return the result, thin along the axes along which all operands are."""
    shape = tuple(aval.shape)
    thin = {axis for axis, size in enumerate(shape) if size != 1}
    for operand in operands:
        if operand.shape:  # axes may also be of size 1 in the network itself
            thin &= operand.thin | {axis for axis, size in enumerate(operand.shape) if size == 1}
    if all(not operand.shape for operand in operands):
        thin = set()
    return Tensor(name, shape, np.dtype(aval.dtype), frozenset(thin))


def _broadcast(g: Graph, eqn: Any, value: Value) -> Tensor:
    """Write the insertion of axes only: what is elementwise broadcasts them."""
    x, out = tensor(g, value), eqn.outvars[0].aval
    kept = eqn.params["broadcast_dimensions"]
    thin = {axis for axis, size in enumerate(out.shape) if size != 1 and axis not in kept}
    for axis, to in enumerate(kept):
        if axis in x.thin or (x.shape[axis] == 1 and out.shape[to] != 1):
            thin.add(to)
    name = g.unsqueeze(x.name, *(axis for axis in range(len(out.shape)) if axis not in kept))
    return Tensor(name, tuple(out.shape), np.dtype(out.dtype), frozenset(thin))


def _iota(g: Graph, eqn: Any) -> Tensor:
    out, along = eqn.outvars[0].aval, eqn.params["dimension"]
    others = [axis for axis in range(len(out.shape)) if axis != along]
    name = g.unsqueeze(g.cast(g.range(out.shape[along]), stored(out.dtype)), *others)
    thin = frozenset(axis for axis in others if out.shape[axis] != 1)
    return Tensor(name, tuple(out.shape), np.dtype(out.dtype), thin)


def _is_foldable(eqn: Any, inputs: Sequence[Value]) -> bool:
    """Whether the results are known now, and small enough to be stored."""
    if any(isinstance(value, Tensor) for value in inputs) or eqn.effects:
        return False
    if eqn.primitive.name in ("scan", "while", "cond", "dim_as_value"):
        return False
    avals = [v.aval for v in eqn.outvars]
    if not all(is_known(*aval.shape) for aval in avals):
        return False
    if any(jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in avals):
        return True
    if eqn.primitive.name.startswith("random_"):
        return True
    limit = max(_MAX_FOLDED, sum(np.size(value) for value in inputs))
    return all(math.prod(aval.shape) <= limit for aval in avals)


def _folded(eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    results = eqn.primitive.bind(*inputs, **eqn.params)
    results = results if eqn.primitive.multiple_results else [results]
    return [_constant(result) for result in results]
