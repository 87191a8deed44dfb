"""How likely an image is under what a decoder returns: nats per image, summed over its pixels.

A likelihood says how many numbers a decoder returns for each pixel and channel, what they mean,
and which range the images must have.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Protocol

import chex
import jax
import jax.numpy as jnp

from jaxnets.core import at_least_float32
from jaxnets.functional.lowering.layout import materialize
from jaxnets.functional.lowering.platforms import platform_dependent
from jaxnets.objectives.image_range import ImageRange
from jaxnets.objectives.losses import binary_cross_entropy

# Below it a scale would let single pixels outweigh all else (as in PixelCNN++).
_LEAST_LOG_SCALE = -7.0


class Likelihood(Protocol):
    """What a decoder's outputs say about an image.

    Attributes:
        num_parameters: outputs of the decoder for each pixel and channel.
        image_range: least and greatest value of a pixel; None takes any that is finite.
    """

    @property
    def num_parameters(self) -> int: ...

    @property
    def image_range(self) -> ImageRange: ...

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Return -log p(image), [batch], from outputs [batch, ..., channels * num_parameters]."""
        ...

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the expected images [batch, ..., channels]."""
        ...


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent black or white pixels: the outputs are logits.

    For gray levels x in [0, 1] the loss is the cross-entropy -x log p - (1 - x) log(1 - p), which
    is what autoencoders are usually compared by, though no density of gray levels.

    Example:
        >>> Bernoulli().losses(jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)))  # 4 log 2
        Array([2.7725887], dtype=float32)
    """

    num_parameters: ClassVar[int] = 1
    image_range: ClassVar[ImageRange] = (0.0, 1.0)

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Sum the cross-entropy over the pixels of each image, [batch]."""
        return sum_per_image(binary_cross_entropy(outputs, images))

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the probabilities of white."""
        return jax.nn.sigmoid(at_least_float32(outputs))


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """The outputs are the pixels themselves; the loss is the sum of their squared errors.

    It is the Gaussian likelihood of variance 1/2 without its constant, so no number of nats.

    Attributes:
        image_range: least and greatest value of a pixel; None takes any that is finite, such as
            those of standardized images.
    """

    num_parameters: ClassVar[int] = 1
    image_range: ImageRange = (0.0, 1.0)

    def losses(self, outputs: jax.Array, images: jax.Array) -> jax.Array:
        """Sum the squared error over the pixels of each image, [batch]."""
        chex.assert_equal_shape([outputs, images])
        outputs = at_least_float32(outputs)
        return sum_per_image(jnp.square(outputs - images.astype(outputs.dtype)))

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the outputs."""
        return at_least_float32(outputs)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent normal pixels, whose density can exceed 1 and the loss fall below 0.

    Attributes:
        scale: standard deviation of every pixel; None learns one for each, whose logarithms, at
            least -7, are the second half of the outputs' channels.
        image_range: as of `SquaredError`.

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
        """Sum -log N(x; mean, scale^2) over the pixels of each image, [batch]."""
        if self.scale is None:
            mean, log_scale = _mean_and_log_scale(outputs)
        else:
            mean = at_least_float32(outputs)
            log_scale = jnp.full((), math.log(self.scale), mean.dtype)
        chex.assert_equal_shape([mean, images])
        distance = (images.astype(mean.dtype) - mean) * jnp.exp(-log_scale)
        return sum_per_image(jnp.square(distance) / 2 + log_scale + math.log(2 * math.pi) / 2)

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the means."""
        return at_least_float32(outputs) if self.scale else _mean_and_log_scale(outputs)[0]


@dataclasses.dataclass(frozen=True)
class DiscretizedLogistic:
    """Independent logistic pixels, integrated over the bin of each gray level.

    P(x) = S((x + d - mean) / scale) - S((x - d - mean) / scale) with the sigmoid S and half the
    width of a bin, d = 1 / (num_levels - 1); the outermost bins reach to infinity, so that the
    probabilities of the levels sum to 1. The second half of the outputs' channels are the log
    scales, at least -7. The loss is a true number of nats, comparable between models; divide it
    by log(2) and the number of values for bits per dimension.

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
        """Sum -log P(level) over the pixels of each image, [batch]."""
        mean, log_scale = _mean_and_log_scale(outputs)
        chex.assert_equal_shape([mean, images])
        images, rate = images.astype(mean.dtype), jnp.exp(-log_scale)
        half = 1 / (self.num_levels - 1)
        upper, lower = (images + half - mean) * rate, (images - half - mean) * rate
        # S(a) - S(b) = S(a) S(-b) (1 - e^(b - a)), which neither cancels nor underflows.
        below = jax.nn.log_sigmoid(upper)
        above = jax.nn.log_sigmoid(-lower)
        between = below + above + jnp.log(-jnp.expm1(-2 * half * rate))
        first, last = images < -1 + half, images > 1 - half
        return -sum_per_image(jnp.where(first, below, jnp.where(last, above, between)))

    def mean(self, outputs: jax.Array) -> jax.Array:
        """Return the means, within [-1, 1]."""
        return jnp.clip(_mean_and_log_scale(outputs)[0], -1, 1)


def _mean_and_log_scale(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, log_scale = jnp.split(at_least_float32(outputs), 2, axis=-1)
    return mean, jnp.maximum(log_scale, _LEAST_LOG_SCALE)


def sum_per_image(errors: jax.Array) -> jax.Array:
    """Sum the errors of each image, [batch, ...] to [batch]."""
    # On CPU JAX 0.12 adds one after the other if exponentials and logarithms are merged into it.
    errors = platform_dependent(errors, cpu=materialize, default=lambda errors: errors)
    return jnp.sum(errors, axis=tuple(range(1, errors.ndim)))
