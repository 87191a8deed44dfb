"""Convolutional networks without shortcuts: LeNet-5 (LeCun et al. 1998) and a configurable one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxnets.checks import IMAGES, IMAGES_OR_AUDIO, check_rank, check_rate, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.functional.pooling import average_pool, global_average_pool, max_pool
from jaxnets.functional.windows import Size
from jaxnets.layers import Convolution, Dense, Dropout, Initializer, check_norm, normalize


class LeNet5(nn.Module):
    """LeNet-5 in its modern form: 61,706 parameters for one channel and 10 classes.

    Differs from the paper: pooling has no trainable coefficients, the second convolution connects
    every output channel to all input channels, tanh is not scaled, and the output layer is linear
    instead of radial basis functions.

    Attributes:
        num_outputs: size of the output.
        activation: name or element-wise function; tanh in the paper.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    References:
        LeCun, Bottou, Bengio and Haffner 1998, Proceedings of the IEEE 86(11), section II.B.
    """

    num_outputs: int = 10
    activation: Activation = "tanh"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(num_outputs=self.num_outputs)
        activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images to [batch, num_outputs]; records "features".

        Args:
            inputs: [batch, 28, 28, channels], zero-padded to 32x32, or [batch, 32, 32, channels].
            train: has no effect, as there is neither dropout nor a norm.

        Raises:
            ValueError: inputs of another size.
        """
        check_rank(inputs, self, layouts=IMAGES)
        if inputs.shape[1:3] not in ((28, 28), (32, 32)):
            raise ValueError(
                f"LeNet5 got images of {inputs.shape[1:3]}; resize or pad them to 28x28 or "
                "32x32, or use ConvNet, which takes any size"
            )
        policy, act = self.precision, activation(self.activation)
        x = inputs
        for index, (features, padding) in enumerate(((6, (32 - inputs.shape[1]) // 2), (16, 0))):
            name = f"conv_{index}"
            x = Convolution(features, 5, padding=padding, precision=policy, name=name)(x)
            x = average_pool(act(x), 2)
        x = x.reshape(x.shape[0], -1)  # [batch, 400]
        for index, width in enumerate((120, 84)):
            x = act(Dense(width, precision=policy, name=f"hidden_{index}")(x))
        record(self, "features", x)
        return Dense(self.num_outputs, precision=policy, name="head")(x).astype(policy.output)


class ConvNet(nn.Module):
    """A plain convolutional network for images or audio, of any depth and width.

    Each layer is a convolution, a max pool, a norm and an activation. Pooling precedes norm and
    activation, which then cost a quarter. Without a norm and with an increasing activation the
    result equals that of the usual order.

    Attributes:
        features: channels of each convolution.
        kernel_size: size of the kernels, an int for every spatial axis or one per axis.
        pool: window and stride of the max pool after each convolution; 1 for none.
        hidden_features: widths of the hidden dense layers.
        num_outputs: size of the output.
        activation: name or element-wise function.
        norm: None, "batch" or "layer", after each convolution and hidden layer.
        dropout_rate: dropout before each dense layer, in [0, 1).
        global_pool: global average pooling before the dense layers instead of flattening, which
            ties the number of parameters to the input size.
        kernel_init: initializer of all but the last layer; the default suits relu and similar.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range, or the input is too small for the pools.

    Example:
        >>> module = ConvNet(features=(8, 16))
        >>> images, audio = jax.numpy.ones((2, 28, 28, 1)), jax.numpy.ones((2, 100, 3))
        >>> for inputs in (images, audio):
        ...     shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
        ...     print(shapes["params"]["conv_0"]["kernel"].shape)
        (3, 3, 1, 8)
        (3, 3, 8)
    """

    features: Sequence[int] = (32, 64)
    kernel_size: Size = 3
    pool: int = 2
    hidden_features: Sequence[int] = (128,)
    num_outputs: int = 10
    activation: Activation = "relu"
    norm: str | None = None
    dropout_rate: float = 0.0
    global_pool: bool = False
    kernel_init: Initializer = nn.initializers.he_normal()
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            features=self.features,
            kernel_size=self.kernel_size,
            pool=self.pool,
            hidden_features=self.hidden_features,
            num_outputs=self.num_outputs,
        )
        check_norm(self.norm)
        check_rate(self.dropout_rate)
        activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map images or audio to [batch, num_outputs]; records "features".

        Args:
            inputs: [batch, height, width, channels] or [batch, time, channels].
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: inputs of another rank, or too small for the pools.
        """
        check_rank(inputs, self, layouts=IMAGES_OR_AUDIO)
        policy, act = self.precision, activation(self.activation)
        smallest = self.pool ** len(self.features)
        if min(inputs.shape[1:-1]) < smallest:
            raise ValueError(
                f"inputs of shape {inputs.shape} are too small for {len(self.features)} pools of "
                f"{self.pool}, which need {smallest} a side; use fewer features or pool=1, and "
                "give channels last"
            )
        # A norm subtracts any bias of the layer before it.
        shared: dict[str, Any] = {
            "use_bias": self.norm is None,
            "kernel_init": self.kernel_init,
            "precision": policy,
        }

        def normalized(x: jax.Array, name: str) -> jax.Array:
            return normalize(
                x, self.norm, train=train, weights=weights, name=name, precision=policy
            )

        x = inputs
        for index, width in enumerate(self.features):
            x = Convolution(width, self.kernel_size, name=f"conv_{index}", **shared)(x)
            x = max_pool(x, self.pool) if self.pool > 1 else x
            x = act(normalized(x, f"conv_norm_{index}"))
        # [batch, channels], or flattened: [batch, positions * channels]
        x = global_average_pool(x) if self.global_pool else x.reshape(x.shape[0], -1)
        for index, width in enumerate(self.hidden_features):
            x = Dropout(self.dropout_rate, name=f"dropout_{index}")(x, train=train)
            x = Dense(width, name=f"hidden_{index}", **shared)(x)
            x = act(normalized(x, f"hidden_norm_{index}"))
        record(self, "features", x)
        x = Dropout(self.dropout_rate, name="dropout_head")(x, train=train)
        return Dense(self.num_outputs, precision=policy, name="head")(x).astype(policy.output)
