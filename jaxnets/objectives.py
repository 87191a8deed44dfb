"""Losses per example, and the generic objectives made of them.

An objective sums its losses and their weights; it never takes a mean. All losses are computed in
float32 or wider.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from jaxnets.core import (
    Batch,
    Mean,
    ModelState,
    Objective,
    ObjectiveOutput,
    Params,
    apply_module,
    at_least_float32,
    rng_streams,
)
from jaxnets.metrics import accuracy


class Measure(Protocol):
    """A measure of predictions, such as `metrics.accuracy`."""

    def __call__(
        self, predictions: jax.Array, labels: jax.Array, weights: jax.Array | None, /
    ) -> Mean: ...


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy between labels and the softmax of logits.

    -sum_c p_c log softmax(logits)_c, where p is the label's distribution, mixed with the uniform
    one: (1 - label_smoothing) p + label_smoothing / num_classes.

    Args:
        logits: [..., num_classes].
        labels: integer [...] in [0, num_classes), or class probabilities [..., num_classes].
        label_smoothing: in [0, 1).

    Returns:
        Nats per example, [...]. NaN for an integer label outside its range, so that a wrong label
        stops training instead of counting as another class.

    Raises:
        ValueError: shapes that do not fit, or `label_smoothing` outside its range.

    References:
        Szegedy et al., 2016, arXiv:1512.00567, section 7 (label smoothing).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; give a number in [0, 1)")
    logits = at_least_float32(logits)
    num_classes = logits.shape[-1]
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = logits.shape[:-1] if integer else logits.shape
    if labels.shape != expected:
        raise ValueError(
            f"labels of shape {labels.shape} and type {labels.dtype} do not fit logits of shape "
            f"{logits.shape}; give integers {logits.shape[:-1]} or probabilities {logits.shape}"
        )
    if integer:
        probabilities = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
    else:
        probabilities = labels.astype(logits.dtype)
    if label_smoothing:
        probabilities = (1 - label_smoothing) * probabilities + label_smoothing / num_classes
    losses = optax.softmax_cross_entropy(logits, probabilities)
    if integer:
        losses = jnp.where((labels < 0) | (labels >= num_classes), jnp.nan, losses)
    return losses


def squared_error(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """(prediction - label)^2, elementwise.

    Args:
        predictions: [...].
        labels: [...], same shape.

    Returns:
        [...], in the square of the labels' unit.
    """
    chex.assert_equal_shape([predictions, labels])
    predictions = at_least_float32(predictions)
    return jnp.square(predictions - labels.astype(predictions.dtype))


def absolute_error(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """|prediction - label|, elementwise.

    Args:
        predictions: [...].
        labels: [...], same shape.

    Returns:
        [...], in the labels' unit.
    """
    chex.assert_equal_shape([predictions, labels])
    predictions = at_least_float32(predictions)
    return jnp.abs(predictions - labels.astype(predictions.dtype))


def huber_error(predictions: jax.Array, labels: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Squared error / 2 up to `delta`, growing linearly beyond it, elementwise.

    Args:
        predictions: [...].
        labels: [...], same shape.
        delta: the distance at which the loss becomes linear, in the labels' unit.

    Returns:
        [...].

    References:
        Huber, 1964, "Robust Estimation of a Location Parameter".
    """
    chex.assert_equal_shape([predictions, labels])
    predictions = at_least_float32(predictions)
    return optax.huber_loss(predictions, labels.astype(predictions.dtype), delta=delta)


def classification(
    module: Any,
    *,
    label_smoothing: float = 0.0,
    measures: Mapping[str, Measure] | None = None,
) -> Objective:
    """Build the objective of a classifier.

    Batches hold "inputs" [batch, ...], "labels" (integer [batch], or class probabilities
    [batch, num_classes]) and optionally "weights" [batch]. The loss is in nats per example. With
    `train`, the module gets a "dropout" stream. If the batch has "lengths" [batch], the module
    gets them as a keyword.

    Args:
        module: inputs -> logits [batch, num_classes].
        label_smoothing: as in `cross_entropy`, in training only; evaluation is without it.
        measures: functions of (logits, labels, weights); by default the accuracy.

    Returns:
        An `Objective`.
    """
    measures = {"accuracy": accuracy} if measures is None else measures
    return supervised(module, label_losses(label_smoothing), measures)


def regression(
    module: Any,
    *,
    loss: Literal["squared", "absolute", "huber"] = "squared",
    measures: Mapping[str, Measure] | None = None,
) -> Objective:
    """Build the objective of a network that predicts numbers.

    Batches hold "inputs" [batch, ...], "labels" [batch, ...] of the shape of the predictions, and
    optionally "weights" [batch]. The loss of an example is its mean over the predicted numbers.
    If the batch has "lengths" [batch], the module gets them as a keyword.

    Args:
        module: inputs -> predictions [batch, ...].
        loss: the error per number.
        measures: functions of (predictions, labels, weights); by default "absolute_error".

    Returns:
        An `Objective`.

    Raises:
        ValueError: an unknown `loss`.
    """
    errors = {"squared": squared_error, "absolute": absolute_error, "huber": huber_error}
    if loss not in errors:
        raise ValueError(f"loss is {loss!r}; choose one of {sorted(errors)}")

    def mean_absolute_error(
        predictions: jax.Array, labels: jax.Array, weights: jax.Array | None
    ) -> Mean:
        return Mean.of(_per_example(absolute_error(predictions, labels)), weights)

    measures = {"absolute_error": mean_absolute_error} if measures is None else measures

    def losses(predictions: jax.Array, batch: Batch, *, train: bool) -> jax.Array:
        return _per_example(errors[loss](predictions, batch["labels"]))

    return supervised(module, losses, measures)


def with_batch_transform(
    objective: Objective, transform: Callable[[Batch, jax.Array, bool], Batch]
) -> Objective:
    """Change the batch inside the step: normalise it, augment it.

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


def label_losses(label_smoothing: float = 0.0) -> Callable[..., jax.Array]:
    """Build the losses of logits against the labels of a batch, for `supervised`.

    Args:
        label_smoothing: as in `cross_entropy`, in training only; evaluation is without it.

    Returns:
        `(logits, batch, *, train)` -> nats per label.
    """

    def losses(logits: jax.Array, batch: Batch, *, train: bool) -> jax.Array:
        smoothing = label_smoothing if train else 0.0
        return cross_entropy(logits, batch["labels"], label_smoothing=smoothing)

    return losses


def supervised(
    module: Any,
    losses: Callable[..., jax.Array],
    measures: Mapping[str, Measure],
    *,
    inputs: Sequence[str] = ("inputs",),
    needs: Sequence[str] = (),
    weigh: Callable[[Batch], jax.Array | None] = lambda batch: batch.get("weights"),
    apply: Callable[..., tuple[Any, ModelState]] = apply_module,
) -> Objective:
    """Build an objective from losses of predictions; the factories of objectives are made of it.

    With `train`, the module gets a "dropout" stream. If the batch has "lengths" [batch], the
    module gets them as a keyword.

    Args:
        module: anything with Linen's `apply`.
        losses: `(predictions, batch, *, train)` -> the losses, such as [batch] or [batch, time].
        measures: functions of (predictions, labels, weights).
        inputs: names of the batch's arrays that the module gets.
        needs: names of further arrays that the batch must have, besides "labels".
        weigh: batch -> weights of the losses, a leading part of their shape; None weighs all 1.
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
        weights = weigh(batch)
        loss = Mean.of(losses(predictions, batch, train=train), weights)
        metrics = {
            name: measure(predictions, batch["labels"], weights)
            for name, measure in measures.items()
        }
        return ObjectiveOutput(loss, model_state, metrics)

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
