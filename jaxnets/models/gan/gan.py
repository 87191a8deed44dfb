"""Generative adversarial networks: a generator and a discriminator as submodules of one module."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnets.checks import check_sizes
from jaxnets.core import weights_keyword
from jaxnets.layers import UpsamplingMethod
from jaxnets.models.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from jaxnets.models.gan.layers import check_labels
from jaxnets.models.gan.resnet import ResNetDiscriminator, ResNetGenerator


class GAN(nn.Module):
    """A generator and a discriminator, with params {"generator": ..., "discriminator": ...}.

    Train it with the objectives of `adversarial`, one `Update` for each network on one state.

    Attributes:
        generator: latents [batch, latent_size] -> images in [-1, 1], with a field `latent_size`.
        discriminator: images -> logits [batch].

    Both have the keyword `train`, and with a batch norm the keyword `weights`: [batch], 0 =
    padding. With a field `num_classes` that is not None they require labels
    [batch] as a second argument.

    Raises:
        ValueError: the two networks differ in their number of classes.

    Example:
        >>> module = dcgan((28, 28, 1), width=8)
        >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 100)))
        >>> sorted(variables["params"])
        ['discriminator', 'generator']
        >>> module.apply(variables, jnp.ones((2, 100)), method="generate").shape
        (2, 28, 28, 1)

    References:
        Goodfellow et al. 2014, arXiv:1406.2661; Mirza and Osindero 2014, arXiv:1411.1784
        (conditional).
    """

    generator: nn.Module
    discriminator: nn.Module

    def __post_init__(self) -> None:
        classes = [
            getattr(network, "num_classes", None)
            for network in (self.generator, self.discriminator)
        ]
        if classes[0] != classes[1]:
            raise ValueError(
                f"the generator has num_classes={classes[0]} and the discriminator "
                f"num_classes={classes[1]}; give both the same"
            )
        super().__post_init__()

    @property
    def latent_size(self) -> int:
        """Dimension of the latents."""
        return self.generator.latent_size

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for an unconditional pair."""
        return getattr(self.generator, "num_classes", None)

    def __call__(
        self,
        latents: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map latents to the logits [batch] of their images; `init` calls both networks."""
        images = self.generate(latents, labels, train=train, weights=weights)
        return self.discriminate(images, labels, train=train, weights=weights)

    def generate(
        self,
        latents: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map latents to images [batch, height, width, channels].

        Args:
            latents: [batch, latent_size].
            labels: integer [batch], for a conditional pair.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: latents of another size, labels that are missing or do not fit.
        """
        keywords = weights_keyword(self.generator, weights, self.generator.variables)
        return self.generator(latents, *_given(labels), train=train, **keywords)

    def discriminate(
        self,
        images: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """Map images to logits [batch], positive for images that look real.

        Args:
            images: [batch, height, width, channels].
            labels: integer [batch], for a conditional pair.
            train: training mode.
            weights: [batch], 0 = padding, for the batch norms in training.

        Raises:
            ValueError: images of another rank or size, labels that are missing or do not fit.
        """
        keywords = weights_keyword(self.discriminator, weights, self.discriminator.variables)
        return self.discriminator(images, *_given(labels), train=train, **keywords)


def dcgan(
    image_shape: tuple[int, int, int] = (64, 64, 3),
    *,
    num_classes: int | None = None,
    width: int = 64,
    latent_size: int = 100,
    norm: str | None = "batch",
    upsampling: UpsamplingMethod = "resize",
    **fields: Any,
) -> GAN:
    """Build a DCGAN: 2,371,139 + 2,765,633 parameters for 64 x 64 x 3 images.

    Args:
        image_shape: (height, width, channels) that halve to 8 pixels or fewer: 28, 32, 64, ...
        num_classes: None, or the number of classes of a conditional pair.
        width: channels at half the image size, in both networks.
        latent_size: dimension of the latents.
        norm: of the discriminator: "batch" as in the paper, None, "layer" or "spectral".
        upsampling: of the generator: "resize", "subpixel" or "transposed".
        fields: further fields of both networks, such as `precision` and `kernel_init`.

    Returns:
        A `GAN`.

    Raises:
        ValueError: an image shape that does not halve so, or another field out of range.

    References:
        Radford, Metz and Chintala 2016, arXiv:1511.06434, section 3 and figure 1.
    """
    shared: dict[str, Any] = {"width": width, "num_classes": num_classes, **fields}
    generator = DCGANGenerator(
        image_shape, latent_size=latent_size, upsampling=upsampling, **shared
    )
    return GAN(generator, DCGANDiscriminator(norm=norm, **shared))


def resnet_gan(
    image_shape: tuple[int, int, int] = (32, 32, 3),
    *,
    num_classes: int | None = None,
    generator_width: int = 256,
    discriminator_width: int = 128,
    latent_size: int = 128,
    num_halvings: int = 2,
    norm: str | None = "spectral",
    upsampling: UpsamplingMethod = "resize",
    **fields: Any,
) -> GAN:
    """Build the residual GAN of spectral normalization, by default for CIFAR-10.

    Args:
        image_shape: (height, width, channels) that halve to 8 pixels or fewer: 28, 32, 64, ...
        num_classes: None, or the number of classes of a conditional pair.
        generator_width: channels of the generator's blocks.
        discriminator_width: channels of the discriminator's blocks.
        latent_size: dimension of the latents.
        num_halvings: blocks of the discriminator that halve the size; two more follow at the lowest
            resolution.
        norm: of the discriminator: "spectral" as in the paper, None, "batch" or "layer".
        upsampling: of the generator: "resize", "subpixel" or "transposed".
        fields: further fields of both networks, such as `precision` and `kernel_init`.

    Returns:
        A `GAN`.

    Raises:
        ValueError: an image shape that does not halve so, or another field out of range.

    References:
        Miyato et al. 2018, arXiv:1802.05957, table 4.
    """
    shared: dict[str, Any] = {"num_classes": num_classes, **fields}
    generator = ResNetGenerator(
        image_shape,
        latent_size=latent_size,
        width=generator_width,
        upsampling=upsampling,
        **shared,
    )
    discriminator = ResNetDiscriminator(
        num_halvings, width=discriminator_width, norm=norm, **shared
    )
    return GAN(generator, discriminator)


def generate_images(
    module: GAN,
    variables: Any,
    latents: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray | None = None,
    *,
    batch_size: int = 250,
) -> np.ndarray:
    """Generate any number of images in batches.

    Args:
        module: a `GAN`.
        variables: its parameters and other collections.
        latents: [images, latent_size].
        labels: integer [images], for a conditional network.
        batch_size: images in a batch; the last one is padded, so that one program is compiled.

    Returns:
        Images in [-1, 1], [images, height, width, channels].

    Raises:
        ValueError: no latents, latents of another size, labels missing, unexpected or out of
            range, or `batch_size` below 1.
    """
    check_sizes(batch_size=batch_size)
    arrays = [np.asarray(array) for array in (latents, *_given(labels))]
    if not len(arrays[0]):
        raise ValueError(f"latents of shape {arrays[0].shape} make no image; give at least one")
    if len(arrays[-1]) != len(arrays[0]):
        raise ValueError(
            f"{len(arrays[-1])} labels do not fit {len(arrays[0])} latents; give one for each"
        )
    if module.num_classes is not None:  # concrete here, traced inside the compiled program
        given = None if labels is None else arrays[1]
        check_labels(given, module.num_classes, len(arrays[0]), type(module).__name__)
    images = []
    for first in range(0, len(arrays[0]), batch_size):
        parts = [array[first : first + batch_size] for array in arrays]
        missing = min(batch_size, len(arrays[0])) - len(parts[0])
        padded = [np.concatenate([part, part[:1].repeat(missing, axis=0)]) for part in parts]
        images.append(np.asarray(_generate(module, variables, *padded))[: len(parts[0])])
    return np.concatenate(images)


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    module: GAN, variables: Any, latents: jax.Array, labels: jax.Array | None = None
) -> jax.Array:
    images: Any = module.apply(variables, latents, labels, method="generate")
    return images


def interpolate_latents(first: jax.Array, second: jax.Array, num_steps: int) -> jax.Array:
    """Interpolate spherically between two latents (slerp), which preserves the Gaussian norm.

    Args:
        first: [latent_size].
        second: [latent_size].
        num_steps: number of latents, both ends included; 2 or more.

    Returns:
        [num_steps, latent_size].

    Raises:
        ValueError: fewer than two steps.

    Example:
        >>> path = interpolate_latents(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 3)
        >>> [round(float(x), 3) for x in path[1]]
        [0.707, 0.707]

    References:
        White 2016, arXiv:1609.04468, section 2.1.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; give 2 or more, both ends count")
    norms = jnp.linalg.norm(first) * jnp.linalg.norm(second)
    cosine = jnp.clip(jnp.vdot(first, second) / jnp.where(norms > 0, norms, 1), -1, 1)
    angle = jnp.where(norms > 0, jnp.arccos(cosine), 0)
    fraction = jnp.linspace(0.0, 1.0, num_steps, dtype=first.dtype)[:, None]
    # Interpolate linearly between parallel latents, or from zero: there is no unique great circle.
    linear = jnp.sin(angle) < 1e-6
    sine = jnp.where(linear, 1.0, jnp.sin(angle))
    left = jnp.where(linear, 1 - fraction, jnp.sin((1 - fraction) * angle) / sine)
    right = jnp.where(linear, fraction, jnp.sin(fraction * angle) / sine)
    return left * first[None] + right * second[None]


def recalibrate_batch_norm(
    module: GAN, variables: Any, latents: jax.Array, labels: jax.Array | None = None
) -> Any:
    """Recompute the running statistics of the generator's batch norms for its parameters.

    The running statistics of training fit the parameters of training. Other parameters, such as
    `averaged_parameters`, need statistics of their own. Like `torch.optim.swa_utils.update_bn`;
    differs from it: the statistics are moving averages, so the old ones decay with every step.
    Unlike `jaxnets.recalibrate_batch_norm`, which is for any network, it needs latents only.

    Args:
        module: a `GAN`.
        variables: its parameters and other collections.
        latents: [steps, batch, latent_size]; after 50 steps the old statistics have a weight of
            0.9^50 = 0.005.
        labels: integer [steps, batch], for a conditional network.

    Returns:
        `variables` with new "batch_stats" of the generator; unchanged if there are none.

    References:
        Brock, Donahue and Simonyan 2019, arXiv:1809.11096, section 3.1 (standing statistics).
    """
    if "batch_stats" not in variables:
        return variables

    def update(statistics: Any, inputs: tuple[jax.Array, ...]) -> tuple[Any, None]:
        _, changed = module.apply(
            {**variables, "batch_stats": statistics},
            *inputs,
            train=True,
            mutable=["batch_stats"],
            method="generate",
        )
        return changed["batch_stats"], None

    statistics, _ = lax.scan(update, variables["batch_stats"], (latents, *_given(labels)))
    return {**variables, "batch_stats": statistics}


def _given(labels: Any) -> tuple[Any, ...]:
    return () if labels is None else (labels,)
