"""Metrics of generated images in the feature space of a classifier, in float64 on the host.

The features may come from any network. With a classifier trained by this library,
`frechet_distance` is a "classifier-feature distance": compare it only with distances in the same
features, first of all with the distance between two halves of the real images. It is the FID of
the literature only for features of the published Inception network and 50,000 images. To compare
with published statistics, often an .npz of `mu` and `sigma`:

    published = np.load("statistics.npz")
    real = FeatureDistribution(published["mu"], published["sigma"])
    fid = gaussian_distance(real, gaussian_fit(inception_features))  # [images, 2048]
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnets.checks import check_sizes
from jaxnets.core import at_least_float32, capture

# Rows of a distance matrix that are materialized at once.
_ROWS = 1024


class ClassifierOutput(NamedTuple):
    """What `classifier_features` returns.

    Attributes:
        features: [images, features].
        logits: [images, num_classes].
    """

    features: np.ndarray
    logits: np.ndarray


class FeatureDistribution(NamedTuple):
    """A normal distribution of features.

    Attributes:
        mean: [features].
        covariance: [features, features].
    """

    mean: np.ndarray
    covariance: np.ndarray


class PrecisionRecall(NamedTuple):
    """What `precision_recall` returns.

    Attributes:
        precision: fraction of the generated images inside the manifold of the real ones: quality.
        recall: fraction of the real images inside the manifold of the generated ones: variety.
    """

    precision: float
    recall: float


def classifier_features(
    module: Any, variables: Any, inputs: np.ndarray, *, batch_size: int = 500
) -> ClassifierOutput:
    """Run a classifier over images in batches, and return its features and logits.

    Args:
        module: a classifier that records "features", such as `ConvNet` or `ResNet`.
        variables: its parameters and other collections.
        inputs: images preprocessed as in its training, [images, height, width, channels].
        batch_size: images in a batch; the last one is padded, so that one program is compiled.

    Returns:
        `ClassifierOutput`.

    Raises:
        ValueError: no images, `batch_size` below 1, or a network that records no features.
    """
    check_sizes(batch_size=batch_size)
    inputs = np.asarray(inputs)
    if not len(inputs):
        raise ValueError(f"inputs of shape {inputs.shape} hold no image; give at least one")
    parts = []
    for first in range(0, len(inputs), batch_size):
        part = inputs[first : first + batch_size]
        missing = min(batch_size, len(inputs)) - len(part)
        padded = np.concatenate([part, part[:1].repeat(missing, axis=0)])
        logits, recorded = _captured(module, variables, padded)
        if "features" not in recorded:
            raise ValueError(
                f"{type(module).__name__} records {sorted(recorded)} and no 'features'; record "
                "them with jaxnets.core.record before its last layer"
            )
        features = recorded["features"].reshape(len(padded), -1)  # [batch, features]
        parts.append((np.asarray(features)[: len(part)], np.asarray(logits)[: len(part)]))
    return ClassifierOutput(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def _captured(module: Any, variables: Any, inputs: jax.Array) -> Any:
    return jax.tree.map(at_least_float32, capture(module, variables, inputs))


def gaussian_fit(features: np.ndarray) -> FeatureDistribution:
    """Fit a normal distribution: the mean and the unbiased covariance.

    Args:
        features: [images, features], two images or more.

    Returns:
        `FeatureDistribution` in float64.

    Raises:
        ValueError: not two axes, fewer than two images, or a value that is not finite.
    """
    features = _checked(features, "features", min_images=2)
    mean = features.mean(axis=0)
    centered = features - mean
    return FeatureDistribution(mean, centered.T @ centered / (len(features) - 1))


def gaussian_distance(first: FeatureDistribution, second: FeatureDistribution) -> float:
    """Squared Frechet distance of two normal distributions.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (R S2 R)^(1/2)) with R = S1^(1/2). The matrix square roots use
    eigendecompositions of symmetric matrices with negative eigenvalues, due to rounding, set to
    zero. So singular covariances, of fewer images than features, are safe.

    Args:
        first: from `gaussian_fit`, or published statistics.
        second: likewise, with the same number of features.

    Returns:
        0 or more, in the square of the features' unit.

    Raises:
        ValueError: the two differ in their number of features.

    Example:
        >>> first = FeatureDistribution(np.zeros(2), np.eye(2))
        >>> second = FeatureDistribution(np.array([3.0, 0.0]), 4 * np.eye(2))
        >>> gaussian_distance(first, second)  # 9 + 2 (2 - 1)^2
        11.0

    References:
        Dowson and Landau 1982, Journal of Multivariate Analysis 12(3), equation 4; Heusel et al.
        2017, arXiv:1706.08500, equation 6.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"{len(first.mean)} features do not fit {len(second.mean)}; compute both with the same "
            "network"
        )
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ second.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    mean_term = np.sum(np.square(first.mean - second.mean))
    covariance_term = np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross
    return float(max(mean_term + covariance_term, 0.0))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the normal distributions fitted to two sets of features.

    It is biased upward for few images: compare only distances of equally many images, and take the
    distance between real training and test images as reference. Not the FID unless the features
    are Inception's.

    Args:
        first: [images, features].
        second: [images, features]; the same number of features, any number of images.

    Returns:
        0 or more, in the square of the features' unit.

    Raises:
        ValueError: features that differ in number, fewer than two images, NaN.

    References:
        As for `gaussian_distance`; Chong and Forsyth 2020, arXiv:1911.07023 (the bias).
    """
    return gaussian_distance(gaussian_fit(first), gaussian_fit(second))


def precision_recall(
    real: np.ndarray, generated: np.ndarray, *, num_neighbors: int = 3
) -> PrecisionRecall:
    """Improved precision and recall of generated images.

    The manifold of a set is the union of balls around its images, each with the distance to the
    k-th nearest neighbor in the set as radius. Precision is the fraction of generated images inside
    the manifold of the real ones; recall is the converse.

    Args:
        real: features, [images, features].
        generated: features, [images, features]; use about as many images, since radii depend on
            the number.
        num_neighbors: k.

    Returns:
        `PrecisionRecall`, both in [0, 1].

    Raises:
        ValueError: features that differ in number, no more than k images, NaN.

    References:
        Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2.
    """
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors is {num_neighbors}; give 1 or more")
    real = _checked(real, "real", min_images=num_neighbors + 1)
    generated = _checked(generated, "generated", min_images=num_neighbors + 1)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"{real.shape[1]} features do not fit {generated.shape[1]}; compute both with the same "
            "network"
        )
    return PrecisionRecall(
        float(np.mean(_in_manifold(generated, real, num_neighbors))),
        float(np.mean(_in_manifold(real, generated, num_neighbors))),
    )


def class_shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the relative frequency of every class.

    Args:
        labels: integer [images] in [0, num_classes), such as predictions of a classifier.
        num_classes: number of classes.

    Returns:
        [num_classes], which sum to 1.

    Raises:
        ValueError: no labels, or one out of range.
    """
    labels = np.asarray(labels)
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size or not labels.size:
        problem = f"label {wrong[0]}" if wrong.size else "no label"
        raise ValueError(f"{problem} for {num_classes} classes; give labels in [0, {num_classes})")
    return np.bincount(labels.astype(np.int64), minlength=num_classes) / labels.size


def class_coverage(labels: np.ndarray, num_classes: int, *, least: float = 0.1) -> float:
    """Return the fraction of classes that occur among generated images; low for mode collapse.

    Args:
        labels: integer [images], predictions of a classifier for the generated images.
        num_classes: number of classes.
        least: minimum frequency of a covered class, relative to the uniform 1 / num_classes: with
            10 classes, 0.1 requires one image in a hundred.

    Returns:
        In [0, 1]; 1 if every class is covered.

    Raises:
        ValueError: labels out of range, or `least` not above 0.

    Example:
        >>> class_coverage(np.array([0, 0, 0, 1]), 4)
        0.5
    """
    if not least > 0:
        raise ValueError(f"least is {least}; give a number above 0, or every class is covered")
    return float(np.mean(class_shares(labels, num_classes) >= least / num_classes))


def class_agreement(logits: np.ndarray, asked: np.ndarray) -> float:
    """Return the accuracy of a classifier with respect to the labels given to a generator.

    Args:
        logits: of the classifier, [images, num_classes].
        asked: integer [images], the labels that the conditional generator got.

    Returns:
        In [0, 1].

    Raises:
        ValueError: not one label for each image.
    """
    logits, asked = np.asarray(logits), np.asarray(asked)
    if logits.shape[:-1] != asked.shape or not asked.size:
        raise ValueError(
            f"labels of shape {asked.shape} do not fit logits of shape {logits.shape}; give one "
            "for each image"
        )
    return float(np.mean(logits.argmax(axis=-1) == asked))


def _in_manifold(points: np.ndarray, others: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Return whether each point lies in the ball of one of the others, bool [points]."""
    radii = np.concatenate(
        [  # Entry 0 is the distance of a point to itself.
            np.partition(rows, num_neighbors, axis=1)[:, num_neighbors]
            for rows in _squared_distances(others, others)
        ]
    )
    return np.concatenate(
        [np.any(rows <= radii, axis=1) for rows in _squared_distances(points, others)]
    )


def _squared_distances(first: np.ndarray, second: np.ndarray) -> Any:
    """Yield the distance matrix in blocks of rows, [rows, len(second)]."""
    squared_norms = np.sum(np.square(second), axis=1)
    for start in range(0, len(first), _ROWS):
        block = first[start : start + _ROWS]
        distances = np.sum(np.square(block), axis=1)[:, None] + squared_norms - 2 * block @ second.T
        yield np.maximum(distances, 0)


def _checked(features: np.ndarray, name: str, *, min_images: int) -> np.ndarray:
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or len(array) < min_images:
        raise ValueError(
            f"{name} have shape {array.shape}; give [images, features] of {min_images} images or "
            "more"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold {array[~np.isfinite(array)][0]}; the network has diverged")
    return array
