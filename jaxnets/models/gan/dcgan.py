"""Deep convolutional generative adversarial networks (DCGAN)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank
from jaxnets.core import Precision
from jaxnets.layers import (
    Convolution,
    Dense,
    Initializer,
    Upsampling,
    UpsamplingMethod,
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


class DCGANGenerator(nn.Module):
    """Map latents to images: a linear projection to a small feature map, then upsampling by 2.

    Each upsampling but the last halves the channels and is followed by a norm and relu; the last
    is followed by tanh. Images of 28 pixels a side start from 7, those of 8, 16, 32 and 64 from 4.

    Differs from the paper: upsampling is nearest-neighbor and a 3x3 convolution instead of a 5x5
    transposed convolution, and latents are usually Gaussian.

    Attributes:
        image_shape: (height, width, channels).
        latent_size: dimension of the latents.
        width: channels before the last upsampling; twice as many before each previous one.
        num_classes: None, or the number of classes of a conditional generator; each norm then has
            a scale and a shift for each class.
        norm: None, "batch" or "layer".
        upsampling: "resize", "subpixel" or "transposed", see `layers.Upsampling`.
        kernel_init: initializer of all kernels.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range, or the image size does not halve to 8 or less.

    Example:
        >>> module = DCGANGenerator(image_shape=(28, 28, 1), width=8)
        >>> latents = jnp.ones((2, 100))
        >>> module.apply(module.init(jax.random.key(0), latents), latents).shape
        (2, 28, 28, 1)

    References:
        Radford, Metz and Chintala 2016, arXiv:1511.06434, section 3 and figure 1; Odena et al.
        2016, doi:10.23915/distill.00003 (nearest-neighbor upsampling).
    """

    image_shape: tuple[int, int, int] = (64, 64, 3)
    latent_size: int = 100
    width: int = 64
    num_classes: int | None = None
    norm: str | None = "batch"
    upsampling: UpsamplingMethod = "resize"
    kernel_init: Initializer = nn.initializers.normal(0.02)
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

        def normalized(x: jax.Array, name: str) -> jax.Array:
            x = modulated_norm(
                x,
                labels,
                norm=self.norm,
                num_classes=self.num_classes,
                train=train,
                name=name,
                precision=policy,
                weights=weights,
            )
            return nn.relu(x)

        channels = self.width * 2 ** (num_doublings - 1)
        use_bias = self.norm is None
        x = Dense(height * width * channels, use_bias=use_bias, name="start", **shared)(latents)
        x = x.reshape(-1, height, width, channels)  # [batch, height, width, channels]
        x = normalized(x, "start_norm")
        for index in range(1, num_doublings + 1):
            last, name = index == num_doublings, f"double_{index}"
            channels = self.image_shape[-1] if last else channels // 2
            double = Upsampling(
                channels, self.upsampling, use_bias=use_bias or last, name=name, **shared
            )
            x = double(x)
            x = x if last else normalized(x, f"{name}_norm")
        return jnp.tanh(x).astype(policy.output)


class DCGANDiscriminator(nn.Module):
    """Map images to logits, large for "real", by convolutions of stride 2.

    Each convolution halves height and width, doubles the channels, and is followed by a norm
    (except the first) and leaky relu.

    Differs from the paper: kernels are 4x4, a multiple of the stride, instead of 5x5.

    Attributes:
        width: channels of the first convolution.
        num_classes: None, or the number of classes of a projection discriminator.
        norm: None, "batch", "layer", or "spectral", which divides every kernel by its largest
            singular value. Gradient penalties do not work with "batch".
        negative_slope: of leaky relu.
        kernel_init: initializer of all kernels; the paper's default suits "batch" and "spectral",
            `nn.initializers.he_normal()` the others.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> module, images = DCGANDiscriminator(width=8), jnp.ones((2, 28, 28, 1))
        >>> module.apply(module.init(jax.random.key(0), images), images).shape
        (2,)

    References:
        Radford, Metz and Chintala 2016, arXiv:1511.06434, section 3; Miyato and Koyama 2018,
        arXiv:1802.05637 (projection); Miyato et al. 2018, arXiv:1802.05957 (spectral norm).
    """

    width: int = 64
    num_classes: int | None = None
    norm: str | None = "batch"
    negative_slope: float = 0.2
    kernel_init: Initializer = nn.initializers.normal(0.02)
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_discriminator(self.num_classes, self.norm, width=self.width)
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
            ValueError: images that do not halve, labels missing, unexpected or out of range.
        """
        check_rank(inputs, self, layouts=IMAGES)
        check_labels(labels, self.num_classes, inputs.shape[0], type(self).__name__)
        policy, spectral = self.precision, self.norm == "spectral"
        num_halvings, _ = halvings(*inputs.shape[1:3])
        x = inputs
        for index in range(1, num_halvings + 1):
            norm = None if spectral or index == 1 else self.norm
            x = linear_layer(
                x,
                Convolution,
                self.width * 2 ** (index - 1),
                spectral=spectral,
                train=train,
                name=f"conv_{index}",
                use_bias=norm is None,
                kernel_size=4,
                strides=2,
                kernel_init=self.kernel_init,
                precision=policy,
            )
            x = normalize(
                x, norm, train=train, weights=weights, name=f"norm_{index}", precision=policy
            )
            x = nn.leaky_relu(x, self.negative_slope)
        return logits_of(self, x, labels, flatten=True, train=train)
