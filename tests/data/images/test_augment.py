"""Image augmentation: documented distributions, independent examples, argument checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import (
    alternating_flip,
    cutout,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_shift,
)

BATCH = 60  # the number of pixels of an image, so that an image can be one-hot
IMAGES = np.arange(1, 1 + BATCH * 6 * 5 * 2).reshape(BATCH, 6, 5, 2).astype(np.float32)
ONE_HOT = np.eye(4, dtype=np.float32)[np.arange(BATCH) % 4]

AUGMENTATIONS = {
    "crop": lambda key, images: random_crop(key, images, 2),
    "reflect": lambda key, images: random_crop(key, images, 2, mode="reflect"),
    "shift": lambda key, images: random_shift(key, images, 1),
    "flip": random_flip,
    "cutout": lambda key, images: cutout(key, images, 3),
    "mixup": lambda key, images: mixup(key, images, ONE_HOT[: len(images)], 0.4)[0],
}
every_augmentation = pytest.mark.parametrize("name", AUGMENTATIONS)
compiled_mixup = jax.jit(mixup)


@functools.cache
def compiled(name):
    """Compile an augmentation once for all tests."""
    if name == "mixup":
        return lambda key, images: compiled_mixup(key, images, ONE_HOT, 0.4)[0]
    return jax.jit(AUGMENTATIONS[name])


every_mode = pytest.mark.parametrize(
    ("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect")]
)


def windows(image, padding, mode):
    """Return all windows of the image size within the padded image, by slicing."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
    return {
        (row, column): padded[row : row + height, column : column + width]
        for row in range(2 * padding + 1)
        for column in range(2 * padding + 1)
    }


@every_augmentation
def test_the_same_key_gives_the_same_images_and_another_key_others(name):
    first, again, other = (compiled(name)(jax.random.key(seed), IMAGES) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first.shape, first.dtype) == (IMAGES.shape, IMAGES.dtype)


@every_augmentation
def test_examples_are_changed_independently(name):
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    if name == "mixup":
        same = same + np.arange(BATCH, dtype=np.float32).reshape(BATCH, 1, 1, 1)
    changed = np.asarray(compiled(name)(jax.random.key(0), same)) - same
    assert len(np.unique(changed.reshape(BATCH, -1), axis=0)) > 1


@pytest.mark.parametrize(
    "name",
    [
        *("crop", "flip", "cutout"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("reflect", "shift", "mixup")),
    ],
)
def test_mapping_over_keys_equals_calling_one_by_one(name):
    keys = jax.random.split(jax.random.key(3), 2)
    images = np.stack([IMAGES, IMAGES[::-1]])
    mapped = jax.jit(jax.vmap(AUGMENTATIONS[name]))(keys, images)
    singles = [compiled(name)(key, image) for key, image in zip(keys, images, strict=True)]
    np.testing.assert_allclose(mapped, singles, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "flip" else pytest.mark.slow) for n in AUGMENTATIONS],
)
def test_compiled_equals_eager(name):
    eager = AUGMENTATIONS[name](jax.random.key(0), jnp.array(IMAGES))
    np.testing.assert_allclose(compiled(name)(jax.random.key(0), IMAGES), eager, rtol=1e-6)


def test_two_epochs_contain_every_image_and_its_mirror_image_once():
    numbers, images = np.arange(BATCH, dtype=np.int32), IMAGES.astype("u1")
    flip = jax.jit(alternating_flip)
    epochs = [np.asarray(flip(images, numbers, np.full_like(numbers, e))) for e in range(4)]
    assert epochs[0].dtype == np.uint8
    mirrored = [(epoch == images[:, :, ::-1]).all((1, 2, 3)) for epoch in epochs]
    plain = [(epoch == images).all((1, 2, 3)) for epoch in epochs]
    for even, odd in ((0, 1), (1, 2), (2, 3)):
        np.testing.assert_array_equal(mirrored[even], plain[odd])
        assert (mirrored[even] ^ plain[even]).all()
    assert 19 <= mirrored[0].sum() <= 41  # of 60 draws of 1/2, 3 standard deviations


def test_a_flip_depends_on_number_and_epoch_but_not_on_the_position_in_the_batch():
    order, numbers = np.random.default_rng(0).permutation(BATCH), np.arange(BATCH, dtype=np.int32)
    epochs, flip = numbers % 3, jax.jit(alternating_flip)
    whole = np.asarray(flip(IMAGES, numbers, epochs))
    permuted = flip(IMAGES[order], numbers[order], epochs[order])
    np.testing.assert_array_equal(permuted, whole[order])


@pytest.mark.parametrize("name", ["crop", "reflect", "shift", "flip", "cutout"])
def test_uint8_images_stay_uint8(name):
    images = jax.ShapeDtypeStruct(IMAGES.shape, jnp.uint8)
    changed = jax.eval_shape(AUGMENTATIONS[name], jax.random.key(0), images)
    assert (changed.shape, changed.dtype) == (IMAGES.shape, jnp.uint8)


@every_mode
def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs(mode, numpy_mode):
    images = np.repeat(IMAGES[:2], 200, axis=0)
    drawn = set()
    crop = jax.jit(lambda key, x: random_crop(key, x, 2, mode=mode))
    cropped = np.asarray(crop(jax.random.key(0), images))
    for image, result in zip(images, cropped, strict=True):
        matches = [w for w, cut in windows(image, 2, numpy_mode).items() if (cut == result).all()]
        assert len(matches) >= 1
        drawn.update(matches)
    assert len(drawn) == 25


def test_a_crop_without_padding_changes_nothing():
    crop = jax.jit(lambda key, x: random_crop(key, x, 0))
    np.testing.assert_array_equal(crop(jax.random.key(0), IMAGES), IMAGES)


def test_a_signal_is_shifted_along_time_only():
    signal = np.arange(1.0, 9, dtype=np.float32).reshape(1, 8, 1).repeat(50, axis=0)
    shift = jax.jit(lambda key, x: random_shift(key, x, 2, axes=(1,)))
    shifted = np.asarray(shift(jax.random.key(0), signal))
    expected = {tuple(np.pad(np.arange(1.0, 9), 2)[start : start + 8]) for start in range(5)}
    assert {tuple(row) for row in shifted[..., 0]} == expected


def test_about_half_of_the_images_are_mirrored_left_to_right():
    images = np.repeat(IMAGES[:1], 1000, axis=0)
    flipped = np.asarray(jax.jit(random_flip)(jax.random.key(0), images))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == images).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert abs(mirrored.sum() - 500) < 5 * np.sqrt(250)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_cutout_removes_one_square_clipped_at_the_border(size):
    cut = np.asarray(jax.jit(lambda key, x: cutout(key, x, size))(jax.random.key(0), IMAGES))
    centers = [(row, column) for row in range(6) for column in range(5)]
    possible = set()
    for row, column in centers:
        mask = np.zeros((6, 5), bool)
        top, left = row - size // 2, column - size // 2
        mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
        possible.add(mask.tobytes())
    for image, result in zip(IMAGES, cut, strict=True):
        removed = (result == 0).all(axis=-1)
        assert removed.tobytes() in possible
        np.testing.assert_array_equal(result[~removed], image[~removed])


def test_mixup_blends_images_and_labels_with_the_same_weight():
    # Each image is its own index, one-hot, so the result is the weights.
    images = np.eye(BATCH, dtype=np.float32).reshape(IMAGES.shape)
    mixed, labels = compiled_mixup(jax.random.key(0), images, ONE_HOT, 1.0)
    weights = np.asarray(mixed).reshape(BATCH, BATCH)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert ((weights > 0).sum(axis=1) <= 2).all()
    np.testing.assert_allclose(labels, weights @ ONE_HOT, rtol=1e-5, atol=1e-6)
    partners = weights - np.diag(np.diag(weights))
    assert ((partners > 0).sum(axis=0) <= 1).all()  # a permutation: each is a partner once


def test_mixup_weights_follow_the_beta_distribution():
    images = np.eye(BATCH, dtype=np.float32).reshape(IMAGES.shape)
    keys = jax.random.split(jax.random.key(1), 40)
    mixed = [compiled_mixup(key, images, ONE_HOT, 0.3)[0] for key in keys]
    weights = np.reshape(mixed, (40, BATCH, BATCH))
    weights = np.diagonal(weights, axis1=1, axis2=2)  # m, or 1 where the partner is itself
    weights = weights[weights < 1]
    assert len(weights) > 2000
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert abs(weights.mean() - 0.5) < 0.06
    assert abs(weights.var() - 1 / 6.4) < 0.02


def test_normalized_training_pixels_have_mean_zero_and_deviation_one():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    mean, std = (pixels / 255).mean(axis=(0, 1, 2)), (pixels / 255).std(axis=(0, 1, 2))
    normal = np.asarray(jax.jit(lambda x: normalize(x, tuple(mean), tuple(std)))(pixels))
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=(0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("uint8", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_normalizing_widens_to_at_least_float32(dtype, expected):
    with jax.enable_x64(True):
        images = jax.ShapeDtypeStruct((2, 2, 2, 1), dtype)
        normal = jax.eval_shape(lambda x: normalize(x, (0.5,), (0.5,)), images)
    assert normal.dtype == expected


def test_float_images_are_expected_in_the_unit_interval():
    pixels = jnp.array([[[0, 51, 255]]], jnp.uint8)
    statistics = (0.1, 0.3, 0.2), (0.4, 0.5, 0.6)
    from_floats = normalize(jnp.array([[[0, 0.2, 1]]]), *statistics)
    np.testing.assert_allclose(normalize(pixels, *statistics), from_floats, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.array([255]), "images have type int32; give gray levels 0 to 255 as uint8"),
        (np.array([255], np.uint16), "images have type uint16"),
        (np.array([True]), "images have type bool"),
        (np.array([0.0, 255.0]), "images hold 0 to 255, outside of"),
        (np.array([-1.0, 1.0]), "images hold -1 to 1, outside of"),
        (np.array([0.5, np.nan]), "images hold nan to nan"),
    ],
)
def test_pixels_whose_greatest_gray_level_is_unknown_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        normalize(images.reshape(1, -1, 1), (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key, x: normalize(x, (0.5,), (0.5,)), r"mean is \(0.5,\), .* a sequence of"),
        (lambda key, x: normalize(x, (0.5,) * x.shape[-1], 0.5), "std is 0.5, .* one number per"),
        (lambda key, x: random_crop(key, x, -1), "cannot move by -1 pixels"),
        (lambda key, x: random_crop(key, x, 1, mode="wrap"), "unknown mode 'wrap'"),
        (lambda key, x: random_crop(key, x, 5, mode="reflect"), "cannot reflect 5 pixels"),
        (lambda key, x: random_shift(key, x, 1, axes=(0,)), "hold the batch axis 0"),
        (lambda key, x: cutout(key, x, 0), "square of 0 pixels"),
        (lambda key, x: mixup(key, x, ONE_HOT, 0.0), "alpha 0.0 is not positive"),
        (lambda key, x: mixup(key, x.astype(jnp.uint8), ONE_HOT, 1.0), "images have dtype uint8"),
        (lambda key, x: mixup(key, x, ONE_HOT.astype(int), 1.0), "labels_one_hot have dtype int"),
        (lambda key, x: mixup(key, x[:3], ONE_HOT, 1.0), "3 images and 60 labels"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0), jnp.array(IMAGES))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("random_crop", lambda key, x: random_crop(key, x, 2)),
        ("random_flip", random_flip),
        ("alternating_flip", lambda key, x: alternating_flip(x, jnp.arange(6), jnp.zeros(6, int))),
        ("cutout", lambda key, x: cutout(key, x, 2)),
    ],
)
def test_a_single_image_without_batch_axis_is_refused(name, call):
    message = rf"{name} got inputs of shape \(6, 5, 2\).* batch axis with inputs\[None\]"
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0), jnp.array(IMAGES[0]))


@pytest.mark.parametrize("name", ["numbers", "epochs"])
def test_one_number_for_a_whole_batch_is_refused(name):
    integers = {
        "numbers": jnp.arange(BATCH),
        "epochs": jnp.zeros(BATCH, int),
        name: jnp.zeros((), int),
    }
    with pytest.raises(ValueError, match=rf"{name} have shape \(\); give one for each image"):
        alternating_flip(jnp.array(IMAGES), **integers)
