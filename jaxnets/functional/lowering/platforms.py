"""One function of arrays, computed in another way on another platform.

`lax.platform_dependent` leaves a conditional in the program, which XLA resolves behind the
partitioning for a mesh; what then holds a collective stays a conditional. On fake CPU devices
such collectives have no order, and devices that run them in different ones wait for each other for
ever. Here the choice is made when the program is lowered, and nothing of it is left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

_Function = Callable[..., Any]
#: The same, with as many positional arrays, that returns a list of arrays.
_ArrayFunction = Callable[..., list[jax.Array]]

_CPU, _PARTITIONED = "cpu", "partitioned"


def platform_dependent(
    *operands: Any, cpu: _Function, default: _Function, partitioned: _Function | None = None
) -> Any:
    """Apply one function on CPU and another one elsewhere.

    It can be differentiated, transposed and mapped as often as both functions can. A derivative
    computes what it needs of the function's intermediate results again, so a function that is
    not linear in its arrays belongs into a custom derivative.

    Args:
        operands: the arguments of the functions, arrays or trees of them.
        cpu: on CPU, returns an array or a tree of arrays.
        default: on other platforms, returns arrays of the same shapes and dtypes.
        partitioned: on CPU in a program for a mesh, which XLA divides among the devices; if None,
            `cpu` is.

    Returns:
        What the function returns.

    Raises:
        TypeError: results that differ in structure, shape or dtype.
    """
    functions = {_CPU: cpu, "default": default, _PARTITIONED: partitioned}
    branches, returned = {}, {}
    for name, each in functions.items():
        if each:
            branches[name], shapes = jax.make_jaxpr(each, return_shape=True)(*operands)
            returned[name] = jax.tree.map(lambda x: jax.core.ShapedArray(x.shape, x.dtype), shapes)
    for name, own in returned.items():
        if own != returned["default"]:
            raise TypeError(
                f"the function {name!r} returns {own}, the default {returned['default']}; make "
                "them alike"
            )
    results = _choice.bind(*jax.tree.leaves(operands), **branches)
    return jax.tree.unflatten(jax.tree.structure(returned["default"]), results)


_choice = Primitive("platform_dependent")
_choice.multiple_results = True


@_choice.def_impl
def _run(*arrays: jax.Array, **branches: ClosedJaxpr) -> list[jax.Array]:
    platforms = {device.platform for device in jax.numpy.asarray(arrays[0]).devices()}
    return jaxpr_as_fun(branches[_CPU if platforms == {_CPU} else "default"])(*arrays)


@_choice.def_abstract_eval
def _result(*avals: Any, **branches: ClosedJaxpr) -> Any:
    return branches["default"].out_avals


def _lower(
    ctx: mlir.LoweringRuleContext, *operands: Any, platform: str, **branches: ClosedJaxpr
) -> Any:
    # Inside of `shard_map` and `pmap` nothing is divided any more, and no such number is there.
    num_devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
    if platform == _CPU and num_devices > 1 and _PARTITIONED in branches:
        platform = _PARTITIONED
    # XLA puts the body in the place of the call; unlike `mlir.lower_fun`, nothing is traced again.
    body = branches[platform]
    return mlir.core_call_lowering(ctx, *operands, name=f"on_{platform}", call_jaxpr=body)


mlir.register_lowering(_choice, functools.partial(_lower, platform="default"))
mlir.register_lowering(_choice, functools.partial(_lower, platform=_CPU), platform=_CPU)


def _push_forward(
    primals: Sequence[Any], tangents: Sequence[Any], **branches: ClosedJaxpr
) -> tuple[list[jax.Array], list[jax.Array]]:
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def tangent_of(function: _ArrayFunction) -> _ArrayFunction:
        def tangent(*arrays: jax.Array) -> list[jax.Array]:
            values, directions = arrays[: len(primals)], arrays[len(primals) :]
            partial = _with_others_fixed(function, values, moving)
            return jax.jvp(partial, tuple(values[i] for i in moving), directions)[1]

        return tangent

    pushed = _changed(tangent_of, [*primals, *(tangents[i] for i in moving)], branches)
    return _choice.bind(*primals, **branches), pushed


def _pull_back(cotangents: list[Any], *operands: Any, **branches: ClosedJaxpr) -> list[Any]:
    linear = [i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    if all(isinstance(cotangent, ad.Zero) for cotangent in cotangents):
        return [None if i not in linear else ad.Zero(x.aval) for i, x in enumerate(operands)]
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    known = [operand for i, operand in enumerate(operands) if i not in linear]

    def transpose_of(function: _ArrayFunction, which: int) -> _ArrayFunction:
        def transpose(*arrays: jax.Array) -> list[jax.Array]:
            pulled, rest = list(arrays[: len(cotangents)]), iter(arrays[len(cotangents) :])
            values = [None if i in linear else next(rest) for i in range(len(operands))]
            partial = _with_others_fixed(function, values, linear)
            avals = [operands[i].aval for i in linear]
            return [jax.linear_transpose(partial, *avals)(pulled)[linear.index(which)]]

        return transpose

    # One choice for each, so that the compiler can drop the gradient that nobody asks for.
    return [
        _changed(functools.partial(transpose_of, which=i), [*cotangents, *known], branches)[0]
        if i in linear
        else None
        for i in range(len(operands))
    ]


def _map(
    arrays: Sequence[Any], axes: Sequence[int | None], **branches: ClosedJaxpr
) -> tuple[list[jax.Array], list[int]]:
    mapped = _changed(functools.partial(jax.vmap, in_axes=tuple(axes)), arrays, branches)
    return mapped, [0] * len(mapped)


ad.primitive_jvps[_choice] = _push_forward
ad.primitive_transposes[_choice] = _pull_back
batching.primitive_batchers[_choice] = _map


def _changed(
    transform: Callable[[_ArrayFunction], _ArrayFunction],
    arrays: Sequence[Any],
    branches: dict[str, ClosedJaxpr],
) -> list[jax.Array]:
    """Choose between the transforms of the functions of a choice."""
    functions = {name: transform(jaxpr_as_fun(each)) for name, each in branches.items()}
    return platform_dependent(*arrays, **functions)


def _with_others_fixed(
    function: _ArrayFunction, values: Sequence[Any], moving: Sequence[int]
) -> _ArrayFunction:
    """Return the function of the arguments `moving` alone."""

    def partial(*moved: jax.Array) -> list[jax.Array]:
        arguments = list(values)
        for i, value in zip(moving, moved, strict=True):
            arguments[i] = value
        return function(*arguments)

    return partial
