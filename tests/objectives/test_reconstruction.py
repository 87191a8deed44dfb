"""Objectives of autoencoders against hand-computed values, SciPy and loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from checks import mostly_slow, random_variables

import jaxnets as jn
from jaxnets.functional.gaussian import draw_code, log_prior_ratio, normal_divergence
from jaxnets.models.autoencoder import VAE, VQVAE, Autoencoder, EncoderDecoderConfig
from jaxnets.objectives.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, SquaredError

CONFIG = EncoderDecoderConfig((3, 4, 1), features=(5,), activation="tanh")
WEIGHTS = np.array([1, 0, 2, 0.5], np.float32)


def images(*shape, low=0.0):
    return np.random.default_rng(0).uniform(low, 1, size=shape).astype(np.float32)


BATCH = {"inputs": images(4, 3, 4, 1)}


@functools.cache
def initialized(module):
    labels = [np.zeros(4, np.int32)] * (getattr(module, "num_classes", None) is not None)
    variables = random_variables(module, BATCH["inputs"], *labels)
    return variables.pop("params"), variables


def evaluate(objective, params, state, batch=BATCH, *, train=False):
    return objective(params, state, batch, jax.random.key(1), train=train)


AUTOENCODER = Autoencoder(CONFIG, latent_size=2)
SMALL_VAE = VAE(CONFIG, latent_size=3)
SMALL_VQ_VAE = VQVAE(EncoderDecoderConfig((3, 4, 1), "convolutional", (5,)), 4, embedding_size=2)


def test_the_divergence_equals_a_monte_carlo_estimate_and_the_closed_form():
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


def test_the_log_prior_ratio_is_the_log_ratio_of_the_densities():
    random = np.random.default_rng(0)
    mean, log_variance, noise = random.normal(size=(3, 4, 2)).astype(np.float32)
    code = np.asarray(draw_code(*map(jnp.asarray, (mean, log_variance, noise))))
    expected = scipy.stats.norm.logpdf(code)
    expected -= scipy.stats.norm.logpdf(code, mean, np.exp(log_variance / 2))
    found = log_prior_ratio(*map(jnp.asarray, (code, log_variance, noise)))
    np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-4, atol=1e-5)


def test_reconstruction_sums_weighted_squared_errors():
    params, state = initialized(AUTOENCODER)

    @jax.jit
    def run(params):
        batch = {**BATCH, "weights": WEIGHTS}
        output = evaluate(jn.reconstruction(AUTOENCODER), params, state, batch)
        return output, AUTOENCODER.apply({"params": params}, BATCH["inputs"]).outputs

    output, outputs = run(params)
    errors = np.square(np.asarray(outputs) - BATCH["inputs"]).sum(axis=(1, 2, 3))
    assert output.loss.total == pytest.approx(np.vdot(WEIGHTS, errors), rel=1e-5)
    assert output.loss.count == 3.5
    pixels = output.metrics["squared_error"].compute()
    assert pixels == pytest.approx(np.vdot(WEIGHTS, errors) / 3.5 / 12, rel=1e-5)


def test_the_sparse_penalty_is_the_l1_norm_of_the_code_in_training_only():
    params, state = initialized(AUTOENCODER)
    objective = jn.sparse_reconstruction(AUTOENCODER, weight=0.3)

    @jax.jit
    def run(params):
        return (
            evaluate(jn.reconstruction(AUTOENCODER), params, state).loss.total,
            evaluate(objective, params, state).loss.total,
            evaluate(objective, params, state, train=True),
            AUTOENCODER.apply({"params": params}, BATCH["inputs"]).code,
        )

    plain, evaluated, trained, code = run(params)
    assert evaluated == pytest.approx(float(plain))
    assert trained.loss.total == pytest.approx(float(plain) + 0.3 * np.abs(code).sum(), rel=1e-5)
    assert trained.metrics["penalty"].total == pytest.approx(np.abs(code).sum(), rel=1e-5)
    assert trained.metrics["reconstruction"].total == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("kind", mostly_slow(["dense", "convolutional"], ["dense"]))
def test_the_contractive_penalty_is_the_norm_of_the_jacobian(kind):
    module = Autoencoder(EncoderDecoderConfig((3, 4, 1), kind, (5,), "tanh"), latent_size=2)
    params, state = initialized(module)
    weighted = {**BATCH, "weights": WEIGHTS}

    def penalty(params, num_probes):
        objective = jn.contractive(module, weight=0.7, num_probes=num_probes)
        return evaluate(objective, params, state, train=True).metrics["penalty"].total

    @jax.jit
    def run(params):
        def encode(image):
            return module.apply({"params": params}, image[None], method="encode")[0]

        return (
            evaluate(jn.reconstruction(module), params, state, weighted).loss.total,
            evaluate(jn.contractive(module, weight=0.7), params, state, weighted, train=True),
            jax.vmap(jax.jacrev(encode))(jnp.asarray(BATCH["inputs"])),
            jax.value_and_grad(penalty)(params, 4000),
            jax.value_and_grad(penalty)(params, None),
        )

    plain, exact, jacobians, (estimate, estimated_gradient), (value, gradient) = run(params)
    norms = np.sum(np.square(jacobians), axis=(1, 2, 3, 4))
    expected = np.vdot(WEIGHTS, norms)
    assert exact.metrics["penalty"].total == pytest.approx(expected, rel=1e-5)
    assert exact.loss.total == pytest.approx(float(plain) + 0.7 * expected, rel=1e-5)
    assert estimate == pytest.approx(float(value), rel=0.05)
    for estimated, known in zip(
        jax.tree.leaves(estimated_gradient["encoder"]),
        jax.tree.leaves(gradient["encoder"]),
        strict=True,
    ):
        assert np.any(known)
        np.testing.assert_allclose(estimated, known, atol=0.1 * np.abs(known).max())


FREE_BITS = 0.02


def divergences(mean, log_variance):
    return (mean**2 + np.exp(log_variance) - 1 - log_variance) / 2


@pytest.mark.parametrize("conditional", [False, True])
def test_the_vae_loss_is_the_bound_of_one_latent_sample_per_image(conditional):
    module = VAE(CONFIG, latent_size=3, num_classes=4 if conditional else None)
    labels = [np.array([3, 0, 1, 2], np.int32)] * conditional
    batch = {**BATCH, **({"labels": labels[0]} if conditional else {}), "weights": WEIGHTS}
    params, state = initialized(module)
    cases = list(itertools.product([False, True], [1.0, 2.5], [0.0, FREE_BITS]))

    @jax.jit
    def run(params):
        noise = jax.random.normal(jn.rng_streams(jax.random.key(1), "latent")["latent"], (4, 3))
        outputs, mean, log_variance = module.apply(
            {"params": params}, BATCH["inputs"], *labels, noise=noise
        )
        losses = Bernoulli().losses(outputs, jnp.asarray(BATCH["inputs"]))
        outputs = [
            evaluate(
                jn.vae(module, beta=beta, free_bits=free_bits), params, state, batch, train=train
            )
            for train, beta, free_bits in cases
        ]
        return outputs, losses, mean, log_variance

    outputs, losses, mean, log_variance = jax.tree.map(np.asarray, run(params))
    each = divergences(mean, log_variance)
    assert (each < FREE_BITS).any() and (each > FREE_BITS).any()
    for (train, beta, free_bits), found in zip(cases, outputs, strict=True):
        weight, floored = (beta, np.maximum(each, free_bits)) if train else (1.0, each)
        expected = np.vdot(WEIGHTS, losses + weight * floored.sum(axis=1))
        assert found.loss.total == pytest.approx(expected, rel=1e-5)
        assert found.loss.count == 3.5
        both = [found.metrics[name].total for name in ("reconstruction", "divergence")]
        sums = [np.vdot(WEIGHTS, losses), np.vdot(WEIGHTS, each.sum(axis=1))]
        np.testing.assert_allclose(both, sums, rtol=1e-5)


def test_beta_in_the_model_state_overrides_the_argument():
    module = SMALL_VAE
    params, state = initialized(module)
    given = jn.with_hyperparameters({"params": params}, beta=3.0)
    with_beta = {"hyperparameters": given["hyperparameters"]}

    @jax.jit
    def run(params):
        return (
            evaluate(jn.vae(module), params, with_beta, train=True),
            evaluate(jn.vae(module, beta=3.0), params, state, train=True),
        )

    found, expected = run(params)
    assert found.loss.total == pytest.approx(float(expected.loss.total), rel=1e-6)
    assert jax.tree.structure(found.model_state) == jax.tree.structure(with_beta)


@pytest.mark.parametrize("num_microbatches", mostly_slow([1, 2], [2]))
def test_scheduled_warms_up_the_divergence(num_microbatches):
    params, _ = initialized(SMALL_VAE)
    variables = jn.with_hyperparameters({"params": params}, beta=9.0)
    update = jn.Update(jn.vae(SMALL_VAE), optax.sgd(1e-3))
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
    module = SMALL_VQ_VAE
    params, state = initialized(module)

    @jax.jit
    def run(params):
        batch = {**BATCH, "weights": WEIGHTS}
        return (
            evaluate(jn.vq_vae(module, commitment=0.5), params, state, batch),
            module.apply({"params": params, **state}, BATCH["inputs"]),
        )

    found, quantized = jax.tree.map(np.asarray, run(params))
    errors = np.square(quantized.outputs - BATCH["inputs"]).sum(axis=(1, 2, 3))
    distances = np.square(quantized.vectors - quantized.nearest).sum(axis=(1, 2, 3))
    assert found.loss.total == pytest.approx(np.vdot(WEIGHTS, errors + 0.5 * distances), rel=1e-5)
    usage = np.zeros(4)
    for weight, row in zip(WEIGHTS, quantized.codes, strict=True):
        usage += weight * np.bincount(row.ravel(), minlength=4) / row.size
    np.testing.assert_allclose(found.metrics["code_usage"].total, usage, rtol=1e-6)
    shares = usage[usage > 0] / usage.sum()
    perplexity = jn.metrics.codebook_perplexity(found.metrics["code_usage"])
    assert perplexity == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)
    assert found.metrics["perplexity"].compute() == pytest.approx(4)  # of the initial averages


def test_commitment_moves_the_encoder_towards_its_codes_only():
    module = SMALL_VQ_VAE
    params, state = initialized(module)

    def loss(params, commitment):
        return evaluate(jn.vq_vae(module, commitment=commitment), params, state).loss.total

    @jax.jit
    def run(params):
        vectors, pullback = jax.vjp(
            lambda p: module.apply({"params": p, **state}, BATCH["inputs"], method="encode"), params
        )
        nearest = module.apply({"params": params, **state}, BATCH["inputs"]).nearest
        gradients = [jax.grad(loss)(params, commitment) for commitment in (1.0, 0.0)]
        change = jax.tree.map(jnp.subtract, *gradients)
        return change, pullback(2 * (vectors - nearest))[0]

    change, expected = run(params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(change["decoder"]))
    for one, other in zip(
        jax.tree.leaves(change["embed"]), jax.tree.leaves(expected["embed"]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


LIKELIHOODS = [Bernoulli(), DiscretizedLogistic(), Gaussian(), SquaredError(image_range=None)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda x: type(x).__name__)
def test_images_out_of_range_are_refused_or_nan(likelihood):
    module = VAE(CONFIG, latent_size=2, likelihood=likelihood)
    params, state = initialized(module)
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
        jax.eval_shape(lambda: evaluate(objective, params, state, {"inputs": x}))


BLOCK = jn.BlockConfig(features=4, num_heads=1, mlp_dim=4)
PADDED = {
    "reconstruction": (AUTOENCODER, jn.reconstruction),
    "contractive": (AUTOENCODER, lambda m: jn.contractive(m, weight=0.1)),
    "denoising": (AUTOENCODER, lambda m: jn.denoising(jn.reconstruction(m), noise="masking")),
    "vae": (SMALL_VAE, jn.vae),
    "vq_vae": (SMALL_VQ_VAE, jn.vq_vae),
    "masked": (
        jn.MaskedAutoencoder(1, 1, BLOCK, decoder_num_layers=1, decoder_config=BLOCK),
        jn.masked_reconstruction,
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_of_nan_changes_no_loss_gradient_or_codebook(name):
    module, make = PADDED[name]
    params, state = initialized(module)
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
            "has 'targets', but the bound is that of the inputs",
        ),
    ],
)
def test_invalid_arguments_and_batches_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(Autoencoder(CONFIG))
