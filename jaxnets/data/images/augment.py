"""Image augmentation as pure functions of a key or an epoch, to be called inside `jax.jit`.

Every example of a batch gets its own random change; shapes are static, and all functions can be
mapped over keys and batches with `jax.vmap`. A step draws its key from the stream "augmentation".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.checks import IMAGES, check_rank
from jaxnets.core import at_least_float32, known_values

# Tolerance of a range of pixels, such as for a division in 16 bits.
_ROUNDING = 1e-2


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Compute `(x - mean) / std` per channel, with pixels x in [0, 1].

    Corresponds to `torchvision.transforms.ToTensor` and `Normalize`, channels last.

    Args:
        images: [..., height, width, channels]; uint8, which is divided by 255, or floats in [0, 1].
        mean: per channel, in [0, 1].
        std: per channel, positive.

    Returns:
        The shape of `images`; float64 stays float64, other dtypes become float32.

    Raises:
        ValueError: `mean` or `std` does not have one value per channel; integers other than uint8,
            whose greatest gray level is unknown; or floats that are known to be outside of [0, 1].

    Example:
        >>> normalize(jnp.full((1, 1, 1), 255, jnp.uint8), mean=(0.5,), std=(0.25,)).item()
        2.0
    """
    images = jnp.asarray(images)
    channels = images.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if np.shape(values) != (channels,):
            raise ValueError(
                f"{name} is {values}, which does not fit images of shape {images.shape}; give a "
                f"sequence of {channels}, one number per channel"
            )
    if images.dtype == jnp.uint8:
        images = images / 255
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images have type {images.dtype}; give gray levels 0 to 255 as uint8, or divide them "
            "by the greatest gray level"
        )
    else:
        _check_unit_range(images)
    images = at_least_float32(images)
    shape = (1,) * (images.ndim - 1) + (channels,)
    offset, scale = (jnp.asarray(value, images.dtype).reshape(shape) for value in (mean, std))
    # [1, ..., 1, channels]
    return (images - offset) / scale


def _check_unit_range(images: jax.Array) -> None:
    known = known_values(images)
    if known is None or not known.size:
        return
    least, greatest = float(known.min()), float(known.max())
    if not -_ROUNDING <= least <= greatest <= 1 + _ROUNDING:  # NaN too
        raise ValueError(
            f"images hold {least:g} to {greatest:g}, outside of [0, 1]; divide gray levels by "
            "their maximum, such as 255"
        )


def random_shift(
    key: jax.Array, inputs: jax.Array, max_shift: int, *, axes: Sequence[int] = (1, 2)
) -> jax.Array:
    """Translate each example by its own random offset, filled with zeros.

    Args:
        key: random key.
        inputs: [batch, ...], any dtype; images, or with `axes=(1,)` signals [batch, time, ...].
        max_shift: the offset of each axis is uniform in -max_shift ... max_shift.
        axes: axes to shift along, not the batch axis.

    Returns:
        Shape and dtype of `inputs`.

    Raises:
        ValueError: negative `max_shift`, or the batch axis among `axes`.

    Example:
        >>> random_shift(jax.random.key(0), jnp.ones((2, 5, 1)), 2, axes=(1,)).shape
        (2, 5, 1)
    """
    if 0 in axes:
        raise ValueError(f"axes {tuple(axes)} hold the batch axis 0; shift along later axes")
    return _pad_and_cut(key, inputs, max_shift, axes, "constant")


def random_crop(
    key: jax.Array,
    images: jax.Array,
    padding: int,
    *,
    mode: Literal["zero", "reflect"] = "zero",
) -> jax.Array:
    """Pad the borders and crop a random window of the original size from each image.

    Corresponds to `torchvision.transforms.RandomCrop(size, padding)`, or to
    `tf.image.random_crop` after padding, with an own offset for each image of the batch.

    Args:
        key: random key.
        images: [batch, height, width, channels], any dtype.
        padding: pixels added on each side; 4 is usual for 32 x 32 images.
        mode: fill the border with zeros, or with the image reflected at its edge (the
            `padding_mode` "constant" or "reflect" of torchvision).

    Returns:
        Shape and dtype of `images`.

    Raises:
        ValueError: images of another rank, negative `padding`, unknown `mode`, or a reflection of
            at least as many pixels as the image has.

    References:
        He et al. (2016), Deep Residual Learning for Image Recognition, arXiv 1512.03385,
        section 4.2 (padding 4, zeros).

    Example:
        >>> random_crop(jax.random.key(0), jnp.ones((2, 8, 8, 3)), 1).shape
        (2, 8, 8, 3)
    """
    check_rank(images, "random_crop", layouts=IMAGES)
    if mode not in ("zero", "reflect"):
        raise ValueError(f"unknown mode {mode!r}; use 'zero' or 'reflect'")
    if mode == "reflect" and padding >= min(images.shape[1:3]):
        raise ValueError(
            f"cannot reflect {padding} pixels of images of shape {images.shape}; "
            f"use a padding below {min(images.shape[1:3])} or mode 'zero'"
        )
    return _pad_and_cut(key, images, padding, (1, 2), "constant" if mode == "zero" else mode)


def _pad_and_cut(
    key: jax.Array, inputs: jax.Array, padding: int, axes: Sequence[int], mode: str
) -> jax.Array:
    if padding < 0:
        raise ValueError(f"cannot move by {padding} pixels; give 0 or more")
    widths = [(padding, padding) if axis in axes else (0, 0) for axis in range(inputs.ndim)]
    padded = jnp.pad(inputs, widths, mode=mode)
    limits = jnp.array([2 * width + 1 for width, _ in widths[1:]])  # 1 on axes that stay
    starts = jax.random.randint(key, (len(inputs), inputs.ndim - 1), 0, limits[None])
    return jax.vmap(lambda example, start: jax.lax.dynamic_slice(example, start, inputs.shape[1:]))(
        padded, starts
    )


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image left to right with probability 1/2.

    Corresponds to `torchvision.transforms.RandomHorizontalFlip` and
    `tf.image.random_flip_left_right`.

    Args:
        key: random key.
        images: [batch, height, width, channels], any dtype.

    Returns:
        Shape and dtype of `images`.

    Raises:
        ValueError: images of another rank.

    Example:
        >>> random_flip(jax.random.key(0), jnp.ones((2, 8, 8, 3))).shape
        (2, 8, 8, 3)
    """
    check_rank(images, "random_flip", layouts=IMAGES)
    flip = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def alternating_flip(images: jax.Array, numbers: jax.Array, epochs: jax.Array) -> jax.Array:
    """Mirror each image left to right in every other epoch.

    Two consecutive epochs contain each image and its mirror image once, whereas `random_flip`
    repeats one of the two in half of the cases. Whether an image starts mirrored is a pseudorandom
    function of its number.

    Args:
        images: [batch, height, width, channels], any dtype.
        numbers: integers [batch], the index of each image in the dataset.
        epochs: integers [batch], see `with_epochs`.

    Returns:
        Shape and dtype of `images`.

    Raises:
        ValueError: images, numbers or epochs of another rank.

    References:
        Jordan 2024, arXiv:2404.00498, section 3.6.

    Example:
        >>> image, number = jnp.arange(2.0).reshape(1, 1, 2, 1), jnp.zeros(1, int)
        >>> first = alternating_flip(image, number, jnp.zeros(1, int)).ravel()
        >>> second = alternating_flip(image, number, jnp.ones(1, int)).ravel()
        >>> (first + second).tolist()
        [1.0, 1.0]
    """
    check_rank(images, "alternating_flip", layouts=IMAGES)
    for name, integers in (("numbers", numbers), ("epochs", epochs)):
        if integers.ndim != 1:
            raise ValueError(
                f"{name} have shape {integers.shape}; give one for each image, [batch]"
            )

    def starts_mirrored(number: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), number))

    flip = jax.vmap(starts_mirrored)(numbers) ^ (epochs % 2 == 1)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Set a random square of each image to zero, which after `normalize` is the mean color.

    The center is uniform over the pixels, so a square is clipped at the border. Corresponds to
    `torchvision.transforms.RandomErasing(value=0)`, which instead draws area and aspect ratio and
    keeps the rectangle within the image.

    Args:
        key: random key.
        images: [batch, height, width, channels], any dtype.
        size: side of the square in pixels; 16 is usual for CIFAR-10.

    Returns:
        Shape and dtype of `images`.

    Raises:
        ValueError: images of another rank, or `size` below 1.

    References:
        DeVries and Taylor (2017), Improved Regularization of Convolutional Neural Networks with
        Cutout, arXiv 1708.04552, section 3.2.

    Example:
        >>> erased = cutout(jax.random.key(0), jnp.ones((1, 8, 8, 1)), 1)
        >>> int(64 - erased.sum())
        1
    """
    check_rank(images, "cutout", layouts=IMAGES)
    if size < 1:
        raise ValueError(f"cannot cut out a square of {size} pixels; give a size of 1 or more")
    batch, height, width, _ = images.shape

    def covered(axis_key: jax.Array, length: int) -> jax.Array:
        first = jax.random.randint(axis_key, (batch, 1), 0, length) - size // 2
        pixels = jnp.arange(length)[None]
        return (pixels >= first) & (pixels < first + size)  # [batch, length]

    row_key, column_key = jax.random.split(key)
    rows, columns = covered(row_key, height), covered(column_key, width)
    square = rows[:, :, None, None] & columns[:, None, :, None]  # [batch, height, width, 1]
    return jnp.where(square, jnp.zeros_like(images), images)


def mixup(
    key: jax.Array, images: jax.Array, labels_one_hot: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Interpolate each example and its label with another one of the batch.

    `x = m x_i + (1 - m) x_j` and `y = m y_i + (1 - m) y_j` with `m ~ Beta(alpha, alpha)` per
    example and j a random permutation of the batch. Use it on full batches: padding would be mixed
    in. Corresponds to `torchvision.transforms.v2.MixUp`, which draws one m per batch.

    Args:
        key: random key.
        images: [batch, ...], floating.
        labels_one_hot: [batch, classes], floating.
        alpha: positive; 0.2 mixes little, 1 uniformly.

    Returns:
        Images and labels of the given shapes and dtypes.

    Raises:
        ValueError: `alpha` not positive, integer images or labels, or unequal batch sizes.

    References:
        Zhang et al. (2018), mixup: Beyond Empirical Risk Minimization, arXiv 1710.09412, eq. 1.
        Differs from the authors' code, which draws one m per batch.

    Example:
        >>> images, labels = jnp.ones((4, 8, 8, 1)), jax.nn.one_hot(jnp.arange(4), 10)
        >>> [array.shape for array in mixup(jax.random.key(0), images, labels, 0.2)]
        [(4, 8, 8, 1), (4, 10)]
    """
    if isinstance(alpha, (int, float)) and alpha <= 0:
        raise ValueError(f"alpha {alpha} is not positive; give for example 0.2, or omit mixup")
    for name, array in (("images", images), ("labels_one_hot", labels_one_hot)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} have dtype {array.dtype}; give floats, after normalize")
    if len(images) != len(labels_one_hot):
        raise ValueError(
            f"{len(images)} images and {len(labels_one_hot)} labels; give one label per image"
        )
    mix_key, order_key = jax.random.split(key)
    batch = len(images)
    mix = jax.random.beta(mix_key, alpha, alpha, (batch,))
    partner = jax.random.permutation(order_key, batch)

    def interpolate(array: jax.Array) -> jax.Array:
        # [batch, 1, ..., 1]
        weight = mix.astype(array.dtype).reshape(batch, *[1] * (array.ndim - 1))
        return weight * array + (1 - weight) * jnp.take(array, partner, axis=0)

    return interpolate(images), interpolate(labels_one_hot)
