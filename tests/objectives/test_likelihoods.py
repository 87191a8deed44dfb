"""Likelihoods of images against SciPy, and the check of the pixel range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import expit

from jaxnets.objectives.image_range import check_images
from jaxnets.objectives.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, SquaredError


def images(*shape, low=0.0):
    return np.random.default_rng(0).uniform(low, 1, size=shape).astype(np.float32)


def test_the_bernoulli_loss_is_the_cross_entropy_of_gray_levels():
    logits, x = 3 * images(2, 3, 4, 2, low=-1), images(2, 3, 4, 2)
    p = expit(logits.astype(np.float64))
    expected = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(Bernoulli().losses(logits, x), expected, rtol=1e-5)
    np.testing.assert_allclose(Bernoulli().mean(logits), p, rtol=1e-5)


def test_the_gaussian_losses_equal_scipy():
    x, mean = images(2, 3, 4, 2), images(2, 3, 4, 2, low=-1)
    log_scale = 4 * images(2, 3, 4, 2, low=-1)
    fixed = -scipy.stats.norm.logpdf(x, mean, 0.3).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(Gaussian(0.3).losses(mean, x), fixed, rtol=1e-5)
    learned = -scipy.stats.norm.logpdf(x, mean, np.exp(log_scale)).sum(axis=(1, 2, 3))
    outputs = np.concatenate([mean, log_scale], axis=-1)
    np.testing.assert_allclose(Gaussian().losses(outputs, x), learned, rtol=1e-4)
    np.testing.assert_array_equal(Gaussian().mean(outputs), mean)
    floored = -scipy.stats.norm.logpdf(x, mean, np.exp(-7.0)).sum(axis=(1, 2, 3))
    outputs[..., 2:] = -20
    np.testing.assert_allclose(Gaussian().losses(outputs, x), floored, rtol=1e-4)


@pytest.mark.parametrize(
    ("mean", "scale"), [(0.1, 0.2), (-1.3, 0.01), (0.5, 3.0), (1.0, 1e-3), (0.9, np.exp(-9))]
)
def test_the_256_levels_of_the_logistic_likelihood_sum_to_one(mean, scale):
    levels = (np.arange(256) / 127.5 - 1).astype(np.float32)
    outputs = np.tile(np.array([mean, np.log(scale)], np.float32), (256, 1, 1, 1))
    losses = DiscretizedLogistic().losses(outputs, levels.reshape(256, 1, 1, 1))
    assert np.isfinite(losses).all()
    assert np.exp(-np.asarray(losses, np.float64)).sum() == pytest.approx(1, abs=1e-4)


def test_the_logistic_likelihood_is_the_probability_of_the_bin():
    levels = np.array([-1.0, -0.2, 0.0, 0.4, 1.0])  # five of the eleven levels
    logistic = scipy.stats.logistic(0.1, 0.3)
    edges = np.stack([levels - 0.1, levels + 0.1])
    edges[0, 0], edges[1, -1] = -np.inf, np.inf
    expected = -np.log(logistic.cdf(edges[1]) - logistic.cdf(edges[0])).sum()
    outputs = np.tile(np.array([0.1, np.log(0.3)], np.float32), (1, 1, 5, 1))
    x = levels.astype(np.float32).reshape(1, 1, 5, 1)
    assert DiscretizedLogistic(11).losses(outputs, x)[0] == pytest.approx(expected, rel=1e-5)


def test_the_pixel_furthest_outside_is_named_with_the_remedy():
    x = np.array([[0.5, 300.0, -2.0]])
    with pytest.raises(ValueError, match=r"hold 300.*\[0, 1\]; divide gray levels by 255, or take"):
        check_images(x, (0.0, 1.0))
    with pytest.raises(ValueError, match=r"300.*\[-1, 1\]; divide .* by 127\.5 and subtract 1"):
        check_images(x, (-1.0, 1.0))
    with pytest.raises(ValueError, match=r"hold nan, outside of \[-inf, inf\]"):
        check_images(np.array([[0.5, np.nan, -2.0]]), None)
    with pytest.raises(ValueError, match="type int32; give floats"):
        check_images(x.astype(np.int32), None)


def test_rounding_errors_are_accepted():
    x = np.array([[0.0, 1.00005], [-0.00005, 1.0]], np.float32)
    for check in (check_images, jax.jit(check_images, static_argnums=1)):
        checked, inside = check(x, (0.0, 1.0))
        np.testing.assert_array_equal(checked, x)
        assert inside.all()


def test_images_out_of_range_become_zeros_in_a_compiled_program():
    x = np.array([[0.0, 1.0], [0.5, 1.5], [np.nan, 0.0], [np.inf, 0.0]], np.float32)
    check = jax.jit(check_images, static_argnums=1)
    checked, inside = check(x, (0.0, 1.0))
    np.testing.assert_array_equal(inside, [True, False, False, False])
    np.testing.assert_array_equal(checked, [[0, 1], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(check(x, None)[1], [True, True, False, False])


@pytest.mark.parametrize("likelihood", [Bernoulli(), SquaredError(), Gaussian(), Gaussian(0.1)])
def test_gray_levels_are_refused_unless_any_range_is_allowed(likelihood):
    with pytest.raises(ValueError, match="divide gray levels by 255"):
        check_images(255 * images(2, 3, 4, 1), likelihood.image_range)
    for free in (SquaredError(image_range=None), Gaussian(image_range=None)):
        assert check_images(255 * images(2, 3, 4, 1), free.image_range)[1].all()
    assert hash(SquaredError(image_range=(-1.0, 1.0))) != hash(SquaredError())


@pytest.mark.parametrize(
    ("likelihood", "values"),
    [
        (Bernoulli(), [0.0, 255.0]),
        (SquaredError(), [-1.0, 0.0]),
        (Gaussian(0.1), [0.0, 1.5]),
        (Gaussian(), [0.0, np.nan]),
        (DiscretizedLogistic(), [0.0, 255.0]),
    ],
)
def test_a_likelihood_refuses_images_outside_of_its_range(likelihood, values):
    images = np.array(values, np.float32).reshape(1, 2, 1)
    outputs = jnp.zeros((1, 2, likelihood.num_parameters))
    with pytest.raises(ValueError, match="outside of"):
        likelihood.losses(outputs, images)
    with pytest.raises(ValueError, match="images have type uint8; give floats"):
        jax.jit(likelihood.losses)(outputs, np.zeros_like(images, np.uint8))
