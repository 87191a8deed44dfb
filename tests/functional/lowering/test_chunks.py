"""A batch in chunks: the same values, and no remainder if a divisor of the batch is near."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.lowering.chunks import map_chunks, sum_over_chunks

# One element an example, so that the elements of a chunk are its examples.
CASES = [
    # (batch, chunk_elements, examples of the chunks and of a remainder)
    (60, 5, [5]),
    (64, 5, [4]),  # the divisor that is nearest as a ratio
    (64, 6, [8]),
    (61, 5, [5, 1]),  # a prime number: chunks of the wanted size, and a remainder
    (12, 12, [12]),  # one chunk
    (12, 3, [12]),  # too few chunks to gain anything
    (0, 4, [0]),
]


@pytest.mark.parametrize(("batch", "chunk_elements", "sizes"), CASES)
def test_chunks_leave_no_remainder_if_a_divisor_is_near(batch, chunk_elements, sizes):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 3)), jnp.float32)
    traced = []  # if there are chunks, the whole batch comes first, for the shape of its result
    sizes = sizes if sizes == [batch] else [batch, *sizes]

    def squares(x):
        traced.append(len(x))
        return x**2

    found = jax.jit(
        lambda x: map_chunks(squares, x, num_elements=batch, chunk_elements=chunk_elements)
    )(x)
    np.testing.assert_allclose(found, x**2, rtol=1e-6)
    assert list(dict.fromkeys(traced)) == sizes

    traced.clear()
    summed = jax.jit(
        lambda x: sum_over_chunks(
            lambda x: jnp.sum(squares(x), 0), x, num_elements=batch, chunk_elements=chunk_elements
        )
    )(x)
    np.testing.assert_allclose(summed, jnp.sum(x**2, 0), rtol=1e-5)
    assert list(dict.fromkeys(traced)) == sizes
