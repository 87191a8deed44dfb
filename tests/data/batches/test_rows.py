"""Parts of batches: together they are the whole batch, of every source."""

import jax
import numpy as np
import pytest

from jaxnets.data import (
    bucketed_batches,
    bucketed_pass,
    chunked,
    index_batches,
    member_batches,
    prefetch,
    process_part,
    sequential_batches,
    sequential_windows,
    sharded_batches,
    shuffled_batches,
    token_streams,
    token_windows,
    with_epochs,
)
from jaxnets.data.batches.rows import part_of

ARRAYS = {"inputs": np.arange(46.0).reshape(23, 2), "labels": np.arange(23)}
PAIRS = [([5] * (1 + n % 4), n) for n in range(40)]
TEXT = np.arange(100)


def of_a_user(first_step):
    return (batch for batch in shuffled_batches(ARRAYS, 4, seed=0)(first_step))


#: name -> source, axis of the rows
SOURCES = {
    "index": (index_batches(23, 4, seed=1), 0),
    "shuffled": (shuffled_batches(ARRAYS, 4, seed=1), 0),
    "epochs": (with_epochs(shuffled_batches(ARRAYS, 4, seed=1)), 0),
    "sequential": (sequential_batches(ARRAYS, 4), 0),
    "members": (member_batches([shuffled_batches(ARRAYS, 4, seed=s) for s in range(3)]), 1),
    "chunked": (chunked(shuffled_batches(ARRAYS, 4, seed=1), 3), 1),
    "prefetched": (prefetch(chunked(shuffled_batches(ARRAYS, 4, seed=1), 3)), 1),
    "windows": (token_windows(TEXT, batch_size=4, length=5, seed=2), 0),
    "streams": (token_streams(TEXT, batch_size=4, length=5), 0),
    "passes of windows": (sequential_windows(TEXT, batch_size=4, length=5), 0),
    "buckets": (bucketed_batches(PAIRS, tokens_per_batch=16, seed=0, batch_multiple=4), 0),
    "a pass of buckets": (
        bucketed_pass([([5, 6], 0)] * 7, tokens_per_batch=16, num_buckets=1, multiple=4),
        0,
    ),
    "a user's": (of_a_user, 0),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_parts_are_the_batch(name):
    source, axis = SOURCES[name]
    first = 0 if name == "a pass of buckets" else 2
    parts = [part_of(source, index, 4)(first) for index in (3, 0, 1, 2)]
    whole = source(first)
    for _, batch, last, *others in zip(range(6), whole, *parts, strict=False):
        joined = {k: np.concatenate([p[k] for p in (*others, last)], axis=axis) for k in batch}
        assert joined.keys() == batch.keys()
        for key, array in batch.items():
            np.testing.assert_array_equal(joined[key], array)
            assert joined[key].dtype == array.dtype


def test_a_part_of_a_part_is_one_of_more_parts():
    source = shuffled_batches(ARRAYS, 8, seed=1)
    halves = source.part(1, 2).part(0, 2)
    assert next(halves(0))["labels"].tolist() == next(source(0))["labels"][4:6].tolist()
    assert halves.steps_per_epoch == source.steps_per_epoch


@pytest.mark.parametrize("name", ["index", "buckets", "windows", "a user's"])
def test_a_batch_that_is_not_divisible_is_refused(name):
    with pytest.raises(ValueError, match="is not divisible into 3 parts; give a multiple of 3"):
        next(part_of(SOURCES[name][0], 0, 3)(0))


def test_a_part_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="part 2 of 2 does not exist; give 0 to 1"):
        part_of(SOURCES["index"][0], 2, 2)


def test_a_source_of_several_steps_needs_parts_of_its_own():
    class Chunks:
        steps_per_batch = 2

        def __call__(self, first_step):
            return iter([])

    with pytest.raises(ValueError, match="Chunks has several steps in a batch and no method part"):
        part_of(Chunks(), 0, 2)


@pytest.mark.four_devices
def test_rows_that_the_devices_cannot_share_are_named():
    batches = sharded_batches(index_batches(23, 6, seed=1), jax.make_mesh((4,), ("data",)))
    with pytest.raises(ValueError, match="batch size 6 is not divisible into 4 parts"):
        next(batches(0))


@pytest.mark.four_devices
def test_sharded_batches_are_on_the_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    source, _ = SOURCES["chunked"]
    batches = sharded_batches(source, mesh, batch_spec=jax.P(None, "data"))
    assert batches.endless and batches.steps_per_batch == 3
    placed, batch = next(batches(1)), next(source(1))
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding.spec == jax.P(None, "data")
    assert process_part(mesh) == (0, 1)


def test_another_part_than_that_of_the_process_is_refused():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"part=\(1, 2\) are not the rows .* part 0 of 1"):
        sharded_batches(SOURCES["index"][0], mesh, part=(1, 2))
    with pytest.raises(ValueError, match="splits no axis"):
        sharded_batches(SOURCES["index"][0], mesh, batch_spec=jax.P())
    own = sharded_batches(SOURCES["index"][0], mesh, part=(0, 1))
    assert next(own(0))["indices"].shape == (4,)
