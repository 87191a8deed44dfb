"""Encoders and decoders of images, dense or convolutional, from one configuration.

The decoder mirrors the encoder: the same widths in reverse order, back to exactly the image size,
odd ones included.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets import functional
from jaxnets.checks import check_sizes
from jaxnets.core import Precision
from jaxnets.functional.activations import Activation, activation
from jaxnets.layers import (
    Convolution,
    Dense,
    Initializer,
    Upsampling,
    UpsamplingMethod,
    check_norm,
    check_upsampling,
    normalize,
)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Configuration of the encoder and decoder of an autoencoder.

    Attributes:
        image_shape: (height, width, channels).
        kind: "dense" layers over the flattened image, or "convolutional": layers of stride 2 in the
            encoder, upsampling by 2 in the decoder.
        features: widths of the encoder's layers; the decoder has them in reverse order. A dense
            autoencoder with none, (), is linear.
        activation: name or elementwise function, after each of these layers.
        norm: None, "batch" or "layer", before each activation.
        kernel_size: height and width of the kernels (convolutional).
        upsampling: "resize", "subpixel" or "transposed", see `layers.Upsampling`.
        num_blocks: residual blocks at the lowest resolution, in encoder and decoder
            (convolutional).
        kernel_init: initializer of all kernels; by default He normal before an activation and
            LeCun normal elsewhere.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> EncoderDecoderConfig((28, 28, 1), "convolutional", (16, 32)).code_shape
        (7, 7, 32)
    """

    image_shape: tuple[int, int, int]
    kind: Literal["dense", "convolutional"] = "dense"
    features: tuple[int, ...] = (512, 256)
    activation: Activation = "relu"
    norm: str | None = None
    kernel_size: int = 3
    upsampling: UpsamplingMethod = "resize"
    num_blocks: int = 0
    kernel_init: Initializer | None = None

    def __post_init__(self) -> None:
        check_sizes(
            image_shape=self.image_shape, features=self.features, kernel_size=self.kernel_size
        )
        check_norm(self.norm)
        check_upsampling(self.upsampling)
        activation(self.activation)
        if len(self.image_shape) != 3:
            raise ValueError(
                f"image_shape={self.image_shape} must be (height, width, channels); add a channel "
                "axis of 1 to gray images"
            )
        if self.kind not in ("dense", "convolutional"):
            raise ValueError(f"kind is {self.kind!r}; choose 'dense' or 'convolutional'")
        if self.num_blocks < 0:
            raise ValueError(f"num_blocks is {self.num_blocks}; give 0 or more")
        if self.kind == "dense":
            if self.num_blocks:
                raise ValueError("num_blocks needs kind='convolutional'; dense layers have none")
            return
        smallest = 2 ** (len(self.features) - 1) + 1
        if not self.features or min(self.image_shape[:2]) < smallest:
            raise ValueError(
                f"features={self.features} halve images of {self.image_shape[:2]} "
                f"{len(self.features)} times; give 1 to "
                f"{math.ceil(math.log2(min(self.image_shape[:2])))} widths"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width before each convolution of the encoder and after the last."""
        sizes = [self.image_shape[:2]]
        for _ in self.features:
            height, width = sizes[-1]
            sizes.append((-(-height // 2), -(-width // 2)))
        return tuple(sizes)

    @property
    def hidden_init(self) -> Initializer:
        """Initializer of kernels before an activation."""
        return self.kernel_init or nn.initializers.he_normal()

    @property
    def linear_init(self) -> Initializer:
        """Initializer of the other kernels."""
        return self.kernel_init or nn.initializers.lecun_normal()

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the encoder's output for one image."""
        if self.kind == "convolutional":
            return *self.sizes[-1], self.features[-1]
        return (self.features[-1] if self.features else math.prod(self.image_shape),)


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the block of the VQ-VAE paper.

    Attributes:
        kernel_init: initializer of the kernels.
        precision: dtypes.

    References:
        van den Oord et al. 2017, arXiv:1711.00937, section 4.1.
    """

    kernel_init: Initializer = nn.initializers.he_normal()
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to the same shape."""
        features = x.shape[-1]
        shared: dict[str, Any] = {"kernel_init": self.kernel_init, "precision": self.precision}
        y = Convolution(features, 3, name="conv_0", **shared)(nn.relu(x))
        return x + Convolution(features, 1, name="conv_1", **shared)(nn.relu(y))


class TiedDense(nn.Module):
    """Dense layer whose kernel is the transpose of another layer's; only the bias is its own.

    Attributes:
        precision: dtypes of parameters and arithmetic.
    """

    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Map [batch, outputs] with a kernel [inputs, outputs] to [batch, inputs]."""
        policy = self.precision
        bias = self.param("bias", nn.initializers.zeros, kernel.shape[:1], policy.parameter)
        y = functional.linear(x.astype(policy.compute), kernel.astype(policy.compute).T)
        return y + bias.astype(policy.compute)[None]


class Encoder(nn.Module):
    """The encoder of an autoencoder, without the final projection to the code.

    Attributes:
        config: its layers.
        precision: dtypes.
    """

    config: EncoderDecoderConfig
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        condition: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, *config.code_shape].

        Args:
            images: of the config's `image_shape`.
            condition: one-hot classes [batch, classes], appended to the channels of every pixel,
                or to the flattened image.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: images of another size.
        """
        config, policy = self.config, self.precision
        if images.ndim != 4 or images.shape[1:] != config.image_shape:
            raise ValueError(
                f"images of shape {images.shape} do not fit image_shape {config.image_shape}; "
                f"give [batch, {', '.join(map(str, config.image_shape))}]"
            )
        x = images.astype(policy.compute)
        if config.kind == "dense":
            x = x.reshape(x.shape[0], -1)  # [batch, height * width * channels]
        if condition is not None:
            axes = tuple(range(1, x.ndim - 1))
            planes = jnp.expand_dims(condition.astype(x.dtype), axes)
            # [batch, height, width, classes], or [batch, classes] if dense
            planes = jnp.broadcast_to(planes, (*x.shape[:-1], condition.shape[-1]))
            x = jnp.concatenate([x, planes], axis=-1)
        shared = _shared(config, policy)
        activated = functools.partial(
            _activated, config=config, train=train, weights=weights, precision=policy
        )
        for index, width in enumerate(config.features):
            if config.kind == "dense":
                x = Dense(width, name=f"hidden_{index}", **shared)(x)
            else:
                x = Convolution(
                    width, config.kernel_size, strides=2, name=f"conv_{index}", **shared
                )(x)
            x = activated(x, name=f"norm_{index}")
        return _blocks(x, config, policy)


class Decoder(nn.Module):
    """The decoder of an autoencoder.

    Attributes:
        config: the encoder's layers, which the decoder mirrors.
        num_parameters: outputs for each pixel and channel, see `Likelihood`.
        precision: dtypes.
    """

    config: EncoderDecoderConfig
    num_parameters: int = 1
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self,
        code: jax.Array,
        kernels: Sequence[jax.Array] | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map a code to [batch, height, width, channels * num_parameters].

        Args:
            code: [batch, latent_size], or for a convolutional decoder also a feature map [batch,
                height, width, channels] of the size of the encoder's output.
            kernels: of the encoder's dense layers, in reverse order; their transposes replace the
                decoder's own kernels.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.
        """
        config, policy = self.config, self.precision
        height, width, channels = config.image_shape
        outputs = channels * self.num_parameters
        activated = functools.partial(
            _activated, config=config, train=train, weights=weights, precision=policy
        )
        x = code.astype(policy.compute)
        if config.kind == "dense":
            x = self._dense(x, kernels, height * width * outputs, activated)
            # [batch, height, width, channels * num_parameters]
            return x.reshape(x.shape[0], height, width, outputs).astype(policy.output)
        shared = _shared(config, policy)
        if x.ndim == 2:
            x = Dense(math.prod(config.code_shape), name="unfold", **shared)(x)
            x = x.reshape(x.shape[0], *config.code_shape)  # [batch, height, width, channels]
        else:
            x = Convolution(config.features[-1], config.kernel_size, name="unfold", **shared)(x)
        x = activated(x, name="norm_unfold")
        x = _blocks(x, config, policy)
        for index in reversed(range(len(config.features))):
            last = index == 0
            up = Upsampling(
                outputs if last else config.features[index - 1],
                config.upsampling,
                config.kernel_size,
                name="head" if last else f"up_{index - 1}",
                **(_linear(config, policy) if last else shared),
            )
            rows, columns = config.sizes[index]
            x = up(x)[:, :rows, :columns]  # the encoder rounds half of an odd size up
            if not last:
                x = activated(x, name=f"norm_{index - 1}")
        return x.astype(policy.output)

    def _dense(
        self,
        x: jax.Array,
        kernels: Sequence[jax.Array] | None,
        outputs: int,
        activated: Callable[..., jax.Array],
    ) -> jax.Array:
        config, policy = self.config, self.precision
        widths = [*reversed(config.features), outputs]
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            name = "head" if last else f"hidden_{index}"
            if kernels is not None:
                x = TiedDense(precision=policy, name=name)(x, kernels[index])
            elif last:
                x = Dense(width, name=name, **_linear(config, policy))(x)
            else:
                x = Dense(width, name=name, **_shared(config, policy))(x)
            if not last:
                x = activated(x, name=f"norm_{index}")
        return x


def _shared(config: EncoderDecoderConfig, precision: Precision) -> dict[str, Any]:
    """Return the fields of a layer before a norm and an activation."""
    return {
        "use_bias": config.norm is None,
        "kernel_init": config.hidden_init,
        "precision": precision,
    }


def _linear(config: EncoderDecoderConfig, precision: Precision) -> dict[str, Any]:
    """Return the fields of a layer without an activation."""
    return {"kernel_init": config.linear_init, "precision": precision}


def _activated(
    x: jax.Array,
    config: EncoderDecoderConfig,
    *,
    name: str,
    train: bool,
    weights: jax.Array | None,
    precision: Precision,
) -> jax.Array:
    x = normalize(x, config.norm, train=train, weights=weights, name=name, precision=precision)
    return activation(config.activation)(x)


def refuse_labels(module: nn.Module, labels: jax.Array | None) -> None:
    """Refuse labels given to an autoencoder that is not conditional.

    Raises:
        ValueError: naming the class of the module.
    """
    if labels is not None:
        raise ValueError(
            f"{type(module).__name__} takes no labels; leave them out, or use VAE(num_classes=...)"
        )


def check_code(code: jax.Array, latent_size: int) -> None:
    """Refuse codes that are not [batch, latent_size].

    Raises:
        ValueError: the shape, and the one that fits.
    """
    if code.ndim != 2 or code.shape[1] != latent_size:
        raise ValueError(
            f"codes of shape {code.shape} do not fit latent_size {latent_size}; give "
            f"[batch, {latent_size}]"
        )


def _blocks(x: jax.Array, config: EncoderDecoderConfig, precision: Precision) -> jax.Array:
    for index in range(config.num_blocks):
        x = ResidualBlock(config.hidden_init, precision, name=f"block_{index}")(x)
    return nn.relu(x) if config.num_blocks else x
