"""Batch sources: order, epochs, resume, stacking, argument checks."""

import itertools

import numpy as np
import pytest

from jaxnets.core import steps_per_batch
from jaxnets.data import (
    chunked,
    index_batches,
    member_batches,
    sequential_batches,
    shuffled_batches,
    with_epochs,
)

DATA = {
    "inputs": np.arange(23 * 4, dtype=np.uint8).reshape(23, 2, 2, 1),
    "labels": np.arange(23, dtype=np.int32),
}


def take(source, first_step, number):
    return list(itertools.islice(source(first_step), number))


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


@pytest.mark.parametrize("first_step", [0, 1, 3, 4, 5, 11, 40])
@pytest.mark.parametrize(
    "source",
    [
        shuffled_batches(DATA, 5, seed=1),
        index_batches(23, 5, seed=1),
        index_batches(23, 23, seed=1),
        with_epochs(index_batches(23, 5, seed=1)),
    ],
    ids=["shuffled", "index", "whole epochs", "with epochs"],
)
def test_a_run_resumed_at_any_step_gets_the_batches_of_an_uninterrupted_run(source, first_step):
    whole = take(source, 0, first_step + 6)
    assert_equal_batches(take(source, first_step, 6), whole[first_step:])


def test_each_epoch_has_no_duplicates_and_its_own_order():
    source = shuffled_batches(DATA, 5, seed=0)
    assert source.steps_per_epoch == 4
    labels = [batch["labels"] for batch in take(source, 0, 12)]
    epochs = [np.concatenate(labels[start : start + 4]).tolist() for start in (0, 4, 8)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_examples_dropped_at_the_end_of_an_epoch_change_with_the_epoch():
    labels = [batch["labels"] for batch in take(shuffled_batches(DATA, 5, seed=0), 0, 40)]
    assert set(np.concatenate(labels)) == set(range(23))


def test_rows_of_different_arrays_stay_aligned_with_their_dtypes():
    for batch in take(shuffled_batches(DATA, 5, seed=2), 0, 5):
        assert batch["inputs"].dtype == np.uint8
        np.testing.assert_array_equal(batch["inputs"], DATA["inputs"][batch["labels"]])


def test_index_batches_follow_the_order_of_shuffled_batches():
    indices = take(index_batches(23, 4, seed=9), 3, 8)
    assert all(batch["indices"].dtype == np.int32 for batch in indices)
    gathered = [{name: array[b["indices"]] for name, array in DATA.items()} for b in indices]
    assert_equal_batches(gathered, take(shuffled_batches(DATA, 4, seed=9), 3, 8))


@pytest.mark.parametrize(
    "source", [shuffled_batches(DATA, 5, seed=1), index_batches(23, 5, seed=1)]
)
def test_batches_have_the_number_of_their_epoch(source):
    told = with_epochs(source)
    assert told.steps_per_epoch == source.steps_per_epoch == 4
    batches = take(told, 2, 7)
    expected = np.repeat([[0], [1], [2]], [2, 4, 1], axis=0) * np.ones(5, np.int32)
    np.testing.assert_array_equal([batch.pop("epochs") for batch in batches], expected)
    assert_equal_batches(batches, take(source, 2, 7))


def test_seeds_give_different_orders_at_every_epoch():
    # Epoch e of seed s must not be epoch e - 1 of seed s + 1.
    orders = {
        tuple(batch["indices"])
        for seed in range(5)
        for batch in take(index_batches(12, 12, seed=seed), 0, 5)
    }
    assert len(orders) == 25


def test_a_sequential_pass_is_in_order_and_padded_with_weight_zero():
    source = sequential_batches(DATA, 10)
    batches = list(source(0))
    assert len(batches) == len(source) == 3
    assert all(batch["inputs"].shape == (10, 2, 2, 1) for batch in batches)
    weights = np.concatenate([batch["weights"] for batch in batches])
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert labels[weights > 0].tolist() == list(range(23))
    assert weights.tolist() == [1] * 23 + [0] * 7
    assert weights.dtype == np.float32


def test_a_sequential_pass_can_start_at_any_batch_and_ends():
    source = sequential_batches(DATA, 10)
    assert_equal_batches(list(source(2)), list(source(0))[2:])
    assert list(source(3)) == []


def test_a_sequential_pass_uses_the_weights_of_the_data():
    weighted = {**DATA, "weights": np.linspace(0, 1, 23)}
    weights = [batch["weights"] for batch in sequential_batches(weighted, 23)(0)]
    np.testing.assert_allclose(weights, [np.linspace(0, 1, 23)], rtol=1e-7)


@pytest.mark.parametrize("first_step", [0, 1, 2, 3, 7])
def test_chunks_start_at_any_step_and_stack_consecutive_batches(first_step):
    source = shuffled_batches(DATA, 5, seed=0)
    chunks = take(chunked(source, 3), first_step, 2)
    assert chunks[0]["inputs"].shape == (3, 5, 2, 2, 1)
    steps = [{name: array[i] for name, array in c.items()} for c in chunks for i in range(3)]
    assert_equal_batches(steps, take(source, first_step, 6))


def test_only_chunks_have_several_steps_per_batch():
    source = index_batches(8, 2, seed=0)
    assert steps_per_batch(chunked(source, 4)) == 4
    assert steps_per_batch(source) == steps_per_batch(member_batches([source])) == 1


def test_a_source_that_ends_within_a_chunk_is_an_error():
    chunks = chunked(sequential_batches(DATA, 10), 2)(0)
    next(chunks)
    with pytest.raises(ValueError, match="ended after 1 batches of a chunk of 2"):
        next(chunks)


@pytest.mark.parametrize("first_step", [0, 5])
def test_every_member_gets_exactly_the_batches_of_its_own_source(first_step):
    sources = [shuffled_batches(DATA, 5, seed=seed) for seed in range(3)]
    together = take(member_batches(sources), first_step, 6)
    for member, source in enumerate(sources):
        own = [{name: array[member] for name, array in batch.items()} for batch in together]
        assert_equal_batches(own, take(source, first_step, 6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shuffled_batches(DATA, 24, seed=0), "batch size 24 is larger than the 23"),
        (lambda: shuffled_batches(DATA, 0, seed=0), "batch_size=0 must be a positive integer"),
        (lambda: shuffled_batches(DATA, 5, seed=-1), "seed -1 is negative"),
        (lambda: shuffled_batches({"inputs": np.full(3, np.nan)}, 1, seed=0), "non-finite"),
        (lambda: index_batches(5, 6, seed=0), "batch size 6 is larger than the 5"),
        (lambda: sequential_batches(DATA, 0), "batch_size=0 must be a positive integer"),
        (lambda: sequential_batches({}, 1), "no arrays"),
        (lambda: member_batches([]), "sources is empty"),
        (lambda: chunked(index_batches(5, 5, seed=0), 0), "num_steps=0 must be a positive integer"),
        (lambda: chunked(index_batches(5, 5, seed=0), 2.5), r"num_steps=2\.5 must be a positive"),
        (lambda: next(index_batches(5, 5, seed=0)(-1)), "first step -1 is negative"),
        (lambda: next(sequential_batches(DATA, 5)(-1)), "first step -1 is negative"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
