"""The masked autoencoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import check_module, mostly_slow, shapes_of
from transformer_problem import BLOCK, DROPPING, NORM, close, config, floats, made

import jaxnets as jn
from jaxnets import transformer
from jaxnets.models.transformer import MaskedAutoencoder, VisionTransformer
from jaxnets.models.transformer.masked_autoencoder import inpaint

IMAGES = floats(2, 4, 6, 3)  # of 6 patches of 2 x 2
MODULE = MaskedAutoencoder(
    2, 1, config(**DROPPING), 1, config(positions="sinusoidal"), mask_ratio=0.5
)
NOISE = np.array([[3, 1, 5, 0, 2, 4], [0, 5, 1, 4, 2, 3]], np.float32)


@pytest.fixture(scope="module")
def variables():
    return made(MODULE, IMAGES)


@jax.jit
def run(variables, images, noise):
    return MODULE.apply(variables, images, noise=noise)


def test_a_masked_autoencoder_passes_every_check():
    encoder = 12 * 8 + 8 + 8 + 7 * 8 + BLOCK + NORM
    decoder = 8 * 8 + 8 + 8 + BLOCK + NORM + 8 * 12 + 12
    check_module(MODULE, IMAGES, num_parameters=encoder + decoder, streams=("dropout", "mask"))


PRESETS = {"mae_vit_base16": 111_907_840, "mae_vit_large16": 329_541_888}


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    mostly_slow(PRESETS.items(), [("mae_vit_base16", 111_907_840)]),
)
def test_a_preset_has_the_published_number_of_parameters(name, num_parameters):
    module = getattr(transformer, name)(scan_layers=True)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables, output = shapes_of(module, images)
    assert output.outputs.shape == (1, 196, 768)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == num_parameters


def test_the_patches_with_the_smallest_noise_are_visible(variables):
    masked = run(variables, IMAGES, NOISE).masked
    np.testing.assert_array_equal(masked, NOISE >= 3)


def test_masked_pixels_change_nothing_and_visible_ones_everything(variables):
    outputs, masked = run(variables, IMAGES, NOISE)
    patches = np.array(jn.patchify(jnp.asarray(IMAGES), 2))
    patches[np.asarray(masked)] = 99
    changed = np.asarray(jn.unpatchify(jnp.asarray(patches), (4, 6, 3)))
    close(run(variables, changed, NOISE).outputs, outputs)
    patches[~np.asarray(masked)] += 1
    changed = np.asarray(jn.unpatchify(jnp.asarray(patches), (4, 6, 3)))
    other = run(variables, changed, NOISE)
    assert np.abs(other.outputs - outputs).max(axis=-1).min() > 1e-4


def test_the_order_of_the_visible_patches_changes_nothing(variables):
    swapped = NOISE.copy()
    swapped[NOISE == 0], swapped[NOISE == 2] = 2, 0
    close(run(variables, IMAGES, swapped), run(variables, IMAGES, NOISE))


def test_masks_are_drawn_from_their_stream_in_training_and_fixed_in_evaluation(variables):
    @functools.partial(jax.jit, static_argnums=1)  # which drops all but the mask
    def masks(seed, train):
        streams = dict.fromkeys(["mask", "dropout"], jax.random.key(seed))
        return MODULE.apply(variables, IMAGES, train=train, rngs=streams).masked

    first, second = (np.asarray(masks(seed, True)) for seed in range(2))
    assert (first.sum(axis=1) == 3).all() and (first != second).any()
    np.testing.assert_array_equal(masks(0, False), masks(1, False))


@jax.jit
def losses(params, key):
    batch = {"inputs": jnp.asarray(IMAGES), "weights": jnp.array([1.0, 3.0])}
    found = []
    for normalize in (False, True):
        objective = jn.masked_reconstruction(MODULE, normalize=normalize, image_range=None)
        found.append(objective(params, {}, batch, key, train=False).loss)
    return found


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_error_of_the_masked_pixels(variables, normalize):
    key = jax.random.key(5)
    found = losses(variables["params"], key)[normalize]
    noise = jax.random.uniform(jn.core.rng_streams(key, "mask")["mask"], (2, 6))
    outputs, masked = jax.tree.map(np.asarray, run(variables, IMAGES, noise))
    total = 0.0
    for image in range(2):
        errors = []
        for patch in np.flatnonzero(masked[image]):
            row, column = 2 * (patch // 3), 2 * (patch % 3)
            pixels = IMAGES[image, row : row + 2, column : column + 2].reshape(-1)
            if normalize:
                pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var() + 1e-6)
            errors.append(np.mean((np.asarray(outputs[image, patch]) - pixels) ** 2))
        total += [1, 3][image] * np.mean(errors)
    close(found.total, total)
    assert found.count == 4


def test_the_trained_encoder_fits_a_vision_transformer(variables):
    classifier = VisionTransformer(3, 2, num_layers=1, config=config(), pool="mean")
    token = VisionTransformer(3, 2, num_layers=1, config=config())
    fresh = made(token, IMAGES)["params"]
    moved = {**fresh, **variables["params"]["encoder"]}
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, fresh)
    encoder = transformer.PatchEncoder(2, 1, config())

    @jax.jit
    def features_by_each():
        return (
            jn.capture(token, {"params": moved}, IMAGES)[1]["features"],
            MODULE.apply(variables, IMAGES, method="encode"),
            encoder.apply({"params": variables["params"]["encoder"]}, IMAGES),
        )

    of_token, mean, expected = map(np.asarray, features_by_each())
    close(of_token, expected[:, 0])
    close(mean, expected[:, 1:].mean(axis=1))
    assert "token" not in made(classifier, IMAGES)["params"]


@jax.jit
def inpainted(variables):
    return [
        inpaint(MODULE, variables, IMAGES, noise=NOISE, normalized=normalized)
        for normalized in (False, True)
    ]


@pytest.mark.parametrize("normalized", [True, False])
def test_masked_patches_are_inpainted_and_visible_ones_unchanged(variables, normalized):
    outputs, masked = jax.tree.map(np.asarray, run(variables, IMAGES, NOISE))
    result = inpainted(variables)[normalized]
    np.testing.assert_array_equal(result.masked, masked)
    images = np.asarray(result.images)
    assert images.shape == IMAGES.shape
    for image, patch in np.ndindex(2, 6):
        rows, columns = (slice(2 * i, 2 * i + 2) for i in divmod(patch, 3))
        expected = IMAGES[image, rows, columns]
        if masked[image, patch]:
            true, expected = expected, np.asarray(outputs[image, patch]).reshape(2, 2, 3)
            if normalized:
                expected = true.mean() + np.sqrt(true.var() + 1e-6) * expected
        close(images[image, rows, columns], expected)


def test_gray_levels_are_refused_unless_a_range_is_named(variables):
    batch = {"inputs": np.abs(IMAGES) * 255}
    with pytest.raises(ValueError, match=r"outside of \[0, 1\]; divide gray levels by 255"):
        jn.masked_reconstruction(MODULE)(
            variables["params"], {}, batch, jax.random.key(0), train=False
        )


@pytest.mark.slow
def test_it_learns_to_continue_stripes():
    """A quarter of the patches determines the direction of the stripes in an image."""
    rng = np.random.default_rng(0)
    stripes = np.sin(np.arange(8) * np.pi / 2 + 0.5)[None, :, None, None]
    images = np.tile(stripes, (64, 1, 8, 1)).astype(np.float32)
    transposed = rng.uniform(size=64) < 0.5
    images[transposed] = np.swapaxes(images[transposed], 1, 2)
    block = config(features=16)
    module = MaskedAutoencoder(2, 1, block, 1, block)
    update = jn.Update(jn.masked_reconstruction(module, image_range=(-1.0, 1.0)), optax.adam(1e-2))
    variables = jax.jit(module.init)(jax.random.key(0), images[:1])
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    batches = jn.data.shuffled_batches({"inputs": images}, 64, seed=0)
    step = jn.jit_step(jn.scan_steps(jn.make_train_step(update)))
    state, history = jn.fit(step, state, jn.data.chunked(batches, 20), num_steps=200)
    losses = history.column("loss")[1]
    assert losses[-1] < 0.1, losses  # without attention to the visible patches 0.5 at best


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskedAutoencoder(mask_ratio=1.0), "mask_ratio is 1.0"),
        (lambda: MaskedAutoencoder(config=config(positions="rotary")), "'rotary'"),
        (lambda: MaskedAutoencoder(decoder_config=config(window=2)), "decoder_config.*window=2"),
        (lambda: made(MODULE, floats(2, 2, 2, 3)), "of 1 patches mask_ratio 0.5 leaves 1"),
        (lambda: made(MODULE, floats(2, 5, 6, 3)), "5 x 6 .* 2 x 2"),
        (lambda: jn.unpatchify(jnp.zeros((1, 5, 4)), (4, 6, 1)), r"\(1, 5, 4\)"),
        (
            lambda: MODULE.apply(made(MODULE, IMAGES), IMAGES, noise=NOISE[:, :5]),
            r"\(2, 5\).*\(2, 6\)",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
