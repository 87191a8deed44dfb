"""Checks of arguments that are of another kind than needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.checks import check_batch, check_key, check_source
from jaxnets.data.batches.prefetching import prefetch
from jaxnets.data.batches.sources import chunked, index_batches, member_batches


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"inputs": np.ones(2)}], r"batches is a list; .* for a list lambda first"),
        (({"inputs": np.ones(2)},), "batches is a tuple"),
        ({"inputs": np.ones(2)}, r"dict with \['inputs'\]; .*shuffled_batches"),
        (iter([{"inputs": np.ones(2)}]), "iterator, which cannot start again"),
        (({"inputs": x} for x in range(2)), "generator, which cannot start again"),
        (lambda: iter([]), "<lambda> cannot be called with the first step .* one argument"),
        (None, "batches is a NoneType"),
    ],
)
def test_what_is_no_source_is_refused_with_its_remedy(batches, message):
    for use in (check_source, prefetch, lambda b: chunked(b, 2), lambda b: member_batches([b])):
        with pytest.raises(TypeError, match=message):
            use(batches)


def test_functions_and_objects_with_a_call_are_sources():
    for source in (index_batches(4, 2, seed=0), lambda first: iter([]), dict.fromkeys):
        check_source(source)


def test_a_batch_is_a_dict():
    check_batch({})
    with pytest.raises(TypeError, match=r"is a tuple; give a dict of arrays"):
        check_batch((np.ones(2), np.ones(2)))


@pytest.mark.parametrize("rng", [0, None, np.int64(3), np.uint32(3), jnp.arange(2), "key"])
def test_what_is_no_key_is_refused(rng):
    with pytest.raises(TypeError, match=r"give one key, such as jax.random.key\(0\)"):
        check_key(rng)


def test_several_keys_are_refused_and_one_passes_also_while_mapped():
    with pytest.raises(TypeError, match=r"rng is keys of shape \(2,\)"):
        check_key(jax.random.split(jax.random.key(0)))
    check_key(jax.random.PRNGKey(0))
    jax.vmap(check_key)(jax.random.split(jax.random.key(0)))
