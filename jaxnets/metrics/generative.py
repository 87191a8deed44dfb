"""Measures of generated images in the features of a classifier, in float64 on the host.

The features are those of whatever network the caller trusts. In the features of a classifier
trained with this library, `frechet_distance` is a "classifier-feature distance", to be compared
with distances in the same features only, first of all with the distance between two halves of
real images. It is the FID of the literature only in the features of the published Inception
network, with 50,000 images; give those features, and it is. Against statistics that others have
published, often as an .npz of `mu` and `sigma`:

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

# Rows of a distance matrix that are in memory at once.
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
        precision: share of the generated images that lie among the real ones: quality.
        recall: share of the real images that lie among the generated ones: variety.
    """

    precision: float
    recall: float


def classifier_features(
    module: Any, variables: Any, inputs: np.ndarray, *, batch_size: int = 500
) -> ClassifierOutput:
    """Run a classifier over images, a batch at a time, and keep what it recorded.

    Args:
        module: a classifier that records "features", such as `ConvNet` or `ResNet`.
        variables: its parameters and other collections.
        inputs: images as it was trained on them, [images, height, width, channels].
        batch_size: images at once; the last batch is filled up, so that one program serves all.

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
        filled = np.concatenate([part, part[:1].repeat(missing, axis=0)])
        logits, recorded = _captured(module, variables, filled)
        if "features" not in recorded:
            raise ValueError(
                f"{type(module).__name__} records {sorted(recorded)} and no 'features'; record "
                "them with jaxnets.layers.record in front of its last layer"
            )
        features = recorded["features"].reshape(len(filled), -1)
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
        ValueError: not two axes, fewer than two images, or a number that is not finite.
    """
    features = _checked(features, "features", least=2)
    mean = features.mean(axis=0)
    centered = features - mean
    return FeatureDistribution(mean, centered.T @ centered / (len(features) - 1))


def gaussian_distance(first: FeatureDistribution, second: FeatureDistribution) -> float:
    """Squared Frechet distance of two normal distributions.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (R S2 R)^(1/2)) with R = S1^(1/2). The roots come from
    eigenvalues of symmetric matrices, with those below zero by rounding set to zero, so that
    covariances of fewer images than features do no harm.

    Args:
        first: from `gaussian_fit`, or of published numbers.
        second: likewise, with as many features.

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
            f"{len(first.mean)} features do not fit {len(second.mean)}; take both from the same "
            "network"
        )
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ second.covariance @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    means = np.sum(np.square(first.mean - second.mean))
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross
    return float(max(means + spread, 0.0))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the normal distributions fitted to two sets of features.

    Small sets make it larger: compare distances of equally many images, and with the distance of
    real training from real test images. Not the FID unless the features are Inception's.

    Args:
        first: [images, features].
        second: [images, features]; as many features, of any number of images.

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
    """Count the generated images among the real ones, and the real ones among the generated.

    Around each image of a set lies a ball that reaches to its k-th nearest neighbor in the set;
    an image of the other set lies among them if it is in one of these balls.

    Args:
        real: features, [images, features].
        generated: features, [images, features]; about as many images, or the balls differ.
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
    real = _checked(real, "real", least=num_neighbors + 1)
    generated = _checked(generated, "generated", least=num_neighbors + 1)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"{real.shape[1]} features do not fit {generated.shape[1]}; take both from the same "
            "network"
        )
    return PrecisionRecall(
        float(np.mean(_among(generated, real, num_neighbors))),
        float(np.mean(_among(real, generated, num_neighbors))),
    )


def class_shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the share of every class.

    Args:
        labels: integer [images] in [0, num_classes), such as those a classifier gives.
        num_classes: number of classes.

    Returns:
        [num_classes], which sum to 1.

    Raises:
        ValueError: no labels, or one out of range.
    """
    labels = np.asarray(labels)
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size or not labels.size:
        found = f"label {wrong[0]}" if wrong.size else "no label"
        raise ValueError(f"{found} for {num_classes} classes; give labels in [0, {num_classes})")
    return np.bincount(labels, minlength=num_classes) / labels.size


def class_coverage(labels: np.ndarray, num_classes: int, *, least: float = 0.1) -> float:
    """Return the share of the classes that are not missing among generated images.

    Args:
        labels: integer [images], what a classifier takes the generated images to be.
        num_classes: number of classes.
        least: a class counts from this part of an even share on: of 10 classes, 0.1 asks for one
            image in a hundred.

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
    """Return the share of generated images that a classifier takes to be of the class asked for.

    Args:
        logits: of the classifier, [images, num_classes].
        asked: integer [images], the labels that a conditional generator got.

    Returns:
        In [0, 1].

    Raises:
        ValueError: not one label for each image.
    """
    logits, asked = np.asarray(logits), np.asarray(asked)
    if logits.shape[:-1] != asked.shape or not asked.size:
        raise ValueError(
            f"asked labels of shape {asked.shape} do not fit logits of shape {logits.shape}; give "
            "one for each image"
        )
    return float(np.mean(logits.argmax(axis=-1) == asked))


def _among(points: np.ndarray, others: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Say for each point whether it lies in the ball of one of the others: bool [points]."""
    radii = np.concatenate(
        [  # The nearest of all is the point itself.
            np.partition(rows, num_neighbors, axis=1)[:, num_neighbors]
            for rows in _squared_distances(others, others)
        ]
    )
    return np.concatenate(
        [np.any(rows <= radii, axis=1) for rows in _squared_distances(points, others)]
    )


def _squared_distances(first: np.ndarray, second: np.ndarray) -> Any:
    """Yield [rows, second] of the distances of `first`, a block of rows at a time."""
    lengths = np.sum(np.square(second), axis=1)
    for start in range(0, len(first), _ROWS):
        block = first[start : start + _ROWS]
        squares = np.sum(np.square(block), axis=1)[:, None] + lengths - 2 * block @ second.T
        yield np.maximum(squares, 0)


def _checked(features: np.ndarray, name: str, *, least: int) -> np.ndarray:
    array = np.asarray(features, np.float64)
    if array.ndim != 2 or len(array) < least:
        raise ValueError(
            f"{name} have shape {array.shape}; give [images, features] of {least} images or more"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold {array[~np.isfinite(array)][0]}; the network has diverged")
    return array
