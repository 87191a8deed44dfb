"""The cross-entropy of yes-or-no labels against both of its logarithms."""

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


def test_it_is_the_sum_of_both_logarithms():
    logits, labels = PAIRS
    expected = -labels * log_expit(logits) - (1 - labels) * log_expit(-logits)
    actual = binary_cross_entropy(*(jnp.asarray(each, jnp.float32) for each in PAIRS))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-30)


def test_a_label_that_is_met_costs_what_float32_can_tell():
    costs = binary_cross_entropy(jnp.array([20.0, -20.0]), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(costs, np.log1p(np.exp(-20.0)), rtol=1e-5)


@pytest.mark.parametrize("argument", [0, 1])
def test_derivatives_are_those_of_both_logarithms(argument):
    logits, labels = (jnp.asarray(each, jnp.float32) for each in PAIRS)
    for derivative in (jax.grad, lambda f, n: jax.jacfwd(f, n)):
        actual, expected = (
            jax.vmap(derivative(function, argument))(logits, labels)
            for function in (binary_cross_entropy, optax.sigmoid_binary_cross_entropy)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_second_derivative_has_no_corner_at_zero():
    logits = jnp.asarray(LOGITS, jnp.float32)
    second = jax.vmap(jax.grad(jax.grad(binary_cross_entropy)), (0, None))(logits, jnp.float32(0.2))
    np.testing.assert_allclose(second, expit(LOGITS) * expit(-LOGITS), atol=1e-7)


def test_a_narrow_dtype_is_computed_in_float32():
    costs = binary_cross_entropy(jnp.zeros(2, jnp.bfloat16), jnp.array([0, 1]))
    assert costs.dtype == jnp.float32
    np.testing.assert_allclose(costs, np.log(2), rtol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        binary_cross_entropy(jnp.zeros((4, 1)), jnp.zeros(4))
