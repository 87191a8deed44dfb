"""Saliency maps: which pixels the output of a network depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank


def input_gradient(function: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """Compute the vanilla gradient saliency of each pixel: max over channels of |d output / d x|.

    Args:
        function: images -> the output to explain, one number per image, [batch]; it must not
            depend on the other images of the batch.
        images: floating [batch, height, width, channels].

    Returns:
        [batch, height, width], non-negative.

    Raises:
        ValueError: a function that returns another shape.

    References:
        Simonyan, Vedaldi and Zisserman 2014, arXiv:1312.6034, section 3.1.

    Example:
        >>> images = jnp.ones((1, 1, 2, 1))
        >>> input_gradient(lambda x: x[:, 0, 0, 0] - 3 * x[:, 0, 1, 0], images).tolist()
        [[[1.0, 3.0]]]
    """
    check_rank(images, "input_gradient", layouts=IMAGES)

    def total(images: jax.Array) -> jax.Array:
        outputs = function(images)
        if outputs.shape != images.shape[:1]:
            raise ValueError(
                f"the function returns shape {outputs.shape} for {len(images)} images; return one "
                f"number per image, of shape {images.shape[:1]}"
            )
        return jnp.sum(outputs)

    return jnp.abs(jax.grad(total)(images)).max(axis=-1)


def visual_backprop(
    maps: Sequence[jax.Array],
    geometry: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
) -> jax.Array:
    """Compute VisualBackProp: the image regions that the deepest feature maps depend on.

    The deepest feature map, averaged over channels, is upsampled to the size of the previous map
    by a transposed convolution with ones and multiplied by the channel mean of that map; and so
    on, up to the image. It needs no gradient and little time.

    Args:
        maps: feature maps of each convolution in order, after its activation, non-negative,
            [batch, height, width, channels]; such as "map_0", "map_1", ... of
            `capture(PilotNet(), ...)`.
        geometry: (kernel size, stride) of each convolution, without padding.
        image_size: height and width of the images.

    Returns:
        [batch, height, width], scaled to a maximum of 1 for each image; 0 if no feature is active.

    Raises:
        ValueError: geometry that does not match the maps.

    References:
        Bojarski et al. 2016, arXiv:1611.05418, section III.

    Example:
        One active element of a map marks the pixels in its receptive field:

        >>> one = jnp.zeros((1, 2, 2, 1)).at[0, 0, 1, 0].set(5.0)
        >>> visual_backprop([one], [(2, 2)], (4, 4))[0].astype(int).tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    if len(maps) != len(geometry) or not maps:
        raise ValueError(
            f"{len(maps)} maps and {len(geometry)} convolutions; give one or more of each"
        )
    sizes = [tuple(image_size), *(tuple(values.shape[1:3]) for values in maps)]
    mask = jnp.ones((*maps[-1].shape[:3],))
    for index in reversed(range(len(maps))):
        (kernel, stride), size = geometry[index], sizes[index]
        expected = tuple((length - kernel) // stride + 1 for length in size)
        if expected != sizes[index + 1]:
            raise ValueError(
                f"a convolution of kernel {kernel} and stride {stride} makes {expected} of "
                f"{size}, but the map has {sizes[index + 1]}; check geometry and image_size"
            )
        mask = _upsample(mask * jnp.mean(maps[index], axis=-1), kernel, stride, size)
        # Without normalization the product over many layers overflows or underflows float32.
        mask = mask / jnp.maximum(mask.max(axis=(1, 2), keepdims=True), 1e-30)
    return mask


def _upsample(values: jax.Array, kernel: int, stride: int, size: tuple[int, ...]) -> jax.Array:
    """Transpose-convolve [batch, height, width] with ones; pad to `size` with 0."""
    ones = jnp.ones((kernel, kernel, 1, 1), values.dtype)
    upsampled = jax.lax.conv_transpose(
        values[..., None],
        ones,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[..., 0]
    missing = [
        (0, 0),
        *((0, length - have) for length, have in zip(size, upsampled.shape[1:], strict=True)),
    ]
    return jnp.pad(upsampled, missing)
