"""Networks of dense layers: the multilayer perceptron and the MLP-Mixer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank, check_rate, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.layers import (
    Convolution,
    Dense,
    Dropout,
    Initializer,
    LayerNorm,
    check_norm,
    normalize,
)


class MLP(nn.Module):
    """A multilayer perceptron: dense layers with an activation between them.

    Attributes:
        features: widths of the hidden layers; () is the perceptron, a single dense layer.
        num_outputs: size of the output.
        activation: name or element-wise function.
        dropout_rate: dropout after each hidden layer, in [0, 1).
        norm: None, "batch" or "layer", before each activation.
        residual: add a skip connection around each hidden layer that keeps the width.
        kernel_init: initializer of the hidden layers; the default suits relu and its variants.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module = MLP(features=(16,), num_outputs=3)
        >>> images = jnp.ones((5, 28, 28, 1))
        >>> module.apply(module.init(jax.random.key(0), images), images).shape
        (5, 3)

    References:
        Rumelhart, Hinton and Williams 1986, Nature 323; He et al. 2015, arXiv:1502.01852
        (initialization).
    """

    features: Sequence[int] = (128, 128)
    num_outputs: int = 10
    activation: Activation = "relu"
    dropout_rate: float = 0.0
    norm: str | None = None
    residual: bool = False
    kernel_init: Initializer = nn.initializers.he_normal()
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(features=self.features, num_outputs=self.num_outputs)
        check_rate(self.dropout_rate)
        check_norm(self.norm)
        activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map flattened inputs to [batch, num_outputs]; records "features".

        Args:
            inputs: [batch, ...], flattened to [batch, inputs].
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: inputs without a batch axis.
        """
        if inputs.ndim < 2:
            raise ValueError(
                f"MLP got inputs of shape {inputs.shape}; give [batch, ...], one example as "
                "inputs[None]"
            )
        policy = self.precision
        x = inputs.reshape(inputs.shape[0], -1).astype(policy.compute)  # [batch, inputs]
        for index, width in enumerate(self.features):
            y = Dense(
                width,
                use_bias=self.norm is None,
                kernel_init=self.kernel_init,
                precision=policy,
                name=f"hidden_{index}",
            )(x)
            y = normalize(
                y, self.norm, train=train, weights=weights, name=f"norm_{index}", precision=policy
            )
            y = activation(self.activation)(y)
            y = Dropout(self.dropout_rate, name=f"dropout_{index}")(y, train=train)
            x = x + y if self.residual and x.shape == y.shape else y
        record(self, "features", x)
        return Dense(self.num_outputs, precision=policy, name="head")(x).astype(policy.output)


class MixerBlock(nn.Module):
    """Token mixing over patches, then channel mixing, each an MLP with pre-norm and residual.

    Attributes:
        token_width: hidden width of the token-mixing MLP.
        channel_width: hidden width of the channel-mixing MLP.
        dropout_rate: stochastic depth: probability of skipping a residual branch, in [0, 1).
        precision: dtypes.
    """

    token_width: int
    channel_width: int
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map [batch, patches, channels] to the same shape."""
        policy, patches, channels = self.precision, *x.shape[1:]

        def two_layers(y: jax.Array, width: int, outputs: int, name: str) -> jax.Array:
            y = Dense(width, precision=policy, name=f"{name}_in")(y)
            return Dense(outputs, precision=policy, name=f"{name}_out")(activation("gelu")(y))

        skip = Dropout(self.dropout_rate, per_example=True, name="skip")
        y = LayerNorm(precision=policy, name="token_norm")(x)
        y = jnp.swapaxes(y, 1, 2)  # [batch, channels, patches]
        y = two_layers(y, self.token_width, patches, "token")
        y = jnp.swapaxes(y, 1, 2)  # [batch, patches, channels]
        x = x + skip(y, train=train)
        y = LayerNorm(precision=policy, name="channel_norm")(x)
        y = two_layers(y, self.channel_width, channels, "channel")
        return x + skip(y, train=train)


class MLPMixer(nn.Module):
    """MLP-Mixer: MLPs alternate between the patch axis and the channel axis of an image.

    The parameter shapes depend on the number of patches, so a trained network accepts one image
    size only.

    Attributes:
        patch_size: side of a patch in pixels; it must divide the sides of the image.
        hidden_size: channels of a patch embedding (C in the paper).
        num_layers: number of blocks.
        token_width: hidden width of the token-mixing MLPs (D_S in the paper).
        channel_width: hidden width of the channel-mixing MLPs (D_C in the paper).
        num_outputs: size of the output.
        dropout_rate: stochastic depth at the last block, growing linearly from 0 at the first.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range, or the patches do not tile the image.

    References:
        Tolstikhin et al. 2021, arXiv:2105.01601, Table 1, which counts parameters at 224x224
        without the last layer.
    """

    patch_size: int = 4
    hidden_size: int = 128
    num_layers: int = 4
    token_width: int = 64
    channel_width: int = 512
    num_outputs: int = 10
    dropout_rate: float = 0.0
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            token_width=self.token_width,
            channel_width=self.channel_width,
            num_outputs=self.num_outputs,
        )
        check_rate(self.dropout_rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images to [batch, num_outputs]; records "features".

        Args:
            inputs: [batch, height, width, channels].
            train: training mode.

        Raises:
            ValueError: inputs of another rank, or patches that do not tile the images.
        """
        check_rank(inputs, self, layouts=IMAGES)
        size, policy = self.patch_size, self.precision
        if any(side % size for side in inputs.shape[1:3]):
            raise ValueError(
                f"patches of {size}x{size} do not tile images of {inputs.shape[1:3]}; choose a "
                f"patch_size that divides {math.gcd(*inputs.shape[1:3])}, or pad the images"
            )
        patches = Convolution(
            self.hidden_size, size, strides=size, padding="VALID", precision=policy, name="patches"
        )
        x = patches(inputs)
        x = x.reshape(x.shape[0], -1, self.hidden_size)  # [batch, patches, channels]
        for index in range(self.num_layers):
            x = MixerBlock(
                self.token_width,
                self.channel_width,
                dropout_rate=self.dropout_rate * index / max(1, self.num_layers - 1),
                precision=policy,
                name=f"block_{index}",
            )(x, train=train)
        x = LayerNorm(precision=policy, name="norm")(x)
        x = jnp.mean(x, axis=1)  # [batch, channels]
        record(self, "features", x)
        return Dense(self.num_outputs, precision=policy, name="head")(x).astype(policy.output)


def mixer_s32(num_classes: int = 1000, **fields: Any) -> MLPMixer:
    """Build Mixer-S/32: 19 million parameters in Table 1; `fields` override its own."""
    return _mixer(32, 512, 8, num_classes, fields)


def mixer_s16(num_classes: int = 1000, **fields: Any) -> MLPMixer:
    """Build Mixer-S/16: 18 million parameters in Table 1; `fields` override its own."""
    return _mixer(16, 512, 8, num_classes, fields)


def mixer_b32(num_classes: int = 1000, **fields: Any) -> MLPMixer:
    """Build Mixer-B/32: 60 million parameters in Table 1; `fields` override its own."""
    return _mixer(32, 768, 12, num_classes, fields)


def mixer_b16(num_classes: int = 1000, **fields: Any) -> MLPMixer:
    """Build Mixer-B/16: 59 million parameters in Table 1; `fields` override its own."""
    return _mixer(16, 768, 12, num_classes, fields)


def mixer_l32(num_classes: int = 1000, **fields: Any) -> MLPMixer:
    """Build Mixer-L/32: 206 million parameters in Table 1; `fields` override its own."""
    return _mixer(32, 1024, 24, num_classes, fields)


def mixer_l16(num_classes: int = 1000, **fields: Any) -> MLPMixer:
    """Build Mixer-L/16: 207 million parameters in Table 1; `fields` override its own."""
    return _mixer(16, 1024, 24, num_classes, fields)


def mixer_h14(num_classes: int = 1000, **fields: Any) -> MLPMixer:
    """Build Mixer-H/14: 431 million parameters in Table 1; `fields` override its own."""
    return _mixer(14, 1280, 32, num_classes, fields)


def _mixer(
    patch_size: int, hidden_size: int, num_layers: int, num_classes: int, fields: dict[str, Any]
) -> MLPMixer:
    # In every row of Table 1 the hidden widths are C / 2 and 4 C.
    preset: dict[str, Any] = {
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "token_width": hidden_size // 2,
        "channel_width": 4 * hidden_size,
        "num_outputs": num_classes,
    }
    return MLPMixer(**(preset | fields))
