"""Autoencoders that restore clean images from corrupted ones, whatever their kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.models.autoencoder import VAE, VQVAE, Autoencoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import SquaredError
from jaxnets.objectives.reconstruction import corrupted

CONFIG = EncoderDecoderConfig((3, 4, 1), features=(5,), activation="tanh")
BATCH = {"inputs": np.random.default_rng(0).uniform(size=(4, 3, 4, 1)).astype(np.float32)}


def prepared(module):
    variables = dict(jax.jit(module.init)(jax.random.key(0), BATCH["inputs"]))
    return variables.pop("params"), variables


def evaluate(objective, params, state, batch=BATCH, *, train=False):
    return objective(params, state, batch, jax.random.key(1), train=train)


def noisy_images():
    key = jn.rng_streams(jax.random.key(1), "augmentation")["augmentation"]
    return corrupted(jnp.asarray(BATCH["inputs"]), key, "gaussian", 0.5)


def test_denoising_restores_the_clean_images():
    module = Autoencoder(CONFIG, latent_size=2)
    params, state = prepared(module)
    objective = jn.denoising(jn.reconstruction(module), amount=0.5)
    errors = (module.apply({"params": params}, noisy_images()).outputs - BATCH["inputs"]) ** 2
    for train in (False, True):
        found = evaluate(objective, params, state, train=train).loss.total
        assert found == pytest.approx(float(jnp.sum(errors)), rel=1e-5)


def test_noise_has_the_asked_size_and_stays_in_the_range():
    x = jnp.full((200, 10, 10, 3), 0.5)
    noisy = corrupted(x, jax.random.key(0), "gaussian", 0.1)
    assert np.std(noisy) == pytest.approx(0.1, rel=0.02)
    wild = corrupted(x, jax.random.key(0), "gaussian", 3.0, (-1.0, 1.0))
    assert (wild.min(), wild.max()) == (-1, 1)
    masked = np.asarray(corrupted(x, jax.random.key(0), "masking", 0.25))
    assert np.mean(masked == 0) == pytest.approx(0.25, rel=0.05)
    assert set(np.unique(masked.sum(axis=-1))) == {0.0, 1.5}  # all channels of a pixel at once


@pytest.mark.parametrize("kind", ["vae", "vq_vae"])
def test_distributions_of_codes_and_discrete_codes_restore_the_clean_images_too(kind):
    if kind == "vae":
        module = VAE(CONFIG, latent_size=3)
        noise = jax.random.normal(jn.rng_streams(jax.random.key(1), "latent")["latent"], (4, 3))
        objective, keywords = jn.vae(module), {"noise": noise}
    else:
        module = VQVAE(EncoderDecoderConfig((3, 4, 1), "convolutional", (5,)), 4, embedding_size=2)
        objective, keywords = jn.vq_vae(module), {}
    params, state = prepared(module)
    outputs = module.apply({"params": params, **state}, noisy_images(), **keywords).outputs
    found = evaluate(jn.denoising(objective, amount=0.5), params, state)
    losses = module.likelihood.losses(outputs, BATCH["inputs"])
    assert found.metrics["reconstruction"].total == pytest.approx(float(losses.sum()), rel=1e-5)
    errors = np.square(module.likelihood.mean(outputs) - BATCH["inputs"]).mean()
    assert found.metrics["squared_error"].compute() == pytest.approx(float(errors), rel=1e-5)


def test_a_masked_autoencoder_paints_the_clean_images():
    block = jn.BlockConfig(features=4, num_heads=1, mlp_dim=4)
    module = jn.MaskedAutoencoder(1, 1, block, decoder_num_layers=1, decoder_config=block)
    params, state = prepared(module)
    objective = jn.masked_reconstruction(module, normalize=False)
    noise = jax.random.uniform(jn.rng_streams(jax.random.key(1), "mask")["mask"], (4, 12))
    outputs, masked = module.apply({"params": params}, noisy_images(), noise=noise)
    errors = np.square(np.asarray(outputs)[..., 0] - BATCH["inputs"].reshape(4, 12))
    found = evaluate(jn.denoising(objective, amount=0.5), params, state).loss
    assert found.total == pytest.approx(errors[np.asarray(masked)].mean() * 4, rel=1e-5)


@pytest.mark.parametrize("noise", ["gaussian", "masking"])
def test_clean_images_outside_of_the_range_are_refused_or_nan(noise):
    # A likelihood of any range, so that nothing but the noise minds.
    module = Autoencoder(CONFIG, latent_size=2, likelihood=SquaredError(image_range=None))
    params, state = prepared(module)
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
        evaluate(objective, params, state, {"inputs": x})


def test_the_noise_does_not_depend_on_how_the_images_were_drawn():
    """Black and white pixels, drawn by one transform, get independent noise from the next."""
    seen = {}

    def spy(params, model_state, batch, rng, *, train):
        seen.update(batch)
        return jn.ObjectiveOutput(jn.Mean.of(jnp.zeros(1)), model_state, {})

    def binarised(batch, rng, train):
        return {"inputs": (jax.random.uniform(rng, batch["inputs"].shape) < 0.5).astype(float)}

    wide = {"inputs": jnp.zeros((100, 10, 10, 1))}
    objective = jn.denoising(spy, amount=0.1, image_range=(-1.0, 2.0))
    evaluate(jn.with_batch_transform(objective, binarised), {}, {}, wide, train=True)
    white = np.asarray(seen["targets"]).ravel()
    noise = np.asarray(seen["inputs"]).ravel() - white
    assert abs(np.corrcoef(white, noise)[0, 1]) < 0.04  # four standard errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: jn.denoising(m, noise="blur"), "noise is 'blur'"),
        (lambda m: jn.denoising(m, noise="masking", amount=1.5), r"amount is 1\.5"),
    ],
)
def test_noise_that_is_none_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(jn.reconstruction(Autoencoder(CONFIG)))
