"""The importance-weighted bound against exact likelihoods and sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from checks import random_variables

import jaxnets as jn
from jaxnets.models.autoencoder import VAE, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import Bernoulli, Gaussian

CONFIG = EncoderDecoderConfig((3, 4, 1), features=(5,), activation="tanh")
IMAGES = np.random.default_rng(0).uniform(size=(4, 3, 4, 1)).astype(np.float32)
WEIGHTS = np.array([1, 0, 2, 0.5], np.float32)


def linear_vae(precision=jn.Precision()):
    """Return the model x ~ N(w z, 0.5^2), z ~ N(0, 1) with its exact posterior, its parameters, two
    images x, and their exact log p(x).
    """
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
    exact = scipy.stats.multivariate_normal(np.zeros(4), covariance).logpdf(x)
    return module, params, x.reshape(2, 2, 2, 1), exact


@functools.partial(jax.jit, static_argnames=("module", "num_samples", "chunk_size"))
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
def test_with_the_exact_posterior_the_bound_is_the_likelihood(num_samples):
    module, params, x, exact = linear_vae()
    np.testing.assert_allclose(bound(module, params, x, num_samples), exact, rtol=1e-4)


def test_the_bound_of_one_sample_is_the_evidence_bound_and_grows_with_more():
    module, params, x, exact = linear_vae()
    params["log_variance"]["bias"] += 0.8  # no longer the exact posterior
    mean, log_variance = (
        np.asarray(y) for y in module.apply({"params": params}, x, method="posterior")
    )
    w, variance = np.asarray(params["decoder"]["head"]["kernel"])[0], np.exp(log_variance[:, 0])
    flat = x.reshape(2, 4)
    expected_square = ((flat - mean * w) ** 2).sum(axis=1) + variance * (w @ w)
    evidence = -expected_square / (2 * 0.25) - 2 * np.log(2 * np.pi * 0.25)
    evidence -= (mean**2 + np.exp(log_variance) - 1 - log_variance)[:, 0] / 2
    one = np.asarray(jax.vmap(lambda seed: bound(module, params, x, 1, seed))(np.arange(4000)))
    error = one.std(axis=0) / np.sqrt(len(one))
    assert (np.abs(one.mean(axis=0) - evidence) < 5 * error).all()
    many = np.asarray(bound(module, params, x, 2000, chunk_size=500))
    assert (evidence + 5 * error < many).all()
    np.testing.assert_allclose(many, exact, atol=0.05)


def test_the_bound_of_one_sample_by_hand():
    module = VAE(CONFIG, latent_size=3)
    params, x = random_variables(module, IMAGES)["params"], IMAGES

    @jax.jit
    def run(params):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (4, 3))
        return noise, *module.apply({"params": params}, x, noise=noise)

    noise, outputs, mean, log_variance = map(np.asarray, run(params))
    code, scale = mean + np.exp(log_variance / 2) * noise, np.exp(log_variance / 2)
    expected = -np.asarray(Bernoulli().losses(outputs, x), np.float64)
    expected += scipy.stats.norm.logpdf(code).sum(axis=1)
    expected -= scipy.stats.norm.logpdf(code, mean, scale).sum(axis=1)
    np.testing.assert_allclose(bound(module, params, x, 1), expected, rtol=1e-5)


def test_the_bound_does_not_depend_on_the_chunk_size():
    module = VAE(CONFIG, latent_size=3, num_classes=2)
    labels = np.array([1, 0, 0, 1], np.int32)
    params = random_variables(module, IMAGES, labels)["params"]

    @jax.jit
    def run(params):
        bounds = [
            bound(module, params, IMAGES, 7, labels=labels, chunk_size=size)
            for size in (1, 3, 7, 100)
        ]
        batch = {"inputs": IMAGES, "labels": labels, "weights": WEIGHTS}
        objective = jn.importance_weighted(module, num_samples=7, chunk_size=3)
        loss = objective(params, {}, batch, jax.random.key(1), train=False).loss
        key = jn.rng_streams(jax.random.key(1), "latent")["latent"]
        same = jn.importance_weighted_bound(
            module, {"params": params}, IMAGES, labels, rng=key, num_samples=7
        )
        return bounds, loss, same

    bounds, loss, same = run(params)
    for other in bounds[1:]:
        np.testing.assert_allclose(other, bounds[0], rtol=1e-5)
    assert loss.total == pytest.approx(-np.vdot(WEIGHTS, same), rel=1e-5)
