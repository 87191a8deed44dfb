"""Grain pipelines: order, resume, threads, argument checks."""

import functools
import itertools
import sys

import numpy as np
import pytest

pytest.importorskip("grain")

from jaxnets.data import chunked, grain_batches, prefetch


class Counting:
    """Ten examples that record which of them were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.read.append(index)
        return {"inputs": np.array([index, index]), "labels": np.int32(index)}


def add_noise(example, generator):
    return {**example, "noise": generator.standard_normal(2)}


def take(source, first_step, number):
    return list(itertools.islice(source(first_step), number))


def labels(batches):
    return [batch["labels"].tolist() for batch in batches]


def noisy_batches(num_threads):
    return grain_batches(Counting(), 3, seed=4, transform=add_noise, num_threads=num_threads)


@functools.cache
def uninterrupted(num_threads):
    return take(noisy_batches(num_threads), 0, 13)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("first_step", [0, 1, 4, 9])
def test_batches_from_a_step_equal_those_of_an_uninterrupted_run(first_step, num_threads):
    expected = uninterrupted(num_threads)[first_step : first_step + 4]
    for one, other in zip(take(noisy_batches(num_threads), first_step, 4), expected, strict=True):
        assert one.keys() == other.keys() == {"inputs", "labels", "noise"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


def test_threads_do_not_change_the_order():
    plain, threaded = (grain_batches(Counting(), 3, seed=0, num_threads=n) for n in (0, 3))
    assert labels(take(plain, 2, 10)) == labels(take(threaded, 2, 10))


def test_every_epoch_has_every_example_once_in_its_own_order():
    read = np.concatenate(labels(take(grain_batches(Counting(), 4, seed=0), 0, 10)))
    epochs = read.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("num_threads", [0, 2])
def test_the_parts_of_a_batch_read_their_own_rows_and_are_together_the_batch(num_threads):
    whole = take(grain_batches(Counting(), 4, seed=4, transform=add_noise), 2, 5)
    examples = [Counting(), Counting()]
    for index, each in enumerate(examples):
        source = grain_batches(each, 4, seed=4, transform=add_noise, num_threads=num_threads)
        parts = take(source.part(index, 2), 2, 5)
        for batch, part in zip(whole, parts, strict=True):
            for name, array in batch.items():
                rows = array[2 * index : 2 * index + 2]
                np.testing.assert_array_equal(part[name], rows, strict=True)
    if not num_threads:  # threads read ahead
        rows = np.concatenate([batch["labels"].reshape(2, 2) for batch in whole], axis=1)
        assert [each.read for each in examples] == rows.tolist()


def test_a_part_of_a_batch_has_equal_rows():
    with pytest.raises(ValueError, match="batch size 4 is not divisible into 3 parts"):
        grain_batches(Counting(), 4, seed=0).part(0, 3)


def test_a_seed_is_not_its_neighbor_one_epoch_later():
    orders = [labels(take(grain_batches(Counting(), 10, seed=seed), 0, 3)) for seed in range(3)]
    assert len({tuple(epoch[0]) for epoch in orders for epoch in zip(epoch, strict=True)}) == 9


def test_noise_differs_between_examples_and_epochs():
    batches = take(grain_batches(Counting(), 10, seed=0, transform=add_noise), 0, 3)
    noise = np.concatenate([batch["noise"] for batch in batches])
    assert len(np.unique(noise)) == noise.size == 60


def test_resuming_does_not_read_earlier_batches():
    examples = Counting()
    take(grain_batches(examples, 2, seed=0), 10**6, 1)
    assert len(examples.read) == 2


def test_grain_batches_can_be_chunked_and_prefetched():
    source = grain_batches(Counting(), 2, seed=0)
    batch = next(prefetch(chunked(source, 3))(5))
    assert batch["labels"].reshape(-1).tolist() == np.ravel(labels(take(source, 5, 3))).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": []}, "holds no examples"),
        ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
        ({"num_threads": -1}, "cannot read with -1 threads"),
        ({"seed": -1}, "seed -1 is negative"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grain_batches(**{"source": Counting(), "batch_size": 2, "seed": 0, **arguments})


def test_a_negative_first_step_is_refused():
    with pytest.raises(ValueError, match="first step -1 is negative"):
        grain_batches(Counting(), 2, seed=0)(-1)


def test_missing_grain_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match="pip install grain"):
        grain_batches(Counting(), 2, seed=0)
