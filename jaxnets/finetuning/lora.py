"""Adapters of low rank: train small matrices beside frozen parameters.

An adapter is a tree of variables, a partial copy of the network's. In place of a frozen kernel it
has the factors of an update, and leaves that are trained as a whole replace the frozen ones. A
function from frozen parameters and adapter to parameters is all there is: the objective is that of
the network, and nothing knows of adapters but `lora_objective`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.checks import check_key, check_sizes
from jaxnets.core import (
    Batch,
    ModelState,
    Objective,
    ObjectiveOutput,
    Params,
    at_least_float32,
    known_values,
)
from jaxnets.finetuning.paths import STACKED, insert, leaves_by_path, matching
from jaxnets.functional.low_rank import LowRankKernel

#: Collection of the factors alpha / rank, one for each rank of each target; not trained.
COLLECTION = "lora"
_A, _B, _MAGNITUDE = "lora_a", "lora_b", "magnitude_scale"


def lora_init(
    rng: jax.Array,
    params: Params,
    *,
    rank: int | jax.Array = 8,
    target: str | None = r"attention/(query|value)/kernel$",
    alpha: float | jax.Array = 16.0,
    full: str | None = None,
    max_rank: int | None = None,
    rank_stabilized: bool = False,
    dora: bool = False,
    stacked: str = STACKED,
) -> dict[str, Any]:
    """Return a new adapter of frozen parameters, with which the network computes what it did.

    LoRA: W + (alpha / rank) A B, with A [channels, rank] random and B [rank, features] zero.
    rsLoRA: alpha / sqrt(rank) instead, whose updates keep their size as the rank grows.
    DoRA: m (W + (alpha / rank) A B) / ||W + (alpha / rank) A B||, with the norm of each output's
    column, and m [features], at first ||W||, trained too.

    Members of a population may differ in `rng`, `rank` and `alpha`: call it under `jax.vmap`, with
    the same `max_rank`. The factors beyond a member's rank are and stay zero.

    Args:
        rng: key; every target and every rank draws from a key of its own.
        params: the frozen parameters, nested dict.
        rank: of the update, 1 or more.
        target: regular expression of the paths of kernels to adapt, dense or convolutional; None
            for no kernel. `re.search` is used, so end it with "$" where that matters.
        alpha: factor of the update.
        full: regular expression of the paths of leaves to train as a whole, such as a new head and
            norms, r"^head/|norm".
        max_rank: rank of the arrays, at least `rank`, which it is by default.
        rank_stabilized: rsLoRA.
        dora: DoRA.
        stacked: regular expression of the paths whose first axis is that of layers in a loop.

    Returns:
        Variables for `create_train_state`: "params", the adapter, and "lora", the scales
        [rank] of each target. Add other collections of the network, such as "batch_stats".

    Raises:
        ValueError: a pattern matches nothing, or both match a leaf; a target is a vector; ranks
            out of range.
        TypeError: `rng` is not a key.

    Example:
        >>> params = {"query": {"kernel": jnp.ones((4, 6))}, "head": {"bias": jnp.zeros(2)}}
        >>> adapter = lora_init(jax.random.key(0), params, rank=2, target="query", full="head")
        >>> jax.tree.map(jnp.shape, adapter["params"]["query"])
        {'kernel': {'lora_a': (4, 2), 'lora_b': (2, 6)}}
        >>> print(lora_summary(params, adapter))
        trained: 22 of 26 parameters (84.62%): 20 in 1 updates of low rank, 2 in 1 leaves

    References:
        Hu et al. 2021, arXiv:2106.09685, equation 3. Differs from it: A is uniform in
        +-1 / sqrt(channels), as in the authors' code and in PEFT, where the paper says Gaussian.
        Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA). Liu et al. 2024, arXiv:2402.09353, equation 5
        (DoRA), with the norm as a constant in the backward pass, section 4.3.
    """
    check_key(rng)
    known = known_values(rank)
    if max_rank is None:
        if known is None:
            raise ValueError("rank is known at run time only; give max_rank, the largest of all")
        max_rank = int(known)
    check_sizes(max_rank=max_rank)
    if known is not None and not 1 <= known <= max_rank:
        raise ValueError(f"rank is {known}; give 1 to max_rank, {max_rank}")
    targets = {} if target is None else matching(params, target, what="target")
    whole = {} if full is None else matching(params, full, what="full")
    if both := sorted(targets.keys() & whole.keys()):
        raise ValueError(f"target and full both match {both[0]}; make one of them narrower")
    if not targets and not whole:
        raise ValueError("target and full are None, so nothing would be trained; give one of them")
    used = jnp.arange(max_rank) < rank  # [rank]
    divisor = jnp.sqrt(jnp.asarray(rank, jnp.float32)) if rank_stabilized else rank
    factor = jnp.where(used, jnp.asarray(alpha / divisor, jnp.float32), 0.0)
    adapter: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    for path, kernel in targets.items():
        leading = int(re.search(stacked, path) is not None)
        if kernel.ndim < 2 + leading:
            raise ValueError(
                f"{path} of shape {kernel.shape} is no matrix; train it as a whole, by "
                f"full={path!r}"
            )
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        factors = _initial_factors(key, kernel, used, leading)
        if dora:
            factors[_MAGNITUDE] = jnp.sqrt(_squared_norms(kernel, leading))
        insert(adapter, path, factors)
        scale = jnp.broadcast_to(factor, (*kernel.shape[:leading], max_rank))
        # A copy: a step that donates its state must not get the same buffer twice.
        insert(scales, path, {"scale": jnp.copy(scale)})
    for path, leaf in whole.items():
        # A copy too: a step that donates its state must not delete the frozen array.
        insert(adapter, path, jnp.copy(leaf))
    return {"params": adapter, COLLECTION: scales}


def lora_objective(objective: Objective, params: Params) -> Objective:
    """Train an adapter of frozen parameters with the objective of the network.

    The state has the adapter alone: frozen parameters cost no gradient and no optimizer state, are
    in no checkpoint, and are one copy for all members of a population. Executors pass them to the
    program as arguments; so compile an evaluation step by `jit_step` too. `sharded_step` keeps
    their sharding.

    A dense kernel is never merged: its inputs are multiplied by W, A and B in turn, so the gradient
    of W is not computed either. Other kernels are merged at every step, in float32 or wider, so
    that small updates of bfloat16 kernels count; layers cast them to their compute dtype.

    Args:
        objective: of the network, such as `classification(module)`.
        params: frozen, as given to `lora_init`; of any dtype, or from `quantize_int8`.

    Returns:
        An `Objective` of the state that `create_train_state` makes of `lora_init`'s variables.

    Raises:
        ValueError: at the call, the state is not that of an adapter of `params`.

    Example:
        >>> import optax
        >>> import jaxnets as jn
        >>> module = jn.MLP(features=(8,), num_outputs=2)
        >>> batch = {"inputs": jnp.ones((4, 3)), "labels": jnp.array([0, 1, 1, 0])}
        >>> key = jax.random.key(0)
        >>> params = jn.initialize(module, key, batch["inputs"])["params"]
        >>> adapter = lora_init(key, params, rank=2, target="hidden_0/kernel", full="head")
        >>> update = jn.Update(lora_objective(jn.classification(module), params), optax.adam(1e-3))
        >>> state = jn.create_train_state(adapter, update, rng=key)
        >>> state, _ = jn.jit_step(jn.make_train_step(update))(state, batch)
        >>> merged = merge_lora(params, state.variables)
        >>> jax.tree.structure(merged) == jax.tree.structure(params)
        True
    """
    return _AdapterObjective(objective, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as jax.jit needs it
class _AdapterObjective:
    objective: Objective
    params: Params

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        own = {name: tree for name, tree in model_state.items() if name != COLLECTION}
        adapted = _adapted(self.params, {"params": params, **model_state}, _for_a_module)
        output = self.objective(adapted, own, batch, rng, train=train)
        after = {**output.model_state, COLLECTION: model_state[COLLECTION]}
        return dataclasses.replace(output, model_state=after)


def merge_lora(params: Params, variables: Mapping[str, Any]) -> Params:
    """Return the parameters that a network with an adapter has, as plain arrays.

    Args:
        params: the frozen parameters.
        variables: of the adapter: from `lora_init`, or `state.variables` after training.

    Returns:
        A tree like `params`, for `module.apply`, as if all of the network had been trained. Updated
        kernels are computed in float32 or wider and have the dtype of `params`.

    Raises:
        ValueError: the adapter is not one of these parameters.
    """
    return _adapted(
        params,
        variables,
        lambda path, kernel, is_matrix: kernel.merged().astype(kernel.base.dtype),
    )


def unmerge_lora(merged: Params, variables: Mapping[str, Any]) -> Params:
    """Subtract an adapter from merged parameters; where you have the frozen ones, use those.

    Args:
        merged: from `merge_lora` with the same variables.
        variables: of the adapter.

    Returns:
        The frozen parameters, up to the rounding of the merged ones.

    Raises:
        ValueError: the adapter has leaves that are trained as a whole, or DoRA, which keep nothing
            of the frozen parameters.
    """
    for path in leaves_by_path(variables.get("params", {})):
        if path.rsplit("/", 1)[-1] not in (_A, _B):
            raise ValueError(
                f"{path} of the adapter does not say what was there before; use the frozen "
                "parameters themselves"
            )
    negative = {
        **variables,
        COLLECTION: jax.tree.map(jnp.negative, variables.get(COLLECTION, {})),
    }
    return merge_lora(merged, negative)


@dataclasses.dataclass(frozen=True)
class LoRASummary:
    """Sizes of an adapter.

    Attributes:
        low_rank: number of trained parameters of each target, ranks that are not used left out.
        full: number of trained parameters of each leaf that is trained as a whole.
        total: number of parameters of the adapted network.
    """

    low_rank: dict[str, int]
    full: dict[str, int]
    total: int

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(self.low_rank.values()) + sum(self.full.values())

    @property
    def share(self) -> float:
        """Trained parameters for each parameter of the adapted network."""
        return self.trained / self.total

    def __str__(self) -> str:
        return (
            f"trained: {self.trained:,} of {self.total:,} parameters ({self.share:.2%}): "
            f"{sum(self.low_rank.values()):,} in {len(self.low_rank)} updates of low rank, "
            f"{sum(self.full.values()):,} in {len(self.full)} leaves"
        )


def lora_summary(params: Params, variables: Mapping[str, Any]) -> LoRASummary:
    """Count what an adapter trains.

    Args:
        params: the frozen parameters.
        variables: of the adapter of one network, from `lora_init` or `state.variables`.

    Returns:
        LoRASummary; `print` it.

    Raises:
        ValueError: the adapter is not one of these parameters.
    """
    low_rank: dict[str, int] = {}

    def count(path: str, kernel: LowRankKernel, is_matrix: bool) -> Any:
        max_rank = kernel.scale.shape[-1]
        rank = int(jnp.count_nonzero(kernel.scale)) * max_rank // kernel.scale.size
        columns = 0 if kernel.columns is None else kernel.columns.size
        low_rank[path] = rank * (kernel.a.size + kernel.b.size) // max_rank + columns
        return kernel.base

    network = leaves_by_path(_adapted(params, variables, count))
    full = {
        path: leaf.size
        for path, leaf in leaves_by_path(variables["params"]).items()
        if path in network
    }
    return LoRASummary(low_rank, full, sum(math.prod(leaf.shape) for leaf in network.values()))


def _for_a_module(path: str, kernel: LowRankKernel, is_matrix: bool) -> Any:
    """Return the kernel as factors where a dense layer takes it, else as an array."""
    return kernel if is_matrix and path.rsplit("/", 1)[-1] == "kernel" else kernel.merged()


def _adapted(
    params: Params,
    variables: Mapping[str, Any],
    convert: Callable[[str, LowRankKernel, bool], Any],
) -> Params:
    """Replace the leaves of an adapter: kernels by `convert(path, kernel, is_matrix)`.

    A kernel of layers in a loop counts as a matrix, one of a convolution does not.
    """
    if COLLECTION not in variables:
        raise ValueError(
            f"the variables have the collections {sorted(variables)} and no {COLLECTION!r}; give "
            "those of lora_init, with its parameters in params"
        )

    def walk(base: Any, adapter: Any, scales: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        name = "/".join(path)
        if isinstance(adapter, Mapping) and _A in adapter:
            is_matrix = adapter[_B].ndim == getattr(base, "ndim", 0)
            return convert(name, _kernel(name, base, adapter, scales["scale"]), is_matrix)
        if not isinstance(adapter, Mapping):
            return adapter
        if not isinstance(base, Mapping) or (unknown := sorted(adapter.keys() - base.keys())):
            missing = name if not isinstance(base, Mapping) else "/".join((*path, unknown[0]))
            raise ValueError(
                f"the adapter has {missing}, which the frozen parameters do not have; give those "
                "for which the adapter was made"
            )
        replaced = {
            key: walk(base[key], value, scales.get(key, {}), (*path, key))
            for key, value in adapter.items()
        }
        return {**base, **replaced}

    return walk(params, variables["params"], variables[COLLECTION], ())


def _kernel(
    path: str, base: Any, factors: Mapping[str, jax.Array], scale: jax.Array
) -> LowRankKernel:
    """Return a kernel with its update; convolutions as [..., offsets, channels, features]."""
    a, b, leading = factors[_A], factors[_B], factors[_B].ndim - 2
    shape = getattr(base, "shape", (0,))
    if a.shape[:-1] != shape[:-1] or b.shape[-1] != shape[-1]:
        raise ValueError(
            f"the adapter of {path} has factors of shapes {a.shape} and {b.shape}, which do not "
            f"fit a kernel of shape {shape}; give the parameters for which it was made"
        )
    offsets = base.ndim - 2 - leading
    # [layers, 1, ..., rank, features] and [layers, 1, ..., rank] for a kernel of a convolution
    b = b.reshape(*b.shape[:leading], *(1,) * offsets, *b.shape[leading:])
    scale = scale.reshape(*scale.shape[:leading], *(1,) * offsets, *scale.shape[leading:])
    columns = None
    if _MAGNITUDE in factors:
        norms = _updated_norms(base, a, factors[_B], scale, leading)
        columns = factors[_MAGNITUDE] / jax.lax.stop_gradient(norms)
        columns = columns.reshape(*columns.shape[:leading], *(1,) * offsets, columns.shape[-1])
    return LowRankKernel(base, a, b, scale, columns)


def _initial_factors(
    key: jax.Array, kernel: Any, used: jax.Array, leading: int
) -> dict[str, jax.Array]:
    layers, inputs, features = kernel.shape[:leading], kernel.shape[leading:-1], kernel.shape[-1]
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    bound, shape = math.prod(inputs) ** -0.5, (*layers, *inputs)

    # A key of its own for every rank, so that a larger rank begins with the same columns.
    def column(index: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, index), shape, dtype, -bound, bound)

    rank = used.shape[0]
    a = jax.vmap(column, out_axes=-1)(jnp.arange(rank))  # [layers, ..., channels, rank]
    a = jnp.where(used.reshape((1,) * len(shape) + (rank,)), a, jnp.zeros((), dtype))
    return {_A: a, _B: jnp.zeros((*layers, rank, features), dtype)}


def _squared_norms(kernel: Any, leading: int) -> jax.Array:
    """Return the sum of squares for each output, [layers, features]."""
    wide = at_least_float32(kernel)
    return jnp.sum(wide**2, axis=tuple(range(leading, kernel.ndim - 1)))


def _updated_norms(
    base: Any, a: jax.Array, b: jax.Array, scale: jax.Array, leading: int
) -> jax.Array:
    """Return the norms of the columns of W + A B without making that matrix, [layers, features].

    ||w + A b||^2 = ||w||^2 + 2 b . A^T w + b . (A^T A) b for each output.
    """
    flat = (*base.shape[:leading], -1)
    kernel = at_least_float32(base).reshape(*flat, base.shape[-1])  # [layers, inputs, features]
    a = (a * scale[..., None, :]).reshape(*flat, a.shape[-1])  # [layers, inputs, rank]
    transposed = jnp.swapaxes(a, -1, -2)
    mixed = 2 * (transposed @ kernel) + (transposed @ a) @ b  # [layers, rank, features]
    squares = jnp.sum(kernel**2, axis=-2) + jnp.sum(b * mixed, axis=-2)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))
