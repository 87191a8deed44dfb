"""Metrics of generated images against SciPy, loops and closed forms."""

import jax
import numpy as np
import pytest
import scipy.linalg
from checks import random_variables

from jaxnets.metrics import generative
from jaxnets.metrics.generative import (
    FeatureDistribution,
    class_agreement,
    class_coverage,
    class_shares,
    classifier_features,
    frechet_distance,
    gaussian_distance,
    gaussian_fit,
    precision_recall,
)
from jaxnets.models.convolutional import ConvNet
from jaxnets.models.gan.dcgan import DCGANGenerator


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_a_gaussian_fit_has_the_mean_and_covariance_of_numpy():
    features = normal(40, 5)
    fit = gaussian_fit(features.astype(np.float32))
    assert fit.covariance.dtype == np.float64
    np.testing.assert_allclose(fit.mean, features.mean(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(fit.covariance, np.cov(features.T), rtol=1e-5, atol=1e-7)


def test_the_frechet_distance_equals_that_by_scipys_matrix_square_root():
    first = normal(60, 7) @ normal(7, 7, seed=1)
    second = normal(50, 7, seed=2) @ normal(7, 7, seed=3) + 0.5
    one, two = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(one @ two).real
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(one + two - 2 * root)
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-9)


def test_the_distance_of_commuting_covariances_has_a_closed_form():
    variances = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 2.0])
    rotation = np.linalg.qr(normal(3, 3))[0]
    means = normal(2, 3)
    first, second = (
        FeatureDistribution(mean, rotation @ np.diag(v) @ rotation.T)
        for mean, v in zip(means, variances, strict=True)
    )
    expected = np.sum((means[0] - means[1]) ** 2)
    expected += np.sum((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2)
    np.testing.assert_allclose(gaussian_distance(first, second), expected, rtol=1e-7)
    np.testing.assert_allclose(gaussian_distance(second, first), expected, rtol=1e-7)


def test_the_distance_to_itself_is_zero_even_with_fewer_images_than_features():
    features = normal(5, 20)
    assert 0 <= frechet_distance(features, features) < 1e-6
    assert frechet_distance(features, features + 1) == pytest.approx(20, rel=1e-6)
    assert frechet_distance(features, np.zeros((9, 20))) > 1


def test_features_can_be_compared_with_published_statistics():
    """As for the FID: mean and covariance from elsewhere, features from the caller."""
    mean, covariance = np.array([1.0, -2.0, 0.0]), np.diag([4.0, 1.0, 9.0])
    published = FeatureDistribution(mean, covariance)
    corners = np.array(list(np.ndindex(2, 2, 2))) * 2.0 - 1  # mean 0, variance 8 / 7 each
    features = np.sqrt(7 / 8) * corners * np.array([1.0, 3.0, 5.0])
    expected = (1 + 4) + (2 - 1) ** 2 + (1 - 3) ** 2 + (3 - 5) ** 2
    found = gaussian_distance(published, gaussian_fit(features))
    assert found == pytest.approx(expected, rel=1e-9)


def fraction_in_manifold(points, others, num_neighbors):
    """Return the fraction of points within a ball of the others, by loops."""
    radii = [
        sorted(np.linalg.norm(other - x) for j, x in enumerate(others) if j != index)[
            num_neighbors - 1
        ]
        for index, other in enumerate(others)
    ]
    return np.mean(
        [
            any(np.linalg.norm(point - x) <= r for x, r in zip(others, radii, strict=True))
            for point in points
        ]
    )


@pytest.mark.parametrize("num_neighbors", [1, 3])
@pytest.mark.parametrize("rows", [4, 1024])
def test_precision_and_recall_equal_those_of_a_loop(num_neighbors, rows, monkeypatch):
    monkeypatch.setattr(generative, "_ROWS", rows)
    real, generated = normal(30, 3), 0.7 * normal(25, 3, seed=1) + 1.5
    found = precision_recall(real, generated, num_neighbors=num_neighbors)
    precision = fraction_in_manifold(generated, real, num_neighbors)
    recall = fraction_in_manifold(real, generated, num_neighbors)
    assert found == pytest.approx((precision, recall))
    assert 0 < found.recall < 1 and 0 < found.precision < 1


def test_a_collapsed_generator_has_high_precision_and_low_recall():
    real = np.concatenate([normal(100, 2), normal(100, 2, seed=1) + 50])
    one_mode = normal(200, 2, seed=2)
    found = precision_recall(real, one_mode)
    assert found.precision > 0.9 and found.recall < 0.6
    noise = precision_recall(real, 200 * normal(200, 2, seed=3) + 1000)
    assert noise.precision == 0 and precision_recall(real, real) == (1, 1)


def test_a_class_is_covered_from_a_tenth_of_the_uniform_frequency_on():
    labels = np.repeat([0, 1, 2], [980, 10, 9])
    np.testing.assert_allclose(class_shares(labels, 4), [980 / 999, 10 / 999, 9 / 999, 0])
    assert class_coverage(labels, 4) == 0.25
    assert class_coverage(labels, 4, least=0.04) == 0.5
    assert class_coverage(labels, 4, least=0.03) == 0.75
    assert class_coverage(np.arange(10), 10, least=1.0) == 1


def test_class_agreement_is_the_accuracy_for_the_given_labels():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0], [1.0, 0.0, 0.0]])
    assert class_agreement(logits, np.array([0, 2, 2, 0])) == 0.75


def test_features_in_batches_equal_those_of_all_images_at_once():
    module = ConvNet(features=(4,), hidden_features=(6,), num_outputs=3, norm="batch")
    images = normal(7, 8, 8, 1).astype(np.float32)
    variables = random_variables(module, images)
    found = classifier_features(module, variables, images, batch_size=3)
    assert found.features.shape == (7, 6) and found.logits.shape == (7, 3)
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    expected = found.features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-6)
    logits = jax.jit(module.apply)(variables, images)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_fit(normal(1, 3)), r"shape \(1, 3\).*of 2 images or more"),
        (lambda: gaussian_fit(normal(4)), r"features have shape \(4,\)"),
        (lambda: gaussian_fit(np.full((3, 2), np.inf)), "features hold inf"),
        (lambda: frechet_distance(normal(4, 3), normal(4, 2)), "3 features do not fit 2"),
        (lambda: precision_recall(normal(4, 3), normal(4, 2)), "3 features do not fit 2"),
        (lambda: precision_recall(normal(9, 3), normal(3, 3)), r"generated have shape \(3, 3\)"),
        (lambda: precision_recall(normal(9, 3), normal(9, 3), num_neighbors=0), "is 0"),
        (lambda: class_coverage(np.array([0, 4]), 4), r"label 4 for 4 classes.*\[0, 4\)"),
        (lambda: class_coverage(np.array([], int), 4), "no label for 4 classes"),
        (lambda: class_coverage(np.array([0]), 4, least=0.0), "least is 0.0"),
        (lambda: class_agreement(normal(4, 3), np.zeros(3, int)), r"\(3,\) do not fit.*\(4, 3\)"),
        (
            lambda: classifier_features(ConvNet(), {}, np.zeros((0, 8, 8, 1))),
            r"\(0, 8, 8, 1\) hold no image",
        ),
        (
            lambda: classifier_features(ConvNet(), {}, np.zeros((2, 8, 8, 1)), batch_size=0),
            "batch_size=0",
        ),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_network_that_records_no_features_is_refused():
    module = DCGANGenerator((8, 8, 1), latent_size=5, width=4)
    latents = normal(2, 5).astype(np.float32)
    variables = random_variables(module, latents)
    with pytest.raises(ValueError, match=r"DCGANGenerator records \[\] and no 'features'"):
        classifier_features(module, variables, latents)
