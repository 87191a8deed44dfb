"""The networks of the autoencoder family: shapes at any size, ties, codebooks, shared checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import check_module, count_parameters, shapes_of

import jaxnets as jn
from jaxnets import autoencoder
from jaxnets.models.autoencoder import VAE, VQVAE, Autoencoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import DiscretizedLogistic, Gaussian, SquaredError

DENSE = EncoderDecoderConfig((4, 5, 2), features=(6, 3))
CONVOLUTIONAL = EncoderDecoderConfig((5, 8, 1), "convolutional", (3, 4))


def images(*shape):
    return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


# A dense layer has inputs x outputs + outputs parameters, a convolution 9 x inputs x outputs +
# outputs; the last convolution of CONVOLUTIONAL leaves 2 x 2 x 4 = 16 numbers.
CONVOLUTIONS = (9 * 3 + 3) + (9 * 3 * 4 + 4)


@pytest.mark.parametrize(
    ("module", "shape", "parameters", "streams"),
    [
        (
            Autoencoder(DENSE, latent_size=2),
            (3, 4, 5, 2),
            (40 * 6 + 6) + 21 + 8 + (2 * 3 + 3) + 24 + (6 * 40 + 40),
            (),
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
            (4, 5, 8, 1),
            (27 + 6) + (108 + 8) + (32 + 2) + (2 * 16 + 8) + (108 + 6) + (27 + 1),
            (),
        ),
        (
            VAE(CONVOLUTIONAL, latent_size=2, likelihood=DiscretizedLogistic()),
            (3, 5, 8, 1),
            CONVOLUTIONS + 2 * 34 + (2 * 16 + 16) + (108 + 3) + (9 * 3 * 2 + 2),
            ("latent",),
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
            (3, 5, 8, 1),
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
    # The class stands beside the 40 pixels and beside the 2 numbers of the code.
    parameters = (43 * 6 + 6) + 21 + 2 * 8 + (5 * 3 + 3) + 24 + (6 * 40 + 40)
    labels = np.array([0, 2, 1], np.int32)
    check_module(module, images(3, 4, 5, 2), labels, num_parameters=parameters, streams=("latent",))


def test_the_example_of_pytorch_has_its_number_of_parameters():
    module = autoencoder.vae_pytorch_example()
    variables, outputs = shapes_of(module, images(2, 28, 28, 1))
    assert count_parameters(variables) == 652_824
    assert outputs.outputs.shape == (2, 28, 28, 1) and outputs.mean.shape == (2, 20)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (9, 14, 2)])
@pytest.mark.parametrize("upsampling", ["resize", "subpixel", "transposed"])
def test_a_decoder_returns_to_the_size_of_the_images(shape, upsampling):
    config = EncoderDecoderConfig(shape, "convolutional", (4, 6, 8), upsampling=upsampling)
    _, coded = shapes_of(Autoencoder(config), images(2, *shape))
    assert coded.outputs.shape == (2, *shape)
    module = VQVAE(config, codebook_size=4, likelihood=DiscretizedLogistic())
    _, quantized = shapes_of(module, images(2, *shape))
    assert quantized.outputs.shape == (2, *shape[:2], 2 * shape[2])
    assert quantized.codes.shape == (2, *config.code_shape[:2])


def test_tied_weights_are_one_matrix_and_its_transpose():
    module = Autoencoder(
        EncoderDecoderConfig((2, 2, 1), features=(), activation="tanh"), 3, tied=True
    )
    x = images(5, 2, 2, 1)
    variables = module.init(jax.random.key(0), x)
    params = variables["params"]
    assert set(params) == {"code", "decoder"} and set(params["decoder"]["head"]) == {"bias"}
    kernel, flat = params["code"]["kernel"], x.reshape(5, 4)
    expected = (flat @ kernel) @ kernel.T
    np.testing.assert_allclose(
        module.apply(variables, x).outputs.reshape(5, 4), expected, rtol=1e-5, atol=1e-6
    )

    def loss(params):
        return jnp.sum(module.apply({"params": params}, x).outputs)

    gradient = jax.grad(loss)(params)["code"]["kernel"]
    by_hand = jax.grad(lambda kernel: jnp.sum((flat @ kernel) @ kernel.T))(kernel)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-5)  # through both of its places


def test_deep_tied_weights_mirror_layer_by_layer():
    module = Autoencoder(EncoderDecoderConfig((4, 5, 2), features=(6, 3)), latent_size=2, tied=True)
    x = images(2, 4, 5, 2)
    params = module.init(jax.random.key(0), x)["params"]
    first, second = (params["encoder"][f"hidden_{i}"]["kernel"] for i in range(2))
    y = module.apply({"params": params}, x).code @ params["code"]["kernel"].T
    y = jax.nn.relu(jax.nn.relu(y) @ second.T) @ first.T
    found = module.apply({"params": params}, x).outputs.reshape(2, -1)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)


def test_a_k_sparse_code_keeps_its_largest_numbers():
    x = images(6, 4, 5, 2)
    dense = Autoencoder(DENSE, latent_size=8)
    sparse = Autoencoder(DENSE, latent_size=8, num_active=3)
    variables = dense.init(jax.random.key(0), x)
    whole, kept = (np.array(m.apply(variables, x).code) for m in (dense, sparse))
    assert ((kept != 0).sum(axis=1) == 3).all()
    for row, other in zip(whole, kept, strict=True):
        expected = np.where(row >= np.sort(row)[-3], row, 0)
        np.testing.assert_array_equal(other, expected)


def test_noise_makes_the_code_and_without_it_the_mean_is_decoded():
    module, x = VAE(DENSE, latent_size=2), images(3, 4, 5, 2)
    variables = module.init(jax.random.key(0), x)
    noise = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    _, mean, log_variance = still = module.apply(variables, x)
    moved = module.apply(variables, x, noise=noise)
    code = mean + np.exp(log_variance / 2) * noise
    for outputs, codes in ((still.outputs, mean), (moved.outputs, code)):
        expected = module.apply(variables, codes, method="decode")
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    drawn = module.apply(variables, x, train=True, rngs={"latent": jax.random.key(0)})
    assert np.any(np.abs(drawn.outputs - still.outputs) > 1e-3)


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
        (lambda: Autoencoder(DENSE, 4, num_active=5), "num_active is 5; give 1 to latent_size, 4"),
        (lambda: Autoencoder(CONVOLUTIONAL, tied=True), "tied weights with kind='convolutional'"),
        (
            lambda: Autoencoder(DENSE, likelihood=DiscretizedLogistic(), tied=True),
            "DiscretizedLogistic.* needs 2",
        ),
        (lambda: VQVAE(DENSE), "kind='dense'; its code is a map"),
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


def trained(module, *inputs):
    return module, jax.jit(module.init)(jax.random.key(0), *inputs)


LABELS = np.array([0, 2], np.int32)
SMOOTH = dataclasses.replace(DENSE, activation="tanh")
SMALL = {
    "plain": lambda: (*trained(Autoencoder(SMOOTH, 3), images(2, 4, 5, 2)), None),
    "vae": lambda: (*trained(VAE(SMOOTH, 3), images(2, 4, 5, 2)), None),
    "conditional": lambda: (
        *trained(VAE(SMOOTH, 3, num_classes=3), images(2, 4, 5, 2), LABELS),
        LABELS,
    ),
    "quantized": lambda: (
        *trained(
            VQVAE(EncoderDecoderConfig((4, 5, 2), "convolutional", (4,)), 5), images(2, 4, 5, 2)
        ),
        None,
    ),
}


@pytest.mark.parametrize("kind", SMALL)
def test_codes_reconstructions_walks_and_scores_fit_together(kind):
    module, variables, labels = SMALL[kind]()
    x = images(2, 4, 5, 2)
    code = autoencoder.encode(module, variables, x, labels)
    outputs = module.apply(variables, x, *([labels] if labels is not None else [])).outputs
    expected = module.likelihood.mean(outputs)
    decoded = autoencoder.decode(module, variables, code, labels)
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-6)
    again = autoencoder.reconstruct(module, variables, x, labels)
    np.testing.assert_array_equal(again, decoded)
    walk = autoencoder.interpolate(
        module, variables, x, x[::-1], num_steps=3, labels=None if labels is None else labels * 0
    )
    assert walk.shape == (2, 3, 4, 5, 2)
    # A walk begins and ends at reconstructions, and passes the middle of the codes.
    same = None if labels is None else labels * 0
    ends = autoencoder.reconstruct(module, variables, x, same)
    np.testing.assert_allclose(walk[:, 0], ends, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(walk[:, -1], ends[::-1], rtol=1e-5, atol=1e-6)
    middle = autoencoder.encode(module, variables, x, same).mean(axis=0, keepdims=True)
    np.testing.assert_allclose(
        walk[:1, 1],
        autoencoder.decode(module, variables, middle, None if same is None else same[:1]),
        rtol=1e-5,
        atol=1e-6,
    )
    scores = autoencoder.anomaly_score(module, variables, x, labels)
    losses = module.likelihood.losses(outputs, x)
    if isinstance(module, VAE):
        mean, log_variance = module.apply(variables, x, labels, method="posterior")
        losses += jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=1) / 2
    np.testing.assert_allclose(scores, losses, rtol=1e-5)


def test_samples_are_decoded_standard_normal_codes_of_the_asked_class():
    module, variables, _ = SMALL["conditional"]()
    key, labels = jax.random.key(3), jnp.array([1, 1, 0])
    found = autoencoder.sample(module, variables, 3, rng=key, labels=labels)
    code = jax.random.normal(key, (3, 3))
    expected = autoencoder.decode(module, variables, code, labels)
    np.testing.assert_array_equal(found, expected)
    other = autoencoder.decode(module, variables, code, labels * 0)
    assert np.abs(other - expected)[:2].max() > 1e-4
    np.testing.assert_array_equal(other[2], expected[2])


def call(kind, function, *arguments, **keywords):
    module, variables, _ = SMALL[kind]()
    return function(module, variables, *arguments, **keywords)


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
    ],
)
def test_what_does_not_fit_a_trained_network_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def test_what_is_known_only_when_the_program_runs_is_nan():
    module, variables, labels = SMALL["conditional"]()
    encode = jax.jit(lambda x, y: autoencoder.encode(module, variables, x, y))
    x = images(2, 4, 5, 2)
    wrong = x.copy()
    wrong[1, 0, 0, 0] = 1.5
    assert np.isfinite(encode(x, labels)).all()
    np.testing.assert_array_equal(np.isnan(encode(wrong, labels)).any(axis=1), [False, True])
    np.testing.assert_array_equal(np.isnan(encode(x, np.array([3, 0]))).any(axis=1), [True, False])


def test_a_linear_autoencoder_at_its_optimum_is_principal_components():
    random = np.random.default_rng(0)
    x = (random.normal(size=(50, 6)) @ random.normal(size=(6, 6))).astype(np.float32)
    x -= x.mean(axis=0)
    _, _, components = np.linalg.svd(x, full_matrices=False)
    likelihood = SquaredError(image_range=None)  # data around 0
    module = Autoencoder(EncoderDecoderConfig((2, 3, 1), features=()), 2, likelihood, tied=True)
    batch = {"inputs": x.reshape(50, 2, 3, 1)}
    params = module.init(jax.random.key(0), batch["inputs"])["params"]
    params["code"]["kernel"] = jnp.asarray(components[:2].T)

    def loss(params):
        objective = jn.reconstruction(module)
        return objective(params, {}, batch, jax.random.key(0), train=True).loss.compute()

    value, gradient = jax.value_and_grad(loss)(params)
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
    variables = jax.jit(module.init)(jax.random.key(0), waves(1))
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    run = jn.jit_step(jn.scan_steps(jn.make_train_step(update)))
    state, _ = run(state, {"inputs": np.stack([waves(32) for _ in range(200)])})
    usual = waves(50)
    unusual = np.swapaxes(usual, 1, 2)  # the same pixels: the waves run the other way
    scores = [
        autoencoder.anomaly_score(module, state.variables, images) for images in (usual, unusual)
    ]
    assert np.max(scores[0]) < np.min(scores[1])
