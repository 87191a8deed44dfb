"""What a network looks at: which pixels its output depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp


def input_gradient(function: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """Compute how much each pixel changes an output: the largest |d output / d channel|.

    Args:
        function: images -> the output that is asked about, one number an image, [batch]; no image
            may matter to the output of another one.
        images: floating [batch, height, width, channels].

    Returns:
        [batch, height, width], at least 0.

    Raises:
        ValueError: a function of another shape.

    References:
        Simonyan, Vedaldi and Zisserman 2014, arXiv:1312.6034, section 3.1.

    Example:
        >>> images = jnp.ones((1, 1, 2, 1))
        >>> input_gradient(lambda x: x[:, 0, 0, 0] - 3 * x[:, 0, 1, 0], images).tolist()
        [[[1.0, 3.0]]]
    """
    chex.assert_rank(images, 4)

    def total(images: jax.Array) -> jax.Array:
        outputs = function(images)
        if outputs.shape != images.shape[:1]:
            raise ValueError(
                f"the function returns shape {outputs.shape} for {len(images)} images; return one "
                f"number an image, of shape {images.shape[:1]}"
            )
        return jnp.sum(outputs)

    return jnp.abs(jax.grad(total)(images)).max(axis=-1)


def visual_backprop(
    maps: Sequence[jax.Array],
    geometry: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
) -> jax.Array:
    """Trace back which regions the deepest active maps of a convolutional network rest on.

    The mean over the channels of the deepest map is enlarged to the size of the map before it by
    a transposed convolution with ones, and multiplied by that one's mean; and so on, up to the
    image. Needs no gradient and hardly any time.

    Args:
        maps: of each convolution in order, behind its activation, at least 0,
            [batch, height, width, channels]; such as "map_0", "map_1", ... of
            `capture(PilotNet(), ...)`.
        geometry: (size of the kernel, stride) of each convolution, without padding.
        image_size: height and width of the images.

    Returns:
        [batch, height, width], the largest value of each image 1, or 0 where nothing is active.

    Raises:
        ValueError: geometry that does not fit the maps.

    References:
        Bojarski et al. 2016, arXiv:1611.05418, section III.

    Example:
        One active place of one map lights the pixels that it sees:

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
        (kernel, stride), before = geometry[index], sizes[index]
        expected = tuple((length - kernel) // stride + 1 for length in before)
        if expected != sizes[index + 1]:
            raise ValueError(
                f"a convolution of kernel {kernel} and stride {stride} makes {expected} of "
                f"{before}, but the map has {sizes[index + 1]}; check geometry and image_size"
            )
        mask = _enlarge(mask * jnp.mean(maps[index], axis=-1), kernel, stride, before)
        # The product of many layers leaves the range of float32 otherwise.
        mask = mask / jnp.maximum(mask.max(axis=(1, 2), keepdims=True), 1e-30)
    return mask


def _enlarge(values: jax.Array, kernel: int, stride: int, size: tuple[int, ...]) -> jax.Array:
    """Convolve [batch, height, width] transposed with ones; what no kernel reached stays 0."""
    ones = jnp.ones((kernel, kernel, 1, 1), values.dtype)
    wide = jax.lax.conv_transpose(
        values[..., None],
        ones,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[..., 0]
    missing = [
        (0, 0),
        *((0, length - have) for length, have in zip(size, wide.shape[1:], strict=True)),
    ]
    return jnp.pad(wide, missing)
