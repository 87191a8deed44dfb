"""Weights in int8, for inference and as the frozen part below an adapter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxnets.core import Params, tree_path
from jaxnets.finetuning.paths import matching
from jaxnets.functional.int8 import quantize_int8_array


def quantize_int8(
    params: Params,
    *,
    target: str = r"(^|/)(kernel|embedding)$",
    group_size: int | None = None,
) -> Params:
    """Store kernels and embeddings as int8, with a scale per channel or per group.

    The tree is applied by the same module: a layer converts its kernel to floats where it uses it,
    in the program. So the parameters need a quarter of the memory of float32, and a call computes
    what it did, in floats, with kernels that differ by at most max |w| / 254 of their group.
    It is no faster, because matmuls are those of floats, of one converted kernel after the other.

    Args:
        params: nested dict of floating arrays.
        target: regular expression of the paths to quantize; those with fewer than two axes are
            left out.
        group_size: inputs that share a scale; None for all inputs of an output channel (for each
            offset of a convolution, and for each row of an embedding).

    Returns:
        A tree of the same structure, with an `Int8Array` for each target. Not for training, but
        `lora_objective` takes it as frozen parameters.

    Raises:
        ValueError: the pattern matches no floating array of two axes or more, or `group_size`
            does not divide an axis.

    Example:
        >>> import jaxnets as jn
        >>> module, x = jn.MLP(features=(64,), num_outputs=2), jnp.ones((1, 32))
        >>> params = jn.initialize(module, jax.random.key(0), x)["params"]
        >>> small = quantize_int8(params)
        >>> y = [module.apply({"params": each}, x) for each in (params, small)]
        >>> bool(jnp.max(jnp.abs(y[0] - y[1])) < 0.02)
        True

    References:
        Jacob et al. 2018, arXiv:1712.05877 (symmetric, weights only). Differs from it: no
        activations are quantized.
    """
    found = matching(params, target, what="target")
    targets = {
        path
        for path, leaf in found.items()
        if leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if not targets:
        raise ValueError(
            f"target={target!r} matches only {', '.join(list(found)[:4])}, and what is quantized "
            "are floating arrays of two axes or more; give the paths of kernels"
        )

    def convert(path: Any, leaf: jax.Array) -> Any:
        name = tree_path(path)
        if name not in targets:
            return leaf
        axis = -1 if name.rsplit("/", 1)[-1] == "embedding" else -2
        try:
            return quantize_int8_array(leaf, axis=axis, group_size=group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; or leave it out of target") from None

    return jax.tree_util.tree_map_with_path(convert, params)
