"""Reference points for codes: principal components, linear probes, signal-to-noise ratios."""

from __future__ import annotations

import warnings

import numpy as np


def principal_components(vectors: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the directions of largest variance.

    Args:
        vectors: [examples, features].
        num_components: at most the number of features.

    Returns:
        [features], and orthonormal rows [num_components, features].
    """
    mean = vectors.mean(axis=0)
    centered = vectors - mean
    _, directions = np.linalg.eigh((centered.T @ centered).astype(np.float64))
    return mean, directions[:, ::-1][:, :num_components].T.astype(vectors.dtype)


def linear_probe(
    codes: np.ndarray, labels: np.ndarray, test_codes: np.ndarray, test_labels: np.ndarray
) -> float:
    """Train a logistic regression on labeled codes.

    The features are standardized. The strength of the L2 penalty is chosen on a fifth of the
    labeled examples, held out from training.

    Args:
        codes: [examples, features].
        labels: integer [examples].
        test_codes: [test examples, features].
        test_labels: integer [test examples].

    Returns:
        Accuracy on the test examples.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # slow to import

    mean, scale = codes.mean(axis=0), codes.std(axis=0)
    scale = np.where(scale > 1e-6 * scale.max(), scale, 1.0)
    codes, test_codes = (codes - mean) / scale, (test_codes - mean) / scale

    def accuracy(strength: float, train: slice, x: np.ndarray, y: np.ndarray) -> float:
        model = LogisticRegression(C=strength, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(codes[train], labels[train])
        return float(np.mean(model.predict(x) == y))

    # The examples are in random order.
    num_train = len(codes) - max(len(codes) // 5, 1)
    strengths = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    scores = [
        accuracy(c, slice(num_train), codes[num_train:], labels[num_train:]) for c in strengths
    ]
    best = strengths[int(np.argmax(scores))]
    return accuracy(best, slice(None), test_codes, test_labels)


def signal_to_noise(images: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio of images in [0, 1].

    Args:
        images: [examples, height, width, channels].
        clean: the same images without noise.

    Returns:
        Decibels, [examples]: 10 log10(1 / mean squared error).
    """
    errors = np.mean(np.square(images - clean), axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(errors, 1e-12))
