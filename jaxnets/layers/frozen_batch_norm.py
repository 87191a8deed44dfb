"""Batch norms that keep their running statistics in training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxnets.core import tree_path
from jaxnets.layers.normalization import BatchNorm


def frozen_batch_norm(module: Any, pattern: str = "") -> Any:
    """Let the batch norms of a module normalize by their running statistics in training too.

    As is right for pretrained layers that are frozen: statistics of small batches of other data
    would change what they compute, and move the running averages. All else of the module, dropout
    included, is as before. The scales and biases of the norms are parameters like any other.

    Args:
        module: a Linen module whose batch norms are `layers.BatchNorm`.
        pattern: regular expression of the paths of the norms to freeze, such as "^stage_[01]/"; by
            default all.

    Returns:
        What objectives take for a module: it has `init` and `apply`.

    Raises:
        ValueError: at `apply`, the variables have no batch norm whose path the pattern matches; the
            message has the paths that there are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> module = frozen_batch_norm(BatchNorm())
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = module.init(jax.random.key(0), x)
        >>> y, state = module.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> round(float(y[1, 0]), 3), float(state["batch_stats"]["mean"][0])
        (3.0, 0.0)
    """
    return _FrozenBatchNorm(module, pattern)


@dataclasses.dataclass(frozen=True)
class _FrozenBatchNorm:
    module: Any
    pattern: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__call__":  # protocols, such as that of `copy`
            raise AttributeError(name)
        return getattr(self.module, name)

    def apply(self, variables: Any, *inputs: Any, **keywords: Any) -> Any:
        """Call the module's `apply`."""
        statistics, _ = jax.tree_util.tree_flatten_with_path(variables.get("batch_stats", {}))
        norms = dict.fromkeys(tree_path(path[:-1]) for path, _ in statistics)
        if not any(re.search(self.pattern, norm) for norm in norms):
            found = ", ".join(list(norms)[:8]) or "the variables have no batch_stats"
            raise ValueError(
                f"pattern={self.pattern!r} of frozen_batch_norm matches none of {len(norms)} batch "
                f"norms ({found}); give a pattern that does, or the module itself"
            )
        with nn.intercept_methods(self._evaluate_norms):
            return self.module.apply(variables, *inputs, **keywords)

    def _evaluate_norms(
        self,
        call: Callable[..., Any],
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        norm = context.module
        called = isinstance(norm, BatchNorm) and context.method_name == "__call__"
        if called and re.search(self.pattern, "/".join(norm.path)):
            keywords = {**keywords, "train": False}
        return call(*inputs, **keywords)
