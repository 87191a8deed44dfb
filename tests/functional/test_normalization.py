"""The gradients of the norms against automatic differentiation of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.normalization import batch_norm, layer_norm, rms_norm

EPSILON = 0.1  # large, so that leaving it out would show


def plain_layer_norm(x, scale, bias):
    mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return scale[None, None] * (x - mean) / jnp.sqrt(variance + EPSILON) + bias[None, None]


def plain_rms_norm(x, scale):
    return scale[None, None] * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPSILON)


def flat_batch_norm(x, scale, bias, epsilon):
    """Return the output, and the mean and variance, which a loss may use too, in one array."""
    return jnp.concatenate([y.ravel() for y in batch_norm(x, scale, bias, epsilon=epsilon)])


def plain_batch_norm(x, scale, bias):
    mean, variance = jnp.mean(x, (0, 1)), jnp.var(x, (0, 1))
    centered = x - mean[None, None]
    y = scale[None, None] * centered / jnp.sqrt(variance + EPSILON)[None, None] + bias[None, None]
    return jnp.concatenate([y.ravel(), mean, variance])


@pytest.mark.parametrize(
    ("own", "plain", "num_vectors"),
    [
        (layer_norm, plain_layer_norm, 2),
        (rms_norm, plain_rms_norm, 1),
        (flat_batch_norm, plain_batch_norm, 2),
    ],
)
def test_first_and_second_derivatives_are_those_of_the_formula(own, plain, num_vectors):
    random = np.random.default_rng(0)
    argnums = tuple(range(1 + num_vectors))

    def gradients(function, *operands):
        def slope(*operands):
            return jnp.sum(jnp.cos(function(*operands)))

        def curvature(*operands):
            first = jax.grad(slope, argnums)(*operands)
            return sum(jnp.sum(jnp.sin(gradient)) for gradient in first)

        return [g for loss in (slope, curvature) for g in jax.grad(loss, argnums)(*operands)]

    @jax.jit
    def derivatives(*operands):
        ours = gradients(lambda *o: own(*o, epsilon=EPSILON), *operands)
        return ours, gradients(plain, *operands)

    with jax.enable_x64(True):
        x = random.normal(size=(2, 3, 5)) + 2
        found, expected = derivatives(x, *(random.normal(size=5) for _ in range(num_vectors)))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float64
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


def batch_norm_of_pairs(x, scale):
    y, *_ = batch_norm(jnp.stack([x[0], x[0] + 4]), scale, jnp.zeros_like(scale))
    return y


@pytest.mark.parametrize("norm", [layer_norm, rms_norm, batch_norm_of_pairs])
def test_statistics_are_float32_for_float16_inputs(norm):
    x = np.asarray(300.0 + np.arange(4.0)[None], np.float16)  # squares beyond its range
    scale = np.ones(4, np.float32)

    @jax.jit
    def value_and_gradient(x):
        return norm(x, scale), jax.grad(lambda x: jnp.sum(norm(x, scale) ** 3))(x)

    y, gradient = value_and_gradient(x)
    exact, exact_gradient = value_and_gradient(x.astype(np.float32))
    assert y.dtype == jnp.float32 and gradient.dtype == jnp.float16
    np.testing.assert_array_equal(y, exact)
    np.testing.assert_array_equal(gradient, np.asarray(exact_gradient, np.float16))
