"""Windows over a text: positions, order, exact coverage, resume, argument checks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnets.data import chunked, member_batches, sequential_windows, token_streams, token_windows

# Every token is its own position plus 100, so a batch shows its positions.
TEXT = np.arange(100, 150)


def take(source, first_step, number):
    return list(itertools.islice(source(first_step), number))


def assert_equal_batches(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], strict=True)


ENDLESS = [
    token_windows(TEXT, batch_size=4, length=6, seed=3),
    token_streams(TEXT, batch_size=4, length=3),
]


@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 23])
@pytest.mark.parametrize("source", ENDLESS, ids=["windows", "streams"])
def test_a_run_resumed_at_any_step_gets_the_batches_of_an_uninterrupted_run(source, first_step):
    whole = take(source, 0, first_step + 5)
    assert_equal_batches(take(source, first_step, 5), whole[first_step:])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint16])
def test_labels_are_the_inputs_shifted_by_one_token_for_every_dtype(dtype):
    text = (TEXT * 7 % 251).astype(dtype)
    sources = (
        token_windows(text, batch_size=4, length=6, seed=3),
        token_streams(text, batch_size=4, length=3),
        sequential_windows(text, batch_size=4, length=6),
    )
    for source in sources:
        batch = next(source(0))
        assert batch["inputs"].dtype == batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])
        follower = dict(itertools.pairwise(text.tolist()))
        for token, label in zip(batch["inputs"].ravel(), batch["labels"].ravel(), strict=True):
            assert follower[token] == label


# Random windows


def test_window_starts_are_uniform():
    source = token_windows(np.arange(14), batch_size=1000, length=4, seed=0)
    starts = np.concatenate([batch["inputs"][:, 0] for batch in take(source, 0, 10)])
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10  # the last window, at 9, has its last label at the end of the text
    # 10,000 draws over 10 places: chi-squared with 9 degrees of freedom, 99.9% below 27.9.
    assert np.sum((counts - 1000) ** 2 / 1000) < 27.9


def test_windows_differ_between_steps_and_seeds():
    draws = {
        tuple(batch["inputs"][:, 0])
        for seed in range(4)
        for batch in take(token_windows(TEXT, batch_size=4, length=6, seed=seed), 0, 4)
    }
    assert len(draws) == 16


def test_the_windows_of_a_seed_never_change():
    # Golden values: if they changed, old runs could not be resumed.
    source = token_windows(TEXT, batch_size=4, length=6, seed=0)
    starts = [batch["inputs"][:, 0].tolist() for batch in take(source, 0, 2)]
    assert starts == [[125, 114, 100, 102], [115, 118, 107, 127]]


def test_a_text_of_one_window_gives_that_window():
    batch = next(token_windows(TEXT[:7], batch_size=2, length=6, seed=0)(0))
    assert batch["inputs"].tolist() == [TEXT[:6].tolist()] * 2


def test_windows_read_a_memory_mapped_file(tmp_path):
    np.save(tmp_path / "tokens.npy", TEXT.astype(np.uint16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    expected = take(token_windows(TEXT, batch_size=4, length=6, seed=3), 0, 2)
    assert_equal_batches(
        take(token_windows(mapped, batch_size=4, length=6, seed=3), 0, 2), expected
    )


@pytest.mark.parametrize("source", ENDLESS, ids=["windows", "streams"])
def test_windows_can_be_stacked_for_scans_and_populations(source):
    assert next(chunked(source, 3)(2))["inputs"].shape == (3, 4, source.length)
    assert next(member_batches([source, source])(2))["labels"].shape == (2, 4, source.length)


def test_an_epoch_of_windows_has_about_the_tokens_of_the_text():
    assert ENDLESS[0].steps_per_epoch == 50 // 24
    assert token_windows(TEXT, batch_size=40, length=6, seed=3).steps_per_epoch == 1


# Streams


@pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (1, 7), (4, 3), (7, 7), (49, 1)])
def test_each_row_continues_the_previous_batch_and_an_epoch_reads_every_token_once(
    batch_size, length
):
    source = token_streams(TEXT, batch_size=batch_size, length=length)
    steps = source.steps_per_epoch
    batches = take(source, 0, 3 * steps)
    rows = np.concatenate([batch["inputs"] for batch in batches], axis=1) - 100
    covered = batch_size * length * steps
    assert 49 - covered < batch_size * length
    np.testing.assert_array_equal(np.diff(rows, axis=1) % covered, 1)
    np.testing.assert_array_equal(np.sort(rows[:, : steps * length].ravel()), np.arange(covered))
    # After its own part a row reads the next one.
    np.testing.assert_array_equal(rows[:-1, steps * length :], rows[1:, : 2 * steps * length])


# One pass


@given(
    num_tokens=st.integers(2, 40),
    length=st.integers(1, 12),
    stride=st.integers(1, 12),
    batch_size=st.integers(1, 5),
)
def test_every_token_but_the_first_is_predicted_exactly_once(
    num_tokens, length, stride, batch_size
):
    length = min(length, num_tokens - 1)
    stride = min(stride, length)
    text = np.arange(num_tokens) + 100
    source = sequential_windows(text, batch_size=batch_size, length=length, stride=stride)
    batches = list(source(0))
    assert len(batches) == len(source)
    assert {batch["inputs"].shape for batch in batches} == {(batch_size, length)}
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    scored = joined["weights"] > 0
    assert np.sort(joined["labels"][scored]).tolist() == list(range(101, num_tokens + 100))
    np.testing.assert_array_equal(joined["inputs"][scored] + 1, joined["labels"][scored])
    assert source.num_predictions == joined["weights"].sum() == num_tokens - 1
    # Context: length - stride tokens before the input, or all there are.
    row, column = np.nonzero(scored)
    position = joined["inputs"][scored] - 100
    assert (column >= np.minimum(position, length - stride)).all()
    # Tokens before a scored one are those of the text, never padding.
    for r, c, p in zip(row, column, position, strict=True):
        np.testing.assert_array_equal(joined["inputs"][r, : c + 1], text[p - c : p + 1])


def test_every_window_has_a_new_token():
    source = sequential_windows(TEXT, batch_size=1, length=6, stride=2)
    assert len(source) == source.num_windows == 1 + (49 - 6 + 1) // 2
    assert all(batch["weights"].sum() > 0 for batch in source(0))


def test_a_pass_can_start_at_any_batch_and_ends():
    source = sequential_windows(TEXT, batch_size=4, length=6)
    assert_equal_batches(list(source(1)), list(source(0))[1:])
    assert list(source(len(source))) == []


def test_a_short_last_batch_is_padded_with_weight_zero():
    *_, last = sequential_windows(TEXT, batch_size=4, length=6)(0)
    assert last["weights"].sum(axis=1).tolist() == [1, 0, 0, 0]
    assert last["inputs"].tolist() == [[148, 0, 0, 0, 0, 0], *[[0] * 6] * 3]


# Argument checks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: token_windows(t, batch_size=2, length=50, seed=0), "50 tokens .* at least 51"),
        (lambda t: token_streams(t, batch_size=5, length=10), "50 tokens .* 5 windows .* least 51"),
        (lambda t: sequential_windows(t, batch_size=2, length=50), "50 tokens are too few"),
        (lambda t: sequential_windows(t, batch_size=2, length=4, stride=5), "stride=5 skips"),
        (lambda t: sequential_windows(t, batch_size=2, length=4, stride=0), "stride=0"),
        (lambda t: token_windows(t, batch_size=0, length=4, seed=0), "batch_size=0"),
        (lambda t: token_streams(t, batch_size=2, length=0), "length=0"),
        (lambda t: token_streams(t, batch_size=2, length=2.0), "length=2.0"),
        (lambda t: token_windows(t, batch_size=2, length=4, seed=-1), "seed -1 is negative"),
        (lambda t: token_windows(t - 103, batch_size=2, length=4, seed=0), "id -3 is negative"),
        (lambda t: token_streams(t / 2, batch_size=2, length=4), "float64 are not a text"),
        (lambda t: sequential_windows(t[None], batch_size=2, length=4), r"\(1, 50\)"),
        (lambda t: sequential_windows([], batch_size=2, length=4), r"\(0,\)"),
        (lambda t: next(token_windows(t, batch_size=2, length=4, seed=0)(-1)), "first step -1"),
        (lambda t: next(token_streams(t, batch_size=2, length=4)(-1)), "first step -1"),
        (lambda t: next(sequential_windows(t, batch_size=2, length=4)(-1)), "first step -1"),
    ],
)
def test_invalid_texts_and_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(TEXT)
