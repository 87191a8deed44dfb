"""Bucketing by length: padding, epochs, shapes, resume, original order, argument checks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnets.data import (
    bucketed_batches,
    bucketed_pass,
    chunked,
    member_batches,
    pad_sequences,
    sequential_windows,
    token_windows,
)


def make_pairs(num_examples, seed=0):
    """Return pairs with distinct sources and a long-tailed distribution of lengths."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(1 + random.geometric(0.12, (num_examples, 2)), 40)
    return [
        (np.r_[1000 + index, random.integers(4, 90, a - 1)], random.integers(4, 90, b))
        for index, (a, b) in enumerate(lengths.tolist())
    ]


PAIRS = make_pairs(300)
LABELLED = [(source, index % 5) for index, (source, _) in enumerate(PAIRS)]
OPTIONS = {"tokens_per_batch": 160, "num_buckets": 5}
SOURCE = bucketed_batches(PAIRS, seed=1, **OPTIONS)


def take(source, first_step, number):
    return list(itertools.islice(source(first_step), number))


def assert_equal_batches(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


def examples(batches):
    """Return the indices of the examples in PAIRS, from their first token."""
    return [int(row[0]) - 1000 for batch in batches for row in batch["inputs"]]


# Padding


def test_sequences_are_padded_to_the_longest_or_to_a_multiple():
    sequences = [[5, 6, 7], np.array([8], np.uint16), (9, 9)]
    padded, lengths = pad_sequences(sequences)
    assert padded.tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert lengths.tolist() == [3, 1, 2]
    assert padded.dtype == lengths.dtype == np.int32
    assert pad_sequences(sequences, multiple=4)[0].shape == (3, 4)
    assert pad_sequences(sequences, multiple=3)[0].shape == (3, 3)
    assert pad_sequences(sequences, length=5)[0].shape == (3, 5)


def test_long_sequences_are_cut_only_on_request():
    with pytest.raises(ValueError, match="sequence 1 has 3 tokens, more than length=2"):
        pad_sequences([[4], [5, 6, 7]], length=2)
    padded, lengths = pad_sequences([[4], [5, 6, 7]], length=2, truncate=True)
    assert padded.tolist() == [[4, 0], [5, 6]] and lengths.tolist() == [1, 2]


# Training batches


@pytest.mark.parametrize("first_step", [0, 1, 7, 30, 31, 32, 100])
@pytest.mark.parametrize(
    "source",
    [
        SOURCE,
        bucketed_batches(LABELLED, seed=1, **OPTIONS),
        bucketed_batches(PAIRS, seed=1, steps_per_shape=3, **OPTIONS),
    ],
    ids=["pairs", "classes", "groups"],
)
def test_a_run_resumed_at_any_step_gets_the_batches_of_an_uninterrupted_run(source, first_step):
    whole = take(source, 0, first_step + 40)
    assert_equal_batches(take(source, first_step, 40), whole[first_step:])


def test_every_row_is_its_example_with_special_ids_and_padding():
    for batch in take(SOURCE, 0, SOURCE.steps_per_epoch):
        assert all(array.dtype == np.int32 for array in batch.values())
        assert batch.keys() == {"inputs", "lengths", "decoder_inputs", "labels", "label_lengths"}
        for row, place in enumerate(examples([batch])):
            source, target = (ids.tolist() for ids in PAIRS[place])
            expected = {"inputs": source, "decoder_inputs": [1, *target], "labels": [*target, 2]}
            for name, ids in expected.items():
                padding = [0] * (batch[name].shape[1] - len(ids))
                assert batch[name][row].tolist() == ids + padding
            assert batch["lengths"][row] == len(source)
            assert batch["label_lengths"][row] == len(target) + 1


@pytest.mark.parametrize("value", [np.int64(2**32 + 5), np.uint64(2**63 + 5), np.uint32(2**31)])
def test_ids_that_int32_cannot_hold_stay_out_of_range(value):
    greatest = 2**31 - 1
    ids = np.array([5, value], value.dtype)
    assert pad_sequences([ids])[0].tolist() == [[5, greatest]]
    for target, label in ((value, greatest), (ids, 5)):
        batch = next(bucketed_batches([(ids, target)], tokens_per_batch=9, seed=0)(0))
        assert batch["inputs"][0, 1] == greatest and batch["labels"].flat[0] == label
    assert np.max(batch["labels"]) == greatest
    text = np.full(9, value)
    for source in (
        token_windows(text, batch_size=1, length=3, seed=0),
        sequential_windows(text, batch_size=1, length=3),
    ):
        assert np.all(next(source(0))["inputs"] == greatest)


def test_classes_stay_with_their_sequences():
    source = bucketed_batches(LABELLED, seed=1, **OPTIONS)
    for batch in take(source, 0, source.steps_per_epoch):
        assert batch.keys() == {"inputs", "lengths", "labels"}
        places = examples([batch])
        assert batch["labels"].tolist() == [place % 5 for place in places]
        assert batch["lengths"].tolist() == [len(PAIRS[place][0]) for place in places]


def test_an_epoch_has_no_duplicates_and_drops_less_than_a_batch_of_each_bucket():
    steps = SOURCE.steps_per_epoch
    epochs = [examples(take(SOURCE, epoch * steps, steps)) for epoch in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        left = sum(len(bucket) % bucket.batch_size for bucket in SOURCE.buckets)
        assert len(epoch) == SOURCE.num_examples - left == 300 - left
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_dropped_examples_change_with_the_epoch():
    assert set(examples(take(SOURCE, 0, 25 * SOURCE.steps_per_epoch))) == set(range(300))


def test_there_are_few_shapes_with_about_the_same_number_of_tokens():
    batches = take(SOURCE, 0, SOURCE.steps_per_epoch)
    shapes = {(batch["inputs"].shape, batch["labels"].shape) for batch in batches}
    assert 3 <= len(shapes) == len(SOURCE.buckets) <= 5
    for (rows, source_length), (_, target_length) in shapes:
        assert source_length % 4 == target_length % 4 == 0
        longest = max(source_length, target_length)
        assert 160 - longest < rows * longest <= 160


def test_the_shapes_of_an_epoch_are_mixed():
    lengths = [batch["inputs"].shape[1] for batch in take(SOURCE, 0, SOURCE.steps_per_epoch)]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_more_buckets_have_less_padding_and_the_share_is_that_of_the_batches():
    shares = [
        bucketed_batches(
            PAIRS, seed=0, tokens_per_batch=160, num_buckets=n, multiple=1
        ).padding_share
        for n in (1, 3, 10)
    ]
    assert shares[0] > shares[1] > shares[2] > 0
    source = bucketed_batches([([5], 0), ([6], 1), ([7], 1)], tokens_per_batch=12, seed=0)
    (batch,) = take(source, 0, 1)
    assert batch["inputs"].shape == (3, 4)
    assert source.padding_share == 1 - 3 / 12
    everything = bucketed_pass([([5], 0), ([6], 1), ([7, 8], 1)], tokens_per_batch=12)
    assert everything.padding_share == 1 - 4 / 12


def test_seeds_share_the_order_of_shapes_but_not_of_examples():
    sources = [bucketed_batches(PAIRS, seed=seed, **OPTIONS) for seed in range(3)]
    together = take(member_batches(sources), 5, 40)
    for member, source in enumerate(sources):
        own = [{name: array[member] for name, array in batch.items()} for batch in together]
        assert_equal_batches(own, take(source, 5, 40))
    assert len({tuple(examples(take(source, 0, 5))) for source in sources}) == 3


@pytest.mark.parametrize("first_step", [0, 3, 30])
def test_batches_of_one_shape_can_be_stacked_for_a_scan(first_step):
    source = bucketed_batches(PAIRS, seed=1, steps_per_shape=3, **OPTIONS)
    assert source.steps_per_epoch % 3 == 0
    chunks = take(chunked(source, 3), first_step, 10)
    steps = [{name: array[i] for name, array in c.items()} for c in chunks for i in range(3)]
    assert_equal_batches(steps, take(source, first_step, 30))
    epoch = examples(take(source, 0, source.steps_per_epoch))
    assert len(set(epoch)) == len(epoch)


def test_batch_sizes_are_multiples_of_the_number_of_devices():
    source = bucketed_batches(PAIRS, seed=1, batch_multiple=3, **OPTIONS)
    assert {len(batch["inputs"]) % 3 for batch in take(source, 0, source.steps_per_epoch)} == {0}


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    num_buckets=st.integers(1, 8),
    multiple=st.integers(1, 6),
    batch_multiple=st.integers(1, 3),
    steps_per_shape=st.integers(1, 3),
)
def test_every_example_is_in_a_bucket_for_all_lengths(
    lengths, num_buckets, multiple, batch_multiple, steps_per_shape
):
    pairs = [(np.full(length, 1000 + index), 0) for index, length in enumerate(lengths)]
    smallest = batch_multiple * steps_per_shape
    options = {"num_buckets": num_buckets, "multiple": multiple, "tokens_per_batch": 120}
    if len(pairs) < smallest:
        with pytest.raises(ValueError, match=f"{len(pairs)} examples are fewer"):
            bucketed_batches(
                pairs,
                seed=0,
                batch_multiple=batch_multiple,
                steps_per_shape=steps_per_shape,
                **options,
            )
        return
    source = bucketed_batches(
        pairs, seed=0, batch_multiple=batch_multiple, steps_per_shape=steps_per_shape, **options
    )
    # Each bucket has at least one batch, so every example is used in some epoch.
    for bucket in source.buckets:
        assert len(bucket) >= bucket.batch_size * steps_per_shape >= smallest
    assert sorted(i for b in source.buckets for i in b.data["indices"]) == list(range(len(pairs)))
    everything = bucketed_pass(pairs, **options)
    restored = np.zeros(len(pairs), int)
    for batch in everything(0):
        restored[batch["indices"]] = batch["lengths"]
    assert restored.tolist() == lengths


# Evaluation


def test_a_pass_has_every_example_once_and_indices_restore_the_original_order():
    source = bucketed_pass(PAIRS, **OPTIONS)
    batches = list(source(0))
    assert len(batches) == len(source) and source.num_examples == 300
    weights = np.concatenate([batch["weights"] for batch in batches])
    indices = np.concatenate([batch["indices"] for batch in batches])
    assert np.sort(indices[weights > 0]).tolist() == list(range(300))
    assert weights.dtype == np.float32 and indices.dtype == np.int32
    results = np.zeros(300, int)
    for batch in batches:
        results[batch["indices"]] = batch["inputs"][:, 0]
    np.testing.assert_array_equal(results, [source[0] for source, _ in PAIRS])


def test_a_pass_is_sorted_by_length_with_one_shape_per_bucket():
    source = bucketed_pass(PAIRS, **OPTIONS)
    batches = list(source(0))
    longest = [max(batch["inputs"].shape[1], batch["labels"].shape[1]) for batch in batches]
    assert longest == sorted(longest)
    assert len({batch["inputs"].shape for batch in batches}) <= len(source.buckets)


def test_a_pass_can_start_at_any_batch_and_ends():
    source = bucketed_pass(LABELLED, **OPTIONS)
    assert_equal_batches(list(source(4)), list(source(0))[4:])
    assert list(source(len(source))) == []


# Argument checks


GOOD = ([5, 6, 7], [8])


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "pairs is empty"),
        ([GOOD, ([], [8])], {}, r"sequence 1 has shape \(0,\)"),
        ([GOOD, ([5], [])], {}, r"sequence 1 has shape \(0,\)"),
        ([([[5]], [8])], {}, r"sequence 0 has shape \(1, 1\)"),
        ([([5.0], [8])], {}, "float64; give integer ids"),
        ([([5], [-8])], {}, r"sequence 0 starts with \[-8\]"),
        ([GOOD, ([5], [0, 1, 0])], {}, r"target 1 starts with \[0, 1, 0\]; .* label vectors"),
        ([([5], [0.0, 1.0])], {}, r"target 0 starts with \[0.0, 1.0\]; .* label vectors"),
        ([([5], np.array([7, 2]))], {}, "give token ids above 2"),
        ([GOOD, ([5], 1)], {}, r"have \[0, 1\] axes"),
        ([([5], 1.0)], {}, "start with 1.0"),
        ([GOOD, ([5], [8], 1)], {}, r"pair 1 is \(\[5\], \[8\], 1\); give \(token ids, target\)"),
        ({"inputs": [[5]], "labels": [1]}, {}, "pair 0 is 'inputs'; give"),
        ([5, 6], {}, "pair 0 is 5; give"),
        ([GOOD], {"tokens_per_batch": 3}, "padded to 4 tokens, more than tokens_per_batch=3"),
        ([GOOD], {"tokens_per_batch": 0}, "tokens_per_batch=0"),
        ([GOOD], {"num_buckets": 0}, "num_buckets=0"),
        ([GOOD], {"multiple": 0}, "multiple=0"),
    ],
)
def test_invalid_pairs_are_refused(pairs, options, message):
    options = {"tokens_per_batch": 100, **options}
    with pytest.raises(ValueError, match=message):
        bucketed_batches(pairs, seed=0, **options)
    with pytest.raises(ValueError, match=message):
        bucketed_pass(pairs, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bucketed_batches([GOOD], tokens_per_batch=9, seed=-1), "seed -1 is negative"),
        (
            lambda: bucketed_batches([GOOD], tokens_per_batch=9, seed=0, batch_multiple=2),
            "1 examples are fewer than batch_multiple=2",
        ),
        (
            lambda: bucketed_batches([GOOD] * 9, tokens_per_batch=8, seed=0, batch_multiple=4),
            "tokens_per_batch=8 holds 2 of the longest examples",
        ),
        (lambda: next(SOURCE(-1)), "first step -1 is negative"),
        (lambda: next(bucketed_pass([GOOD], tokens_per_batch=9)(-1)), "first step -1 is negative"),
        (lambda: pad_sequences([]), "sequences is empty"),
        (lambda: pad_sequences([[4]], length=0), "length=0"),
        (lambda: pad_sequences([[4]], multiple=0), "multiple=0"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
