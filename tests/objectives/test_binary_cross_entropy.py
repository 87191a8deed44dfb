"""Binary cross-entropy against the formula with two logarithms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, log_expit

from jaxnets.objectives.losses import binary_cross_entropy

LOGITS = np.array([-90.0, -20.0, -3.0, -0.5, 0.0, 1e-4, 0.7, 5.0, 30.0, 90.0])
LABELS = np.array([0.0, 0.2, 0.5, 1.0])
PAIRS = tuple(grid.ravel() for grid in np.meshgrid(LOGITS, LABELS))


def test_it_equals_the_formula_with_two_logarithms():
    logits, labels = PAIRS
    expected = -labels * log_expit(logits) - (1 - labels) * log_expit(-logits)
    actual = binary_cross_entropy(*(jnp.asarray(each, jnp.float32) for each in PAIRS))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-30)


def test_small_losses_do_not_cancel():
    losses = binary_cross_entropy(jnp.array([20.0, -20.0]), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(losses, np.log1p(np.exp(-20.0)), rtol=1e-5)


def test_derivatives_equal_those_of_optax():
    logits, labels = (jnp.asarray(each, jnp.float32) for each in PAIRS)

    @jax.jit
    def derivatives(logits, labels):
        return [
            jax.vmap(derivative(function, argument))(logits, labels)
            for function in (binary_cross_entropy, optax.sigmoid_binary_cross_entropy)
            for derivative in (jax.grad, jax.jacfwd)
            for argument in (0, 1)
        ]

    found = derivatives(logits, labels)
    for actual, expected in zip(found[:4], found[4:], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_second_derivative_at_zero_is_that_of_the_sigmoid():
    logits = jnp.asarray(LOGITS, jnp.float32)
    second = jax.jit(jax.vmap(jax.grad(jax.grad(binary_cross_entropy)), (0, None)))(logits, 0.2)
    np.testing.assert_allclose(second, expit(LOGITS) * expit(-LOGITS), atol=1e-7)


def test_bfloat16_logits_give_a_float32_loss():
    losses = binary_cross_entropy(jnp.zeros(2, jnp.bfloat16), jnp.array([0, 1]))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"logits \(4, 1\), labels \(4,\) differ in shape"):
        binary_cross_entropy(jnp.zeros((4, 1)), jnp.zeros(4))


def test_infinite_logits_that_agree_with_their_labels_cost_nothing():
    logits, labels = jnp.array([-jnp.inf, jnp.inf, -jnp.inf]), jnp.array([0.0, 1.0, 1.0])
    for compiled in (lambda f: f, jax.jit):
        losses = compiled(binary_cross_entropy)(logits, labels)
        np.testing.assert_array_equal(losses[:2], 0)
        assert losses[2] > 1e38
        gradient = compiled(jax.grad(lambda x: binary_cross_entropy(x, labels)[:2].sum()))(logits)
        np.testing.assert_array_equal(gradient, 0)
