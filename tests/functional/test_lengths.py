"""Lengths of padded sequences: their checks, and the padding beyond them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.lengths import check_lengths, clear_padding, padding_mask


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
