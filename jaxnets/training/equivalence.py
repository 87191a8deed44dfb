"""Check that a step computes the same result under every executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import Batch, Mean, StepFn, TrainState, tree_path
from jaxnets.training.executors import (
    jit_step,
    pmap_step,
    scan_steps,
    sharded_step,
)
from jaxnets.training.sharding import data_mesh, fsdp_sharding
from jaxnets.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class EquivalenceReport:
    """Largest absolute difference of every leaf from a reference, for every executor.

    Attributes:
        reference: the reference, "eager" or "jit".
        differences: {executor: {leaf path: difference}}, for the leaves of the final state and of
            the metrics over all steps.
        skipped: {executor: reason}.
        num_devices: number of devices of pmap and the mesh.
    """

    reference: str
    differences: dict[str, dict[str, float]]
    skipped: dict[str, str]
    num_devices: int

    @property
    def largest(self) -> float:
        """The largest difference of all leaves and executors; NaN if any difference is NaN."""
        values = [value for leaves in self.differences.values() for value in leaves.values()]
        return float(np.max(values)) if values else 0.0

    def table(self, num_leaves: int = 20) -> str:
        """Format the differences as a table, largest first.

        Args:
            num_leaves: maximum number of rows.

        Returns:
            Text with one column per executor.
        """
        names = list(self.differences)
        worst = {
            leaf: float(np.max([self.differences[name][leaf] for name in names]))
            for leaf in next(iter(self.differences.values()))
        }
        leaves = sorted(worst, key=lambda leaf: -np.nan_to_num(worst[leaf], nan=np.inf))
        shown = leaves[:num_leaves]
        width = max(len("difference from eager"), *map(len, shown))
        title = f"difference from {self.reference}"
        header = f"{title:<{width}}  " + "  ".join(f"{n:>12}" for n in names)
        rows = [header]
        for leaf in shown:
            cells = "  ".join(f"{self.differences[name][leaf]:12.2e}" for name in names)
            rows.append(f"{leaf:<{width}}  {cells}")
        if len(leaves) > num_leaves:
            rows.append(f"({len(leaves) - num_leaves} more leaves differ less)")
        cells = "  ".join(f"{np.max(list(self.differences[n].values())):12.2e}" for n in names)
        rows.append(f"{'largest of all':<{width}}  {cells}")
        rows.append(f"pmap and mesh on {self.num_devices} device(s)")
        rows.extend(f"{name} not run: {reason}" for name, reason in self.skipped.items())
        return "\n".join(rows)

    def __str__(self) -> str:
        return self.table()


def check_equivalence(
    step: StepFn,
    state: TrainState,
    batch: Batch,
    *,
    num_steps: int = 2,
    num_microbatches: int = 2,
    reference: Literal["eager", "jit"] = "eager",
) -> EquivalenceReport:
    """Run a step under every executor and compare the results leaf by leaf.

    Use SGD in float32 (rounding differences of about 1e-7), or float64. Adam turns the rounding
    noise of a gradient that is mathematically zero into a full step, so use SGD instead. Dropout
    draws different masks for every split of the batch, so set its rate to 0.

    Args:
        step: from `make_train_step`, or your own `(state, batch, *, axis_name=None)`.
        state: the initial state; not donated.
        batch: the batch of every step; its size is divisible by devices and microbatches.
        num_steps: steps to run under each executor.
        num_microbatches: parts of the microbatched run, which needs a step of `make_train_step`. It
            differs for a network with batch norm, whose statistics are those of each part.
        reference: "eager" runs the step without jit; "jit" is faster, and sufficient if another
            test compares jit with eager.

    Returns:
        EquivalenceReport; `print` it.
    """
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    mesh = data_mesh(jax.local_devices())

    def repeated(executor: Callable[..., Any]) -> Any:
        current, metrics = executor(state, batch)
        for _ in range(num_steps - 1):
            current, more = executor(current, batch)
            metrics = jax.tree.map(np.add, metrics, more)
        return current, metrics

    def scanned() -> Any:
        stack = {name: np.stack([array] * num_steps) for name, array in batch.items()}
        return jit_step(scan_steps(step))(state, stack)

    runs: dict[str, Callable[[], Any]] = {
        "jit": lambda: repeated(jit_step(step)),
        "scan": scanned,
        "pmap": lambda: repeated(pmap_step(step)),
        "replicated": lambda: repeated(sharded_step(step, mesh)),
        "fsdp": lambda: repeated(sharded_step(step, mesh, fsdp_sharding(state, mesh, min_bytes=0))),
    }
    skipped = {}
    if isinstance(step, TrainStep):
        parts = dataclasses.replace(step, num_microbatches=num_microbatches)
        runs["microbatched"] = lambda: repeated(jit_step(parts))
    else:
        skipped["microbatched"] = "only a step of make_train_step has microbatches"
    if reference == "jit":
        expected = _leaves(runs.pop("jit")())
    else:
        expected = _leaves(repeated(lambda state, batch: step(state, batch)))
    differences = {}
    for name, run in runs.items():
        try:
            leaves = _leaves(run())
        except ValueError as error:
            skipped[name] = str(error).splitlines()[0]
            continue
        differences[name] = {path: _distance(expected[path], leaves[path]) for path in expected}
    return EquivalenceReport(reference, differences, skipped, mesh.size)


def _leaves(result: tuple[TrainState, Any]) -> dict[str, np.ndarray]:
    state, metrics = result
    # Means, not totals, because the rounding error of a sum grows with the batch.
    means = jax.tree.map(
        lambda x: x.compute() if isinstance(x, Mean) else x,
        metrics,
        is_leaf=lambda x: isinstance(x, Mean),
    )
    tree = {"state": state, "metrics": means}
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tree_path(path): _to_numpy(leaf) for path, leaf in leaves}


def _to_numpy(leaf: jax.Array) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.max(np.abs(first - second), initial=0.0))
