"""Elementwise and per-example losses of predictions, in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxnets.checks import check_same_shape, class_scope
from jaxnets.core import Batch, at_least_float32, at_least_int32

# Of the sum of class probabilities from 1: rounding to 16 bits deviates by less.
_LARGEST_DEVIATION = 0.01


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy between labels and the softmax of logits.

    -sum_c p_c log softmax(logits)_c, where p is the label's distribution, mixed with the uniform
    one: (1 - label_smoothing) p + label_smoothing / num_classes.

    `optax.softmax_cross_entropy` for integer labels too, with label smoothing. It equals
    `torch.nn.functional.cross_entropy(reduction="none")`, which has the classes on axis 1.

    Args:
        logits: [..., num_classes]; -infinity excludes a class.
        labels: integer [...] in [0, num_classes), or class probabilities [..., num_classes], each
            of 0 or more, which sum to 1.
        label_smoothing: in [0, 1).

    Returns:
        Nats per example, [...]. Infinite where an excluded class has a probability above 0, as all
        have with label smoothing. NaN for an integer label outside its range, and for class
        probabilities that are negative or do not sum to 1 (to 0.01), so that a wrong label stops
        training instead of being counted as another one.

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
        labels = at_least_int32(labels)
        probabilities = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
        with class_scope(num_classes):
            valid = jnp.asarray((labels >= 0) & (labels < num_classes))
    else:
        probabilities = jnp.asarray(labels, logits.dtype)
        valid = _are_distributions(probabilities)
    if label_smoothing:
        probabilities = (1 - label_smoothing) * probabilities + label_smoothing / num_classes
    return jnp.where(valid, expected_surprisal(logits, probabilities), jnp.nan)


@jax.custom_jvp
def expected_surprisal(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
    """-sum_c p_c log softmax(logits)_c, in which a class of probability 0 counts 0.

    `optax.softmax_cross_entropy`, also where a logit is -infinity.

    Args:
        logits: [..., num_classes], float32 or wider.
        probabilities: p, [..., num_classes].

    Returns:
        Nats, [...].
    """
    return -jnp.sum(probabilities * _log_softmax(logits, probabilities), axis=-1)


@expected_surprisal.defjvp
def _expected_surprisal_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # One array for the backward pass, and no product with an infinite logit.
    (logits, probabilities), (logits_dot, probabilities_dot) = primals, tangents
    total = jnp.sum(probabilities, axis=-1, keepdims=True)
    slope = total * jax.nn.softmax(logits) - probabilities
    log_probabilities = _log_softmax(logits, probabilities)
    tangent = jnp.sum(slope * logits_dot - log_probabilities * probabilities_dot, axis=-1)
    return expected_surprisal(logits, probabilities), tangent


def _log_softmax(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits)
    # 0 log 0 is NaN in floating point.
    excluded = (probabilities == 0) & (log_probabilities == -jnp.inf)
    return jnp.where(excluded, 0, log_probabilities)


def _are_distributions(probabilities: jax.Array) -> jax.Array:
    """Tell which rows sum to 1 and have no negative element, [..., num_classes] to [...]."""
    total = jnp.sum(jnp.where(probabilities < 0, jnp.nan, probabilities), axis=-1)
    return jnp.abs(total - 1) <= _LARGEST_DEVIATION


def squared_error(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """(prediction - label)^2, elementwise.

    `optax.squared_error`, and `torch.nn.functional.mse_loss(reduction="none")`; shapes that would
    broadcast are refused.

    Args:
        predictions: [...].
        labels: [...], same shape.

    Returns:
        [...], in the square of the labels' unit.

    Raises:
        ValueError: shapes that differ.
    """
    check_same_shape(predictions=predictions, labels=labels)
    predictions = at_least_float32(predictions)
    return jnp.square(predictions - labels.astype(predictions.dtype))


def absolute_error(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """|prediction - label|, elementwise.

    `torch.nn.functional.l1_loss(reduction="none")`; shapes that would broadcast are refused.

    Args:
        predictions: [...].
        labels: [...], same shape.

    Returns:
        [...], in the labels' unit.

    Raises:
        ValueError: shapes that differ.
    """
    check_same_shape(predictions=predictions, labels=labels)
    predictions = at_least_float32(predictions)
    return jnp.abs(predictions - labels.astype(predictions.dtype))


def huber_loss(predictions: jax.Array, labels: jax.Array, *, delta: float = 1.0) -> jax.Array:
    """Half the squared error up to an error of `delta`, linear beyond it; elementwise.

    `optax.huber_loss`, and `torch.nn.functional.huber_loss(reduction="none")`; shapes that would
    broadcast are refused.

    Args:
        predictions: [...].
        labels: [...], same shape.
        delta: the absolute error at which the loss becomes linear, in the labels' unit.

    Returns:
        [...].

    Raises:
        ValueError: shapes that differ.

    References:
        Huber, 1964, "Robust Estimation of a Location Parameter".
    """
    check_same_shape(predictions=predictions, labels=labels)
    predictions = at_least_float32(predictions)
    return optax.huber_loss(predictions, labels.astype(predictions.dtype), delta=delta)


def label_losses(label_smoothing: float = 0.0) -> Callable[..., jax.Array]:
    """Build the cross-entropy against the labels of a batch, for `supervised`.

    Args:
        label_smoothing: as in `cross_entropy`, applied in training only.

    Returns:
        `(logits, batch, *, train)` -> nats per label.
    """

    def losses(logits: jax.Array, batch: Batch, *, train: bool) -> jax.Array:
        smoothing = label_smoothing if train else 0.0
        return cross_entropy(logits, batch["labels"], label_smoothing=smoothing)

    return losses


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of independent binary labels under the sigmoid of logits.

    -y log p - (1 - y) log(1 - p) for p = sigmoid(l) equals max(l, 0) - l y + log(1 + exp(-|l|));
    its derivative is p - y.

    `optax.sigmoid_binary_cross_entropy`, and
    `torch.nn.functional.binary_cross_entropy_with_logits(reduction="none")`. Optax computes and
    differentiates two logarithms; with one, a step of a variational autoencoder of 784 pixels
    takes 0.85 to 0.9 of the time.

    Args:
        logits: [...]; an infinite one counts as the greatest finite number, so that its loss is 0
            where the label agrees with it.
        labels: probabilities in [0, 1], [...], same shape.

    Returns:
        Nats per label, [...].

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> binary_cross_entropy(jnp.zeros(2), jnp.array([0.0, 1.0]))  # log 2
        Array([0.6931472, 0.6931472], dtype=float32)
    """
    check_same_shape(logits=logits, labels=labels)
    logits = at_least_float32(logits)
    return _cross_entropy(logits, labels.astype(logits.dtype))


@jax.custom_jvp
def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    softplus = jnp.log1p(jnp.exp(-jnp.abs(logits)))  # of -|logits|
    logits = _finite(logits)
    return jnp.maximum(logits, 0) - logits * labels + softplus


@_cross_entropy.defjvp
def _cross_entropy_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # Differentiated term by term, the second derivative at 0 would be wrong: |l| has a kink there.
    (logits, labels), (logits_dot, labels_dot) = primals, tangents
    tangent = (jax.nn.sigmoid(logits) - labels) * logits_dot - _finite(logits) * labels_dot
    return _cross_entropy(logits, labels), tangent


def _finite(logits: jax.Array) -> jax.Array:
    greatest = float(jnp.finfo(logits.dtype).max)
    return jnp.clip(logits, -greatest, greatest)  # NaN stays NaN
