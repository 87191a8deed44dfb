"""Residual generators and discriminators, as in WGAN-GP and spectral normalization."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank
from jaxnets.core import Precision
from jaxnets.functional.pooling import average_pool
from jaxnets.layers import (
    Convolution,
    Dense,
    Initializer,
    Upsampling,
    UpsamplingMethod,
    enlarge,
    linear_layer,
    normalize,
)
from jaxnets.models.gan.layers import (
    check_discriminator,
    check_generator,
    check_labels,
    check_latents,
    halvings,
    logits_of,
    modulated_norm,
)


class GeneratorBlock(nn.Module):
    """Norm, relu, upsampling by 2, norm, relu, convolution; plus the upsampled input.

    Attributes:
        features: channels of the output.
        num_classes: as for the generator.
        norm: as for the generator.
        upsampling: as for the generator.
        kernel_init: initializer of the kernels.
        precision: dtypes.
    """

    features: int
    num_classes: int | None = None
    norm: str | None = "batch"
    upsampling: UpsamplingMethod = "resize"
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, 2 height, 2 width, features]."""
        # No bias: the norm of the next block subtracts it.
        shared: dict[str, Any] = {
            "use_bias": self.norm is None,
            "kernel_init": self.kernel_init,
            "precision": self.precision,
        }

        def normalized(x: jax.Array, name: str) -> jax.Array:
            x = modulated_norm(
                x,
                labels,
                norm=self.norm,
                num_classes=self.num_classes,
                train=train,
                name=name,
                precision=self.precision,
                weights=weights,
            )
            return nn.relu(x)

        y = normalized(x, "norm_1")
        y = Upsampling(self.features, self.upsampling, name="conv_1", **shared)(y)
        y = Convolution(self.features, 3, name="conv_2", **shared)(normalized(y, "norm_2"))
        # A 1x1 convolution commutes with nearest-neighbor upsampling; this order costs a quarter.
        return enlarge(Convolution(self.features, 1, name="shortcut", **shared)(x)) + y


class ResNetGenerator(nn.Module):
    """Map latents to images: residual blocks that double height and width, all of one width.

    Attributes:
        image_shape: (height, width, channels).
        latent_size: dimension of the latents.
        width: channels of every block.
        num_classes: None, or the number of classes of a conditional generator; each norm then has
            a scale and a shift for each class.
        norm: None, "batch" or "layer".
        upsampling: "resize", "subpixel" or "transposed", see `layers.Upsampling`.
        kernel_init: initializer of all kernels.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range, or the image size does not halve to 8 or less.

    References:
        Gulrajani et al. 2017, arXiv:1704.00028, appendix F; Miyato et al. 2018,
        arXiv:1802.05957, table 4a (32 pixels, 256 channels).
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    latent_size: int = 128
    width: int = 256
    num_classes: int | None = None
    norm: str | None = "batch"
    upsampling: UpsamplingMethod = "resize"
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_generator(
            self.image_shape,
            self.num_classes,
            self.norm,
            self.upsampling,
            latent_size=self.latent_size,
            width=self.width,
        )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map latents [batch, latent_size] to images in [-1, 1], [batch, *image_shape].

        Args:
            latents: usually standard normal.
            labels: integer [batch], for a conditional network only.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: latents of another size, labels missing, unexpected or out of range.
        """
        check_latents(latents, self.latent_size)
        check_labels(labels, self.num_classes, latents.shape[0], type(self).__name__)
        policy = self.precision
        num_doublings, (height, width) = halvings(*self.image_shape[:2])
        shared: dict[str, Any] = {"kernel_init": self.kernel_init, "precision": policy}
        x = Dense(height * width * self.width, name="start", **shared)(latents)
        x = x.reshape(-1, height, width, self.width)  # [batch, height, width, channels]
        for index in range(1, num_doublings + 1):
            x = GeneratorBlock(
                self.width,
                self.num_classes,
                self.norm,
                self.upsampling,
                name=f"block_{index}",
                **shared,
            )(x, labels, train=train, weights=weights)
        x = nn.relu(
            normalize(x, self.norm, train=train, weights=weights, name="norm", precision=policy)
        )
        x = Convolution(self.image_shape[-1], 3, name="image", **shared)(x)
        return jnp.tanh(x).astype(policy.output)


class DiscriminatorBlock(nn.Module):
    """Relu, convolution, relu, convolution, optional 2x2 average pooling; plus the input.

    Attributes:
        features: channels of the output.
        halve: average-pool 2x2 pixels at the end.
        first: the block's input is the image: no norm and no relu before the first convolution.
        norm: None, "batch", "layer" or "spectral"; "batch" and "layer" come before each relu.
        kernel_init: initializer of the kernels.
        precision: dtypes.
    """

    features: int
    halve: bool = False
    first: bool = False
    norm: str | None = "spectral"
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, weights: jax.Array | None = None
    ) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, height or half of it, ..., features]."""
        spectral = self.norm == "spectral"
        norm = None if spectral else self.norm

        def convolved(x: jax.Array, size: int, name: str, use_bias: bool = True) -> jax.Array:
            return linear_layer(
                x,
                Convolution,
                self.features,
                spectral=spectral,
                train=train,
                name=name,
                use_bias=use_bias,
                kernel_size=size,
                kernel_init=self.kernel_init,
                precision=self.precision,
            )

        def normalized(x: jax.Array, name: str) -> jax.Array:
            return normalize(
                x, norm, train=train, weights=weights, name=name, precision=self.precision
            )

        y = x if self.first else nn.relu(normalized(x, "norm_1"))
        y = convolved(y, 3, "conv_1", use_bias=norm is None)
        y = convolved(nn.relu(normalized(y, "norm_2")), 3, "conv_2")
        if self.halve:
            x, y = average_pool(x, 2), average_pool(y, 2)
        if x.shape[-1] != self.features or self.halve:
            # The paper pools after this convolution, except in the first block. Without a bias the
            # two commute, and this order costs a quarter.
            x = convolved(x, 1, "shortcut", use_bias=False)
        return x + y


class ResNetDiscriminator(nn.Module):
    """Map images to logits, large for "real", by residual blocks and a sum over positions.

    Attributes:
        num_halvings: blocks that halve height and width, which must be multiples of
            2^num_halvings.
        num_blocks: further blocks at the lowest resolution, 0 or more.
        width: channels of every block.
        num_classes: None, or the number of classes of a projection discriminator.
        norm: None, "batch", "layer", or "spectral", which divides every kernel by its largest
            singular value. Gradient penalties do not work with "batch".
        kernel_init: initializer of all kernels.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    References:
        Miyato et al. 2018, arXiv:1802.05957, table 4b; Miyato and Koyama 2018, arXiv:1802.05637
        (projection).
    """

    num_halvings: int = 2
    num_blocks: int = 2
    width: int = 128
    num_classes: int | None = None
    norm: str | None = "spectral"
    kernel_init: Initializer = nn.initializers.glorot_uniform()
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_discriminator(
            self.num_classes, self.norm, width=self.width, num_halvings=self.num_halvings
        )
        if self.num_blocks < 0:
            raise ValueError(f"num_blocks is {self.num_blocks}; give 0 or more")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map images [batch, height, width, channels] to logits [batch]; records "features".

        Args:
            inputs: images in [-1, 1].
            labels: integer [batch], for a conditional network only.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: a height or width that is no multiple of 2^num_halvings, labels missing,
                unexpected or out of range.
        """
        check_rank(inputs, self, layouts=IMAGES)
        check_labels(labels, self.num_classes, inputs.shape[0], type(self).__name__)
        height, width = inputs.shape[1:3]
        if height % 2**self.num_halvings or width % 2**self.num_halvings:
            raise ValueError(
                f"images of {height} x {width} pixels do not halve num_halvings="
                f"{self.num_halvings} times without remainder; give fewer halvings, or resize them"
            )
        x = inputs
        for index in range(self.num_halvings + self.num_blocks):
            x = DiscriminatorBlock(
                self.width,
                halve=index < self.num_halvings,
                first=index == 0,
                norm=self.norm,
                kernel_init=self.kernel_init,
                precision=self.precision,
                name=f"block_{index + 1}",
            )(x, train=train, weights=weights)
        return logits_of(self, nn.relu(x), labels, flatten=False, train=train)
