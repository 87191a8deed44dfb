"""Building blocks of generators and discriminators: class conditioning, logit head, checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, at_least_float32, known_values, record
from jaxnets.layers import (
    Dense,
    Embedding,
    Initializer,
    SpectralNorm,
    check_norm,
    check_upsampling,
    linear_layer,
    normalize,
)

# Halving stops at this many pixels a side, or at an odd number.
_SMALLEST = 4
_LARGEST_START = 8


def halvings(height: int, width: int) -> tuple[int, tuple[int, int]]:
    """Compute how often images can be halved, and the resulting size.

    Args:
        height: of the images.
        width: of the images.

    Returns:
        Number of halvings until 4 pixels or an odd number, and the final (height, width).

    Raises:
        ValueError: images that halve to more than 8 pixels, or not at all.

    Example:
        >>> [halvings(side, side) for side in (8, 28, 32, 64)]
        [(1, (4, 4)), (2, (7, 7)), (3, (4, 4)), (4, (4, 4))]
    """
    count, size = 0, (height, width)
    while min(size) > _SMALLEST and not any(side % 2 for side in size):
        count, size = count + 1, (size[0] // 2, size[1] // 2)
    if max(size) > _LARGEST_START or not count:
        raise ValueError(
            f"images of {height} x {width} pixels halve {count} times, to {size[0]} x {size[1]}; "
            "resize or pad them to 8, 16, 28, 32, 64, ... pixels a side"
        )
    return count, size


class ClassModulation(nn.Module):
    """Scale and shift each channel by class-dependent amounts.

    x (1 + gain_y) + shift_y; both embeddings are initialized with zeros. After a batch norm this is
    class-conditional batch normalization.

    Attributes:
        num_classes: number of classes.
        precision: dtypes.

    References:
        Dumoulin, Shlens and Kudlur 2017, arXiv:1610.07629, equation 5.
    """

    num_classes: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the shape of `x`, [batch, height, width, channels], for labels [batch]."""
        gain, shift = (
            Embedding(
                self.num_classes,
                x.shape[-1],
                embedding_init=nn.initializers.zeros,
                precision=self.precision,
                name=name,
            )(labels)[:, None, None]  # [batch, 1, 1, channels]
            for name in ("gain", "shift")
        )
        return x * (1 + gain) + shift


def modulated_norm(
    x: jax.Array,
    labels: jax.Array | None,
    *,
    norm: str | None,
    num_classes: int | None,
    train: bool,
    name: str,
    precision: Precision,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Normalize, then modulate by class if there are classes; to be called in a compact module.

    Args:
        x: [batch, height, width, channels].
        labels: integer [batch], or None without classes.
        norm: as for `layers.normalize`.
        num_classes: number of classes, or None.
        train: training mode.
        name: name of the norm; the modulation is named `{name}_class`.
        precision: dtypes.
        weights: as for `layers.normalize`.

    Returns:
        Shape of `x`.
    """
    x = normalize(x, norm, train=train, weights=weights, name=name, precision=precision)
    if num_classes is None or labels is None:
        return x
    return ClassModulation(num_classes, precision, name=f"{name}_class")(x, labels)


class LogitHead(nn.Module):
    """Linear logit of a discriminator, with a projection on a class embedding.

    (w + v_y) . features + b, where v_y is the embedding of class y, zero without classes.

    Attributes:
        num_classes: number of classes, or None.
        spectral: divide the kernels by their largest singular values.
        kernel_init: initializer of w and of the embedding v.
        precision: dtypes.

    References:
        Miyato and Koyama 2018, arXiv:1802.05637, equation 4 and figure 1d.
    """

    num_classes: int | None = None
    spectral: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self,
        features: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Map features [batch, ...] and integer labels [batch] to logits [batch]."""
        policy = self.precision
        features = features.reshape(features.shape[0], -1)  # [batch, features]
        logits = linear_layer(
            features,
            Dense,
            1,
            spectral=self.spectral,
            train=train,
            name="logit",
            kernel_init=self.kernel_init,
            precision=policy,
        )[:, 0]
        if self.num_classes is None or labels is None:
            return logits.astype(policy.output)
        fields: dict[str, Any] = {"embedding_init": self.kernel_init, "precision": policy}
        if self.spectral:
            table = Embedding(self.num_classes, features.shape[-1], parent=None, **fields)
            vectors = SpectralNorm(table, precision=policy, name="class")(labels, train=train)
        else:
            table = Embedding(self.num_classes, features.shape[-1], name="class", **fields)
            vectors = table(labels)
        products = at_least_float32(vectors) * at_least_float32(features)
        return (logits + jnp.sum(products, axis=-1).astype(logits.dtype)).astype(policy.output)


def logits_of(
    module: Any, x: jax.Array, labels: jax.Array | None, *, flatten: bool, train: bool
) -> jax.Array:
    """Map the last feature map of a discriminator to logits; to be called in its compact method.

    Records "features": the feature map summed over all positions.

    Args:
        module: the discriminator, with `num_classes`, `norm`, `kernel_init` and `precision`.
        x: [batch, height, width, channels].
        labels: integer [batch], or None.
        flatten: apply the head to the flattened feature map; otherwise to its sum over positions.
        train: training mode.

    Returns:
        Logits [batch].
    """
    pooled = jnp.sum(at_least_float32(x), axis=(1, 2)).astype(x.dtype)
    record(module, "features", pooled)
    head = LogitHead(
        module.num_classes,
        spectral=module.norm == "spectral",
        kernel_init=module.kernel_init,
        precision=module.precision,
        name="head",
    )
    return head(x if flatten else pooled, labels, train=train)


def check_generator(
    image_shape: Sequence[int],
    num_classes: int | None,
    norm: str | None,
    upsampling: str,
    **sizes: int,
) -> None:
    """Refuse invalid fields of a generator.

    Raises:
        ValueError: the first invalid field and its value.
    """
    check_sizes(image_shape=image_shape, **sizes)
    if len(image_shape) != 3:
        raise ValueError(f"image_shape={image_shape} must be (height, width, channels)")
    halvings(image_shape[0], image_shape[1])
    check_num_classes(num_classes)
    check_norm(norm)
    check_upsampling(upsampling)


def check_discriminator(num_classes: int | None, norm: str | None, **sizes: int) -> None:
    """Refuse invalid fields of a discriminator.

    Raises:
        ValueError: the first invalid field and its value.
    """
    check_sizes(**sizes)
    check_num_classes(num_classes)
    if norm not in (None, "batch", "layer", "spectral"):
        raise ValueError(
            f"unknown norm {norm!r} of a discriminator; choose None, 'batch', 'layer' or 'spectral'"
        )


def check_num_classes(num_classes: int | None) -> None:
    """Refuse a number of classes that is neither None nor positive.

    Raises:
        ValueError: naming the value.
    """
    if num_classes is not None:
        check_sizes(num_classes=num_classes)


def check_latents(latents: jax.Array, latent_size: int) -> None:
    """Refuse latents that are not [batch, latent_size].

    Args:
        latents: the input of a generator.
        latent_size: the dimension that it expects.

    Raises:
        ValueError: the shape that was given and the one that fits.
    """
    if latents.ndim != 2 or latents.shape[-1] != latent_size:
        raise ValueError(
            f"latents of shape {latents.shape} do not fit a generator of latent_size "
            f"{latent_size}; give [batch, {latent_size}]"
        )


def check_labels(
    labels: jax.Array | np.ndarray | None, num_classes: int | None, batch_size: int, network: str
) -> None:
    """Refuse labels that are missing, unexpected or, unless traced, out of range.

    Args:
        labels: integer [batch], or None.
        num_classes: number of classes, or None for an unconditional network.
        batch_size: number of images.
        network: its name, for the message.

    Raises:
        ValueError: what is wrong with the labels, and the remedy.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(
                f"{network} got labels, but its num_classes is None; leave them out, or build it "
                "with num_classes=..."
            )
        return
    if labels is None:
        raise ValueError(
            f"{network} of {num_classes} classes got no labels; give integers [batch], the class "
            "of each image"
        )
    if labels.shape != (batch_size,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels of shape {labels.shape} and type {labels.dtype} do not fit {batch_size} "
            f"images; give one integer for each, shape ({batch_size},)"
        )
    known = known_values(labels)
    if known is None:
        return  # in a compiled program the embedding gives NaN
    wrong = known[(known < 0) | (known >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"label {wrong[0]} is not in [0, {num_classes}); build {network} with num_classes of "
            "at least one more than the largest label"
        )
