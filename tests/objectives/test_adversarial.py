"""The objectives of a GAN: losses and penalties as sums, random streams, refused batches."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal
from checks import assert_close
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

from jaxnets.core import Update
from jaxnets.models.gan import GAN, dcgan
from jaxnets.models.gan.dcgan import DCGANGenerator
from jaxnets.objectives.adversarial import adversarial
from jaxnets.objectives.adversarial_losses import discriminator_loss, generator_loss
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step

# The logit from which on an image counts as real; without one, the images of a pair compare.
THRESHOLDS = {"non_saturating": 0.0, "least_squares": 0.5, "relativistic": None}


@pytest.mark.parametrize("loss", THRESHOLDS)
def test_objectives_are_weighted_sums_of_the_losses_of_the_logits(loss):
    module = plain()
    objectives = adversarial(module, loss, r1=3.0)
    _, state = problem(objectives, module)
    params, rng = state.params, jax.random.key(2)
    fake = module.apply(state.variables, BATCH["latents"], BATCH["labels"], method="generate")
    real_logits, fake_logits = (
        module.apply(state.variables, images, BATCH["labels"], method="discriminate")
        for images in (BATCH["inputs"], fake)
    )
    critic = objectives.discriminator(params, {}, BATCH, rng, train=False)
    expected = discriminator_loss(real_logits, fake_logits, loss=loss) @ BATCH["weights"]
    np.testing.assert_allclose(critic.loss.total, expected, rtol=1e-5)
    np.testing.assert_allclose(critic.loss.count, BATCH["weights"].sum())
    assert set(critic.metrics) == {"real_logits", "fake_logits", "accuracy"}
    if (threshold := THRESHOLDS[loss]) is None:
        right = np.asarray(real_logits > fake_logits, float)
    else:
        right = (np.asarray(real_logits > threshold, float) + (fake_logits <= threshold)) / 2
    expected = right @ BATCH["weights"]
    np.testing.assert_allclose(critic.metrics["accuracy"].total, expected, rtol=1e-6)
    artist = objectives.generator(params, {}, BATCH, rng, train=False)
    expected = generator_loss(fake_logits, loss=loss, real_logits=real_logits) @ BATCH["weights"]
    np.testing.assert_allclose(artist.loss.total, expected, rtol=1e-5)


class Polynomial(nn.Module):
    """A discriminator whose gradient is 3 / 8 at every pixel, or the image itself."""

    degree: int

    def __call__(self, inputs, *, train=False):
        powers = 3 / 8 * inputs if self.degree == 1 else inputs**2 / 2
        return jnp.sum(powers, axis=(1, 2, 3))


@pytest.mark.parametrize("train", [True, False])
def test_penalties_are_added_in_training_at_the_images_they_are_for(train):
    generator = DCGANGenerator((8, 8, 1), latent_size=5, norm=None, width=2, **INIT)
    batch = {"inputs": jnp.asarray(BATCH["inputs"]), "latents": jnp.asarray(BATCH["latents"])}
    variables = generator.init(jax.random.key(0), batch["latents"])
    params = {"generator": variables["params"], "discriminator": {}}
    fake = generator.apply(variables, batch["latents"])
    squares = {"r1": np.sum(BATCH["inputs"] ** 2), "r2": np.sum(np.square(fake))}

    def added(degree, **factors):
        module = GAN(generator, Polynomial(degree))
        outputs = [
            adversarial(module, "wasserstein", **given).discriminator(
                params, {}, batch, jax.random.key(0), train=train
            )
            for given in ({}, factors)
        ]
        more = outputs[1].loss.total - outputs[0].loss.total
        if train:
            np.testing.assert_allclose(outputs[1].metrics["penalty"].total, more, rtol=1e-4)
        assert "penalty" not in outputs[0].metrics
        return float(more)

    for name, total in squares.items():
        np.testing.assert_allclose(added(2, **{name: 0.5}), train * 0.25 * total, rtol=1e-4)
    # The gradient is 3 long wherever between the images it is taken: (3 - 1)^2 for each of 8.
    np.testing.assert_allclose(added(1, gradient_penalty=0.5), train * 0.5 * 4 * 8, rtol=1e-4)
    both = added(1, r1=1.0, r2=2.0)
    np.testing.assert_allclose(both, train * (4.5 + 9) * 8, rtol=1e-4)


def test_the_gradient_of_the_whole_critic_with_a_penalty_equals_differences(enable_x64):
    module = plain(DOUBLE)
    objectives = adversarial(module, "wasserstein", gradient_penalty=10.0)
    _, state = problem(objectives, module)
    batch = as_double(BATCH)

    @jax.jit
    def total(critic):
        params = {**state.params, "discriminator": critic}
        return objectives.discriminator(params, {}, batch, jax.random.key(0), train=True).loss.total

    critic = state.params["discriminator"]
    slopes = jax.jit(jax.grad(total))(critic)
    random = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: random.normal(size=x.shape), critic)
    ahead, behind = (
        total(jax.tree.map(lambda x, d, s=step: x + s * d, critic, direction))
        for step in (1e-6, -1e-6)
    )
    along = sum(
        float(jnp.vdot(a, b))
        for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(direction), strict=True)
    )
    assert abs(along) > 0.1
    np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=1e-6)


def test_latents_are_drawn_anew_for_every_step_seed_and_update():
    module = plain()
    _, state = problem(adversarial(module), module)
    seen = []

    class Spy:
        latent_size, num_classes = module.latent_size, None

        def apply(self, variables, inputs, labels, *, method, **keywords):
            if method == "generate":
                seen.append(inputs)
                return jnp.zeros_like(BATCH["inputs"]) + variables["params"]["discriminator"], {}
            return jnp.sum(inputs, axis=(1, 2, 3)), {}

    objectives = adversarial(Spy())
    sgd = optax.sgd(0.1)
    updates = [Update(objective, sgd, wrt="discriminator") for objective in objectives]
    params = {"generator": jnp.zeros(()), "discriminator": jnp.zeros(())}
    state = create_train_state({"params": params}, updates, rng=jax.random.key(0))
    batch = without(BATCH, "latents", "weights")
    for step in (0, 1):
        for seed in (0, 1):
            start = dataclasses.replace(state, step=jnp.int32(step), rng=jax.random.key(seed))
            make_train_step(updates)(start, batch)
    draws = np.stack(seen)
    assert draws.shape == (8, 8, 5) and draws.dtype == np.float32
    assert len(np.unique(draws.round(6))) == draws.size
    assert abs(draws.mean()) < 0.2 and abs(draws.std() - 1) < 0.2


def test_real_and_generated_images_are_normalized_as_two_batches():
    module = dcgan((16, 16, 1), norm="batch", **TINY)
    objectives = adversarial(module)
    _, state = problem(objectives, module)
    found = objectives.discriminator(
        state.params, state.model_state, LARGER, jax.random.key(0), train=True
    )

    def call(variables, inputs, method):
        output, changed = module.apply(
            variables, inputs, train=True, mutable=["batch_stats"], method=method
        )
        return output, {**variables, **changed}

    fake, _ = call(state.variables, LARGER["latents"], "generate")
    real_logits, after_real = call(state.variables, LARGER["inputs"], "discriminate")
    fake_logits, after_both = call(after_real, fake, "discriminate")
    for name, logits in (("real_logits", real_logits), ("fake_logits", fake_logits)):
        np.testing.assert_allclose(
            found.metrics[name].total, logits @ LARGER["weights"], rtol=1e-4, atol=1e-5
        )
    statistics = found.model_state["batch_stats"]["discriminator"]
    expected = after_both["batch_stats"]["discriminator"]
    assert_close(statistics, expected, 1e-6)
    # Neither the other order nor one batch of both would do.
    first = call(call(state.variables, fake, "discriminate")[1], LARGER["inputs"], "discriminate")
    mean = statistics["norm_2"]["mean"]
    assert np.abs(mean - first[1]["batch_stats"]["discriminator"]["norm_2"]["mean"]).max() > 1e-4
    both, _ = call(state.variables, jnp.concatenate([LARGER["inputs"], fake]), "discriminate")
    assert np.abs(both[:8] - real_logits).max() > 1e-3


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


def bad(objectives, changes, *, name="discriminator", drop=(), compiled=False):
    module = plain()
    updates, state = problem(adversarial(module), module)
    del updates
    batch = {**without(BATCH, *drop), **changes}
    objective = getattr(objectives, name)

    def run(batch):
        return objective(state.params, {}, batch, jax.random.key(0), train=True)

    return (jax.jit(run) if compiled else run)(batch)


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
        ({}, ("inputs",), "name its images 'inputs'"),
        ({}, ("labels",), "no 'labels'; a conditional network of 3 classes"),
        ({"labels": BATCH["labels"] + 2}, (), r"is not in \[0, 3\)"),
        ({"latents": BATCH["latents"][:, :4]}, (), r"latents of shape \(8, 4\).*latent_size 5"),
        ({"labels": BATCH["labels"][:4]}, (), "differ in their number of examples"),
    ],
)
def test_a_bad_batch_is_refused_with_value_and_remedy(changes, drop, message, name):
    with pytest.raises(ValueError, match=message):
        bad(adversarial(plain()), changes, name=name, drop=drop)


def test_bad_pixels_known_only_in_a_compiled_program_make_the_loss_nan():
    objectives = adversarial(plain())
    bright = BATCH["inputs"].copy()
    bright[0, 0, 0, 0] = 1.5
    for name in ("discriminator", "generator"):
        assert np.isfinite(bad(objectives, {}, name=name, compiled=True).loss.total)
        assert np.isnan(bad(objectives, {"inputs": bright}, name=name, compiled=True).loss.total)
        padded = {"inputs": bright, "weights": np.array([0, 1, 1, 1, 1, 1, 1, 1], np.float32)}
        assert np.isfinite(bad(objectives, padded, name=name, compiled=True).loss.total)


def test_what_makes_no_objective_is_refused():
    with pytest.raises(ValueError, match="unknown loss 'wgan'; choose one of non_saturating"):
        adversarial(plain(), "wgan")
    with pytest.raises(ValueError, match=r"r1 is -1\.0; give 0 or more"):
        adversarial(plain(), r1=-1.0)
    module = dcgan((16, 16, 1), norm="batch", **TINY)
    objectives = adversarial(module, gradient_penalty=10.0)
    updates, state = problem(objectives, module)
    with pytest.raises(ValueError, match="this one has a batch norm; build it with norm=None"):
        make_train_step(updates)(state, LARGER)
