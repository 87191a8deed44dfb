"""The outcome of a run as text."""

import numpy as np
import pytest

from experiments.harness.problem import Measured
from experiments.harness.training import describe


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5], "accuracy 50.00%"),
        ([0.5, 0.7], "accuracy 60.00% +- 127.06% over the seeds (95%)"),
        ([0.5, np.nan], "accuracy 50.00% (1 of 2 networks diverged and do not count)"),
        ([np.nan, np.inf], "accuracy none, because every network diverged"),
    ],
)
def test_the_outcome_says_which_networks_do_not_count(values, shown):
    assert describe(Measured("accuracy", np.array(values))) == shown
