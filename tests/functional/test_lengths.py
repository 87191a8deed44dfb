"""Lengths of padded sequences: their checks, and the padding beyond them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.lengths import (
    check_lengths,
    clear_padding,
    clear_tokens,
    mean_over_time,
    padding_mask,
)


def test_padding_is_cleared_even_where_it_is_nan():
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    x[0, 2:] = np.nan
    cleared, valid = map(np.asarray, jax.jit(clear_padding)(x, np.array([2, 0, 4])))
    np.testing.assert_array_equal(valid.sum(axis=1), [2, 0, 4])
    np.testing.assert_array_equal(cleared[0, :2], x[0, :2])
    np.testing.assert_array_equal(cleared[0, 2:], 0)
    np.testing.assert_array_equal(cleared[1], 0)
    np.testing.assert_array_equal(cleared[2], x[2])


def test_a_length_out_of_range_at_run_time_gives_nan_for_its_sequence_only():
    lengths = np.array([5, 6, -1, 2])
    cleared, valid = map(np.asarray, jax.jit(clear_padding)(np.ones((4, 5, 2)), lengths))
    assert np.isnan(cleared[1:3]).all()
    np.testing.assert_array_equal(cleared[0], 1)
    np.testing.assert_array_equal(cleared[3, :, 0], [1, 1, 0, 0, 0])
    assert valid[1:3].all()


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_vectors_and_images_over_time_are_cleared_too(shape):
    cleared = np.asarray(jax.jit(clear_padding)(np.ones(shape), np.array([1, 3]))[0])
    np.testing.assert_array_equal(cleared[0, :1], 1)
    np.testing.assert_array_equal(cleared[0, 1:], 0)
    np.testing.assert_array_equal(cleared[1], 1)


def test_without_lengths_all_steps_are_valid():
    x = jnp.ones((2, 3))
    cleared, valid = clear_padding(x, None)
    assert cleared is x and valid.shape == (2, 3) and valid.all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: padding_mask(np.array([3, 5]), (2, 4)), r"length 5 is not in \[0, 4\]"),
        (lambda: padding_mask(np.array([-1]), (1, 4)), "length -1"),
        (lambda: padding_mask(np.array([1.0]), (1, 4)), "float64.*one integer for each"),
        (lambda: clear_padding(jnp.ones((3, 4, 2)), np.array([1])), r"\(1,\) .* do not fit 3"),
        (lambda: check_lengths([0, 2], rows=2, most=2, least=1), r"length 0 is not in \[1, 2\]"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_lengths_closed_over_by_a_compiled_function_are_checked_as_constants():
    lengths = jnp.array([1, 3])
    inside = jax.jit(lambda: check_lengths(lengths, rows=2, most=3))
    assert inside().tolist() == [True, True]
    with pytest.raises(ValueError, match=r"length 3 is not in \[0, 2\]"):
        jax.jit(lambda: check_lengths(lengths, rows=2, most=2))()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
def test_lengths_of_every_integer_type_are_those_of_int32(dtype):
    x, lengths = np.ones((3, 300, 1), np.float32), np.array([100, 0, 127])
    cleared, valid = jax.jit(clear_padding)(x, lengths.astype(dtype))
    np.testing.assert_array_equal(np.sum(valid, axis=1), lengths)
    np.testing.assert_array_equal(np.sum(cleared, axis=(1, 2)), lengths)
    means = jax.jit(mean_over_time)(cleared, lengths.astype(dtype))
    np.testing.assert_allclose(means[:, 0], [1, 0, 1], rtol=1e-6)


def test_a_mean_over_more_steps_than_there_are_is_refused_or_nan():
    x, lengths = jnp.array([[[1.0], [0.0], [0.0]]] * 2), np.array([1, 9])
    with pytest.raises(ValueError, match=r"length 9 is not in \[0, 3\]"):
        mean_over_time(x, lengths)
    means = jax.jit(mean_over_time)(x, lengths)
    np.testing.assert_array_equal(means[:, 0], [1, np.nan])


def test_tokens_that_int32_cannot_hold_are_not_taken_for_others():
    tokens = np.array([[5, 2**32 + 1]])
    assert clear_tokens(tokens, np.array([2]))[0, 1] > 2**30
