"""Metrics of predictions as weighted sums, exact over any split of the data.

Most functions return a `Mean`: add them up over batches, then call `compute()`, or the function
named in the docstring.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.core import Mean, at_least_float32, at_least_int32, checked_weights


def class_labels(labels: jax.Array) -> jax.Array:
    """Return integer labels from integer labels or from class probabilities.

    Args:
        labels: integer [...], or floating [..., num_classes] (one-hot, smoothed or mixed).

    Returns:
        Integer [...], int32 or wider.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return at_least_int32(labels)
    return jnp.argmax(labels, axis=-1)


def accuracy(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> Mean:
    """Count the examples whose most likely class is the label, `sklearn.metrics.accuracy_score`.

    Args:
        logits: [..., num_classes].
        labels: integer [...], or class probabilities [..., num_classes].
        weights: [...], 0 = ignore.

    Returns:
        Mean; `compute()` is the accuracy in [0, 1].

    Example:
        >>> logits = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
        >>> round(float(accuracy(logits, jnp.array([0, 1, 1])).compute()), 4)
        0.6667
    """
    return Mean.of(jnp.argmax(logits, axis=-1) == class_labels(labels), weights)


def top_k_accuracy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None, *, k: int = 5
) -> Mean:
    """Count the examples whose label is among the `k` most likely classes.

    `sklearn.metrics.top_k_accuracy_score` from sums.

    Args:
        logits: [..., num_classes].
        labels: integer [...], or class probabilities [..., num_classes].
        weights: [...], 0 = ignore.
        k: from 1 to num_classes.

    Returns:
        Mean; `compute()` is the top-k accuracy in [0, 1]. Equal logits are ranked in class order.

    Raises:
        ValueError: `k` outside its range.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k is {k}; give 1 to the number of classes, {logits.shape[-1]}")
    _, best = jax.lax.top_k(logits, k)
    return Mean.of(jnp.any(best == class_labels(labels)[..., None], axis=-1), weights)


def confusion_matrix(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None
) -> Mean:
    """Count the pairs of true and predicted class.

    `sklearn.metrics.confusion_matrix` as the total of a `Mean`.

    Args:
        logits: [batch, num_classes].
        labels: integer [batch], or class probabilities [batch, num_classes].
        weights: [batch], 0 = ignore.

    Returns:
        Mean with `total` [true class, predicted class], in numbers of examples; its `compute()` is
        their shares of all examples. Both are inputs of `precision_recall_f1`.

    Raises:
        ValueError: a weight is known to be below 0, as in `Mean.of`.
    """
    num_classes = logits.shape[-1]
    dtype = at_least_float32(logits).dtype
    true = jax.nn.one_hot(class_labels(labels), num_classes, dtype=dtype)
    predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_classes, dtype=dtype)
    if weights is None:
        weights = jnp.ones(true.shape[:1], dtype)
    weights = checked_weights(weights, dtype)
    return Mean((true * weights[:, None]).T @ predicted, jnp.sum(weights))


def precision_recall_f1(confusion: Mean | jax.Array) -> dict[str, jax.Array]:
    """Compute precision, recall and F1 of every class from a confusion matrix.

    `sklearn.metrics.precision_recall_fscore_support` with `zero_division=0`.

    Args:
        confusion: from `confusion_matrix`, summed over all batches; or its shares, as `evaluate`
            returns them, or its counts: [..., true class, predicted class].

    Returns:
        "precision", "recall" and "f1", each [..., num_classes], and "macro_f1", the unweighted mean
        of "f1", [...]. A class that is never predicted has precision 0, one that never occurs has
        recall 0.

    Example:
        >>> scores = precision_recall_f1(jnp.array([[3, 1], [0, 4]]))
        >>> scores["precision"].tolist(), scores["recall"].tolist()
        ([1.0, 0.800000011920929], [0.75, 1.0])
    """
    counts = _totals(confusion)
    hits = jnp.diagonal(counts, axis1=-2, axis2=-1)
    predicted, true = jnp.sum(counts, axis=-2), jnp.sum(counts, axis=-1)
    f1 = _ratio(2 * hits, predicted + true)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, true),
        "f1": f1,
        "macro_f1": jnp.mean(f1, axis=-1),
    }


def calibration(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    num_bins: int = 15,
) -> Mean:
    """Bin the examples by confidence, and sum confidence and accuracy of each bin.

    Args:
        logits: [batch, num_classes].
        labels: integer [batch], or class probabilities [batch, num_classes].
        weights: [batch], 0 = ignore.
        num_bins: equal bins of the confidence, the probability of the most likely class;
            bin i holds the confidences in (i / num_bins, (i + 1) / num_bins].

    Returns:
        Mean with `total` [num_bins, 3]: weight, summed confidence and summed hits of every bin, the
        input of `expected_calibration_error`.

    Raises:
        ValueError: a weight is known to be below 0, as in `Mean.of`.
    """
    probabilities = jax.nn.softmax(at_least_float32(logits), axis=-1)
    confidence = jnp.max(probabilities, axis=-1)
    hits = (jnp.argmax(logits, axis=-1) == class_labels(labels)).astype(confidence.dtype)
    if weights is None:
        weights = jnp.ones_like(confidence)
    weights = checked_weights(weights, confidence.dtype)
    confidence = jnp.where(weights == 0, 0, confidence)  # that of padding may be NaN
    index = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    # [batch, num_bins] and [batch, 3]
    in_bin = jax.nn.one_hot(index, num_bins, dtype=confidence.dtype) * weights[:, None]
    columns = jnp.stack([jnp.ones_like(confidence), confidence, hits], axis=-1)
    return Mean(in_bin.T @ columns, jnp.sum(weights))


def expected_calibration_error(bins: Mean | jax.Array) -> jax.Array:
    """Average the gap between confidence and accuracy over the bins, weighted by bin weight.

    Args:
        bins: from `calibration`, summed over all batches; or [..., num_bins, 3] as `evaluate`
            returns it.

    Returns:
        [...] in [0, 1].

    References:
        Guo et al., 2017, arXiv:1706.04599, equation 3.
    """
    weight, confidence, hits = jnp.moveaxis(_totals(bins), -1, 0)  # each [..., num_bins]
    gaps = jnp.sum(jnp.abs(hits - confidence), axis=-1)
    return Mean(gaps, jnp.sum(weight, axis=-1)).compute()


def perplexity(loss: Mean | jax.Array | float) -> jax.Array:
    """Return exp(mean loss), the perplexity of a language model.

    It is the number of equally likely tokens with the same loss.

    Args:
        loss: of a language model, in nats per token: summed over all batches, or its mean as
            `evaluate` returns it.

    Returns:
        Scalar, 1 or more; [members] for a population.

    Example:
        >>> round(float(perplexity(Mean.of(jnp.log(jnp.array([2.0, 8.0]))))), 4)
        4.0
    """
    return jnp.exp(_means(loss))


def codebook_perplexity(usage: Mean | jax.Array) -> jax.Array:
    """Return exp(entropy) of the code usage, the perplexity of a codebook.

    It is the number of equally used codes with the same entropy.

    Args:
        usage: the metric "code_usage" of `vq_vae`: sums [codebook_size], added up over batches; or
            shares [..., codebook_size], as `evaluate` returns them.

    Returns:
        [...] between 1 and the codebook's size.

    Example:
        >>> usage = Mean(jnp.array([2.0, 2.0, 0.0]), jnp.array(4.0))
        >>> round(float(codebook_perplexity(usage)), 4)
        2.0
    """
    return jnp.exp(jnp.sum(jax.scipy.special.entr(_means(usage)), axis=-1))


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Compute the Levenshtein distance: insertions, deletions and substitutions all cost 1.

    Args:
        first: sequence of characters, words, labels or other hashable items.
        second: likewise.

    Returns:
        The minimum number of edits that turn `first` into `second`.

    Example:
        >>> edit_distance("kitten", "sitting")
        3

    References:
        Levenshtein 1966, Soviet Physics Doklady 10(8).
    """
    ids: dict[Hashable, int] = {}
    second_ids = np.array([ids.setdefault(item, len(ids)) for item in second], np.int64)
    columns = np.arange(len(second_ids) + 1)
    row = columns
    for item in first:
        next_row = row + 1  # deletion
        next_row[1:] = np.minimum(next_row[1:], row[:-1] + (second_ids != ids.get(item, -1)))
        # Insertions: next_row[j] = min over i <= j of next_row[i] + j - i.
        row = np.minimum.accumulate(next_row - columns) + columns
    return int(row[-1])


def error_rate(
    predictions: Iterable[Sequence[Hashable]], references: Iterable[Sequence[Hashable]]
) -> Mean:
    """Count the edits between predicted and reference sequences: word or character error rate.

    `jiwer.wer` for sequences of words, `jiwer.cer` for sequences of characters.

    Args:
        predictions: one sequence of words (or characters, or labels) for each utterance.
        references: the true sequences.

    Returns:
        Mean; `compute()` is the error rate: edits per word (character, label) of the references,
        which can exceed 1.

    Raises:
        ValueError: the numbers of predictions and references differ.

    Example:
        >>> error_rate(["one two".split()], ["one two three four".split()]).compute().item()
        0.5
    """
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions do not fit {len(references)} references; give one "
            "for each utterance"
        )
    edits = sum(map(edit_distance, predictions, references))
    return Mean(jnp.asarray(float(edits)), jnp.asarray(float(sum(map(len, references)))))


def confidence_interval(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95
) -> tuple[float, float]:
    """Return the mean over seeds and the half-width of its confidence interval.

    mean +- t s / sqrt(n), with the standard deviation s of the n values and the quantile t of
    Student's distribution with n - 1 degrees of freedom.

    Args:
        values: one per seed, [seeds]. Those that are NaN or infinite, of networks that diverged,
            do not count.
        level: probability that the interval covers the mean, in (0, 1).

    Returns:
        mean, and half-width: NaN for a single value, which has no interval. Both are NaN if no
        value is finite.

    Warns:
        RuntimeWarning: values do not count; it says how many, and which. Select the finite ones
            yourself to leave them out without it.

    Example:
        >>> mean, half_width = confidence_interval([0.90, 0.92, 0.97])
        >>> round(mean, 4), round(half_width, 4)
        (0.93, 0.0896)
    """
    import scipy.stats  # takes as long to import as the rest of the library

    array = np.asarray(values, np.float64)
    finite = np.isfinite(array)
    if not np.all(finite):
        warnings.warn(
            f"{np.sum(~finite)} of {array.size} values are NaN or infinite and do not count in the "
            f"mean: those at {np.flatnonzero(~finite).tolist()}",
            RuntimeWarning,
            stacklevel=2,
        )
    array = array[finite]
    if array.size < 2:
        return float(array[0]) if array.size else np.nan, np.nan
    t = scipy.stats.t.ppf((1 + level) / 2, array.size - 1)
    return float(np.mean(array)), float(t * np.std(array, ddof=1) / np.sqrt(array.size))


def _totals(sums: Mean | jax.Array) -> jax.Array:
    """Return the totals of a metric whose scale does not matter, such as counts or shares."""
    return _floating(sums.total if isinstance(sums, Mean) else sums)


def _means(sums: Mean | jax.Array | float) -> jax.Array:
    return _floating(sums.compute() if isinstance(sums, Mean) else sums)


def _floating(values: jax.typing.ArrayLike) -> jax.Array:
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator == 0, 0.0, numerator / jnp.where(denominator == 0, 1, denominator))
