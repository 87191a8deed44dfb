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


def flat_weighted_batch_norm(x, scale, bias, logits, epsilon):
    parts = batch_norm(x, scale, bias, weights=jnp.exp(logits), epsilon=epsilon)
    return jnp.concatenate([y.ravel() for y in parts])


def plain_weighted_batch_norm(x, scale, bias, logits):
    shares = jax.nn.softmax(logits)[:, None, None] / x.shape[1]
    mean = jnp.sum(shares * x, (0, 1))
    centered = x - mean[None, None]
    variance = jnp.sum(shares * centered**2, (0, 1))
    y = scale[None, None] * centered / jnp.sqrt(variance + EPSILON)[None, None] + bias[None, None]
    return jnp.concatenate([y.ravel(), mean, variance])


@pytest.mark.parametrize(
    ("own", "plain", "sizes"),
    [
        (layer_norm, plain_layer_norm, (5, 5)),
        (rms_norm, plain_rms_norm, (5,)),
        (flat_batch_norm, plain_batch_norm, (5, 5)),
        (flat_weighted_batch_norm, plain_weighted_batch_norm, (5, 5, 2)),
    ],
)
def test_first_and_second_derivatives_are_those_of_the_formula(own, plain, sizes):
    random = np.random.default_rng(0)
    argnums = tuple(range(1 + len(sizes)))

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
        found, expected = derivatives(x, *(random.normal(size=size) for size in sizes))
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


def test_examples_of_weight_zero_count_neither_in_the_statistics_nor_in_the_gradients():
    random = np.random.default_rng(0)
    x, scale, bias = random.normal(size=(3, 4, 5)) + 2, *random.normal(size=(2, 5))
    padded = np.concatenate([x, np.full((1, 4, 5), np.inf), np.full((1, 4, 5), np.nan)])

    def loss(x, scale, bias, weights):
        y, mean, variance = batch_norm(x, scale, bias, weights=weights, epsilon=EPSILON)
        return jnp.sum(jnp.sin(y[:3])) + jnp.sum(mean * variance), y

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    with jax.enable_x64(True):
        (value, y), gradients = both(padded, scale, bias, np.array([1, 2, 1, 0, 0.0]))
        twice = x[np.array([0, 1, 1, 2])]
        y_twice, mean, variance = batch_norm(twice, scale, bias, epsilon=EPSILON)
        (expected, _), whole = both(x, scale, bias, np.array([1, 2, 1.0]))
    np.testing.assert_allclose(y[:3], y_twice[np.array([0, 1, 3])], rtol=1e-12)
    np.testing.assert_allclose(y[3:], np.broadcast_to(bias, (2, 4, 5)))
    own = np.sin(np.asarray(y[:3])).sum() + (np.asarray(mean) * np.asarray(variance)).sum()
    np.testing.assert_allclose([value, expected], [own, own], rtol=1e-12)
    for gradient, other in zip(gradients, whole, strict=True):
        np.testing.assert_allclose(gradient[: len(other)], other, rtol=1e-12)
        assert not np.any(gradient[len(other) :])


def test_weights_that_are_not_one_for_each_row_are_refused():
    x, ones = np.ones((6, 2), np.float32), np.ones(2, np.float32)
    for shape in ((3,), (6, 2)):
        with pytest.raises(ValueError, match=r"weights of shape \(\d, ?2?\) do not fit an array"):
            batch_norm(x, ones, ones, weights=np.ones(shape))


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3)])
def test_a_scale_that_would_broadcast_is_refused(shape):
    x, whole, wrong = jnp.ones((2, 3)), jnp.ones(3), jnp.ones(shape)
    calls = {
        "scale": [lambda: layer_norm(x, wrong), lambda: rms_norm(x, wrong)],
        "bias": [lambda: layer_norm(x, whole, wrong), lambda: batch_norm(x, whole, wrong)],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(ValueError, match=f"a {name} of shape"):
                function()
