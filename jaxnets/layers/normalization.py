"""Normalization layers: batch norm, layer norm and RMS norm."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.core import Precision, at_least_float32, bound_data_axis
from jaxnets.functional.channels import along_channels
from jaxnets.functional.normalization import batch_norm, layer_norm, rms_norm
from jaxnets.layers.linear import Initializer
from jaxnets.layers.parameters import parameter


class BatchNorm(nn.Module):
    """Normalize each channel over the batch and every position.

    y = scale (x - mean) / sqrt(variance + epsilon) + bias. In training the statistics are those
    of the whole batch, also where an executor splits it over devices; in evaluation they are the
    running averages in the collection "batch_stats". An example of weight 0 does not count in them,
    one of weight 2 counts twice, so padding changes neither the loss nor its gradients.

    Corresponds to `flax.linen.BatchNorm`, with the same variables. Differs from it in the momentum,
    which is 0.99 there, in the variance, computed in two passes and not as E[x^2] - E[x]^2, in
    synchronizing devices without `axis_name`, and in `weights`, where Flax has a boolean `mask`.
    `torch.nn.BatchNorm2d(momentum=0.1)` is this momentum of 0.9; torch stores the unbiased running
    variance, Flax and this layer the biased one.

    Attributes:
        momentum: decay of the running averages: new = momentum old + (1 - momentum) batch.
        epsilon: added to the variance.
        scale_init: initializer of the scale; zeros let a residual block start as the identity.
        precision: dtypes of parameters and result; the statistics are float32 or wider.

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Initializer = nn.initializers.ones
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Normalize [batch, ..., channels]; the result has the compute dtype.

        Args:
            x: [batch, ..., channels].
            train: training mode: the statistics are those of the batch.
            weights: [batch] or any other leading part of the shape of `x`, 0 = padding; used in
                training only. The output of padding is the bias. Where all weights are 0 the
                running averages stay as they are.

        Raises:
            ValueError: weights that do not fit, or another number of channels than at
                initialization.
        """
        shape, policy = x.shape[-1:], self.precision
        scale = parameter(self, "scale", self.scale_init, shape, policy.parameter, inputs=x.shape)
        bias = self.param("bias", nn.initializers.zeros, shape, policy.parameter)
        dtype = jnp.promote_types(policy.parameter, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        running_variance = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        if train:
            axis_name = bound_data_axis()
            y, mean, variance = batch_norm(
                x, scale, bias, weights=weights, epsilon=self.epsilon, axis_name=axis_name
            )
            if not self.is_initializing():
                for running, batch in ((running_mean, mean), (running_variance, variance)):
                    average = self.momentum * running.value + (1 - self.momentum) * batch
                    if weights is not None:
                        counts = _any_example(weights, axis_name)
                        average = jnp.where(counts, average, running.value)
                    running.value = average.astype(dtype)
        else:
            factor = scale * jax.lax.rsqrt(running_variance.value + self.epsilon)
            centered = at_least_float32(x) - along_channels(running_mean.value, x)
            y = centered * along_channels(factor, x) + along_channels(bias, x)
        return y.astype(policy.compute)


def _any_example(weights: jax.Array, axis_name: str | None) -> jax.Array:
    total = jnp.sum(weights)
    return (total if axis_name is None else jax.lax.psum(total, axis_name)) > 0


class LayerNorm(nn.Module):
    """Normalize the channels of each position.

    Corresponds to `flax.linen.LayerNorm` and `torch.nn.LayerNorm(channels)`, whose epsilon is 1e-5.
    Differs from Flax in the variance, computed in two passes and not as E[x^2] - E[x]^2.

    Attributes:
        epsilon: added to the variance.
        precision: dtypes of parameters and result; the statistics are float32 or wider.

    References:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """

    epsilon: float = 1e-6
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis of [..., channels]; the result has the compute dtype.

        Raises:
            ValueError: another number of channels than at initialization.
        """
        shape, policy = x.shape[-1:], self.precision
        ones = nn.initializers.ones
        scale = parameter(self, "scale", ones, shape, policy.parameter, inputs=x.shape)
        bias = self.param("bias", nn.initializers.zeros, shape, policy.parameter)
        return layer_norm(x, scale, bias, epsilon=self.epsilon).astype(policy.compute)


class RMSNorm(nn.Module):
    """Divide the channels of each position by their root mean square.

    Corresponds to `flax.linen.RMSNorm` and `torch.nn.RMSNorm(channels)`, whose epsilon is that of
    the dtype.

    Attributes:
        epsilon: added to the mean square.
        precision: dtypes of parameters and result; the statistics are float32 or wider.
        zero_centered: multiply by 1 + scale, with a scale that starts at 0, as in Gemma.

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467; Gemma Team 2024, arXiv:2408.00118.
    """

    epsilon: float = 1e-6
    precision: Precision = Precision()
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis of [..., channels]; the result has the compute dtype.

        Raises:
            ValueError: another number of channels than at initialization.
        """
        shape, policy = x.shape[-1:], self.precision
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        scale = parameter(self, "scale", init, shape, policy.parameter, inputs=x.shape)
        # In 16 bits 1 + scale would lose most of the scale.
        scale = 1 + at_least_float32(scale) if self.zero_centered else scale
        return rms_norm(x, scale, epsilon=self.epsilon).astype(policy.compute)


def check_norm(kind: str | None) -> None:
    """Refuse a norm that `normalize` does not have.

    Raises:
        ValueError: `kind` is not None, "batch" or "layer".
    """
    if kind not in (None, "batch", "layer"):
        raise ValueError(f"unknown norm {kind!r}; choose None, 'batch' or 'layer'")


def normalize(
    x: jax.Array,
    kind: str | None,
    *,
    train: bool,
    name: str,
    precision: Precision,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Apply a batch norm, a layer norm or nothing, inside a compact module.

    Args:
        x: [batch, ..., channels].
        kind: "batch", "layer" or None.
        train: training mode.
        name: name of the norm's parameters.
        precision: dtypes.
        weights: [batch], 0 = padding; for a batch norm in training.

    Returns:
        Shape of `x`.
    """
    if kind == "batch":
        return BatchNorm(precision=precision, name=name)(x, train=train, weights=weights)
    if kind == "layer":
        return LayerNorm(precision=precision, name=name)(x)
    return x
