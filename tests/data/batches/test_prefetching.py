"""Prefetching: order, device, errors, and the end of the thread."""

import itertools
import subprocess
import sys
import threading
import time
import traceback

import jax
import numpy as np
import pytest

from jaxnets.data import chunked, index_batches, prefetch, sequential_batches


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "jaxnets-prefetch"]


def count_from(first_step):
    return ({"step": np.array([step])} for step in itertools.count(first_step))


def failing(first_step):
    yield {"step": np.zeros(1)}
    raise RuntimeError("the disk is gone")


def test_batches_are_those_of_the_source_and_on_the_device():
    source = index_batches(10, 4, seed=0)
    for ahead, batch in itertools.islice(zip(prefetch(source)(3), source(3), strict=False), 5):
        assert isinstance(ahead["indices"], jax.Array)
        np.testing.assert_array_equal(ahead["indices"], batch["indices"])


def test_a_source_that_ends_ends_for_the_consumer_and_leaves_no_thread():
    data = {"inputs": np.arange(5)}
    assert len(list(prefetch(sequential_batches(data, 2))(0))) == 3
    assert not threads()


def test_steps_per_batch_is_that_of_the_source():
    source = index_batches(8, 2, seed=0)
    assert prefetch(chunked(source, 3)).steps_per_batch == 3
    assert prefetch(source).steps_per_batch == 1


@pytest.mark.four_devices
def test_batches_can_be_put_on_several_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    source = prefetch(
        index_batches(8, 4, seed=0), device_put=lambda batch: jax.device_put(batch, sharding)
    )
    assert next(source(0))["indices"].sharding == sharding


def test_at_most_size_batches_are_made_ahead():
    made = []
    batches = prefetch(count_from, size=3, device_put=lambda batch: made.append(batch) or batch)(0)
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4  # one with the consumer, three waiting


def test_an_error_in_the_thread_surfaces_with_its_traceback():
    batches = prefetch(failing)(0)
    next(batches)
    with pytest.raises(RuntimeError, match="the disk is gone") as caught:
        next(batches)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not threads()


def test_an_error_of_the_device_surfaces_too():
    def refuse(batch):
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        next(prefetch(count_from, device_put=refuse)(0))


@pytest.mark.parametrize("leave", ["close", "drop", "break"])
def test_the_thread_ends_when_the_consumer_stops(leave):
    batches = prefetch(count_from)(0)
    next(batches)
    assert len(threads()) == 1
    if leave == "close":
        batches.close()
    elif leave == "break":
        for _ in batches:
            break
    del batches
    assert not threads()


def test_an_iterator_that_was_never_used_starts_no_thread():
    batches = prefetch(count_from)(0)
    assert not threads()
    batches.close()


def test_the_interpreter_exits_with_running_and_blocked_threads():
    script = """
import itertools, sys, time
import jaxnets.data
module = sys.modules["jaxnets.data.batches.prefetching"]
module._JOIN_SECONDS = 0.5
def blocked(first_step):
    yield first_step
    time.sleep(1000)
running = [jaxnets.data.prefetch(source)(0) for source in (itertools.count, blocked)]
assert [next(batches) for batches in running] == [0, 0]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_size_without_room_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="size 0 leaves no room"):
        prefetch(count_from, size=0)
