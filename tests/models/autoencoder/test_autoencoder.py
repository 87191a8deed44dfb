"""Autoencoders: shared checks, image sizes, tied weights, latent space functions, errors."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import check_module, count_parameters, mostly_slow, random_variables, shapes_of

import jaxnets as jn
from jaxnets import autoencoder
from jaxnets.models.autoencoder import VAE, VQVAE, Autoencoder, Encoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import DiscretizedLogistic, Gaussian, SquaredError

DENSE = EncoderDecoderConfig((4, 5, 2), features=(6, 3))
CONVOLUTIONAL = EncoderDecoderConfig((5, 8, 1), "convolutional", (3, 4))


def images(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


# A dense layer has inputs x outputs + outputs parameters, a convolution 9 x inputs x outputs +
# outputs; the encoder output of CONVOLUTIONAL has 2 x 2 x 4 = 16 elements.
CONVOLUTIONS = (9 * 3 + 3) + (9 * 3 * 4 + 4)


@pytest.mark.parametrize(
    ("module", "shape", "parameters", "streams"),
    [
        pytest.param(
            Autoencoder(DENSE, latent_size=2),
            (3, 4, 5, 2),
            (40 * 6 + 6) + 21 + 8 + (2 * 3 + 3) + 24 + (6 * 40 + 40),
            (),
            marks=pytest.mark.slow,
        ),
        (
            Autoencoder(DENSE, latent_size=2, tied=True, code_activation="sigmoid"),
            (3, 4, 5, 2),
            (40 * 6 + 6) + 21 + 8 + 3 + 6 + 40,
            (),
        ),
        (
            Autoencoder(
                EncoderDecoderConfig((5, 8, 1), "convolutional", (3, 4), norm="batch"),
                latent_size=2,
            ),
            (3, 5, 8, 1),
            (27 + 6) + (108 + 8) + (32 + 2) + (2 * 16 + 8) + (108 + 6) + (27 + 1),
            (),
        ),
        pytest.param(
            VAE(CONVOLUTIONAL, latent_size=2, likelihood=DiscretizedLogistic()),
            (3, 5, 8, 1),
            CONVOLUTIONS + 2 * 34 + (2 * 16 + 16) + (108 + 3) + (9 * 3 * 2 + 2),
            ("latent",),
            marks=pytest.mark.slow,
        ),
        (
            VQVAE(
                EncoderDecoderConfig(
                    (5, 8, 1), "convolutional", (3, 4), num_blocks=1, upsampling="subpixel"
                ),
                codebook_size=3,
                embedding_size=2,
                likelihood=Gaussian(),
            ),
            (2, 5, 8, 1),
            CONVOLUTIONS + 2 * (144 + 4 + 16 + 4) + (8 + 2) + (72 + 4) + (432 + 12) + (216 + 8),
            ("codebook",),
        ),
    ],
    ids=["dense", "tied", "convolutional", "variational", "quantized"],
)
def test_an_autoencoder_passes_every_check(module, shape, parameters, streams):
    check_module(module, images(*shape), num_parameters=parameters, streams=streams)


def test_a_conditional_vae_passes_every_check():
    module = VAE(DENSE, latent_size=2, likelihood=Gaussian(0.1), num_classes=3)
    # The one-hot class extends the 40 pixels and the code of size 2.
    parameters = (43 * 6 + 6) + 21 + 2 * 8 + (5 * 3 + 3) + 24 + (6 * 40 + 40)
    labels = np.array([0, 2, 1], np.int32)
    check_module(module, images(3, 4, 5, 2), labels, num_parameters=parameters, streams=("latent",))


def test_the_vae_of_the_pytorch_example_has_its_number_of_parameters():
    module = autoencoder.vae_pytorch_example()
    variables, outputs = shapes_of(module, images(2, 28, 28, 1))
    assert count_parameters(variables) == 652_824
    assert outputs.outputs.shape == (2, 28, 28, 1) and outputs.mean.shape == (2, 20)


@pytest.mark.parametrize(
    ("upsampling", "shape"),
    mostly_slow(
        itertools.product(
            ["resize", "subpixel", "transposed"],
            [(8, 8, 1), (28, 28, 1), (32, 32, 3), (9, 14, 2)],
        ),
        [
            *(("resize", (28, 28, 1)), ("resize", (9, 14, 2))),
            *(("subpixel", (9, 14, 2)), ("transposed", (9, 14, 2))),
        ],
    ),
)
def test_a_decoder_returns_images_of_the_original_size(upsampling, shape):
    config = EncoderDecoderConfig(shape, "convolutional", (4, 6, 8), upsampling=upsampling)
    _, reconstructed = shapes_of(Autoencoder(config), images(2, *shape))
    assert reconstructed.outputs.shape == (2, *shape)
    module = VQVAE(config, codebook_size=4, likelihood=DiscretizedLogistic())
    _, quantized = shapes_of(module, images(2, *shape))
    assert quantized.outputs.shape == (2, *shape[:2], 2 * shape[2])
    assert quantized.codes.shape == (2, *config.code_shape[:2])


def test_the_code_shape_is_that_of_the_encoders_output():
    for config in (DENSE, CONVOLUTIONAL, dataclasses.replace(DENSE, features=())):
        _, output = shapes_of(Encoder(config), images(2, *config.image_shape))
        assert output.shape == (2, *config.code_shape)


def test_tied_weights_share_the_encoders_kernel():
    module = Autoencoder(
        EncoderDecoderConfig((2, 2, 1), features=(), activation="tanh"), 3, tied=True
    )
    x = images(5, 2, 2, 1)
    params = random_variables(module, x)["params"]
    assert set(params) == {"code", "decoder"} and set(params["decoder"]["head"]) == {"bias"}
    kernel, bias = map(np.asarray, (params["code"]["kernel"], params["code"]["bias"]))
    flat = x.reshape(5, 4)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        outputs = module.apply({"params": params}, x).outputs
        return jnp.sum(outputs), outputs

    (_, outputs), gradient = loss(params)
    decoder_bias = np.asarray(params["decoder"]["head"]["bias"])
    expected = (flat @ kernel + bias) @ kernel.T + decoder_bias
    np.testing.assert_allclose(outputs.reshape(5, 4), expected, rtol=1e-5, atol=1e-6)
    # d sum((x K + b) K^T) / dK, through both uses of the kernel: x^T 1 K + 1^T (x K + b).
    ones = np.ones((5, 4), np.float32)
    by_hand = flat.T @ ones @ kernel + ones.T @ (flat @ kernel + bias)
    np.testing.assert_allclose(gradient["code"]["kernel"], by_hand, rtol=1e-5)


def test_tied_weights_of_several_layers_are_used_in_reverse_order():
    module = Autoencoder(EncoderDecoderConfig((4, 5, 2), features=(6, 3)), latent_size=2, tied=True)
    x = images(2, 4, 5, 2)
    variables = random_variables(module, x)
    found = jax.tree.map(np.asarray, jax.jit(module.apply)(variables, x))
    params = jax.tree.map(np.asarray, variables["params"])
    first, second = (params["encoder"][f"hidden_{i}"]["kernel"] for i in range(2))
    biases = [params["decoder"][name]["bias"] for name in ("hidden_0", "hidden_1", "head")]
    y = np.maximum(found.code @ params["code"]["kernel"].T + biases[0], 0)
    y = np.maximum(y @ second.T + biases[1], 0) @ first.T + biases[2]
    np.testing.assert_allclose(found.outputs.reshape(2, -1), y, rtol=1e-5, atol=1e-6)


def test_a_k_sparse_code_keeps_its_largest_entries():
    x = images(6, 4, 5, 2)
    dense = Autoencoder(DENSE, latent_size=8)
    sparse = Autoencoder(DENSE, latent_size=8, num_active=3)
    run = jax.jit(lambda variables: [m.apply(variables, x).code for m in (dense, sparse)])
    all_entries, largest = map(np.asarray, run(random_variables(dense, x)))
    assert ((largest != 0).sum(axis=1) == 3).all()
    for row, other in zip(all_entries, largest, strict=True):
        expected = np.where(row >= np.sort(row)[-3], row, 0)
        np.testing.assert_array_equal(other, expected)


def test_a_vae_decodes_the_reparameterized_code_or_without_noise_the_mean():
    module, x = VAE(DENSE, latent_size=2), images(3, 4, 5, 2)
    noise = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)

    @jax.jit
    def run(variables):
        at_mean = module.apply(variables, x)
        code = at_mean.mean + jnp.exp(at_mean.log_variance / 2) * noise
        return (
            at_mean.outputs,
            module.apply(variables, x, noise=noise).outputs,
            module.apply(variables, x, train=True, rngs={"latent": jax.random.key(0)}).outputs,
            [module.apply(variables, z, method="decode") for z in (at_mean.mean, code)],
        )

    at_mean, at_code, sampled, expected = run(random_variables(module, x))
    np.testing.assert_allclose(at_mean, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at_code, expected[1], rtol=1e-5, atol=1e-6)
    assert np.any(np.abs(sampled - at_mean) > 1e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EncoderDecoderConfig((28, 28)), r"\(28, 28\) must be \(height, width, channels\)"),
        (lambda: EncoderDecoderConfig((8, 8, 1), "linear"), "'linear'; choose 'dense'"),
        (lambda: EncoderDecoderConfig((8, 8, 1), "convolutional", ()), "give 1 to 3 widths"),
        (
            lambda: EncoderDecoderConfig((8, 8, 1), "convolutional", (4,) * 4),
            "4 times; give 1 to 3",
        ),
        (
            lambda: EncoderDecoderConfig((8, 8, 1), upsampling="bilinear"),
            "unknown upsampling 'bilinear'",
        ),
        (lambda: EncoderDecoderConfig((8, 8, 1), num_blocks=1), "needs kind='convolutional'"),
        (lambda: EncoderDecoderConfig((8, 8, 1), num_blocks=-1), "num_blocks is -1; give 0 or"),
        (lambda: Autoencoder(DENSE, 4, num_active=5), "num_active is 5; give 1 to latent_size, 4"),
        (lambda: Autoencoder(CONVOLUTIONAL, tied=True), "tied weights with kind='convolutional'"),
        (
            lambda: Autoencoder(DENSE, likelihood=DiscretizedLogistic(), tied=True),
            "DiscretizedLogistic.* needs 2",
        ),
        (lambda: VQVAE(DENSE), "kind='dense'; its code is a feature map"),
        (lambda: Gaussian(0.0), r"scale is 0\.0"),
        (lambda: DiscretizedLogistic(1), "num_levels is 1"),
        (
            lambda: shapes_of(Autoencoder(DENSE), images(2, 5, 4, 2)),
            r"\(2, 5, 4, 2\) do not fit image_shape \(4, 5, 2\)",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


LABELS = np.array([0, 2], np.int32)
SMOOTH = dataclasses.replace(DENSE, activation="tanh")
SMALL = {
    "plain": Autoencoder(SMOOTH, 3),
    "vae": VAE(SMOOTH, 3),
    "conditional": VAE(SMOOTH, 3, num_classes=3),
    "quantized": VQVAE(EncoderDecoderConfig((4, 5, 2), "convolutional", (4,)), 5),
}


@functools.cache
def small(kind):
    """Return the network, its variables, and labels for two images, None if not conditional."""
    labels = LABELS if kind == "conditional" else None
    inputs = [images(2, 4, 5, 2), *[labels] * (kind == "conditional")]
    return SMALL[kind], random_variables(SMALL[kind], *inputs), labels


@pytest.mark.parametrize("kind", SMALL)
def test_codes_reconstructions_interpolations_and_scores_are_consistent(kind):
    module, variables, labels = small(kind)
    x = images(2, 4, 5, 2)
    one_class = None if labels is None else np.zeros(2, np.int32)

    @jax.jit
    def run(variables):
        code = autoencoder.encode(module, variables, x, labels)
        outputs = module.apply(variables, x, *([labels] if labels is not None else [])).outputs
        losses = module.likelihood.losses(outputs, jnp.asarray(x))
        if isinstance(module, VAE):
            mean, log_variance = module.apply(variables, x, labels, method="posterior")
            losses += jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=1) / 2
        middle = autoencoder.encode(module, variables, x, one_class).mean(axis=0, keepdims=True)
        return {
            "decoded": autoencoder.decode(module, variables, code, labels),
            "expected": module.likelihood.mean(outputs),
            "reconstructed": autoencoder.reconstruct(module, variables, x, labels),
            "path": autoencoder.interpolate(
                module, variables, x, x[::-1], num_steps=3, labels=one_class
            ),
            "ends": autoencoder.reconstruct(module, variables, x, one_class),
            "middle": autoencoder.decode(
                module, variables, middle, None if one_class is None else one_class[:1]
            ),
            "scores": autoencoder.anomaly_score(module, variables, x, labels),
            "losses": losses,
        }

    found = run(variables)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(found["decoded"], found["expected"])
    np.testing.assert_array_equal(found["reconstructed"], found["decoded"])
    path = found["path"]
    assert path.shape == (2, 3, 4, 5, 2)
    # A path starts and ends at reconstructions, and passes through the mean of the codes.
    close(path[:, 0], found["ends"])
    close(path[:, -1], found["ends"][::-1])
    close(path[:1, 1], found["middle"])
    np.testing.assert_allclose(found["scores"], found["losses"], rtol=1e-5)


def test_samples_are_decoded_standard_normal_codes_of_the_given_class():
    module, variables, _ = small("conditional")
    key, labels = jax.random.key(3), np.array([1, 1, 0])

    @jax.jit
    def run(variables):
        code = jax.random.normal(key, (3, 3))
        return (
            autoencoder.sample(module, variables, 3, rng=key, labels=labels),
            autoencoder.decode(module, variables, code, labels),
            autoencoder.decode(module, variables, code, np.zeros(3, np.int32)),
        )

    found, expected, other = run(variables)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(other - expected)[:2].max() > 1e-4
    np.testing.assert_array_equal(other[2], expected[2])


def call(kind, function, *arguments, **keywords):
    """Trace a function of a small network; concrete arguments are checked while tracing."""
    module, variables, _ = small(kind)
    return jax.eval_shape(lambda: function(module, variables, *arguments, **keywords))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: call("vae", autoencoder.encode, 255 * images(2, 4, 5, 2)),
            "outside of \\[0, 1\\]",
        ),
        (
            lambda: call("vae", autoencoder.anomaly_score, np.full((2, 4, 5, 2), np.nan)),
            "images hold nan",
        ),
        (
            lambda: call("vae", autoencoder.encode, np.ones((2, 4, 5, 2), np.uint8)),
            "type uint8; give floats: divide gray levels by 255",
        ),
        (
            lambda: call("plain", autoencoder.decode, np.ones((2, 4), np.float32)),
            r"\(2, 4\) do not fit latent_size 3; give \[batch, 3\]",
        ),
        (
            lambda: call("vae", autoencoder.decode, np.ones((2, 4), np.float32)),
            r"\(2, 4\) do not fit latent_size 3",
        ),
        (
            lambda: call("quantized", autoencoder.decode, np.ones((2, 2, 3, 5), np.float32)),
            r"give \[batch, 2, 3, 64\]",
        ),
        (
            lambda: call("conditional", autoencoder.encode, images(2, 4, 5, 2)),
            "conditional on 3 classes and got no labels",
        ),
        (
            lambda: call("conditional", autoencoder.sample, 2, rng=jax.random.key(0)),
            "conditional on 3 classes and got no labels",
        ),
        (
            lambda: call("conditional", autoencoder.encode, images(2, 4, 5, 2), np.array([0, 3])),
            r"label 3 is not in \[0, 3\)",
        ),
        (
            lambda: call("conditional", autoencoder.encode, images(2, 4, 5, 2), np.ones(2)),
            "type float64 do not fit 2 examples",
        ),
        (
            lambda: call("vae", autoencoder.encode, images(2, 4, 5, 2), LABELS),
            "not conditional and takes no labels",
        ),
        (
            lambda: call("plain", autoencoder.encode, images(2, 4, 5, 2), LABELS),
            "Autoencoder takes no labels",
        ),
        (
            lambda: call("quantized", autoencoder.encode, images(2, 4, 5, 2), LABELS),
            "VQVAE takes no labels",
        ),
        (
            lambda: call("plain", autoencoder.sample, 2, rng=jax.random.key(0)),
            "Autoencoder has no distribution of codes",
        ),
        (
            lambda: call("plain", autoencoder.interpolate, *[images(2, 4, 5, 2)] * 2, num_steps=1),
            "num_steps is 1",
        ),
        (
            lambda: call(
                "plain",
                autoencoder.interpolate,
                images(2, 4, 5, 2),
                images(1, 4, 5, 2),
                num_steps=2,
            ),
            r"first \(2, 4, 5, 2\), second \(1, 4, 5, 2\) differ in shape",
        ),
    ],
)
def test_arguments_that_do_not_fit_a_trained_network_are_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_invalid_images_and_labels_in_a_compiled_program_give_nan():
    module, variables, labels = small("conditional")
    encode = jax.jit(lambda x, y: autoencoder.encode(module, variables, x, y))
    x = images(2, 4, 5, 2)
    wrong = x.copy()
    wrong[1, 0, 0, 0] = 1.5
    assert np.isfinite(encode(x, labels)).all()
    np.testing.assert_array_equal(np.isnan(encode(wrong, labels)).any(axis=1), [False, True])
    np.testing.assert_array_equal(np.isnan(encode(x, np.array([3, 0]))).any(axis=1), [True, False])


def test_principal_components_are_an_optimum_of_a_linear_autoencoder():
    random = np.random.default_rng(0)
    x = (random.normal(size=(50, 6)) @ random.normal(size=(6, 6))).astype(np.float32)
    x -= x.mean(axis=0)
    _, _, components = np.linalg.svd(x, full_matrices=False)
    likelihood = SquaredError(image_range=None)  # data around 0
    module = Autoencoder(EncoderDecoderConfig((2, 3, 1), features=()), 2, likelihood, tied=True)
    batch = {"inputs": x.reshape(50, 2, 3, 1)}
    params = random_variables(module, batch["inputs"])["params"]
    params = jax.tree.map(jnp.zeros_like, params)  # no biases
    params["code"]["kernel"] = jnp.asarray(components[:2].T)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        objective = jn.reconstruction(module)
        return objective(params, {}, batch, jax.random.key(0), train=True).loss.compute()

    value, gradient = loss(params)
    expected = np.sum((x - x @ components[:2].T @ components[:2]) ** 2) / 50
    assert value == pytest.approx(expected, rel=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-3


def test_an_unusual_image_scores_higher_after_a_short_training():
    random = np.random.default_rng(0)
    grid = np.linspace(0, np.pi, 6)

    def waves(number):
        shifts = random.uniform(0, np.pi, size=(number, 1, 1, 1))
        rows = 0.5 + 0.5 * np.sin(grid[None, :, None, None] + shifts)
        return np.tile(rows, (1, 1, 6, 1)).astype(np.float32)

    module = Autoencoder(
        EncoderDecoderConfig((6, 6, 1), features=(16,), activation="tanh"), latent_size=2
    )
    update = jn.Update(jn.reconstruction(module), optax.adam(1e-2))
    variables = random_variables(module, waves(1))
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    run = jn.jit_step(jn.scan_steps(jn.make_train_step(update)))
    state, _ = run(state, {"inputs": np.stack([waves(32) for _ in range(200)])})
    usual = waves(50)
    unusual = np.swapaxes(usual, 1, 2)  # the same pixels: waves along the other axis
    score = jax.jit(lambda variables, images: autoencoder.anomaly_score(module, variables, images))
    scores = [score(state.variables, images) for images in (usual, unusual)]
    assert np.max(scores[0]) < np.min(scores[1])
