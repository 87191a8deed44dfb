"""Supervised objectives: classification, regression, and the generic one that others build on.

An objective returns the sum of its losses and the sum of their weights, never a mean.
"""

from __future__ import annotations

import dataclasses
import functools
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
from jaxnets.objectives.batches import check_batch
from jaxnets.objectives.losses import absolute_error, huber_loss, label_losses, squared_error


class Metric(Protocol):
    """A metric of predictions, such as `metrics.accuracy`.

    The second argument may be anything that the objective takes as "labels"; the weights have a
    shape that is a leading part of the losses', or are None for all 1.
    """

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

    Batches hold "inputs" [batch, ...], "labels" (integer [batch] in [0, num_classes), or class
    probabilities [batch, num_classes], which sum to 1) and optionally "weights" [batch], 0 or more.
    Labels out of range give NaN, which stops training. The loss is `cross_entropy`, in nats per
    example. With `train`, the module gets a "dropout" stream. If the batch has "lengths" [batch],
    the module gets them as a keyword.

    Args:
        module: inputs -> logits [batch, num_classes].
        label_smoothing: as in `cross_entropy`, applied in training only.
        metrics: {name: `Metric` of (logits, labels, weights)}; by default the accuracy.

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
    """Build the objective of a regression network.

    Batches hold "inputs" [batch, ...], "labels" [batch, ...] of the shape of the predictions, and
    optionally "weights" [batch]. The loss of an example is the mean over its predicted values. With
    `train`, the module gets a "dropout" stream. If the batch has "lengths" [batch], the module gets
    them as a keyword.

    Args:
        module: inputs -> predictions [batch, ...].
        loss: the elementwise loss: `squared_error`, `absolute_error` or `huber_loss`.
        metrics: {name: `Metric` of (predictions, labels, weights)}; by default "absolute_error".

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
    """Transform the batch inside the step, such as by normalization or augmentation.

    Args:
        objective: gets the transformed batch.
        transform: `(batch, rng, train) -> batch`; `rng` is the stream "augmentation" of the step,
            so what it draws is a function of the run's seed and the step. Each of several nested
            transforms has its own stream: the innermost "augmentation", the next "augmentation_1",
            and so on. This numbering works only for directly nested transforms.

    Returns:
        An `Objective`.
    """
    return _Transformed(objective, transform)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["objective"], meta_fields=["transform"]
)
@dataclasses.dataclass(frozen=True)
class _Transformed:
    objective: Objective
    transform: Callable[[Batch, jax.Array, bool], Batch]

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        # With one key nested transforms would draw the same noise, such as to binarize an image
        # and to corrupt it.
        name = f"augmentation_{self.depth}" if self.depth else "augmentation"
        batch = self.transform(batch, rng_streams(rng, name)[name], train)
        return self.objective(params, model_state, batch, rng, train=train)

    @property
    def depth(self) -> int:
        """Number of transforms inside this one."""
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
    """Build an objective from a loss function of predictions and batch.

    With `train`, the module gets a "dropout" stream. If the batch has "lengths" [batch], the
    module gets them as a keyword. A module that takes `weights` gets the batch's in training, so
    that padding does not count in its batch norms; see `core.weights_keyword`.

    Args:
        module: anything with Linen's `apply`.
        losses: `(predictions, batch, *, train)` -> the losses, such as [batch] or [batch, time].
        metrics: {name: `Metric` of (predictions, labels, weights)}.
        inputs: names of the batch's arrays that the module gets.
        needs: names of further arrays that the batch must have, besides "labels".
        weights_fn: batch -> weights whose shape is a leading part of the losses' shape, or None
            for all 1; by default the batch's "weights".
        apply: calls the module, with the arguments of `core.apply_module`; those named `lengths`
            and `weights` only if the batch has them.

    Returns:
        An `Objective`; it raises ValueError for a batch that lacks an array or whose arrays
        differ in their number of examples.
    """

    def objective(
        params: Params, model_state: ModelState, batch: Batch, rng: jax.Array, *, train: bool
    ) -> ObjectiveOutput:
        check_batch(batch, {*inputs, *needs, "labels"})
        keywords = {name: batch[name] for name in ("lengths", "weights") if name in batch}
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
        sums = {
            name: metric(predictions, batch["labels"], weights) for name, metric in metrics.items()
        }
        return ObjectiveOutput(loss, model_state, sums)

    return objective


def _per_example(errors: jax.Array) -> jax.Array:
    """Average over all axes but the first, [batch, ...] -> [batch]."""
    return jnp.mean(errors, axis=tuple(range(1, errors.ndim)))
