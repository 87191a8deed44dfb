"""Functions with a different implementation for each platform.

`lax.platform_dependent` leaves a conditional in the program, which XLA resolves only after it has
partitioned the program for a mesh. A conditional that contains a collective by then is never
resolved. On fake CPU devices such collectives have no order, and devices that run them in different
orders deadlock. Here the choice is made at lowering, and the program contains no conditional.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

_Function = Callable[..., Any]
#: The same with flat arguments and results: takes arrays, returns a list of arrays.
_ArrayFunction = Callable[..., list[jax.Array]]

_CPU, _PARTITIONED = "cpu", "partitioned"


def sizes_are_known(*shapes: Sequence[int]) -> bool:
    """Whether all sizes are numbers: `jax.export` also traces with symbols, such as "batch".

    What is chosen by a size has to be chosen without it there.
    """
    return all(isinstance(size, (int, np.integer)) for shape in shapes for size in shape)


def platform_dependent(
    *operands: Any, cpu: _Function, default: _Function, partitioned: _Function | None = None
) -> Any:
    """Apply one function on CPU and another one elsewhere.

    Differentiable, transposable and batchable as often as both functions are. Derivatives save no
    residuals but recompute them, so a nonlinear function belongs inside a `jax.custom_vjp`.
    Unlike `lax.platform_dependent` it leaves no conditional in the program. With symbolic sizes
    (`sizes_are_known`) the default is applied on every platform.

    Args:
        operands: the arguments of the functions, pytrees of arrays.
        cpu: on CPU, returns a pytree of arrays.
        default: on other platforms, returns a pytree of the same structure, shapes and dtypes.
        partitioned: on CPU in a program that XLA partitions over the devices of a mesh; by
            default `cpu`.

    Returns:
        The result of the function.

    Raises:
        TypeError: the functions return other structures, shapes or dtypes.
    """
    if not sizes_are_known(*(jax.numpy.shape(x) for x in jax.tree.leaves(operands))):
        return default(*operands)
    functions = {_CPU: cpu, "default": default, _PARTITIONED: partitioned}
    branches, returned = {}, {}
    for name, function in functions.items():
        if function:
            branches[name], shapes = jax.make_jaxpr(function, return_shape=True)(*operands)
            returned[name] = jax.tree.map(lambda x: jax.core.ShapedArray(x.shape, x.dtype), shapes)
    for name, avals in returned.items():
        if avals != returned["default"]:
            raise TypeError(
                f"the function {name!r} returns {avals}, the default {returned['default']}; make "
                "them alike"
            )
    results = _choice.bind(*jax.tree.leaves(operands), **branches)
    return jax.tree.unflatten(jax.tree.structure(returned["default"]), results)


_choice = Primitive("platform_dependent")
_choice.multiple_results = True


@_choice.def_impl
def _impl(*arrays: jax.Array, **branches: ClosedJaxpr) -> list[jax.Array]:
    platforms = {device.platform for device in jax.numpy.asarray(arrays[0]).devices()}
    return jaxpr_as_fun(branches[_CPU if platforms == {_CPU} else "default"])(*arrays)


@_choice.def_abstract_eval
def _abstract_eval(*avals: Any, **branches: ClosedJaxpr) -> Any:
    return branches["default"].out_avals


def _lower(
    ctx: mlir.LoweringRuleContext, *operands: Any, platform: str, **branches: ClosedJaxpr
) -> Any:
    # Inside `shard_map` and `pmap` XLA partitions nothing, and the context has no such number.
    num_devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
    if platform == _CPU and num_devices > 1 and _PARTITIONED in branches:
        platform = _PARTITIONED
    # XLA inlines the call; unlike `mlir.lower_fun`, this traces nothing again.
    body = branches[platform]
    return mlir.core_call_lowering(ctx, *operands, name=f"on_{platform}", call_jaxpr=body)


mlir.register_lowering(_choice, functools.partial(_lower, platform="default"))
mlir.register_lowering(_choice, functools.partial(_lower, platform=_CPU), platform=_CPU)


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **branches: ClosedJaxpr
) -> tuple[list[jax.Array], list[jax.Array]]:
    differentiated = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def tangent_of(function: _ArrayFunction) -> _ArrayFunction:
        def tangent(*arrays: jax.Array) -> list[jax.Array]:
            values, directions = arrays[: len(primals)], arrays[len(primals) :]
            partial = _with_others_fixed(function, values, differentiated)
            return jax.jvp(partial, tuple(values[i] for i in differentiated), directions)[1]

        return tangent

    nonzero = [tangents[i] for i in differentiated]
    tangents_out = _transform_branches(tangent_of, [*primals, *nonzero], branches)
    return _choice.bind(*primals, **branches), tangents_out


def _transpose(cotangents: list[Any], *operands: Any, **branches: ClosedJaxpr) -> list[Any]:
    linear = [i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    if all(isinstance(cotangent, ad.Zero) for cotangent in cotangents):
        return [None if i not in linear else ad.Zero(x.aval) for i, x in enumerate(operands)]
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    num_cotangents = len(cotangents)
    known = [operand for i, operand in enumerate(operands) if i not in linear]

    def transpose_of(function: _ArrayFunction, which: int) -> _ArrayFunction:
        def transpose(*arrays: jax.Array) -> list[jax.Array]:
            of_results, rest = list(arrays[:num_cotangents]), iter(arrays[num_cotangents:])
            values = [None if i in linear else next(rest) for i in range(len(operands))]
            partial = _with_others_fixed(function, values, linear)
            avals = [operands[i].aval for i in linear]
            return [jax.linear_transpose(partial, *avals)(of_results)[linear.index(which)]]

        return transpose

    # One choice for each operand, so that the compiler can drop the gradients that are not used.
    return [
        _transform_branches(
            functools.partial(transpose_of, which=i), [*cotangents, *known], branches
        )[0]
        if i in linear
        else None
        for i in range(len(operands))
    ]


def _batch(
    arrays: Sequence[Any], axes: Sequence[int | None], **branches: ClosedJaxpr
) -> tuple[list[jax.Array], list[int]]:
    mapped = _transform_branches(functools.partial(jax.vmap, in_axes=tuple(axes)), arrays, branches)
    return mapped, [0] * len(mapped)


ad.primitive_jvps[_choice] = _jvp
ad.primitive_transposes[_choice] = _transpose
batching.primitive_batchers[_choice] = _batch


def _transform_branches(
    transform: Callable[[_ArrayFunction], _ArrayFunction],
    arrays: Sequence[Any],
    branches: dict[str, ClosedJaxpr],
) -> list[jax.Array]:
    """Apply a JAX transformation to every branch, and choose between the results."""
    functions = {name: transform(jaxpr_as_fun(branch)) for name, branch in branches.items()}
    return platform_dependent(*arrays, **functions)


def _with_others_fixed(
    function: _ArrayFunction, values: Sequence[Any], free: Sequence[int]
) -> _ArrayFunction:
    """Return the function of its arguments at `free`, with the others fixed to `values`."""

    def partial(*free_values: jax.Array) -> list[jax.Array]:
        arguments = list(values)
        for i, value in zip(free, free_values, strict=True):
            arguments[i] = value
        return function(*arguments)

    return partial
