"""Running statistics of batch norms for parameters that were not trained with them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import jax

from jaxnets.core import Batch, BatchSource, Executor, Metrics, StepFn, TrainState, Update
from jaxnets.training.executors import jit_step
from jaxnets.training.step import make_train_step


def recalibrate_batch_norm(
    update: Update,
    state: TrainState,
    batches: BatchSource | Iterable[Batch],
    *,
    num_batches: int,
    executor: Callable[[StepFn], Executor] = jit_step,
) -> TrainState:
    """Recompute the running statistics of all batch norms for the parameters of a state.

    The running statistics of training belong to the parameters of its last steps. Others, such as
    `averaged_parameters`, give other activations. The objective is called in training mode, which
    moves the running averages, and the parameters stay as they are; no gradient is computed.
    After n batches the old statistics have a weight of momentum^n: 0.9^50 = 0.005.

    Corresponds to `torch.optim.swa_utils.update_bn`. Differs from it: the statistics are moving
    averages, as in training, not the mean over all batches.

    Args:
        update: as for training; its optimizer changes nothing here. If it has `wrt`, only the
            statistics of that network change.
        state: with the parameters that will be evaluated.
        batches: of the training data: a source (it is called with 0), or an iterable.
        num_batches: how many of them.
        executor: compiles the step, such as `pmap_step`; for a population
            `lambda step: jit_step(population_step(step))`.

    Returns:
        The state with a new collection "batch_stats", and all else unchanged; `state` itself if it
        has no such collection.

    Raises:
        ValueError: `num_batches` is below 1, or there are fewer batches.

    Example:
        >>> import jax
        >>> import optax
        >>> import jaxnets as jn
        >>> module = jn.MLP((4,), num_outputs=2, norm="batch")
        >>> optimizer = jn.with_parameter_average(optax.sgd(0.1), decay=0.9)
        >>> update = Update(jn.classification(module), optimizer)
        >>> data = {"inputs": jax.numpy.ones((8, 3)), "labels": jax.numpy.ones(8, int)}
        >>> batches = jn.data.shuffled_batches(data, 4, seed=0)
        >>> key = jax.random.key(0)
        >>> state = jn.create_train_state(module.init(key, data["inputs"]), update, rng=key)
        >>> average = dataclasses.replace(state, params=jn.averaged_parameters(state))
        >>> average = recalibrate_batch_norm(update, average, batches, num_batches=50)
        >>> statistics = average.model_state["batch_stats"]["norm_0"]
        >>> round(float(statistics["var"].max()), 3)  # all rows are equal; it was 1
        0.005

    References:
        Izmailov et al. 2018, arXiv:1803.05407, section 3.2 (for averaged weights).
    """
    if num_batches < 1:
        raise ValueError(f"num_batches is {num_batches}; give 1 or more, such as 50")
    if "batch_stats" not in state.model_state:
        return state
    run, current = executor(_StatisticsStep(make_train_step(update))), state
    source = iter(batches(0) if callable(batches) else batches)
    taken = 0
    for batch in itertools.islice(source, num_batches):
        current, _ = run(current, batch)
        taken += 1
    if taken < num_batches:
        raise ValueError(
            f"there are {taken} batches, fewer than num_batches, {num_batches}; give a source that "
            "repeats, such as shuffled_batches, or a smaller number"
        )
    return dataclasses.replace(current, step=state.step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _StatisticsStep:
    train: StepFn

    def __call__(
        self, state: TrainState, batch: Batch, /, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        # The compiler removes the gradient and the update: nothing but the statistics is used.
        after, _ = self.train(state, batch, axis_name=axis_name)
        statistics = after.model_state["batch_stats"]
        model_state = {**state.model_state, "batch_stats": statistics}
        return dataclasses.replace(state, step=after.step, model_state=model_state), {}
