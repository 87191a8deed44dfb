"""The importance-weighted bound against likelihoods that are known and sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxnets as jn
from jaxnets.models.autoencoder import VAE, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import Bernoulli, Gaussian

CONFIG = EncoderDecoderConfig((3, 4, 1), features=(5,), activation="tanh")
IMAGES = np.random.default_rng(0).uniform(size=(4, 3, 4, 1)).astype(np.float32)
WEIGHTS = np.array([1, 0, 2, 0.5], np.float32)


def made(module, *inputs):
    return jax.jit(module.init)(jax.random.key(0), *inputs)["params"]


def linear_vae(precision=jn.Precision()):
    """Build x ~ N(w z, 0.5^2), z ~ N(0, 1), with its true posterior, and log p(x) of two images."""
    w, variance = np.array([0.8, -0.6, 0.3, 0.5]), 0.25
    config = EncoderDecoderConfig((2, 2, 1), features=())
    likelihood = Gaussian(0.5, image_range=None)
    module = VAE(config, latent_size=1, likelihood=likelihood, precision=precision)
    posterior = 1 / (1 + w @ w / variance)
    params = {
        "mean": {"kernel": (posterior * w / variance)[:, None], "bias": np.zeros(1)},
        "log_variance": {"kernel": np.zeros((4, 1)), "bias": np.log([posterior])},
        "decoder": {"head": {"kernel": w[None], "bias": np.zeros(4)}},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    covariance = np.outer(w, w) + variance * np.eye(4)
    known = scipy.stats.multivariate_normal(np.zeros(4), covariance).logpdf(x)
    return module, params, x.reshape(2, 2, 2, 1), known


def bound(module, params, x, num_samples, seed=0, **keywords):
    return jn.importance_weighted_bound(
        module,
        {"params": params},
        x,
        rng=jax.random.key(seed),
        num_samples=num_samples,
        **keywords,
    )


@pytest.mark.parametrize("num_samples", [1, 7])
def test_with_the_true_posterior_the_bound_is_the_likelihood(num_samples):
    module, params, x, known = linear_vae()
    np.testing.assert_allclose(bound(module, params, x, num_samples), known, rtol=1e-4)


def test_the_bound_of_one_sample_is_the_evidence_bound_and_grows_with_more():
    module, params, x, known = linear_vae()
    params["log_variance"]["bias"] += 0.8  # no longer the true posterior
    mean, log_variance = (
        np.asarray(y) for y in module.apply({"params": params}, x, method="posterior")
    )
    w, variance = np.asarray(params["decoder"]["head"]["kernel"])[0], np.exp(log_variance[:, 0])
    flat = x.reshape(2, 4)
    expected_square = ((flat - mean * w) ** 2).sum(axis=1) + variance * (w @ w)
    evidence = -expected_square / (2 * 0.25) - 2 * np.log(2 * np.pi * 0.25)
    evidence -= (mean**2 + np.exp(log_variance) - 1 - log_variance)[:, 0] / 2
    compiled = jax.jit(jax.vmap(lambda seed: bound(module, params, x, 1, seed)), static_argnums=())
    one = np.asarray(compiled(np.arange(4000)))
    error = one.std(axis=0) / np.sqrt(len(one))
    assert (np.abs(one.mean(axis=0) - evidence) < 5 * error).all()
    many = np.asarray(bound(module, params, x, 2000, chunk_size=500))
    assert (evidence + 5 * error < many).all()
    np.testing.assert_allclose(many, known, atol=0.05)


def test_the_bound_of_one_sample_by_hand():
    module = VAE(CONFIG, latent_size=3)
    params, x = made(module, IMAGES), IMAGES
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (4, 3))
    outputs, mean, log_variance = module.apply({"params": params}, x, noise=noise)
    code, scale = mean + np.exp(log_variance / 2) * noise, np.exp(log_variance / 2)
    expected = -np.asarray(Bernoulli().losses(outputs, x), np.float64)
    expected += scipy.stats.norm.logpdf(code).sum(axis=1)
    expected -= scipy.stats.norm.logpdf(code, mean, scale).sum(axis=1)
    np.testing.assert_allclose(bound(module, params, x, 1), expected, rtol=1e-5)


def test_chunks_change_the_memory_and_not_the_bound():
    module = VAE(CONFIG, latent_size=3, num_classes=2)
    labels = np.array([1, 0, 0, 1], np.int32)
    params = made(module, IMAGES, labels)
    found = [
        bound(module, params, IMAGES, 7, labels=labels, chunk_size=size) for size in (1, 3, 7, 100)
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)
    batch = {"inputs": IMAGES, "labels": labels, "weights": WEIGHTS}
    objective = jn.importance_weighted(module, num_samples=7, chunk_size=3)
    loss = objective(params, {}, batch, jax.random.key(1), train=False).loss
    key = jn.rng_streams(jax.random.key(1), "latent")["latent"]
    same = jn.importance_weighted_bound(
        module, {"params": params}, IMAGES, labels, rng=key, num_samples=7
    )
    assert loss.total == pytest.approx(-np.vdot(WEIGHTS, same), rel=1e-5)
