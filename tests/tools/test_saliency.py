"""Saliency maps against gradients and products computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import random_variables

import jaxnets as jn
from jaxnets.models.convolutional.pilotnet import CONVOLUTIONS


def test_the_gradient_is_the_maximum_over_channels_and_separate_for_each_image():
    weights = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    images = jnp.ones((2, 3, 4, 2)) * jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
    found = jn.input_gradient(lambda x: jnp.sum(weights[None] * x**2, axis=(1, 2, 3)), images)
    expected = np.abs(2 * weights).max(axis=-1)
    np.testing.assert_allclose(found, np.stack([expected, 3 * expected]), rtol=1e-6)


def test_visual_backprop_multiplies_means_and_spreads_them_with_ones():
    first = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    first = np.concatenate([first, np.zeros_like(first)], axis=-1)  # the mean halves it
    second = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32).reshape(1, 2, 2, 1)
    found = jn.visual_backprop([first, second], [(2, 1), (3, 1)], (5, 5))[0]
    # The kernel of 3 spreads each of the two active elements over 3 x 3 of the 4 x 4 map.
    spread = np.zeros((4, 4))
    spread[:3, :3] += 1
    spread[1:, 1:] += 2
    product = spread * first[0, :, :, 0] / 2
    expected = np.zeros((5, 5))
    for row in range(4):
        for column in range(4):
            expected[row : row + 2, column : column + 2] += product[row, column]
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-5)


def test_maps_of_zeros_give_zeros_and_no_nan():
    found = jn.visual_backprop([jnp.zeros((1, 3, 3, 2))], [(5, 2)], (10, 10))
    np.testing.assert_array_equal(found, np.zeros((1, 10, 10)))


def test_the_maps_of_pilotnet_mark_a_bright_square_in_the_image():
    module = jn.PilotNet()
    images = jnp.zeros((2, 84, 96, 3)).at[0, 30:40, 60:70].set(5.0)
    variables = random_variables(module, images)
    variables = jax.tree.map(lambda x: x * (x.ndim > 1), variables)  # biases 0, so a map is too

    @jax.jit
    def saliency(images):
        _, inside = jn.capture(module, variables, images)
        maps = [inside[f"map_{index}"] for index in range(5)]
        geometry = [(size, stride) for _, size, stride in CONVOLUTIONS]
        return jn.visual_backprop(maps, geometry, (84, 96))

    found = saliency(images)
    assert found.shape == (2, 84, 96)
    assert float(found[0].max()) == pytest.approx(1)
    row, column = np.unravel_index(np.argmax(found[0]), (84, 96))
    assert 25 <= row <= 45 and 55 <= column <= 75
    assert not found[1].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jn.input_gradient(lambda x: x, jnp.ones((2, 3, 3, 1))), r"number per image"),
        (lambda: jn.visual_backprop([], [], (3, 3)), "0 maps and 0 convolutions"),
        (
            lambda: jn.visual_backprop([jnp.ones((1, 3, 3, 1))], [(2, 1)], (5, 5)),
            r"makes \(4, 4\) of \(5, 5\), but the map has \(3, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_image_without_a_batch_is_refused():
    with pytest.raises(
        ValueError, match=r"input_gradient got inputs of shape \(8, 8, 3\); give \["
    ):
        jn.input_gradient(lambda x: x.sum((1, 2, 3)), jnp.zeros((8, 8, 3)))
