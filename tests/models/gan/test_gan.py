"""The networks of the GAN family: shared checks, parameter counts, class conditioning, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, check_module, count_parameters, random_variables, shapes_of

from jaxnets import gan
from jaxnets.core import capture
from jaxnets.models.gan import GAN, dcgan, generate_images, interpolate_latents, resnet_gan
from jaxnets.models.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from jaxnets.models.gan.layers import ClassModulation, LogitHead
from jaxnets.models.gan.resnet import ResNetDiscriminator, ResNetGenerator

LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def images(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("module", "inputs", "parameters"),
    [
        (
            DCGANGenerator((8, 8, 1), latent_size=5, width=4),
            (normal(3, 5),),
            5 * 16 * 4 + 8 + 36 + 1,
        ),
        pytest.param(
            DCGANGenerator(
                (16, 16, 2), latent_size=5, width=4, num_classes=3, upsampling="transposed"
            ),
            (normal(3, 5), LABELS[:3]),
            (5 * 16 * 8 + 16 + 48) + (16 * 8 * 4 + 8 + 24) + (16 * 4 * 2 + 2),
            marks=pytest.mark.slow,
        ),
        (
            ResNetGenerator((8, 8, 1), latent_size=5, width=4, num_classes=3),
            (normal(3, 5), LABELS[:3]),
            (6 * 64) + 2 * (8 + 24) + 2 * 144 + 16 + 8 + 37,
        ),
        pytest.param(
            DCGANDiscriminator(4),
            (images(3, 16, 16, 1),),
            68 + (512 + 16) + (128 + 1),
            marks=pytest.mark.slow,
        ),
        (
            DCGANDiscriminator(4, num_classes=3, norm="spectral"),
            (images(3, 8, 8, 1), LABELS[:3]),
            68 + 65 + 3 * 64,
        ),
        pytest.param(
            DCGANDiscriminator(4, norm="layer"),
            (images(3, 16, 16, 1),),
            68 + 528 + 129,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ResNetDiscriminator(1, 1, width=4, num_classes=3),
            (images(3, 8, 8, 1), LABELS[:3]),
            (40 + 148 + 4) + 2 * 148 + 5 + 12,
            marks=pytest.mark.slow,
        ),
        (
            ResNetDiscriminator(1, 0, width=4, num_classes=3),
            (images(3, 8, 8, 1), LABELS[:3]),
            (40 + 148 + 4) + 5 + 12,
        ),
        pytest.param(
            ResNetDiscriminator(1, 0, width=4, norm=None),
            (images(3, 8, 8, 1),),
            (40 + 148 + 4) + 5,
            marks=pytest.mark.slow,
        ),
        (
            ResNetDiscriminator(1, 1, width=4, norm="batch"),
            (images(3, 8, 8, 1),),
            (36 + 8 + 148 + 4) + (8 + 144 + 8 + 148) + 5,
        ),
    ],
    ids=[
        *("generator", "conditional_generator", "residual_generator"),
        *("discriminator", "projection", "layer"),
        *("residual_projection", "residual_short", "residual_halving", "residual_batch"),
    ],
)
def test_a_network_passes_every_check(module, inputs, parameters):
    check_module(module, *inputs, num_parameters=parameters)


@pytest.mark.parametrize(
    ("module", "latent_size", "side", "channels", "generator", "discriminator"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * slow)
        for name, slow, case in [
            ("dcgan64", False, (dcgan(), 100, 64, 3, 2_371_139, 2_765_633)),
            ("dcgan28", True, (dcgan((28, 28, 1)), 100, 28, 1, 701_889, 138_689)),
            (
                "dcgan32",
                True,
                (dcgan((32, 32, 3), norm="layer"), 100, 32, 3, 780_867, 663_361),
            ),
            ("resnet32", False, (resnet_gan(), 128, 32, 3, 4_274_435, 1_053_569)),
            ("resnet28", True, (resnet_gan((28, 28, 1)), 128, 28, 1, 4_113_409, 1_051_009)),
            (
                "resnet64",
                True,
                (resnet_gan((64, 64, 3), num_halvings=4), 128, 64, 3, 5_520_643, 1_676_673),
            ),
        ]
    ],
)
def test_a_preset_has_its_shapes_and_parameters(
    module, latent_size, side, channels, generator, discriminator
):
    latents = jax.ShapeDtypeStruct((2, latent_size), jnp.float32)
    variables, logits = shapes_of(module, latents)
    assert logits.shape == (2,)
    made = jax.eval_shape(lambda v, z: module.apply(v, z, method="generate"), variables, latents)
    assert made.shape == (2, side, side, channels)
    counts = {name: count_parameters({"params": p}) for name, p in variables["params"].items()}
    assert counts == {"generator": generator, "discriminator": discriminator}


@pytest.mark.parametrize(
    ("module", "plain", "generator", "discriminator"),
    [
        # 10 classes: gain and shift of each channel of each norm; an embedding of the features.
        pytest.param(
            dcgan(num_classes=10),
            dcgan(),
            20 * (512 + 256 + 128 + 64),
            10 * 512 * 16,
            marks=pytest.mark.slow,
        ),
        (
            dcgan((32, 32, 3), num_classes=10, norm="spectral"),
            dcgan((32, 32, 3), norm="spectral"),
            20 * (256 + 128 + 64),
            10 * 256 * 16,
        ),
        (resnet_gan(num_classes=10), resnet_gan(), 20 * 2 * 3 * 256, 10 * 128),
    ],
    ids=["dcgan64", "dcgan32", "resnet32"],
)
def test_classes_add_their_parameters_to_a_preset(module, plain, generator, discriminator):
    latents = jax.ShapeDtypeStruct((2, module.latent_size), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    variables, logits = shapes_of(module, latents, labels)
    assert logits.shape == (2,)
    made = jax.eval_shape(
        lambda v, z, y: module.apply(v, z, y, method="generate"), variables, latents, labels
    )
    assert made.shape == (2, *module.generator.image_shape)
    before, _ = shapes_of(plain, latents)
    added = {
        name: count_parameters({"params": params})
        - count_parameters({"params": before["params"][name]})
        for name, params in variables["params"].items()
    }
    assert added == {"generator": generator, "discriminator": discriminator}


@functools.cache
def conditional_gan():
    """Return a conditional GAN and random variables, so that classes matter."""
    module = dcgan((8, 8, 1), num_classes=3, width=4, latent_size=5)
    return module, random_variables(module, normal(6, 5), LABELS)


@functools.partial(jax.jit, static_argnames=("module", "method"))
def apply(module, variables, *inputs, method):
    return module.apply(variables, *inputs, method=method)


def test_images_lie_between_minus_one_and_one():
    module, variables = conditional_gan()
    variables = jax.tree.map(lambda x: 30 * np.asarray(x), variables)
    made = apply(module, variables, normal(6, 5), LABELS, method="generate")
    assert np.abs(made).max() <= 1 and np.abs(made).max() > 0.99


def test_class_modulation_scales_and_shifts_by_the_entry_of_the_label():
    module, x = ClassModulation(3), normal(2, 2, 2, 4)
    labels = np.array([2, 0])
    gain, shift = normal(3, 4), normal(3, 4) + 1
    params = {"gain": {"embedding": gain}, "shift": {"embedding": shift}}
    y = module.apply({"params": params}, x, labels)
    for row, label in enumerate(labels):
        np.testing.assert_allclose(y[row], x[row] * (1 + gain[label]) + shift[label], rtol=1e-5)


def test_the_projection_adds_the_product_of_features_and_class_embedding():
    module = LogitHead(num_classes=3)
    features, labels = normal(2, 5), np.array([2, 1])
    variables = random_variables(module, features, labels)
    logits = jax.jit(module.apply)(variables, features, labels)
    params = jax.tree.map(np.asarray, variables["params"])
    kernel, bias = params["logit"]["kernel"][:, 0], params["logit"]["bias"][0]
    vectors = params["class"]["embedding"][labels]
    expected = features @ kernel + bias + np.sum(vectors * features, axis=1)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_a_class_changes_the_image_and_its_logit():
    module, variables = conditional_gan()
    latents = np.repeat(normal(1, 5), 6, axis=0)
    made = np.asarray(apply(module, variables, latents, LABELS, method="generate"))
    assert np.abs(made[0] - made[1]).max() > 1e-3 and np.abs(made[0] - made[2]).max() > 1e-3
    same = np.repeat(made[:1], 6, axis=0)
    logits = apply(module, variables, same, LABELS, method="discriminate")
    assert len(np.unique(np.round(logits, 4))) == 3


def test_the_logit_of_a_residual_discriminator_is_linear_in_its_features():
    module = ResNetDiscriminator(1, 1, width=4, norm=None)
    x = images(2, 8, 8, 1)
    variables = random_variables(module, x)
    logits, recorded = jax.jit(lambda variables: capture(module, variables, x))(variables)
    assert recorded["features"].shape == (2, 4)
    head = jax.tree.map(np.asarray, variables["params"]["head"]["logit"])
    expected = recorded["features"] @ head["kernel"][:, 0] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_images_generated_in_batches_equal_those_of_one_batch():
    module, variables = conditional_gan()
    latents = normal(6, 5)
    expected = apply(module, variables, latents, LABELS, method="generate")
    assert_close(generate_images(module, variables, latents, LABELS, batch_size=4), expected, 1e-5)
    with pytest.raises(ValueError, match="2 labels do not fit 6 latents"):
        generate_images(module, variables, latents, LABELS[:2])
    with pytest.raises(ValueError, match=r"\(0, 5\) make no image"):
        generate_images(module, variables, latents[:0], LABELS[:0])
    with pytest.raises(ValueError, match=r"label 3 is not in \[0, 3\)"):
        generate_images(module, variables, latents, LABELS + 1)
    with pytest.raises(ValueError, match="of 3 classes got no labels"):
        generate_images(module, variables, latents)
    with pytest.raises(ValueError, match="batch_size=0 must be a positive integer"):
        generate_images(module, variables, latents, LABELS, batch_size=0)


def test_recalibrated_statistics_are_the_moving_averages_over_the_given_latents():
    module = dcgan((8, 8, 1), width=4, latent_size=5)
    latents = normal(40, 32, 5)
    variables = random_variables(module, latents[0])
    recalibrated = jax.jit(lambda v: gan.recalibrate_batch_norm(module, v, latents))(variables)
    generator = recalibrated["params"]["generator"]
    before = np.einsum("sbl,lo->sbo", latents, generator["start"]["kernel"])
    before = before.reshape(40, -1, 4)  # [steps, batch * height * width, channels]
    statistics = recalibrated["batch_stats"]["generator"]["start_norm"]
    weights = 0.1 * 0.9 ** np.arange(39, -1, -1)
    mean = np.einsum("s,sc->c", weights, before.mean(axis=1))
    variance = np.einsum("s,sc->c", weights, before.var(axis=1)) + 0.9**40
    np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(statistics["var"], variance, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, recalibrated["params"], variables["params"])
    without = {"params": variables["params"]}
    assert gan.recalibrate_batch_norm(module, without, latents) is without


def test_images_are_generated_without_labels():
    module = dcgan((8, 8, 1), width=4, latent_size=5)
    latents = normal(3, 5)
    variables = random_variables(module, latents)
    expected = apply(module, variables, latents, method="generate")
    assert_close(generate_images(module, variables, latents), expected, 1e-5)


def test_interpolated_latents_lie_evenly_on_the_great_circle_and_include_both_ends():
    first, second = normal(2, 16)
    interpolate = jax.jit(interpolate_latents, static_argnums=2)
    path = np.asarray(interpolate(first, second, 7))
    np.testing.assert_allclose(path[[0, -1]], [first, second], atol=1e-5)
    unit = interpolate(first / np.linalg.norm(first), second / np.linalg.norm(second), 7)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    steps = np.linalg.norm(np.diff(unit, axis=0), axis=1)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    np.testing.assert_allclose(interpolate(first, first, 7), [first] * 7, atol=1e-6)
    from_zero = interpolate(np.zeros(16, np.float32), second, 7)
    fractions = np.linspace(0, 1, 7)[:, None]
    np.testing.assert_allclose(from_zero, fractions * second, atol=1e-6)
    with pytest.raises(ValueError, match="num_steps is 1"):
        interpolate_latents(first, second, 1)


def conditional():
    return DCGANGenerator((8, 8, 1), latent_size=5, width=4, num_classes=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DCGANGenerator((30, 30, 1)), r"30 x 30 pixels halve 1 times, to 15 x 15.*28, 32"),
        (lambda: DCGANGenerator((7, 7, 1)), r"7 x 7 pixels halve 0 times"),
        (lambda: DCGANGenerator((8, 8)), r"image_shape=\(8, 8\) must be \(height, width, channels"),
        (lambda: DCGANGenerator((8, 8, 1), norm="spectral"), "unknown norm 'spectral'"),
        (lambda: DCGANGenerator((8, 8, 1), upsampling="bicubic"), "'bicubic'.*transposed"),
        (lambda: ResNetGenerator(latent_size=0), "latent_size=0"),
        (lambda: DCGANDiscriminator(norm="group"), "unknown norm 'group'.*'spectral'"),
        (lambda: DCGANDiscriminator(num_classes=0), "num_classes=0"),
        (
            lambda: GAN(DCGANGenerator(num_classes=3), DCGANDiscriminator()),
            "num_classes=3 and the discriminator num_classes=None",
        ),
        (
            lambda: shapes_of(DCGANGenerator((8, 8, 1), latent_size=5), normal(2, 6)),
            r"latents of shape \(2, 6\).*latent_size 5; give \[batch, 5\]",
        ),
        (lambda: shapes_of(conditional(), normal(2, 5)), "of 3 classes got no labels"),
        (
            lambda: shapes_of(DCGANDiscriminator(4), images(2, 8, 8, 1), LABELS[:2]),
            "DCGANDiscriminator got labels, but its num_classes is None",
        ),
        (lambda: shapes_of(conditional(), normal(2, 5), LABELS), r"shape \(6,\).*2 images"),
        (
            lambda: conditional().init(jax.random.key(0), normal(2, 5), np.array([0, 3])),
            r"label 3 is not in \[0, 3\)",
        ),
        (lambda: shapes_of(DCGANDiscriminator(4), images(8, 8, 1)), r"got inputs of shape \(8, 8"),
        (
            lambda: shapes_of(ResNetDiscriminator(4), images(1, 8, 8, 1)),
            "8 x 8 pixels do not halve num_halvings=4 times without remainder",
        ),
        (
            lambda: shapes_of(ResNetDiscriminator(3), images(1, 28, 28, 1)),
            "28 x 28 pixels do not halve num_halvings=3 times",
        ),
        (lambda: ResNetDiscriminator(2, -1), "num_blocks is -1; give 0 or more"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_label_out_of_range_in_a_compiled_program_gives_nan_for_its_image_only():
    module, variables = conditional_gan()
    labels = np.array([0, 7, 2, 0, 1, 2], np.int32)
    logits = np.asarray(apply(module, variables, normal(6, 5), labels, method="__call__"))
    np.testing.assert_array_equal(np.isnan(logits), np.arange(6) == 1)
