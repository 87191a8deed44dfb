"""Losses per example, and the generic objectives made of them.

An objective sums its losses and their weights; it never takes a mean. All losses are computed in
float32 or wider.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxnets.core import (
    Batch,
    Mean,
    ModelState,
    Objective,
    ObjectiveOutput,
    Params,
    apply_module,
    rng_streams,
)
from jaxnets.metrics.supervised import accuracy
from jaxnets.objectives.losses import (
    absolute_error,
    huber_loss,
    label_losses,
    squared_error,
)


class Metric(Protocol):
    """A measure of predictions, such as `metrics.accuracy`."""

    def __call__(
        self, predictions: jax.Array, labels: jax.Array, weights: jax.Array | None, /
    ) -> Mean: ...


def classification(
    module: Any,
    *,
    label_smoothing: float = 0.0,
    metrics: Mapping[str, Metric] | None = None,
) -> Objective:
    """Build the objective of a classifier.

    Batches hold "inputs" [batch, ...], "labels" (integer [batch], or class probabilities
    [batch, num_classes]) and optionally "weights" [batch]. The loss is in nats per example. With
    `train`, the module gets a "dropout" stream. If the batch has "lengths" [batch], the module
    gets them as a keyword.

    Args:
        module: inputs -> logits [batch, num_classes].
        label_smoothing: as in `cross_entropy`, in training only; evaluation is without it.
        metrics: functions of (logits, labels, weights); by default the accuracy.

    Returns:
        An `Objective`.
    """
    metrics = {"accuracy": accuracy} if metrics is None else metrics
    return supervised(module, label_losses(label_smoothing), metrics)


def regression(
    module: Any,
    *,
    loss: Literal["squared", "absolute", "huber"] = "squared",
    metrics: Mapping[str, Metric] | None = None,
) -> Objective:
    """Build the objective of a network that predicts numbers.

    Batches hold "inputs" [batch, ...], "labels" [batch, ...] of the shape of the predictions, and
    optionally "weights" [batch]. The loss of an example is its mean over the predicted numbers.
    If the batch has "lengths" [batch], the module gets them as a keyword.

    Args:
        module: inputs -> predictions [batch, ...].
        loss: the error per number.
        metrics: functions of (predictions, labels, weights); by default "absolute_error".

    Returns:
        An `Objective`.

    Raises:
        ValueError: an unknown `loss`.
    """
    errors = {"squared": squared_error, "absolute": absolute_error, "huber": huber_loss}
    if loss not in errors:
        raise ValueError(f"loss is {loss!r}; choose one of {sorted(errors)}")

    def mean_absolute_error(
        predictions: jax.Array, labels: jax.Array, weights: jax.Array | None
    ) -> Mean:
        return Mean.of(_per_example(absolute_error(predictions, labels)), weights)

    metrics = {"absolute_error": mean_absolute_error} if metrics is None else metrics

    def losses(predictions: jax.Array, batch: Batch, *, train: bool) -> jax.Array:
        return _per_example(errors[loss](predictions, batch["labels"]))

    return supervised(module, losses, metrics)


def with_batch_transform(
    objective: Objective, transform: Callable[[Batch, jax.Array, bool], Batch]
) -> Objective:
    """Change the batch inside the step: normalize it, augment it.

    Args:
        objective: sees the changed batch.
        transform: `(batch, rng, train) -> batch`; `rng` is the stream "augmentation" of the step,
            so what it draws is a function of the run's seed and the step. Of nested transforms
            each has a stream of its own: "augmentation" is that of the innermost,
            "augmentation_1" that of the one around it, and so on. They find each other only where
            one is around the other at once, with no objective of the caller's in between.

    Returns:
        An `Objective`.
    """
    return _Transformed(objective, transform)


@dataclasses.dataclass(frozen=True)
class _Transformed:
    objective: Objective
    transform: Callable[[Batch, jax.Array, bool], Batch]

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        # From one key the noise of one transform would be that of the other: of the binarised
        # image and of what is added to it, say.
        name = f"augmentation_{self.depth}" if self.depth else "augmentation"
        batch = self.transform(batch, rng_streams(rng, name)[name], train)
        return self.objective(params, model_state, batch, rng, train=train)

    @property
    def depth(self) -> int:
        """Number of transforms between this one and the objective."""
        return self.objective.depth + 1 if isinstance(self.objective, _Transformed) else 0


def supervised(
    module: Any,
    losses: Callable[..., jax.Array],
    metrics: Mapping[str, Metric],
    *,
    inputs: Sequence[str] = ("inputs",),
    needs: Sequence[str] = (),
    weights_fn: Callable[[Batch], jax.Array | None] = lambda batch: batch.get("weights"),
    apply: Callable[..., tuple[Any, ModelState]] = apply_module,
) -> Objective:
    """Build an objective from losses of predictions; the factories of objectives are made of it.

    With `train`, the module gets a "dropout" stream. If the batch has "lengths" [batch], the
    module gets them as a keyword.

    Args:
        module: anything with Linen's `apply`.
        losses: `(predictions, batch, *, train)` -> the losses, such as [batch] or [batch, time].
        metrics: functions of (predictions, labels, weights).
        inputs: names of the batch's arrays that the module gets.
        needs: names of further arrays that the batch must have, besides "labels".
        weights_fn: batch -> weights whose shape is a leading part of the losses'; None is all 1.
        apply: calls the module, with the arguments of `core.apply_module`.

    Returns:
        An `Objective`; it raises ValueError for a batch that lacks an array or whose arrays
        differ in their number of examples.
    """

    def objective(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        check_batch(batch, {*inputs, *needs, "labels"})
        keywords = {"lengths": batch["lengths"]} if "lengths" in batch else {}
        predictions, model_state = apply(
            module,
            params,
            model_state,
            *(batch[name] for name in inputs),
            rngs=rng_streams(rng, "dropout"),
            train=train,
            **keywords,
        )
        weights = weights_fn(batch)
        loss = Mean.of(losses(predictions, batch, train=train), weights)
        measured = {
            name: metric(predictions, batch["labels"], weights) for name, metric in metrics.items()
        }
        return ObjectiveOutput(loss, model_state, measured)

    return objective


def check_batch(batch: Batch, names: set[str]) -> None:
    """Refuse a batch that lacks an array, or whose arrays differ in their number of examples.

    Args:
        batch: {name: array [batch, ...]}.
        names: of the arrays that it must have.

    Raises:
        ValueError: the names that lack, or the numbers of examples.
    """
    missing = names - set(batch)
    if missing:
        raise ValueError(
            f"the batch has {sorted(batch)} and lacks {sorted(missing)}; "
            f"name its arrays {sorted(names)} and optionally 'weights'"
        )
    sizes = {name: array.shape[0] for name, array in batch.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the arrays of the batch differ in their number of examples: {sizes}")


def _per_example(errors: jax.Array) -> jax.Array:
    return jnp.mean(errors, axis=tuple(range(1, errors.ndim)))
