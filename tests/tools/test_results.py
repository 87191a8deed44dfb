"""The result of a run as a file: what is written is read, and what is none is refused."""

import json

import numpy as np
import pytest

from jaxnets.metrics import confidence_interval
from jaxnets.tools import read_result, write_result
from jaxnets.training.history import History

WORDS = {"dataset": "digits", "metric": "test accuracy"}


def test_a_result_has_mean_interval_times_and_what_the_user_adds(tmp_path):
    history = History(
        rows=[], step=300, seconds=4.0, first_call_seconds=1.0, spent={"evaluation": 0.5}
    )
    values = np.array([0.9, 0.92, 0.97])
    path = write_result(
        tmp_path / "new", **WORDS, values=values, history=history, parameters=21, mine=[1, 2]
    )
    assert path == tmp_path / "new" / "result.json"
    result = read_result(tmp_path / "new")
    mean, half = confidence_interval(values)
    assert result["value"] == pytest.approx(mean) and result["ci95"] == pytest.approx(half, 1e-4)
    assert result["values"] == [0.9, 0.92, 0.97] and result["seeds"] == 3
    assert result["train_seconds"] == 5.0 and result["evaluation_seconds"] == 0.5
    assert result["steps"] == 300 and result["mine"] == [1, 2] and result["parameters"] == 21


@pytest.mark.parametrize(
    ("values", "value", "ci95"),
    [(0.5, 0.5, None), ([0.5, np.nan], 0.5, None), ([np.inf], None, None)],
)
def test_networks_that_diverged_have_no_value(values, value, ci95, tmp_path):
    write_result(tmp_path, **WORDS, values=values)
    result = read_result(tmp_path)
    assert (result["value"], result["ci95"]) == (value, ci95)
    finite = np.isfinite(np.atleast_1d(values))
    assert [each is not None for each in result["values"]] == finite.tolist()


@pytest.mark.parametrize("values", [[], [[0.5]]])
def test_values_of_another_shape_are_refused(values, tmp_path):
    with pytest.raises(ValueError, match="give one number per seed"):
        write_result(tmp_path, **WORDS, values=values)
    assert not (tmp_path / "result.json").exists()


def test_a_number_of_seeds_that_does_not_fit_is_refused(tmp_path):
    content = {**WORDS, "unit": "%", "values": [0.9, 0.8], "seeds": 3}
    (tmp_path / "result.json").write_text(json.dumps(content, indent=2))
    with pytest.raises(ValueError, match=r"line 9: .*seeds is 3, but there are 2 values"):
        read_result(tmp_path)
