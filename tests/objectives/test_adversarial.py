"""The objectives of a GAN: losses and penalties as sums, random streams, refused batches."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal
from checks import assert_close, random_variables
from gan_problem import (
    BATCH,
    DOUBLE,
    INIT,
    LARGER,
    TINY,
    as_double,
    plain,
    problem,
    without,
)

from jaxnets.core import Update, rng_streams
from jaxnets.models.gan import GAN, dcgan
from jaxnets.models.gan.dcgan import DCGANGenerator
from jaxnets.objectives.adversarial import adversarial
from jaxnets.objectives.adversarial_losses import discriminator_loss, generator_loss
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step

# The logit above which an image counts as real; None compares the images of a pair.
THRESHOLDS = {"non_saturating": 0.0, "least_squares": 0.5, "relativistic": None}


@functools.cache
def plain_logits():
    """Return the logits of the real and generated images of BATCH."""
    module = plain()
    variables = problem(adversarial(module), module)[1].variables

    @jax.jit
    def both(variables):
        fake = module.apply(variables, BATCH["latents"], BATCH["labels"], method="generate")
        return [
            module.apply(variables, images, BATCH["labels"], method="discriminate")
            for images in (BATCH["inputs"], fake)
        ]

    return both(variables)


@pytest.mark.parametrize("loss", THRESHOLDS)
def test_objectives_are_weighted_sums_of_the_losses_of_the_logits(loss):
    module = plain()
    objectives = adversarial(module, loss, r1=3.0)
    _, state = problem(objectives, module)
    real_logits, fake_logits = plain_logits()

    @jax.jit
    def evaluate(params):
        return [
            objective(params, {}, BATCH, jax.random.key(2), train=False) for objective in objectives
        ]

    discriminator, generator = evaluate(state.params)
    expected = discriminator_loss(real_logits, fake_logits, loss=loss) @ BATCH["weights"]
    np.testing.assert_allclose(discriminator.loss.total, expected, rtol=1e-5)
    np.testing.assert_allclose(discriminator.loss.count, BATCH["weights"].sum())
    assert set(discriminator.metrics) == {"real_logits", "fake_logits", "accuracy"}
    real, fake = np.asarray(real_logits), np.asarray(fake_logits)
    if (threshold := THRESHOLDS[loss]) is None:
        correct = (real > fake).astype(float)
    else:
        correct = ((real > threshold).astype(float) + (fake <= threshold)) / 2
    expected = correct @ BATCH["weights"]
    np.testing.assert_allclose(discriminator.metrics["accuracy"].total, expected, rtol=1e-6)
    expected = generator_loss(fake_logits, loss=loss, real_logits=real_logits) @ BATCH["weights"]
    np.testing.assert_allclose(generator.loss.total, expected, rtol=1e-5)


class Polynomial(nn.Module):
    """A discriminator whose gradient is 3 / 8 at every pixel (degree 1), or the image itself."""

    degree: int

    def __call__(self, inputs, *, train=False):
        powers = 3 / 8 * inputs if self.degree == 1 else inputs**2 / 2
        return jnp.sum(powers, axis=(1, 2, 3))


@pytest.mark.parametrize("train", [True, False])
def test_penalties_are_added_in_training_only_each_at_its_own_images(train):
    generator = DCGANGenerator((8, 8, 1), latent_size=5, norm=None, width=2, **INIT)
    batch = {name: jnp.asarray(BATCH[name]) for name in ("inputs", "latents")}
    variables = random_variables(generator, batch["latents"])
    fake = jax.jit(generator.apply)(variables, batch["latents"])
    real_squares, fake_squares = np.sum(BATCH["inputs"] ** 2), np.sum(np.square(fake))
    cases = [  # (degree, weights, expected penalty)
        (2, {"r1": 0.5}, 0.25 * real_squares),
        (2, {"r2": 0.5}, 0.25 * fake_squares),
        # The gradient has norm 3 at every interpolate: (3 - 1)^2 for each of 8 images.
        (1, {"gradient_penalty": 0.5}, 0.5 * 4 * 8),
        (1, {"r1": 1.0, "r2": 2.0}, (4.5 + 9) * 8),
    ]

    @jax.jit
    def outputs(generator_params):
        params = {"generator": generator_params, "discriminator": {}}
        return [
            adversarial(GAN(generator, Polynomial(degree)), "wasserstein", **given).discriminator(
                params, {}, batch, jax.random.key(0), train=train
            )
            for degree, weights, _ in cases
            for given in ({}, weights)
        ]

    found = outputs(variables["params"])
    for (_, _, expected), without_penalty, output in zip(
        cases, found[::2], found[1::2], strict=True
    ):
        added = output.loss.total - without_penalty.loss.total
        np.testing.assert_allclose(added, train * expected, rtol=1e-4)
        if train:
            np.testing.assert_allclose(output.metrics["penalty"].total, added, rtol=1e-4)
        assert "penalty" not in without_penalty.metrics


def test_the_gradient_of_the_discriminator_loss_with_a_penalty_equals_differences(enable_x64):
    module = plain(DOUBLE)
    objectives = adversarial(module, "wasserstein", gradient_penalty=10.0)
    _, state = problem(objectives, module)
    batch = as_double(BATCH)

    def total(discriminator):
        params = {**state.params, "discriminator": discriminator}
        return objectives.discriminator(params, {}, batch, jax.random.key(0), train=True).loss.total

    params = jax.tree.map(np.asarray, state.params["discriminator"])
    random = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: random.normal(size=x.shape), params)
    value_and_grad = jax.jit(jax.value_and_grad(total))  # one program for three points
    gradient = value_and_grad(params)[1]
    ahead, behind = (
        value_and_grad(jax.tree.map(lambda x, d, s=step: x + s * d, params, direction))[0]
        for step in (1e-6, -1e-6)
    )
    along = sum(
        float(np.vdot(a, b))
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert abs(along) > 0.1
    np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=1e-6)


class Recorder:
    """A GAN that records the latents, and the dropout key of each pass of its discriminator."""

    latent_size, num_classes = 5, None

    def __init__(self):
        self.latents, self.dropout = [], []

    def apply(self, variables, inputs, labels, *, method, rngs, **keywords):
        if method == "generate":
            self.latents.append(inputs)
            return jnp.zeros_like(BATCH["inputs"]) + variables["params"]["discriminator"], {}
        self.dropout.append(tuple(jax.random.key_data(rngs["dropout"]).tolist()))
        return jnp.sum(inputs, axis=(1, 2, 3)), {}


def test_each_pass_of_the_discriminator_has_a_dropout_stream_that_no_other_pass_shifts():
    batch = {"inputs": BATCH["inputs"], "latents": BATCH["latents"]}
    key, params = jax.random.key(3), {"discriminator": jnp.zeros(())}

    def dropout_keys(name, loss="wasserstein", **penalties):
        module = Recorder()
        objective = getattr(adversarial(module, loss, **penalties), name)
        objective(params, {}, batch, key, train=True)
        return module.dropout

    real, fake, penalty = (
        tuple(jax.random.key_data(stream).tolist())
        for stream in rng_streams(key, "dropout_real", "dropout_fake", "dropout_penalty").values()
    )
    assert len({real, fake, penalty}) == 3
    assert dropout_keys("discriminator") == [real, fake]
    assert dropout_keys("discriminator", r1=1.0, r2=1.0) == [real, fake]
    assert dropout_keys("discriminator", gradient_penalty=1.0) == [real, fake, penalty]
    assert dropout_keys("generator") == [fake]
    assert dropout_keys("generator", "relativistic") == [real, fake]


def test_latents_are_drawn_anew_for_every_step_seed_and_update():
    module = Recorder()
    objectives = adversarial(module)
    sgd = optax.sgd(0.1)
    updates = [Update(objective, sgd, wrt="discriminator") for objective in objectives]
    params = {"generator": jnp.zeros(()), "discriminator": jnp.zeros(())}
    state = create_train_state({"params": params}, updates, rng=jax.random.key(0))
    batch = without(BATCH, "latents", "weights")
    for step in (0, 1):
        for seed in (0, 1):
            start = dataclasses.replace(state, step=jnp.int32(step), rng=jax.random.key(seed))
            make_train_step(updates)(start, batch)
    draws = np.stack(module.latents)
    assert draws.shape == (8, 8, 5) and draws.dtype == np.float32
    assert len(np.unique(draws.round(6))) == draws.size
    assert abs(draws.mean()) < 0.2 and abs(draws.std() - 1) < 0.2


def test_real_and_generated_images_are_normalized_as_two_batches():
    module = dcgan((16, 16, 1), norm="batch", **TINY)
    objectives = adversarial(module)
    _, state = problem(objectives, module)

    def call(variables, inputs, method):
        weights = jnp.tile(LARGER["weights"], len(inputs) // 8)
        keywords = {"train": True, "weights": weights, "mutable": ["batch_stats"]}
        output, changed = module.apply(variables, inputs, method=method, **keywords)
        return output, {**variables, **changed}

    @jax.jit
    def run(state):
        found = objectives.discriminator(
            state.params, state.model_state, LARGER, jax.random.key(0), train=True
        )
        fake, _ = call(state.variables, LARGER["latents"], "generate")
        after_real = call(state.variables, LARGER["inputs"], "discriminate")
        after_both = call(after_real[1], fake, "discriminate")
        _, after_fake = call(state.variables, fake, "discriminate")
        _, reversed_order = call(after_fake, LARGER["inputs"], "discriminate")
        images = jnp.concatenate([LARGER["inputs"], fake])
        one_batch, _ = call(state.variables, images, "discriminate")
        return found, after_real, after_both, reversed_order, one_batch

    found, (real_logits, _), (fake_logits, after_both), reversed_order, one_batch = run(state)
    for name, logits in (("real_logits", real_logits), ("fake_logits", fake_logits)):
        np.testing.assert_allclose(
            found.metrics[name].total, logits @ LARGER["weights"], rtol=1e-4, atol=1e-5
        )
    statistics = found.model_state["batch_stats"]["discriminator"]
    expected = after_both["batch_stats"]["discriminator"]
    assert_close(statistics, expected, 1e-6)
    # The reverse order and one batch of both give other results.
    mean, other = statistics["norm_2"]["mean"], reversed_order["batch_stats"]["discriminator"]
    assert np.abs(mean - other["norm_2"]["mean"]).max() > 1e-4
    assert np.abs(one_batch[:8] - real_logits).max() > 1e-3


def test_padding_of_nan_changes_no_loss_or_gradient():
    module = plain()
    objectives = adversarial(module, r1=0.1)
    _, state = problem(objectives, module)

    @jax.jit
    def trained(images):
        def loss(params, objective):
            batch = {**BATCH, "inputs": images}
            return objective(params, {}, batch, jax.random.key(0), train=True).loss.total

        return [jax.value_and_grad(loss)(state.params, objective) for objective in objectives]

    black, broken = BATCH["inputs"].copy(), BATCH["inputs"].copy()
    black[4], broken[4] = 0, np.nan  # of weight 0
    assert_bitwise_equal(trained(broken), trained(black))


def test_an_evaluation_is_the_same_at_every_call_and_changes_no_statistics():
    module = dcgan((8, 8, 1), norm="batch", **TINY)
    objectives = adversarial(module)
    _, state = problem(objectives, module)
    evaluate = jax.jit(make_eval_step(objectives.discriminator))
    batch = without(BATCH, "latents")
    first, second = (evaluate(state, batch) for _ in range(2))
    assert_bitwise_equal(first, second)
    assert set(first) == {"loss", "real_logits", "fake_logits", "accuracy"}


def plain_params():
    return problem(adversarial(plain()), plain())[1].params


def run(name, params, batch):
    """Run one of the objectives of the plain GAN."""
    objective = getattr(adversarial(plain()), name)
    return objective(params, {}, batch, jax.random.key(0), train=True)


@pytest.mark.parametrize("name", ["discriminator", "generator"])
@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        (
            {"inputs": 127.5 * (BATCH["inputs"] + 1)},
            (),
            r"images hold 25\d.*, outside of \[-1, 1\]; divide gray levels by 127.5 and subtract 1",
        ),
        ({"inputs": np.full((8, 8, 8, 1), np.nan, np.float32)}, (), "images hold nan"),
        (
            {"inputs": np.zeros((8, 8, 8, 1), np.uint8)},
            (),
            r"type uint8; give floats: divide.* 127",
        ),
        ({"inputs": BATCH["inputs"][:, :4]}, (), r"\(4, 8, 1\) do not fit a generator of \(8, 8"),
        ({}, ("inputs",), r"lacks \['inputs'\]; name its arrays \['inputs', 'labels'\]"),
        ({}, ("labels",), r"lacks \['labels'\]"),
        ({"labels": BATCH["labels"] + 2}, (), r"is not in \[0, 3\)"),
        ({"latents": BATCH["latents"][:, :4]}, (), r"latents of shape \(8, 4\).*latent_size 5"),
        ({"labels": BATCH["labels"][:4]}, (), "differ in their number of examples"),
    ],
)
def test_a_bad_batch_is_refused_with_value_and_remedy(changes, drop, message, name):
    batch, params = {**without(BATCH, *drop), **changes}, plain_params()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: run(name, params, batch))


def test_bad_pixels_in_a_compiled_program_make_the_loss_nan():
    bright = BATCH["inputs"].copy()
    bright[0, 0, 0, 0] = 1.5
    padding = np.array([0, 1, 1, 1, 1, 1, 1, 1], np.float32)

    params = plain_params()

    @jax.jit
    def losses(inputs, weights):
        batch = {**BATCH, "inputs": inputs, "weights": weights}
        outputs = [run(name, params, batch) for name in ("discriminator", "generator")]
        return jnp.stack([output.loss.total for output in outputs])

    assert np.isfinite(losses(BATCH["inputs"], BATCH["weights"])).all()
    assert np.isnan(losses(bright, BATCH["weights"])).all()
    assert np.isfinite(losses(bright, padding)).all()


def test_invalid_arguments_of_the_objectives_are_refused():
    with pytest.raises(ValueError, match="unknown loss 'wgan'; choose one of non_saturating"):
        adversarial(plain(), "wgan")
    with pytest.raises(ValueError, match=r"r1 is -1\.0; give 0 or more"):
        adversarial(plain(), r1=-1.0)
    module = dcgan((16, 16, 1), norm="batch", **TINY)
    objectives = adversarial(module, gradient_penalty=10.0)
    updates, state = problem(objectives, module)
    with pytest.raises(ValueError, match="this one has a batch norm; build it with norm=None"):
        make_train_step(updates)(state, LARGER)
