"""Patches of images: what does not split into them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.patches import patchify, unpatchify


def test_patches_assemble_to_the_image_they_were_cut_from():
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
    patches = patchify(jnp.asarray(images, jnp.float32), 2)
    np.testing.assert_array_equal(patches[1, 1], images[1, :2, 2:4].reshape(-1).astype(np.float32))
    np.testing.assert_array_equal(unpatchify(patches, (4, 6, 3)), images.astype(np.float32))


@pytest.mark.parametrize("size", [0, -2, 2.0, (2, 2)])
def test_a_size_that_is_no_positive_integer_is_refused(size):
    with pytest.raises(ValueError, match="must be made of positive integers"):
        patchify(jnp.ones((1, 4, 4, 1)), size)


@pytest.mark.parametrize("shape", [(4, 4, 0), (4, 4), (4, 4, 7)])
def test_patches_that_do_not_fill_the_image_are_refused(shape):
    with pytest.raises(ValueError, match=r"image_shape|fill images"):
        unpatchify(jnp.ones((1, 4, 4)), shape)


def test_a_missing_batch_axis_is_named():
    with pytest.raises(ValueError, match=r"patchify got inputs of shape \(4, 4, 1\)"):
        patchify(jnp.ones((4, 4, 1)), 2)
