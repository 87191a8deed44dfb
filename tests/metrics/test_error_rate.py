"""Edit distance against its recursion, and error rate by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.core import Mean
from jaxnets.metrics.supervised import edit_distance, error_rate


def distance_by_recursion(first, second):
    if not first or not second:
        return len(first) + len(second)
    return min(
        distance_by_recursion(first[1:], second) + 1,
        distance_by_recursion(first, second[1:]) + 1,
        distance_by_recursion(first[1:], second[1:]) + (first[0] != second[0]),
    )


def test_the_edit_distance_equals_its_recursion():
    random = np.random.default_rng(0)
    for _ in range(100):
        first, second = (tuple(random.integers(0, 3, random.integers(0, 6))) for _ in range(2))
        expected = distance_by_recursion(first, second)
        assert edit_distance(first, second) == edit_distance(second, first) == expected
    assert edit_distance(["one", "two"], ["one", 2, "two"]) == 1


def test_the_error_rate_counts_edits_per_word_of_the_references():
    references = [["a", "b", "c"], ["d"], []]
    predictions = [["a", "c"], ["d", "e", "f"], ["g"]]
    rate = error_rate(predictions, references)
    assert (float(rate.total), float(rate.count)) == (1 + 2 + 1, 4)
    assert float((rate + Mean(jnp.asarray(0.0), jnp.asarray(4.0))).compute()) == 0.5
    with pytest.raises(ValueError, match="3 predictions do not fit 2 references"):
        error_rate(predictions, references[:2])
