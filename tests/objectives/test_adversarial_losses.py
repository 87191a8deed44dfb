"""Adversarial losses by hand, penalties against closed forms and differences, spectral norms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import DOUBLE, mostly_slow, random_variables

from jaxnets.core import Precision
from jaxnets.layers import Convolution, Dense, SpectralNorm, largest_singular_value
from jaxnets.models.gan.dcgan import DCGANDiscriminator
from jaxnets.objectives.adversarial_losses import (
    ADVERSARIAL_LOSSES,
    discriminator_accuracy,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    logits_and_gradients,
    mix,
    zero_centered_penalty,
)

REAL, FAKE = np.array([0.0, 2.0, -1.0], np.float32), np.array([0.0, -0.5, 3.0], np.float32)
# softplus(x) = ln(1 + e^x) by hand: 0.693147 at 0, 0.126928 at -2, 1.313262 at 1, 0.474077 at -0.5,
# 3.048587 at 3, 0.974077 at 0.5, 0.048587 at -3, 0.078889 at -2.5, 2.578889 at 2.5, 4.018150 at 4,
# 0.018150 at -4.
CROSS_ENTROPIES = [2 * 0.693147, 0.126928 + 0.474077, 1.313262 + 3.048587]
BY_HAND = {
    "non_saturating": (CROSS_ENTROPIES, [0.693147, 0.974077, 0.048587]),
    "minimax": (CROSS_ENTROPIES, [-0.693147, -0.474077, -3.048587]),
    "hinge": ([2.0, 0.5, 6.0], [0.0, 0.5, -3.0]),
    "least_squares": ([0.5, 0.625, 6.5], [0.5, 1.125, 2.0]),
    "wasserstein": ([0.0, -2.5, 4.0], [0.0, 0.5, -3.0]),
    "relativistic": ([0.693147, 0.078889, 4.018150], [0.693147, 2.578889, 0.018150]),
}


# Accuracies of the logit pairs (0.7, 0.2), (0.2, 0.7), (0.7, 0.6), (0.3, -0.3), (0.1, 0.1).
_ABOVE_ZERO = [0.5, 0.5, 0.5, 1.0, 0.5]
_PAIRS = [1.0, 0.0, 1.0, 1.0, 0.0]
ACCURACIES = {
    **dict.fromkeys(["non_saturating", "minimax", "hinge"], _ABOVE_ZERO),
    "least_squares": [1.0, 0.0, 0.5, 0.5, 0.5],
    **dict.fromkeys(["wasserstein", "relativistic"], _PAIRS),
}


def test_every_loss_is_computed_by_hand():
    assert set(BY_HAND) == set(ACCURACIES) == set(ADVERSARIAL_LOSSES)


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
def test_the_accuracy_has_the_threshold_of_the_loss(loss):
    real, fake = jnp.array([0.7, 0.2, 0.7, 0.3, 0.1]), jnp.array([0.2, 0.7, 0.6, -0.3, 0.1])
    np.testing.assert_array_equal(discriminator_accuracy(real, fake, loss=loss), ACCURACIES[loss])
    if loss in ("wasserstein", "relativistic"):  # invariant to a shift of all logits
        shifted = discriminator_accuracy(real + 9, fake + 9, loss=loss)
        np.testing.assert_array_equal(shifted, ACCURACIES[loss])


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
def test_a_loss_equals_the_values_computed_by_hand(loss):
    discriminator, generator = BY_HAND[loss]
    found = discriminator_loss(jnp.asarray(REAL), jnp.asarray(FAKE), loss=loss)
    np.testing.assert_allclose(found, discriminator, atol=2e-6)
    found = generator_loss(jnp.asarray(FAKE), loss=loss, real_logits=jnp.asarray(REAL))
    np.testing.assert_allclose(found, generator, atol=2e-6)


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
def test_losses_of_large_bfloat16_logits_are_finite_and_float32(loss):
    logits = jnp.array([300.0, -300.0], jnp.bfloat16)
    losses = [
        discriminator_loss(logits, -logits, loss=loss),
        generator_loss(logits, loss=loss, real_logits=-logits),
    ]
    for found in losses:
        assert found.dtype == jnp.float32 and np.isfinite(found).all()


def test_descending_the_generator_loss_raises_the_logits_of_its_images():
    logits = jnp.asarray(FAKE)

    def total(x, loss):
        return jnp.sum(generator_loss(x, loss=loss, real_logits=logits))

    @jax.jit
    def gradients(x):
        return {loss: jax.grad(total)(x, loss) for loss in ADVERSARIAL_LOSSES}

    for loss, gradient in gradients(logits).items():
        if loss == "least_squares":
            assert np.all(np.sign(gradient) == np.sign(FAKE - 1))
        else:
            assert np.all(np.asarray(gradient) < 0), loss


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: discriminator_loss(x, x, loss="hings"), "'hings'.*non_saturating.*hinge"),
        (lambda x: generator_loss(x, loss="gan"), "unknown loss 'gan'"),
        (lambda x: generator_loss(x, loss="relativistic"), "'relativistic'.*give real_logits"),
    ],
)
def test_an_unknown_loss_or_missing_logits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros(2))


def test_shapes_that_would_broadcast_are_refused():
    message = r"real_logits \(2,\), fake_logits \(3,\) differ in shape"
    with pytest.raises(ValueError, match=message):
        discriminator_loss(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match=message):
        discriminator_accuracy(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match=message):
        generator_loss(jnp.zeros(3), real_logits=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"real \(2, 1\), fake \(1, 1\) differ in shape"):
        mix(jnp.zeros((2, 1)), jnp.zeros((1, 1)), jax.random.key(0))


def test_penalties_of_a_linear_discriminator_have_a_closed_form():
    weights = np.random.default_rng(0).normal(size=(4, 3, 1)).astype(np.float32)
    images = np.random.default_rng(1).normal(size=(5, 4, 3, 1)).astype(np.float32)

    def discriminate(x):
        return 2 * jnp.sum(x * weights[None], axis=(1, 2, 3)) + 1, "state"

    logits, aux, gradients = logits_and_gradients(discriminate, jnp.asarray(images))
    np.testing.assert_allclose(logits, discriminate(images)[0], rtol=1e-6)
    assert aux == "state"
    norm = 2 * np.sqrt(np.sum(weights**2))
    np.testing.assert_allclose(gradients, np.broadcast_to(2 * weights, images.shape), rtol=1e-6)
    np.testing.assert_allclose(zero_centered_penalty(gradients), [norm**2 / 2] * 5, rtol=1e-5)
    np.testing.assert_allclose(gradient_penalty(gradients), [(norm - 1) ** 2] * 5, rtol=1e-5)


def test_the_gradient_penalty_is_differentiable_where_the_discriminator_is_constant():
    value, gradient = jax.value_and_grad(lambda g: jnp.sum(gradient_penalty(g)))(jnp.zeros((2, 3)))
    assert value == 2
    np.testing.assert_array_equal(gradient, 0)


def test_interpolates_lie_between_their_two_images_each_at_its_own_fraction():
    real, fake = jnp.ones((64, 2, 2, 1)), jnp.zeros((64, 2, 2, 1))
    mixed = np.asarray(mix(real, fake, jax.random.key(0)))
    assert np.all(mixed == mixed[:, :1, :1]) and np.all((mixed >= 0) & (mixed <= 1))
    assert len(np.unique(mixed)) == 64 and abs(mixed.mean() - 0.5) < 0.15


PENALTIES = {"zero_centered": zero_centered_penalty, "one_centered": gradient_penalty}


@pytest.mark.parametrize(
    ("norm", "penalty"),
    mostly_slow(
        itertools.product([None, "layer"], PENALTIES),
        [(None, "zero_centered"), ("layer", "one_centered")],
    ),
)
def test_gradients_of_a_penalty_through_the_layers_equal_differences(norm, penalty, enable_x64):
    module = DCGANDiscriminator(width=2, norm=norm, precision=DOUBLE)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 1))
    params = jax.tree.map(np.asarray, random_variables(module, images)["params"])

    @jax.jit
    @jax.value_and_grad
    def total(params):
        _, _, gradients = logits_and_gradients(
            lambda x: (module.apply({"params": params}, x, train=True), None), jnp.asarray(images)
        )
        return jnp.sum(PENALTIES[penalty](gradients))

    gradient = total(params)[1]
    random = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: random.normal(size=x.shape), params)
    step = 1e-6
    ahead, behind = (
        total(jax.tree.map(lambda x, d, s=sign: x + s * step * d, params, direction))[0]
        for sign in (1, -1)
    )
    along = sum(
        np.vdot(a, b)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert abs(along) > 1e-3
    np.testing.assert_allclose(along, (ahead - behind) / (2 * step), rtol=1e-5)


def test_a_penalty_in_bfloat16_has_the_gradient_of_float32():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    wide, narrow = (
        DCGANDiscriminator(width=2, norm=None, precision=precision)
        for precision in (Precision(), Precision(compute=jnp.bfloat16))
    )
    params = random_variables(wide, images)["params"]

    def total(params, module):
        gradients = logits_and_gradients(
            lambda x: (module.apply({"params": params}, x), None), jnp.asarray(images)
        )[2]
        return jnp.sum(zero_centered_penalty(gradients))

    @jax.jit
    def both(params):
        return [jax.grad(total)(params, module) for module in (wide, narrow)]

    expected, found = both(params)
    for name in ("conv_1", "head"):
        for one, other in zip(
            jax.tree.leaves(expected[name]), jax.tree.leaves(found[name]), strict=True
        ):
            # In norm: rounding flips the slope of single leaky relus.
            assert np.linalg.norm(other - one) <= 0.2 * np.linalg.norm(one)
    assert np.any(expected["conv_1"]["kernel"])


def test_power_iteration_converges_to_the_singular_value_of_numpy():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)), jnp.float32)
    exact = np.linalg.svd(matrix, compute_uv=False)[0]
    iterate, right = jax.jit(largest_singular_value), jnp.ones(5)
    estimates = []
    for _ in range(40):
        value, right = iterate(matrix, right)
        estimates.append(float(value))
    assert estimates[0] < exact * (1 - 1e-3)
    assert np.all(np.diff(estimates) > -1e-5)
    np.testing.assert_allclose(estimates[-1], exact, rtol=1e-5)
    _, right_vectors = np.linalg.svd(matrix)[1:]
    np.testing.assert_allclose(np.abs(right), np.abs(right_vectors[0]), atol=1e-3)


def test_the_gradient_of_the_singular_value_is_the_outer_product_of_numpys_vectors():
    matrix = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    left, _, right = np.linalg.svd(matrix)

    gradient = jax.grad(lambda w: largest_singular_value(w, jnp.ones(4), num_iterations=100)[0])(
        jnp.asarray(matrix)
    )
    np.testing.assert_allclose(gradient, np.outer(left[:, 0], right[0]), atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: Dense(5, use_bias=False, parent=None), (3, 7)),
        (lambda: Convolution(5, 3, strides=2, use_bias=False, parent=None), (3, 6, 6, 2)),
    ],
    ids=["dense", "convolution"],
)
def test_a_normalized_layer_has_a_kernel_of_singular_value_one(layer, shape):
    module = SpectralNorm(layer(), use_bias=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    variables = random_variables(module, x)
    kernel = np.asarray(variables["params"]["layer"]["kernel"])
    bias = np.asarray(variables["params"]["bias"])
    largest = np.linalg.svd(kernel.reshape(-1, 5), compute_uv=False)[0]

    @jax.jit
    def train(variables):
        return module.apply(variables, x, train=True, mutable=["spectral_norm"])

    before = np.asarray(variables["spectral_norm"]["right"])
    for _ in range(60):
        y, changed = train(variables)
        variables = {**variables, **changed}
    assert np.any(before != variables["spectral_norm"]["right"])
    plain, evaluated = jax.jit(
        lambda variables: (
            layer().apply({"params": {"kernel": kernel}}, x),
            module.apply(variables, x),
        )
    )(variables)
    np.testing.assert_allclose(y, np.asarray(plain) / largest + bias, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(evaluated, y, rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_bias_of_its_own_is_refused():
    module = SpectralNorm(Dense(5, parent=None))
    with pytest.raises(ValueError, match=r"Dense of 2 parameters.*use_bias=False"):
        module.init(jax.random.key(0), jnp.ones((2, 3)))
