"""First checks of a new network: can it overfit one batch, and with which learning rate."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets.checks import check_sizes, check_source
from jaxnets.core import Batch, BatchSource, Objective, Update
from jaxnets.training.executors import jit_step, population_step
from jaxnets.training.held_arrays import split_arrays
from jaxnets.training.loop import value_ranges
from jaxnets.training.step import create_train_state, make_train_step


@dataclasses.dataclass(frozen=True)
class LearningRateSearch:
    """The training losses of several learning rates.

    Attributes:
        learning_rates: [rates], ascending.
        losses: training loss [steps, rates]; not finite if the rate diverged.
        best: the rate with the lowest mean loss over the last tenth of the steps.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    best: float

    def __str__(self) -> str:
        last = _last_tenth(self.losses)
        rows = [
            f"{rate:10.2e}  {loss:10.4f}{'  <- best' if rate == self.best else ''}"
            for rate, loss in zip(self.learning_rates, last, strict=True)
        ]
        return "\n".join([f"{'rate':>10}  {'loss':>10}", *rows])


def find_learning_rate(
    objective: Objective,
    make_optimizer: Callable[..., optax.GradientTransformation],
    variables: Mapping[str, Any],
    batches: BatchSource,
    *,
    rng: jax.Array,
    learning_rates: Sequence[float] | None = None,
    num_steps: int = 100,
    strategy: Literal["vmap", "map"] = "vmap",
) -> LearningRateSearch:
    """Train a network with many learning rates at once, as a population.

    Every rate starts from the same parameters and trains for the same number of steps, unlike the
    learning rate range test, which increases the rate within one run.

    Args:
        objective: the loss.
        make_optimizer: function of `learning_rate`, such as `optax.adam`.
        variables: from `module.init`; the start of every member.
        batches: batch source.
        rng: root key.
        learning_rates: by default 17 rates from 1e-5 to 1e-1, four per decade.
        num_steps: steps for each rate.
        strategy: as for `population_step`.

    Returns:
        LearningRateSearch; `print` it.

    Raises:
        ValueError: there is no rate, the loss is finite with none of them, the source ends early,
            or `num_steps` is below 1.
        TypeError: `batches` is no source, such as a list.
    """
    check_source(batches)
    check_sizes(num_steps=num_steps)
    rates = np.geomspace(1e-5, 1e-1, 17) if learning_rates is None else np.sort(learning_rates)
    if rates.size == 0 or np.min(rates) <= 0:
        raise ValueError(f"learning_rates is {learning_rates}; give rates above 0")
    # By default Optax rounds the hyper-parameters to the dtype of the parameters: in bfloat16 the
    # decay 0.999 of Adam's second moment is 1, which divides by 0.
    injected = optax.inject_hyperparams(make_optimizer, hyperparam_dtype=jnp.float32)
    update = Update(objective, injected(learning_rate=float(rates[0])))

    def create(rate: jax.Array) -> Any:
        state = create_train_state(variables, update, rng=rng)
        opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
        return dataclasses.replace(state, opt_state=opt_state)

    states = jax.vmap(create)(jnp.asarray(rates, jnp.float32))
    step = jit_step(population_step(make_train_step(update), strategy=strategy))
    losses = []
    for batch in itertools.islice(batches(0), num_steps):
        states, metrics = step(states, batch)
        losses.append(metrics["loss"].compute())
    if len(losses) < num_steps:
        raise ValueError(
            f"the batch source ended at step {len(losses)} of {num_steps}; use a source that "
            "repeats, or fewer steps"
        )
    table = np.stack(jax.device_get(losses))
    last = _last_tenth(table)
    if not np.isfinite(last).any():
        raise ValueError(
            f"the loss is not finite at any learning rate from {rates[0]:g} to {rates[-1]:g}; "
            "look for labels out of range, for n classes 0 to n - 1, and for NaN in the inputs; "
            f"the last batch has {value_ranges(batch)}. If the data are right, try lower rates"
        )
    return LearningRateSearch(rates, table, float(rates[np.nanargmin(last)]))


@dataclasses.dataclass(frozen=True)
class OverfitReport:
    """Whether a network can overfit one batch.

    Attributes:
        losses: training loss [steps].
        passed: the last loss is finite and at most `target` times the first loss.
        target: argument of `overfit_one_batch`.
    """

    losses: np.ndarray
    passed: bool
    target: float

    def __str__(self) -> str:
        verdict = "overfits" if self.passed else "does NOT overfit"
        return (
            f"{verdict} one batch: loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g} in "
            f"{len(self.losses)} steps (target: {self.target:g} times the first)"
        )


def overfit_one_batch(
    update: Update | Sequence[Update],
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    rng: jax.Array,
    num_steps: int = 200,
    target: float = 0.1,
) -> OverfitReport:
    """Train on a single batch, the first test of a new network.

    If a network cannot overfit one batch, its loss is wrong, a layer is dead, the inputs have no
    information, or the optimizer does not change the parameters.

    Args:
        update: as for `make_train_step`.
        variables: from `module.init`.
        batch: a few dozen examples.
        rng: root key.
        num_steps: steps on the batch, all in one call.
        target: pass if the last loss is at most this fraction of the first.

    Returns:
        OverfitReport; `print` it.

    Raises:
        ValueError: `num_steps` is below 1.
    """
    check_sizes(num_steps=num_steps)
    step = make_train_step(update)
    state = create_train_state(variables, update, rng=rng)
    name = "loss" if step.updates[0].wrt is None else f"{step.updates[0].wrt}/loss"

    held, with_arrays = split_arrays(step)

    def run(held: Sequence[Any], state: Any, batch: Batch) -> jax.Array:
        def body(state: Any, _: None) -> tuple[Any, jax.Array]:
            state, metrics = with_arrays(held)(state, batch)
            return state, metrics[name].compute()

        return jax.lax.scan(body, state, None, length=num_steps)[1]

    losses = np.asarray(jax.jit(run)(held, state, dict(batch)))
    passed = bool(np.isfinite(losses[-1]) and losses[-1] <= target * losses[0])
    return OverfitReport(losses, passed, target)


def _last_tenth(losses: np.ndarray) -> np.ndarray:
    return np.mean(losses[-max(1, len(losses) // 10) :], axis=0)
