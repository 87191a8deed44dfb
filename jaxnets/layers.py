"""The Linen layers that families share: dense, convolution, norms, activations, dropout.

All follow one `Precision`: parameters are kept in `precision.parameter` and cast to
`precision.compute` where they are used; norms are computed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets import functional
from jaxnets.activations import ACTIVATIONS
from jaxnets.channels import along_channels
from jaxnets.core import Precision, at_least_float32, bound_data_axis
from jaxnets.normalization import batch_norm, layer_norm, rms_norm

Initializer: TypeAlias = Callable[..., jax.Array]
Activation: TypeAlias = str | Callable[[jax.Array], jax.Array]


def activation(name: Activation) -> Callable[[jax.Array], jax.Array]:
    """Look an activation function up by name.

    Args:
        name: "relu", "gelu" (exact), "gelu_tanh", "silu", "tanh", ..., or any callable.

    Returns:
        An element-wise function; a callable comes back as it is. The others compute in float32 or
        wider, and return the dtype that they got.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.

    Example:
        >>> activation("relu")(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_rank(inputs: jax.Array, model: nn.Module, *, layouts: Sequence[str]) -> None:
    """Refuse inputs whose number of axes fits none of the layouts.

    Args:
        inputs: what the model was called with.
        model: the model, for its name in the message.
        layouts: such as "[batch, height, width, channels]"; each comma adds an axis.

    Raises:
        ValueError: the shape, the layouts that fit, and what to do.
    """
    if inputs.ndim not in [layout.count(",") + 1 for layout in layouts]:
        raise ValueError(
            f"{type(model).__name__} got inputs of shape {inputs.shape}; give "
            f"{' or '.join(layouts)}. Add a missing batch axis with inputs[None], a missing "
            "channel axis with inputs[..., None]"
        )


#: Layouts of a network whose kernels take their rank from the input.
IMAGES_OR_AUDIO = ("[batch, height, width, channels]", "[batch, time, channels]")
IMAGES = IMAGES_OR_AUDIO[:1]


def record(module: nn.Module, name: str, value: jax.Array) -> None:
    """Make a value inside a network readable with `capture`; free when nobody reads it.

    Args:
        module: the module that computes the value.
        name: such as "features".
        value: the array; a second call with the same name replaces it.
    """
    module.sow("intermediates", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def capture(
    module: nn.Module, variables: Any, *inputs: Any, **keywords: Any
) -> tuple[Any, dict[str, Any]]:
    """Run a network in evaluation and return what it recorded, such as its features.

    Args:
        module: any Linen network.
        variables: parameters and other collections, as given by `module.init`.
        inputs: inputs of the network.
        keywords: further keyword inputs; `capture_intermediates=True` records the output of
            every layer too, under `[layer]["__call__"][0]`.

    Returns:
        The output, and {name: array} of the values recorded by the network itself, with one
        nested dict for each submodule that recorded some.

    Example:
        >>> class Doubled(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         record(self, "doubled", 2 * x)
        ...         return 3 * x
        >>> output, recorded = capture(Doubled(), {}, 1.0)
        >>> output, recorded["doubled"]
        (3.0, 2.0)
    """
    output, state = module.apply(variables, *inputs, mutable=["intermediates"], **keywords)
    return output, dict(state.get("intermediates", {}))


class Dense(nn.Module):
    """Multiply the last axis by a matrix and add a bias: y = x W + b.

    Attributes:
        features: size of the last axis afterwards.
        use_bias: False in front of a norm, which subtracts any bias again.
        kernel_init: initializer of the matrix.
        bias_init: initializer of the bias.
        precision: dtypes of parameters and arithmetic.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., channels] to [..., features] in the compute dtype."""
        shape, policy = (x.shape[-1], self.features), self.precision
        kernel = self.param("kernel", self.kernel_init, shape, policy.parameter)
        y = functional.linear(x.astype(policy.compute), kernel.astype(policy.compute))
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), policy.parameter)
            y = y + along_channels(bias.astype(policy.compute), y)
        return y


class Convolution(nn.Module):
    """Convolve over time or over height and width, whichever the input has.

    Attributes:
        features: number of output channels.
        kernel_size: extent of the kernel, one int for every spatial axis or one per axis.
        strides: step between outputs.
        padding: "SAME", "VALID", a width, or (low, high) pairs.
        dilation: step between the inputs that one output sees.
        groups: number of channel groups convolved apart.
        use_bias: False in front of a norm, which subtracts any bias again.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.
        precision: dtypes of parameters and arithmetic.
    """

    features: int
    kernel_size: functional.Extent = 3
    strides: functional.Extent = 1
    padding: functional.Padding = "SAME"
    dilation: functional.Extent = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, ..., channels] to [batch, ..., features] in the compute dtype."""
        size, channels, policy = self.kernel_size, x.shape[-1], self.precision
        taps = (size,) * (x.ndim - 2) if isinstance(size, int) else tuple(size)
        if channels % self.groups:
            raise ValueError(
                f"{channels} channels do not split into {self.groups} groups; "
                "choose groups that divide the channels"
            )
        shape = (*taps, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, policy.parameter)
        y = functional.convolution(
            x.astype(policy.compute),
            kernel.astype(policy.compute),
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), policy.parameter)
            y = y + along_channels(bias.astype(policy.compute), y)
        return y


class BatchNorm(nn.Module):
    """Normalise each channel over the batch and every position.

    y = scale (x - mean) / sqrt(variance + epsilon) + bias. In training the statistics are those
    of the whole batch, also where an executor splits it over devices; in evaluation they are the
    running averages kept in "batch_stats". The running variance is the biased one.

    Attributes:
        momentum: weight of the past in the running averages.
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
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalise [batch, ..., channels]; the result has the compute dtype."""
        shape, policy = x.shape[-1:], self.precision
        scale = self.param("scale", self.scale_init, shape, policy.parameter)
        bias = self.param("bias", nn.initializers.zeros, shape, policy.parameter)
        kept = jnp.promote_types(policy.parameter, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kept)
        running_variance = self.variable("batch_stats", "var", jnp.ones, shape, kept)
        if train:
            y, mean, variance = batch_norm(
                x, scale, bias, epsilon=self.epsilon, axis_name=bound_data_axis()
            )
            if not self.is_initializing():
                for running, now in ((running_mean, mean), (running_variance, variance)):
                    moved = self.momentum * running.value + (1 - self.momentum) * now
                    running.value = moved.astype(kept)
        else:
            factor = scale * jax.lax.rsqrt(running_variance.value + self.epsilon)
            centred = at_least_float32(x) - along_channels(running_mean.value, x)
            y = centred * along_channels(factor, x) + along_channels(bias, x)
        return y.astype(policy.compute)


class LayerNorm(nn.Module):
    """Normalise the channels of each position.

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
        """Normalise the last axis of [..., channels]; the result has the compute dtype."""
        shape, policy = x.shape[-1:], self.precision
        scale = self.param("scale", nn.initializers.ones, shape, policy.parameter)
        bias = self.param("bias", nn.initializers.zeros, shape, policy.parameter)
        return layer_norm(x, scale, bias, epsilon=self.epsilon).astype(policy.compute)


class RMSNorm(nn.Module):
    """Divide the channels of each position by their root mean square.

    Attributes:
        epsilon: added to the mean square.
        precision: dtypes of parameters and result; the statistics are float32 or wider.

    References:
        Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    epsilon: float = 1e-6
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of [..., channels]; the result has the compute dtype."""
        shape, policy = x.shape[-1:], self.precision
        scale = self.param("scale", nn.initializers.ones, shape, policy.parameter)
        return rms_norm(x, scale, epsilon=self.epsilon).astype(policy.compute)


def check_norm(kind: str | None) -> None:
    """Refuse what `normalize` does not know.

    Raises:
        ValueError: `kind` is not None, "batch" or "layer".
    """
    if kind not in (None, "batch", "layer"):
        raise ValueError(f"unknown norm {kind!r}; choose None, 'batch' or 'layer'")


def normalize(
    x: jax.Array, kind: str | None, *, train: bool, name: str, precision: Precision
) -> jax.Array:
    """Apply a batch norm, a layer norm or nothing, inside a compact module.

    Args:
        x: [batch, ..., channels].
        kind: "batch", "layer" or None.
        train: training mode.
        name: name of the norm's parameters.
        precision: dtypes.

    Returns:
        Shape of `x`.
    """
    if kind == "batch":
        return BatchNorm(precision=precision, name=name)(x, train=train)
    if kind == "layer":
        return LayerNorm(precision=precision, name=name)(x)
    return x


class Dropout(nn.Module):
    """Set elements to zero at random in training and scale the rest up; stream "dropout".

    Attributes:
        rate: probability of zero, in [0, 1).
        per_example: drop whole examples of the batch instead of elements: on the branch of a
            residual block this is stochastic depth (Huang et al. 2016, arXiv:1603.09382).
        shared_axes: axes along which one draw holds: (1,) drops the same channels at every step
            of [batch, time, channels] (Gal and Ghahramani 2016, arXiv:1512.05287).
    """

    rate: float
    per_example: bool = False
    shared_axes: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_rate(self.rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Return an array of the shape of `x`, [batch, ...]; `x` itself in evaluation."""
        shared = tuple(range(1, x.ndim)) if self.per_example else tuple(self.shared_axes)
        return nn.Dropout(self.rate, broadcast_dims=shared)(x, deterministic=not train)


def check_rate(rate: float) -> None:
    """Refuse a dropout rate outside of [0, 1).

    Raises:
        ValueError: the rate is not a probability below 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate {rate} must be at least 0 and below 1")


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Refuse sizes that are not positive integers.

    Args:
        sizes: {name: a size or several}.

    Raises:
        ValueError: the name and value of the first bad one.
    """
    for name, size in sizes.items():
        for value in (size,) if isinstance(size, (int, float)) else size:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={size} must be made of positive integers")
