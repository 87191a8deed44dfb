"""Losses of autoencoders against hand-computed numbers, scipy, and plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from checks import mostly_slow

import jaxnets as jn
from jaxnets.functional.gaussian import draw_code, log_prior_ratio, normal_divergence
from jaxnets.models.autoencoder import VAE, VQVAE, Autoencoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, SquaredError

CONFIG = EncoderDecoderConfig((3, 4, 1), features=(5,), activation="tanh")
WEIGHTS = np.array([1, 0, 2, 0.5], np.float32)


def images(*shape, low=0.0):
    return np.random.default_rng(0).uniform(low, 1, size=shape).astype(np.float32)


BATCH = {"inputs": images(4, 3, 4, 1)}


def prepared(module, *inputs):
    variables = dict(jax.jit(module.init)(jax.random.key(0), *(inputs or [BATCH["inputs"]])))
    return variables.pop("params"), variables


def evaluate(objective, params, state, batch=BATCH, *, train=False):
    return objective(params, state, batch, jax.random.key(1), train=train)


def test_the_divergence_equals_monte_carlo_and_its_own_formula():
    random = np.random.default_rng(0)
    mean, log_variance = random.normal(size=(2, 3)), random.normal(size=(2, 3))
    found = np.asarray(normal_divergence(jnp.asarray(mean), jnp.asarray(log_variance)))
    exact = (mean**2 + np.exp(log_variance) - 1 - log_variance) / 2
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    scale = np.exp(log_variance / 2)
    codes = mean + scale * random.normal(size=(200_000, 2, 3))
    ratios = scipy.stats.norm.logpdf(codes, mean, scale) - scipy.stats.norm.logpdf(codes)
    error = ratios.std(axis=0) / np.sqrt(len(codes))
    assert (np.abs(found - ratios.mean(axis=0)) < 5 * error).all()


def test_the_ratio_of_prior_and_posterior_is_that_of_the_densities():
    random = np.random.default_rng(0)
    mean, log_variance, noise = random.normal(size=(3, 4, 2)).astype(np.float32)
    code = np.asarray(draw_code(*map(jnp.asarray, (mean, log_variance, noise))))
    expected = scipy.stats.norm.logpdf(code)
    expected -= scipy.stats.norm.logpdf(code, mean, np.exp(log_variance / 2))
    found = log_prior_ratio(*map(jnp.asarray, (code, log_variance, noise)))
    np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-4, atol=1e-5)


def test_reconstruction_sums_weighted_squared_errors():
    module = Autoencoder(CONFIG, latent_size=2)
    params, state = prepared(module)
    output = evaluate(jn.reconstruction(module), params, state, {**BATCH, "weights": WEIGHTS})
    errors = (module.apply({"params": params}, BATCH["inputs"]).outputs - BATCH["inputs"]) ** 2
    errors = np.asarray(errors).sum(axis=(1, 2, 3))
    assert output.loss.total == pytest.approx(np.vdot(WEIGHTS, errors), rel=1e-5)
    assert output.loss.count == 3.5
    pixels = output.metrics["squared_error"].compute()
    assert pixels == pytest.approx(np.vdot(WEIGHTS, errors) / 3.5 / 12, rel=1e-5)


def test_the_sparse_penalty_is_the_absolute_code_in_training_only():
    module = Autoencoder(CONFIG, latent_size=2)
    params, state = prepared(module)
    plain = evaluate(jn.reconstruction(module), params, state).loss.total
    objective = jn.sparse_reconstruction(module, weight=0.3)
    code = np.asarray(module.apply({"params": params}, BATCH["inputs"]).code)
    assert evaluate(objective, params, state).loss.total == pytest.approx(float(plain))
    trained = evaluate(objective, params, state, train=True)
    assert trained.loss.total == pytest.approx(float(plain) + 0.3 * np.abs(code).sum(), rel=1e-5)
    assert trained.metrics["penalty"].total == pytest.approx(np.abs(code).sum(), rel=1e-5)
    assert trained.metrics["reconstruction"].total == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("kind", mostly_slow(["dense", "convolutional"], ["dense"]))
def test_the_contractive_penalty_is_the_norm_of_the_jacobian(kind):
    module = Autoencoder(EncoderDecoderConfig((3, 4, 1), kind, (5,), "tanh"), latent_size=2)
    params, state = prepared(module)
    weighted = {**BATCH, "weights": WEIGHTS}
    plain = evaluate(jn.reconstruction(module), params, state, weighted).loss.total

    def encode(image):
        return module.apply({"params": params}, image[None], method="encode")[0]

    jacobians = jax.vmap(jax.jacrev(encode))(BATCH["inputs"])
    norms = np.sum(np.square(jacobians), axis=(1, 2, 3, 4))
    exact = evaluate(jn.contractive(module, weight=0.7), params, state, weighted, train=True)
    expected = np.vdot(WEIGHTS, norms)
    assert exact.metrics["penalty"].total == pytest.approx(expected, rel=1e-5)
    assert exact.loss.total == pytest.approx(float(plain) + 0.7 * expected, rel=1e-5)

    def loss(params, num_probes):
        objective = jn.contractive(module, weight=0.7, num_probes=num_probes)
        return evaluate(objective, params, state, train=True).metrics["penalty"].total

    estimate, gradient = jax.value_and_grad(loss)(params, 4000)
    value, expected = jax.value_and_grad(loss)(params, None)
    assert estimate == pytest.approx(float(value), rel=0.05)
    one, other = (tree["encoder"] for tree in (gradient, expected))
    for estimated, known in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.any(known)
        np.testing.assert_allclose(estimated, known, atol=0.1 * np.abs(known).max())


def divergences(mean, log_variance):
    return (mean**2 + np.exp(log_variance) - 1 - log_variance) / 2


@pytest.mark.parametrize("conditional", [False, True])
def test_the_vae_loss_is_the_bound_of_one_code_per_image(conditional):
    module = VAE(CONFIG, latent_size=3, num_classes=4 if conditional else None)
    labels = [np.array([3, 0, 1, 2], np.int32)] * conditional
    batch = {**BATCH, **({"labels": labels[0]} if conditional else {}), "weights": WEIGHTS}
    params, state = prepared(module, BATCH["inputs"], *labels)
    noise = jax.random.normal(jn.rng_streams(jax.random.key(1), "latent")["latent"], (4, 3))
    outputs, mean, log_variance = module.apply(
        {"params": params}, BATCH["inputs"], *labels, noise=noise
    )
    losses = np.asarray(Bernoulli().losses(outputs, BATCH["inputs"]))
    each = np.asarray(divergences(mean, log_variance))
    floor = np.median(each)
    for train, beta, free_bits in itertools.product([False, True], [1.0, 2.5], [0.0, floor]):
        objective = jn.vae(module, beta=beta, free_bits=free_bits)
        found = evaluate(objective, params, state, batch, train=train)
        weight, floored = (beta, np.maximum(each, free_bits)) if train else (1.0, each)
        expected = np.vdot(WEIGHTS, losses + weight * floored.sum(axis=1))
        assert found.loss.total == pytest.approx(expected, rel=1e-5)
        assert found.loss.count == 3.5
        both = [found.metrics[name].total for name in ("reconstruction", "divergence")]
        sums = [np.vdot(WEIGHTS, losses), np.vdot(WEIGHTS, each.sum(axis=1))]
        np.testing.assert_allclose(both, sums, rtol=1e-5)


def test_beta_in_the_model_state_takes_the_place_of_the_argument():
    module = VAE(CONFIG, latent_size=3)
    params, state = prepared(module)
    given = jn.with_hyperparameters({"params": params}, beta=3.0)
    held = {"hyperparameters": given["hyperparameters"]}
    found = evaluate(jn.vae(module), params, held, train=True)
    expected = evaluate(jn.vae(module, beta=3.0), params, state, train=True)
    assert found.loss.total == pytest.approx(float(expected.loss.total), rel=1e-6)
    assert jax.tree.structure(found.model_state) == jax.tree.structure(held)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_the_divergence_is_warmed_up_by_the_step(num_microbatches):
    module = VAE(CONFIG, latent_size=3)
    params, _ = prepared(module)
    variables = jn.with_hyperparameters({"params": params}, beta=9.0)
    update = jn.Update(jn.vae(module), optax.sgd(1e-3))
    state = jn.create_train_state(variables, update, rng=jax.random.key(0))
    inner = jn.make_train_step(update, num_microbatches=num_microbatches)
    step = jn.jit_step(jn.scheduled(inner, beta=optax.linear_schedule(0.0, 1.0, 2)))
    for expected in (0.0, 0.5, 1.0, 1.0):
        state, metrics = step(state, BATCH)
        assert state.model_state["hyperparameters"]["beta"] == pytest.approx(expected)
        total = metrics["reconstruction"].total + expected * metrics["divergence"].total
        assert metrics["loss"].total == pytest.approx(float(total), rel=1e-5)
    with pytest.raises(ValueError, match=r"no 'gamma'; give create_train_state with_hyperparam"):
        jn.scheduled(inner, gamma=optax.constant_schedule(1.0))(state, BATCH)


def test_the_vq_loss_is_reconstruction_plus_commitment():
    module = VQVAE(EncoderDecoderConfig((3, 4, 1), "convolutional", (5,)), 4, embedding_size=2)
    params, state = prepared(module)
    found = evaluate(
        jn.vq_vae(module, commitment=0.5), params, state, {**BATCH, "weights": WEIGHTS}
    )
    quantized = module.apply({"params": params, **state}, BATCH["inputs"])
    errors = np.square(quantized.outputs - BATCH["inputs"]).sum(axis=(1, 2, 3))
    distances = np.square(quantized.vectors - quantized.nearest).sum(axis=(1, 2, 3))
    assert found.loss.total == pytest.approx(np.vdot(WEIGHTS, errors + 0.5 * distances), rel=1e-5)
    usage = np.zeros(4)
    for weight, row in zip(WEIGHTS, np.asarray(quantized.codes), strict=True):
        usage += weight * np.bincount(row.ravel(), minlength=4) / row.size
    np.testing.assert_allclose(found.metrics["code_usage"].total, usage, rtol=1e-6)
    shares = usage[usage > 0] / usage.sum()
    perplexity = jn.metrics.codebook_perplexity(found.metrics["code_usage"])
    assert perplexity == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)
    assert found.metrics["perplexity"].compute() == pytest.approx(4)  # the averages at the start


def test_commitment_draws_the_encoder_to_its_codes_and_not_the_other_way():
    module = VQVAE(EncoderDecoderConfig((3, 4, 1), "convolutional", (5,)), 4, embedding_size=2)
    params, state = prepared(module)

    def loss(params, commitment):
        return evaluate(jn.vq_vae(module, commitment=commitment), params, state).loss.total

    change = jax.tree.map(jnp.subtract, jax.grad(loss)(params, 1.0), jax.grad(loss)(params, 0.0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(change["decoder"]))
    vectors, pullback = jax.vjp(
        lambda p: module.apply({"params": p, **state}, BATCH["inputs"], method="encode"), params
    )
    nearest = module.apply({"params": params, **state}, BATCH["inputs"]).nearest
    (expected,) = pullback(2 * (vectors - nearest))
    for one, other in zip(
        jax.tree.leaves(change["embed"]), jax.tree.leaves(expected["embed"]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


LIKELIHOODS = [Bernoulli(), DiscretizedLogistic(), Gaussian(), SquaredError(image_range=None)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda x: type(x).__name__)
def test_images_out_of_range_are_refused_or_nan(likelihood):
    module = VAE(CONFIG, latent_size=2, likelihood=likelihood)
    params, state = prepared(module)
    objective = jn.vae(module)
    x = BATCH["inputs"].copy()
    x[2, 0, 0, 0] = -1.25
    compiled = jax.jit(
        lambda batch, weights: (
            evaluate(objective, params, state, {"inputs": batch, "weights": weights}).loss.total
        )
    )
    assert np.isfinite(compiled(BATCH["inputs"], WEIGHTS))
    assert np.isfinite(compiled(x, WEIGHTS * np.array([1, 1, 0, 1], np.float32)))
    if likelihood.image_range is None:
        assert np.isfinite(compiled(x, WEIGHTS))
        return
    assert np.isnan(compiled(x, WEIGHTS))
    low = f"{likelihood.image_range[0]:g}"
    with pytest.raises(ValueError, match=rf"images hold -1\.25, outside of \[{low}, 1\]; divide"):
        evaluate(objective, params, state, {"inputs": x})


BLOCK = jn.BlockConfig(features=4, num_heads=1, mlp_dim=4)
PADDED = {
    "reconstruction": (Autoencoder(CONFIG, latent_size=2), jn.reconstruction),
    "contractive": (Autoencoder(CONFIG, latent_size=2), lambda m: jn.contractive(m, weight=0.1)),
    "denoising": (
        Autoencoder(CONFIG, latent_size=2),
        lambda m: jn.denoising(jn.reconstruction(m), noise="masking"),
    ),
    "vae": (VAE(CONFIG, latent_size=2), jn.vae),
    "vq_vae": (VQVAE(EncoderDecoderConfig((3, 4, 1), "convolutional", (5,)), 4, 2), jn.vq_vae),
    "masked": (
        jn.MaskedAutoencoder(1, 1, BLOCK, decoder_num_layers=1, decoder_config=BLOCK),
        jn.masked_reconstruction,
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_of_nan_changes_no_loss_gradient_or_codebook(name):
    module, make = PADDED[name]
    params, state = prepared(module)
    objective = make(module)

    @jax.jit
    def trained(images, weights):
        def loss(params):
            batch = {"inputs": images, "weights": weights}
            output = evaluate(objective, params, state, batch, train=True)
            return output.loss.total, output.model_state

        return jax.value_and_grad(loss, has_aux=True)(params)

    black, broken = BATCH["inputs"].copy(), BATCH["inputs"].copy()
    black[1], broken[1] = 0, np.nan
    jax.tree.map(np.testing.assert_array_equal, trained(broken, WEIGHTS), trained(black, WEIGHTS))
    assert np.isnan(trained(broken, np.ones(4, np.float32))[0][0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: jn.sparse_reconstruction(m, weight=-1.0), r"weight is -1\.0"),
        (lambda m: jn.contractive(m, weight=1.0, num_probes=0), "num_probes is 0"),
        (
            lambda m: jn.contractive(
                Autoencoder(EncoderDecoderConfig((3, 4, 1), norm="batch")), weight=1.0
            ),
            "a batch norm mixes the examples",
        ),
        (lambda m: jn.vae(m, beta=-1.0), r"beta is -1\.0"),
        (lambda m: jn.vq_vae(m, commitment=-1.0), r"commitment is -1\.0"),
        (lambda m: jn.importance_weighted(m, num_samples=0), "num_samples is 0"),
        (
            lambda m: evaluate(jn.vae(VAE(CONFIG, num_classes=3)), {}, {}),
            r"lacks \['labels'\]",
        ),
        (
            lambda m: evaluate(jn.reconstruction(m), {}, {}, {"images": BATCH["inputs"]}),
            r"lacks \['inputs'\]",
        ),
        (
            lambda m: evaluate(
                jn.importance_weighted(VAE(CONFIG), num_samples=1),
                {},
                {},
                {**BATCH, "targets": BATCH["inputs"]},
            ),
            "has 'targets', and the bound is that of the inputs",
        ),
    ],
)
def test_objectives_refuse_what_they_cannot_compute(build, message):
    with pytest.raises(ValueError, match=message):
        build(Autoencoder(CONFIG))
