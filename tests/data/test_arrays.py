"""Datasets in memory: checks, padding, orders, splits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import check_arrays, pad_batch, split
from jaxnets.data.arrays import random_order


def test_checked_arrays_are_not_copied():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    assert check_arrays({"inputs": images})["inputs"] is images


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no arrays"),
        ({"inputs": np.zeros((0, 2))}, "hold no examples"),
        ({"inputs": np.float32(1)}, "'inputs' is a single value"),
        ({"inputs": np.zeros(3), "labels": np.zeros(2)}, r"{'inputs': 3, 'labels': 2}"),
        ({"inputs": np.array([{}, None])}, "'inputs' has dtype object"),
        ({"names": np.array(["a", "b"])}, "'names' has dtype <U1"),
        (
            {"inputs": np.array([[1, 2], [np.inf, np.nan]])},
            r"2 non-finite values, first inf .*1, 0",
        ),
        ({"inputs": np.array([1 + 1j, np.nan])}, r"1 non-finite value, .* index \(1,\)"),
        ({"inputs": np.array(jnp.array([1, jnp.nan], jnp.bfloat16))}, r"first nan at index \(1,\)"),
    ],
)
def test_invalid_arrays_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        check_arrays(data)


def test_a_non_finite_value_is_found_in_any_block(monkeypatch):
    monkeypatch.setattr("jaxnets.data.arrays._BLOCK_ELEMENTS", 6)
    inputs = np.zeros((10, 3))
    inputs[5, 2] = inputs[9, 0] = np.nan
    with pytest.raises(ValueError, match=r"2 non-finite values, first nan at index \(5, 2\)"):
        check_arrays({"inputs": inputs})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 3]), r"1 labels are outside \[0, 3\), first 3 at index \(2,\)"),
        (np.array([-1, 1, 2]), r"first -1 at index \(0,\)"),
        (np.array([0.0, 1.0, 2.0]), "labels have dtype float64"),
    ],
)
def test_labels_out_of_range_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        check_arrays({"labels": labels}, num_classes=3)


def test_labels_of_every_integer_type_are_compared_with_all_classes():
    data = {"labels": np.array([0, 255], np.uint8), "weights": np.array([0.0, 2.0])}
    assert check_arrays(data, num_classes=256)["labels"].dtype == np.uint8


def test_weights_below_zero_are_refused():
    with pytest.raises(ValueError, match=r"1 weights are below 0, first -0\.5"):
        check_arrays({"labels": np.arange(2), "weights": np.array([1, -0.5])})


def test_missing_labels_are_refused_if_num_classes_is_given():
    with pytest.raises(ValueError, match=r"no 'labels' among \['inputs'\]"):
        check_arrays({"inputs": np.zeros(2)}, num_classes=2)


def test_padding_has_weight_zero_and_given_weights_and_dtypes_are_unchanged():
    batch = {
        "inputs": np.ones((2, 3), np.uint8),
        "labels": np.array([4, 5], np.int32),
        "weights": np.array([2, 0.5]),
    }
    padded = pad_batch(batch, 5)
    assert {name: array.dtype for name, array in padded.items()} == {
        "inputs": np.uint8,
        "labels": np.int32,
        "weights": np.float32,
    }
    assert padded["weights"].tolist() == [2, 0.5, 0, 0, 0]
    assert padded["inputs"].shape == (5, 3)
    assert padded["labels"].tolist() == [4, 5, 0, 0, 0]


def test_token_weights_are_padded_in_their_shape():
    padded = pad_batch({"inputs": np.ones((1, 4)), "weights": np.ones((1, 4))}, 2)
    assert padded["weights"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_a_batch_that_is_too_large_cannot_be_padded():
    with pytest.raises(ValueError, match="batch of 4 examples does not fit batch size 3"):
        pad_batch({"labels": np.arange(4)}, 3)


def test_orders_are_permutations_that_differ_between_seeds_and_streams():
    orders = [random_order(50, seed, stream) for seed in range(3) for stream in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9


def test_orders_never_change():
    # Computed once; a change would break the resume of every saved run.
    assert random_order(8, 0).tolist() == [1, 4, 5, 6, 2, 0, 3, 7]
    assert random_order(8, 2**40, 3).tolist() == [4, 7, 0, 3, 2, 6, 5, 1]


def test_orders_are_uniform():
    orders = np.stack([random_order(5, seed=1, stream=epoch) for epoch in range(4000)])
    counts = np.stack([np.bincount(column, minlength=5) for column in orders.T])
    # Mean 800, standard deviation 25: five standard deviations.
    assert np.abs(counts - 800).max() < 125


def test_parts_of_a_split_have_every_example_once_and_in_order():
    data = {"inputs": np.arange(101), "labels": np.arange(101) % 7}
    parts = split(data, (0.5, 0.3, 0.2), seed=3)
    assert [len(part["inputs"]) for part in parts] == [50, 31, 20]
    assert sorted(np.concatenate([part["inputs"] for part in parts])) == list(range(101))
    for part in parts:
        assert (np.diff(part["inputs"]) > 0).all()
        assert (part["labels"] == part["inputs"] % 7).all()


def test_a_split_depends_on_the_seed_alone():
    data = {"inputs": np.arange(40)}
    first, again, other = (split(data, (30, 10), seed=seed)[1]["inputs"] for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_a_stratified_split_divides_every_class_in_proportion():
    labels = np.repeat([0, 1, 2], [500, 203, 11])
    train, test = split({"labels": labels}, (0.8, 0.2), seed=0, stratify=True)
    assert (len(train["labels"]), len(test["labels"])) == (571, 143)
    exact = np.array([500, 203, 11]) * 143 / 714
    assert np.abs(np.bincount(test["labels"]) - exact).max() < 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((0.8, 0.3), "sum to 1.1"),
        ((7, 2), "together they must be 10"),
        ((10, 0), "every part needs one"),
        ((0.99, 0.01), "every part needs one"),
        ((-1, 11), "every part needs one"),
        ((), "together they must be 10"),
    ],
)
def test_parts_that_do_not_sum_to_the_whole_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        split({"inputs": np.arange(10)}, parts, seed=0)


def test_a_split_without_labels_cannot_be_stratified():
    with pytest.raises(ValueError, match="no 'labels'"):
        split({"inputs": np.arange(10)}, (5, 5), seed=0, stratify=True)
