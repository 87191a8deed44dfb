"""Regression output heads: Gaussian and discretized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxnets.checks import check_same_shape
from jaxnets.core import Batch, Mean, ModelState, Objective, apply_module, at_least_float32
from jaxnets.objectives.losses import absolute_error, expected_surprisal
from jaxnets.objectives.supervised import Metric, supervised

# A standard deviation of exp(-5): perfectly predicted labels must not dominate the loss.
_LEAST_LOG_VARIANCE = -10.0


class RegressionHead(Protocol):
    """Interpretation of a network's outputs as a distribution of `num_values` values."""

    @property
    def num_values(self) -> int:
        """Number of predicted values."""
        ...

    @property
    def num_outputs(self) -> int:
        """Outputs that the network needs."""
        ...

    def losses(self, outputs: jax.Array, labels: jax.Array, *, train: bool) -> jax.Array:
        """Return the loss of each value: outputs [..., num_outputs] -> [..., num_values]."""
        ...

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the expected values: [..., num_outputs] -> [..., num_values]."""
        ...


@dataclasses.dataclass(frozen=True)
class GaussianHead:
    """Each value is normal, with a mean and a variance predicted by the network.

    The loss is -log N(y; mean, variance), multiplied in training by stop_gradient(variance^beta).
    With beta = 0, the plain likelihood, the network neglects labels of large predicted variance;
    with beta = 1 the means get the gradient of half the squared error.

    With beta = 0 the loss is that of `torch.nn.functional.gaussian_nll_loss(full=True)`. Differs
    from it: the network predicts the logarithm of the variance, which is at least -10.

    Attributes:
        num_values: number of predicted values.
        beta: in [0, 1].

    Raises:
        ValueError: `num_values` below 1, or `beta` out of range.

    References:
        Nix and Weigend 1994 (variance as an output); Seitzer et al. 2022, arXiv:2203.09168,
        equation 5 (beta; 0.5 is theirs).
    """

    num_values: int
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_num_values(self.num_values)
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; give a number in [0, 1]")

    @property
    def num_outputs(self) -> int:
        """The means, followed by the log variances."""
        return 2 * self.num_values

    def losses(self, outputs: jax.Array, labels: jax.Array, *, train: bool) -> jax.Array:
        """Return nats per value, in training weighted by variance^beta, [..., num_values].

        Raises:
            ValueError: outputs or labels of a shape that does not fit.
        """
        mean, log_variance = self._split(outputs)
        check_same_shape(means=mean, labels=labels)
        error = jnp.square(labels.astype(mean.dtype) - mean)
        losses = (error * jnp.exp(-log_variance) + log_variance + math.log(2 * math.pi)) / 2
        if train and self.beta:
            losses = losses * jax.lax.stop_gradient(jnp.exp(self.beta * log_variance))
        return losses

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the means, [..., num_values]."""
        return self._split(outputs)[0]

    def _split(self, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        _check_outputs(outputs, self)
        mean, log_variance = jnp.split(at_least_float32(outputs), 2, axis=-1)
        return mean, jnp.maximum(log_variance, _LEAST_LOG_VARIANCE)


@dataclasses.dataclass(frozen=True)
class DiscretizedHead:
    """Each value is categorical over evenly spaced bin centers in its range.

    A label becomes probabilities of its two neighboring bins ("two-hot") whose mean is the label;
    the loss is the cross-entropy. Labels outside the range are clipped to it.

    Attributes:
        ranges: (low, high) of each value.
        num_bins: bin centers from low to high, both included.

    Raises:
        ValueError: no ranges, an empty range, or fewer than two bins.

    References:
        Schrittwieser et al. 2020, arXiv:1911.08265, appendix F (two-hot labels).

    Example:
        >>> head = DiscretizedHead(ranges=((0.0, 1.0),), num_bins=5)
        >>> head.probabilities(jnp.array([0.375])).tolist()
        [[0.0, 0.5, 0.5, 0.0, 0.0]]
    """

    ranges: Sequence[tuple[float, float]]
    num_bins: int = 21

    def __post_init__(self) -> None:
        _check_num_values(len(self.ranges))
        if self.num_bins < 2:
            raise ValueError(f"num_bins is {self.num_bins}; give 2 or more")
        for low, high in self.ranges:
            if not low < high:
                raise ValueError(f"the range ({low}, {high}) is empty; give low < high")

    @property
    def num_values(self) -> int:
        """Number of ranges."""
        return len(self.ranges)

    @property
    def num_outputs(self) -> int:
        """A logit for each bin of each value."""
        return self.num_values * self.num_bins

    def probabilities(self, labels: jax.Array) -> jax.Array:
        """Return two-hot labels: [..., num_values] -> [..., num_values, num_bins]."""
        labels = at_least_float32(labels)
        low, high = self._limits(labels.dtype, labels.ndim)
        position = jnp.clip((labels - low) / (high - low), 0, 1) * (self.num_bins - 1)
        bins = jnp.arange(self.num_bins, dtype=labels.dtype)
        bins = bins.reshape((1,) * labels.ndim + (-1,))  # [1, ..., 1, num_bins]
        distance = jnp.abs(position[..., None] - bins)  # [..., num_values, num_bins]
        return jnp.maximum(1 - distance, 0)

    def losses(self, outputs: jax.Array, labels: jax.Array, *, train: bool) -> jax.Array:
        """Return nats per value, [..., num_values].

        Raises:
            ValueError: outputs or labels of a shape that does not fit.
        """
        logits = self._logits(outputs)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels of shape {labels.shape} do not fit outputs of shape {outputs.shape}; "
                f"give {logits.shape[:-1]}"
            )
        probabilities = self.probabilities(labels).astype(logits.dtype)
        return expected_surprisal(logits, probabilities)

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the expected values, [..., num_values]."""
        logits = self._logits(outputs)
        low, high = self._limits(logits.dtype, outputs.ndim)
        fractions = jnp.linspace(0, 1, self.num_bins, dtype=logits.dtype)
        return low + (high - low) * (jax.nn.softmax(logits) @ fractions)

    def _logits(self, outputs: jax.Array) -> jax.Array:
        _check_outputs(outputs, self)
        shape = (*outputs.shape[:-1], self.num_values, self.num_bins)
        return at_least_float32(outputs).reshape(shape)

    def _limits(self, dtype: Any, ndim: int) -> tuple[jax.Array, jax.Array]:
        """Return the lows and highs of the ranges, each [1, ..., 1, num_values] of `ndim` axes."""
        low, high = jnp.asarray(self.ranges, dtype).T
        return (low.reshape((1,) * (ndim - 1) + (-1,)), high.reshape((1,) * (ndim - 1) + (-1,)))


def head_regression(
    module: Any,
    head: RegressionHead,
    *,
    inputs: Sequence[str] = ("inputs",),
    value_names: Sequence[str] = (),
    apply: Callable[..., tuple[Any, ModelState]] = apply_module,
) -> Objective:
    """Build the objective of a regression network with an output head.

    Batches hold "labels" [batch, ..., num_values] and optionally "weights" [batch] or
    [batch, ...]. The loss of an example is its sum over the values; the metrics are the mean
    absolute errors of the expected values: "absolute_error", and one for each name.

    Args:
        module: inputs -> outputs [batch, ..., head.num_outputs].
        head: interprets the outputs.
        inputs: names of the batch's arrays that the module gets.
        value_names: one for each value, for metrics "{name}_error"; none by default.
        apply: calls the module, with the arguments of `core.apply_module`.

    Returns:
        An `Objective`.

    Raises:
        ValueError: a number of names that differs from that of the values.
    """
    if value_names and len(value_names) != head.num_values:
        raise ValueError(
            f"{len(value_names)} names for {head.num_values} values; give one for each"
        )

    def losses(outputs: jax.Array, batch: Batch, *, train: bool) -> jax.Array:
        return jnp.sum(head.losses(outputs, batch["labels"], train=train), axis=-1)

    def error_of(index: int | None) -> Metric:
        def error(outputs: jax.Array, labels: jax.Array, weights: jax.Array | None) -> Mean:
            errors = absolute_error(head.mean(outputs), labels)
            return Mean.of(errors.mean(axis=-1) if index is None else errors[..., index], weights)

        return error

    metrics: Mapping[str, Metric] = {
        "absolute_error": error_of(None),
        **{f"{name}_error": error_of(index) for index, name in enumerate(value_names)},
    }
    return supervised(module, losses, metrics, inputs=inputs, apply=apply)


def _check_num_values(num_values: int) -> None:
    if num_values < 1:
        raise ValueError(f"{num_values} values to predict; give 1 or more")


def _check_outputs(outputs: jax.Array, head: RegressionHead) -> None:
    if outputs.shape[-1] != head.num_outputs:
        raise ValueError(
            f"outputs of shape {outputs.shape} do not fit {type(head).__name__}, which needs "
            f"{head.num_outputs} for {head.num_values} values; build the network with "
            "num_outputs=head.num_outputs"
        )
