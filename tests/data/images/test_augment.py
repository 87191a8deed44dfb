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

IMAGES = np.arange(1, 1 + 64 * 6 * 5 * 2).reshape(64, 6, 5, 2).astype(np.float32)
ONE_HOT = np.eye(4, dtype=np.float32)[np.arange(64) % 4]

AUGMENTATIONS = {
    "crop": lambda key, images: random_crop(key, images, 2),
    "reflect": lambda key, images: random_crop(key, images, 2, mode="reflect"),
    "shift": lambda key, images: random_shift(key, images, 1),
    "flip": random_flip,
    "cutout": lambda key, images: cutout(key, images, 3),
    "mixup": lambda key, images: mixup(key, images, ONE_HOT[: len(images)], 0.4)[0],
}
every_augmentation = pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
every_mode = pytest.mark.parametrize(
    ("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect")]
)


def windows(image, padding, mode):
    """All windows of the size of the image within the padded image, by plain slicing."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
    return {
        (row, column): padded[row : row + height, column : column + width]
        for row in range(2 * padding + 1)
        for column in range(2 * padding + 1)
    }


@every_augmentation
def test_the_same_key_gives_the_same_images_and_another_key_others(augment):
    first, again, other = (augment(jax.random.key(seed), jnp.array(IMAGES)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first.shape, first.dtype) == (IMAGES.shape, IMAGES.dtype)


@every_augmentation
def test_examples_are_changed_independently(augment):
    same = jnp.broadcast_to(jnp.array(IMAGES[:1]), IMAGES.shape)
    if augment is AUGMENTATIONS["mixup"]:
        same = same + jnp.arange(64.0).reshape(64, 1, 1, 1)
    changed = np.asarray(augment(jax.random.key(0), same) - same)
    assert len(np.unique(changed.reshape(64, -1), axis=0)) > 1


@every_augmentation
def test_mapping_over_keys_equals_calling_one_by_one(augment):
    keys = jax.random.split(jax.random.key(3), 3)
    images = jnp.array(IMAGES[:6]).reshape(3, 2, 6, 5, 2)
    mapped = jax.jit(jax.vmap(augment))(keys, images)
    singles = jnp.stack([augment(key, image) for key, image in zip(keys, images, strict=True)])
    np.testing.assert_allclose(mapped, singles, rtol=1e-6)


def test_two_epochs_show_every_image_and_its_mirror_image_once():
    numbers, images = jnp.arange(64), jnp.array(IMAGES.astype("u1"))
    epochs = [
        np.asarray(alternating_flip(images, numbers, jnp.full(64, e, jnp.int32))) for e in range(4)
    ]
    assert epochs[0].dtype == np.uint8
    mirrored = [(epoch == np.asarray(images)[:, :, ::-1]).all((1, 2, 3)) for epoch in epochs]
    plain = [(epoch == np.asarray(images)).all((1, 2, 3)) for epoch in epochs]
    for even, odd in ((0, 1), (1, 2), (2, 3)):
        np.testing.assert_array_equal(mirrored[even], plain[odd])
        assert (mirrored[even] ^ plain[even]).all()
    assert 20 <= mirrored[0].sum() <= 44  # of 64 draws of 1/2, 3 standard deviations


def test_an_image_is_mirrored_by_its_own_number_and_epoch_wherever_it_stands():
    images, order = jnp.array(IMAGES), np.random.default_rng(0).permutation(64)
    epochs = jnp.arange(64) % 3
    whole = np.asarray(alternating_flip(images, jnp.arange(64), epochs))
    moved = jax.jit(alternating_flip)(images[order], jnp.arange(64)[order], epochs[order])
    np.testing.assert_array_equal(moved, whole[order])


@pytest.mark.parametrize("name", ["crop", "reflect", "shift", "flip", "cutout"])
def test_bytes_stay_bytes(name):
    images = jnp.array(IMAGES % 256, jnp.uint8)
    assert AUGMENTATIONS[name](jax.random.key(0), images).dtype == jnp.uint8


@every_mode
def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs(mode, numpy_mode):
    images = np.repeat(IMAGES[:2], 200, axis=0)
    seen = set()
    cropped = np.asarray(random_crop(jax.random.key(0), jnp.array(images), 2, mode=mode))
    for image, result in zip(images, cropped, strict=True):
        found = [w for w, cut in windows(image, 2, numpy_mode).items() if (cut == result).all()]
        assert len(found) >= 1
        seen.update(found)
    assert len(seen) == 25


def test_a_crop_without_padding_changes_nothing():
    np.testing.assert_array_equal(random_crop(jax.random.key(0), jnp.array(IMAGES), 0), IMAGES)


def test_a_signal_is_shifted_in_time_alone():
    signal = np.arange(1.0, 9).reshape(1, 8, 1).repeat(50, axis=0)
    shifted = np.asarray(random_shift(jax.random.key(0), jnp.array(signal), 2, axes=(1,)))
    expected = {tuple(np.pad(np.arange(1.0, 9), 2)[start : start + 8]) for start in range(5)}
    assert {tuple(row) for row in shifted[..., 0]} == expected


def test_about_half_of_the_images_are_mirrored_left_to_right():
    images = np.repeat(IMAGES[:1], 1000, axis=0)
    flipped = np.asarray(random_flip(jax.random.key(0), jnp.array(images)))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == images).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert abs(mirrored.sum() - 500) < 5 * np.sqrt(250)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_cutout_removes_one_square_clipped_at_the_border(size):
    cut = np.asarray(cutout(jax.random.key(0), jnp.array(IMAGES), size))
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
    # The image is its own index, one-hot, so the blend can be read off it.
    images = np.eye(64, dtype=np.float32).reshape(64, 8, 8, 1)
    mixed, labels = mixup(jax.random.key(0), jnp.array(images), jnp.array(ONE_HOT), 1.0)
    weights = np.asarray(mixed).reshape(64, 64)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert ((weights > 0).sum(axis=1) <= 2).all()
    np.testing.assert_allclose(labels, weights @ ONE_HOT, rtol=1e-5, atol=1e-6)
    partners = weights - np.diag(np.diag(weights))
    assert ((partners > 0).sum(axis=0) <= 1).all()  # a permutation: nobody serves twice


def test_mixup_weights_follow_the_beta_distribution():
    images = jnp.concatenate([jnp.zeros((2000, 1)), jnp.ones((2000, 1))])
    mixed, _ = mixup(jax.random.key(1), images, images, 0.3)
    weights = np.asarray(mixed[:2000, 0])  # 1 - m where the partner is a one
    weights = weights[weights > 0]
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert abs(weights.mean() - 0.5) < 0.06
    assert abs(weights.var() - 1 / 6.4) < 0.02


def test_normalized_training_pixels_have_mean_zero_and_deviation_one():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    mean, std = (pixels / 255).mean(axis=(0, 1, 2)), (pixels / 255).std(axis=(0, 1, 2))
    normal = normalize(jnp.array(pixels), tuple(mean), tuple(std))
    assert normal.dtype == jnp.float32
    np.testing.assert_allclose(normal.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=(0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("uint8", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_normalizing_widens_to_at_least_float32(dtype, expected):
    with jax.enable_x64(True):
        assert normalize(jnp.ones((2, 2, 2, 1), dtype), (0.5,), (0.5,)).dtype == expected


def test_float_images_are_taken_to_be_in_the_unit_interval():
    pixels = jnp.array([[[0, 51, 255]]], jnp.uint8)
    statistics = (0.1, 0.3, 0.2), (0.4, 0.5, 0.6)
    from_floats = normalize(jnp.array([[[0, 0.2, 1]]]), *statistics)
    np.testing.assert_allclose(normalize(pixels, *statistics), from_floats, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key, x: normalize(x, (0.5,), (0.5,)), "1 means and 1 standard deviations"),
        (lambda key, x: random_crop(key, x, -1), "cannot move by -1 pixels"),
        (lambda key, x: random_crop(key, x, 1, mode="wrap"), "unknown mode 'wrap'"),
        (lambda key, x: random_crop(key, x, 5, mode="reflect"), "cannot reflect 5 pixels"),
        (lambda key, x: random_shift(key, x, 1, axes=(0,)), "hold the batch axis 0"),
        (lambda key, x: cutout(key, x, 0), "square of 0 pixels"),
        (lambda key, x: mixup(key, x, ONE_HOT, 0.0), "alpha 0.0 is not positive"),
        (lambda key, x: mixup(key, x.astype(jnp.uint8), ONE_HOT, 1.0), "images have dtype uint8"),
        (lambda key, x: mixup(key, x, ONE_HOT.astype(int), 1.0), "labels_one_hot have dtype int"),
        (lambda key, x: mixup(key, x[:3], ONE_HOT, 1.0), "3 images and 64 labels"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0), jnp.array(IMAGES))


@pytest.mark.parametrize("augment", [random_flip, lambda key, x: cutout(key, x, 2)])
def test_a_single_image_without_batch_axis_is_refused(augment):
    with pytest.raises(AssertionError, match="rank"):
        augment(jax.random.key(0), jnp.array(IMAGES[0]))
