"""A batch chunk by chunk: the same numbers, and no rest where the batch divides well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.lowering.chunks import map_chunks, sum_over_chunks

# As many numbers as examples: `cached` is how many examples a chunk may have.
CASES = [
    # (batch, cached, examples of the chunks and of a rest)
    (60, 5, [5]),
    (64, 5, [4]),  # the divisor that is nearest as a ratio
    (64, 6, [8]),
    (61, 5, [5, 1]),  # a prime number: chunks of what was asked for, and a rest
    (12, 12, [12]),  # one chunk
    (12, 3, [12]),  # too few chunks to gain anything
    (0, 4, [0]),
]


@pytest.mark.parametrize(("batch", "cached", "sizes"), CASES)
def test_chunks_leave_no_rest_where_a_divisor_is_near(batch, cached, sizes):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 3)), jnp.float32)
    seen = []  # where there are chunks, the whole batch comes first: its shape is asked for
    sizes = sizes if sizes == [batch] else [batch, *sizes]

    def squares(x):
        seen.append(len(x))
        return x**2

    found = jax.jit(lambda x: map_chunks(squares, x, num_elements=batch, chunk_elements=cached))(x)
    # The order of the examples stays.
    np.testing.assert_allclose(found, x**2, rtol=1e-6)
    assert list(dict.fromkeys(seen)) == sizes

    seen.clear()
    summed = jax.jit(
        lambda x: sum_over_chunks(
            lambda x: jnp.sum(squares(x), 0), x, num_elements=batch, chunk_elements=cached
        )
    )(x)
    np.testing.assert_allclose(summed, jnp.sum(x**2, 0), rtol=1e-5)
    assert list(dict.fromkeys(seen)) == sizes
