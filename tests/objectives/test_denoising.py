"""The denoising objective around every kind of autoencoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import random_variables

import jaxnets as jn
from jaxnets.models.autoencoder import VAE, VQVAE, Autoencoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import SquaredError
from jaxnets.objectives.reconstruction import corrupted

CONFIG = EncoderDecoderConfig((3, 4, 1), features=(5,), activation="tanh")
BATCH = {"inputs": np.random.default_rng(0).uniform(size=(4, 3, 4, 1)).astype(np.float32)}


@functools.cache
def initialized(module):
    variables = random_variables(module, BATCH["inputs"])
    return variables.pop("params"), variables


def evaluate(objective, params, state, batch=BATCH, *, train=False):
    return objective(params, state, batch, jax.random.key(1), train=train)


def noisy_images():
    key = jn.rng_streams(jax.random.key(1), "augmentation")["augmentation"]
    return corrupted(jnp.asarray(BATCH["inputs"]), key, "gaussian", 0.5)


def test_the_loss_compares_the_output_for_noisy_images_with_the_clean_ones():
    module = Autoencoder(CONFIG, latent_size=2)
    params, state = initialized(module)
    objective = jn.denoising(jn.reconstruction(module), amount=0.5)

    @jax.jit
    def run(params):
        losses = [evaluate(objective, params, state, train=t).loss.total for t in (False, True)]
        return losses, module.apply({"params": params}, noisy_images()).outputs

    losses, outputs = run(params)
    errors = np.square(np.asarray(outputs) - BATCH["inputs"])
    np.testing.assert_allclose(losses, errors.sum(), rtol=1e-5)


def test_noise_has_the_given_amount_and_stays_in_the_range():
    x = np.full((200, 10, 10, 3), 0.5, np.float32)

    @jax.jit
    def run(key):
        return (
            corrupted(x, key, "gaussian", 0.1),
            corrupted(x, key, "gaussian", 3.0, (-1.0, 1.0)),
            corrupted(x, key, "masking", 0.25),
        )

    noisy, clipped, masked = map(np.asarray, run(jax.random.key(0)))
    assert np.std(noisy) == pytest.approx(0.1, rel=0.02)
    assert (clipped.min(), clipped.max()) == (-1, 1)
    assert np.mean(masked == 0) == pytest.approx(0.25, rel=0.05)
    assert set(np.unique(masked.sum(axis=-1))) == {0.0, 1.5}  # all channels of a pixel at once


@pytest.mark.parametrize("kind", ["vae", "vq_vae"])
def test_variational_and_quantized_autoencoders_reconstruct_the_clean_images(kind):
    if kind == "vae":
        module = VAE(CONFIG, latent_size=3)
        noise = jax.random.normal(jn.rng_streams(jax.random.key(1), "latent")["latent"], (4, 3))
        objective, keywords = jn.vae(module), {"noise": noise}
    else:
        module = VQVAE(EncoderDecoderConfig((3, 4, 1), "convolutional", (5,)), 4, embedding_size=2)
        objective, keywords = jn.vq_vae(module), {}
    params, state = initialized(module)

    @jax.jit
    def run(params):
        outputs = module.apply({"params": params, **state}, noisy_images(), **keywords).outputs
        return evaluate(jn.denoising(objective, amount=0.5), params, state), outputs

    found, outputs = run(params)
    losses = module.likelihood.losses(outputs, BATCH["inputs"])
    assert found.metrics["reconstruction"].total == pytest.approx(float(losses.sum()), rel=1e-5)
    errors = np.square(module.likelihood.mean(outputs) - BATCH["inputs"]).mean()
    assert found.metrics["squared_error"].compute() == pytest.approx(float(errors), rel=1e-5)


def test_a_masked_autoencoder_reconstructs_the_clean_images():
    block = jn.BlockConfig(features=4, num_heads=1, mlp_dim=4)
    module = jn.MaskedAutoencoder(1, 1, block, decoder_num_layers=1, decoder_config=block)
    params, state = initialized(module)
    objective = jn.denoising(jn.masked_reconstruction(module, normalize=False), amount=0.5)

    @jax.jit
    def run(params):
        noise = jax.random.uniform(jn.rng_streams(jax.random.key(1), "mask")["mask"], (4, 12))
        outputs, masked = module.apply({"params": params}, noisy_images(), noise=noise)
        return evaluate(objective, params, state).loss, outputs, masked

    found, outputs, masked = run(params)
    errors = np.square(np.asarray(outputs)[..., 0] - BATCH["inputs"].reshape(4, 12))
    assert found.total == pytest.approx(errors[np.asarray(masked)].mean() * 4, rel=1e-5)


@pytest.mark.parametrize("noise", ["gaussian", "masking"])
def test_clean_images_outside_of_the_range_are_refused_or_nan(noise):
    # The likelihood accepts any range, so the check is that of the noise.
    module = Autoencoder(CONFIG, latent_size=2, likelihood=SquaredError(image_range=None))
    params, state = initialized(module)
    objective = jn.denoising(jn.reconstruction(module), noise=noise)
    x = BATCH["inputs"].copy()
    x[2, 0, 0, 0] = 200

    @jax.jit
    def loss(images, weights):
        batch = {"inputs": images, "weights": weights}
        return evaluate(objective, params, state, batch, train=True).loss.total

    whole = np.ones(4, np.float32)
    assert np.isfinite(loss(BATCH["inputs"], whole))
    assert np.isnan(loss(x, whole))
    assert np.isfinite(loss(x, np.array([1, 1, 0, 1], np.float32)))
    with pytest.raises(ValueError, match=r"images hold 200, outside of \[0, 1\]; divide gray"):
        jax.eval_shape(lambda: evaluate(objective, params, state, {"inputs": x}))


def test_the_noise_is_independent_of_an_outer_random_transform():
    """Pixels binarized by one transform get independent noise from the next."""
    corrupted_batch = {}

    def spy(params, model_state, batch, rng, *, train):
        corrupted_batch.update(batch)
        return jn.ObjectiveOutput(jn.Mean.of(jnp.zeros(1)), model_state, {})

    def binarized(batch, rng, train):
        return {"inputs": (jax.random.uniform(rng, batch["inputs"].shape) < 0.5).astype(float)}

    wide = {"inputs": jnp.zeros((100, 10, 10, 1))}
    objective = jn.denoising(spy, amount=0.1, image_range=(-1.0, 2.0))
    evaluate(jn.with_batch_transform(objective, binarized), {}, {}, wide, train=True)
    white = np.asarray(corrupted_batch["targets"]).ravel()
    noise = np.asarray(corrupted_batch["inputs"]).ravel() - white
    assert abs(np.corrcoef(white, noise)[0, 1]) < 0.04  # four standard errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: jn.denoising(m, noise="blur"), "noise is 'blur'"),
        (lambda m: jn.denoising(m, noise="masking", amount=1.5), r"amount is 1\.5"),
    ],
)
def test_unknown_noise_or_an_invalid_amount_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(jn.reconstruction(Autoencoder(CONFIG)))
