"""Likelihoods of images given a decoder's outputs, in nats per image, summed over its pixels.

A likelihood defines how many parameters the decoder outputs for each pixel and channel, what they
mean, and which range the images must have.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from jaxnets.checks import check_same_shape
from jaxnets.core import at_least_float32
from jaxnets.functional.lowering.layout import materialize
from jaxnets.functional.lowering.platforms import platform_dependent
from jaxnets.objectives.image_range import ImageRange, refuse_images
from jaxnets.objectives.losses import binary_cross_entropy

# With a smaller scale single pixels would dominate the loss (as in PixelCNN++).
_LEAST_LOG_SCALE = -7.0


class Likelihood(Protocol):
    """A distribution of images whose parameters are a decoder's outputs.

    Attributes:
        num_parameters: outputs of the decoder for each pixel and channel.
        image_range: minimum and maximum of a pixel; None allows any finite value.
    """

    @property
    def num_parameters(self) -> int: ...

    @property
    def image_range(self) -> ImageRange: ...

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Return -log p(image), [batch], from outputs [batch, ..., channels * num_parameters].

        Traced values are not checked here; the objectives turn the losses of images outside of
        `image_range` into NaN.

        Raises:
            ValueError: images that are not floats, known to be outside of `image_range`, or of a
                shape that does not fit.
        """
        ...

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the expected images [batch, ..., channels]."""
        ...


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent binary pixels: the outputs are logits.

    For gray levels x in [0, 1] the loss is the cross-entropy -x log p - (1 - x) log(1 - p), the
    usual measure of autoencoders, although it is no density of gray levels.

    Example:
        >>> Bernoulli().losses(jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)))  # 4 log 2
        Array([2.7725887], dtype=float32)
    """

    num_parameters: ClassVar[int] = 1
    image_range: ClassVar[ImageRange] = (0.0, 1.0)

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Sum the cross-entropy over the pixels of each image in [0, 1], nats [batch].

        Raises:
            ValueError: images out of range, or of another shape than the outputs.
        """
        refuse_images(images, self.image_range)
        return sum_per_image(binary_cross_entropy(outputs, images))

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the probabilities that pixels are 1, in the shape of `outputs`."""
        return jax.nn.sigmoid(at_least_float32(outputs))


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """The outputs are the pixels; the loss is the sum of their squared errors.

    It equals the Gaussian likelihood of variance 1/2 without its constant, so it is not in nats.

    Attributes:
        image_range: minimum and maximum of a pixel; None allows any finite value, such as those of
            standardized images.
    """

    num_parameters: ClassVar[int] = 1
    image_range: ImageRange = (0.0, 1.0)

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Sum the squared error over the pixels of each image, [batch].

        Raises:
            ValueError: images out of range, or of another shape than the outputs.
        """
        refuse_images(images, self.image_range)
        check_same_shape(outputs=outputs, images=images)
        outputs = at_least_float32(outputs)
        return sum_per_image(jnp.square(outputs - images.astype(outputs.dtype)))

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the outputs."""
        return at_least_float32(outputs)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent normal pixels. Their density can exceed 1, and the loss be negative.

    `torch.nn.functional.gaussian_nll_loss(full=True)`, summed over the pixels of each image, for
    variances scale^2.

    Attributes:
        scale: standard deviation of every pixel; None learns one for each pixel and channel. Their
            logarithms, at least -7, are the second half of the outputs' channels.
        image_range: as for `SquaredError`.

    Raises:
        ValueError: a scale that is not above 0.
    """

    scale: float | None = None
    image_range: ImageRange = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; give a standard deviation above 0, or None")

    @property
    def num_parameters(self) -> int:
        """Return 2 with learned scales, else 1."""
        return 2 if self.scale is None else 1

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Sum -log N(x; mean, scale^2) over the pixels of each image, nats [batch].

        Raises:
            ValueError: images out of range, or of another shape than the outputs.
        """
        refuse_images(images, self.image_range)
        if self.scale is None:
            mean, log_scale = _mean_and_log_scale(outputs)
        else:
            mean = at_least_float32(outputs)
            log_scale = jnp.full((), math.log(self.scale), mean.dtype)
        check_same_shape(means=mean, images=images)
        standardized = (images.astype(mean.dtype) - mean) * jnp.exp(-log_scale)
        return sum_per_image(jnp.square(standardized) / 2 + log_scale + math.log(2 * math.pi) / 2)

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the means, [batch, ..., channels]."""
        return at_least_float32(outputs) if self.scale else _mean_and_log_scale(outputs)[0]


@dataclasses.dataclass(frozen=True)
class DiscretizedLogistic:
    """Independent logistic pixels, integrated over the bin of each gray level.

    P(x) = S((x + d - mean) / scale) - S((x - d - mean) / scale) with the sigmoid S and half the
    bin width d = 1 / (num_levels - 1). The outermost bins extend to infinity, so that the
    probabilities of the levels sum to 1. The second half of the outputs' channels are the log
    scales, at least -7. The loss is the negative log-probability of discrete pixels, so models can
    be compared by it; divide it by log(2) and the number of pixels times channels for bits per
    dimension.

    Attributes:
        num_levels: gray levels, spread evenly over [-1, 1].

    Raises:
        ValueError: fewer than two levels.

    References:
        Salimans et al. 2017, arXiv:1701.05517, section 2.1; Kingma et al. 2016, arXiv:1606.04934,
        appendix C.
    """

    num_levels: int = 256
    num_parameters: ClassVar[int] = 2
    image_range: ClassVar[ImageRange] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if self.num_levels < 2:
            raise ValueError(f"num_levels is {self.num_levels}; give 2 or more")

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Sum -log P(level) over the pixels of each image in [-1, 1], nats [batch].

        Raises:
            ValueError: images out of range, or of another shape than the outputs.
        """
        refuse_images(images, self.image_range)
        mean, log_scale = _mean_and_log_scale(outputs)
        check_same_shape(means=mean, images=images)
        images, rate = images.astype(mean.dtype), jnp.exp(-log_scale)
        half = 1 / (self.num_levels - 1)
        upper, lower = (images + half - mean) * rate, (images - half - mean) * rate
        # S(a) - S(b) = S(a) S(-b) (1 - e^(b - a)) avoids cancellation and underflow.
        below = jax.nn.log_sigmoid(upper)
        above = jax.nn.log_sigmoid(-lower)
        between = below + above + jnp.log(-jnp.expm1(-2 * half * rate))
        first, last = images < -1 + half, images > 1 - half
        return -sum_per_image(jnp.where(first, below, jnp.where(last, above, between)))

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the means, within [-1, 1], [batch, ..., channels]."""
        return jnp.clip(_mean_and_log_scale(outputs)[0], -1, 1)


def _mean_and_log_scale(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, log_scale = jnp.split(at_least_float32(outputs), 2, axis=-1)
    return mean, jnp.maximum(log_scale, _LEAST_LOG_SCALE)


def sum_per_image(errors: jax.Array) -> jax.Array:
    """Sum the errors of each image, [batch, ...] to [batch]."""
    # Materialize on CPU: JAX 0.12 reduces sequentially if exponentials and logarithms are fused in.
    errors = platform_dependent(errors, cpu=materialize, default=lambda errors: errors)
    return jnp.sum(errors, axis=tuple(range(1, errors.ndim)))
