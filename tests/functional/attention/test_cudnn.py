"""Attention by a kernel: a stand-in for cuDNN's on any machine, the kernel itself where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.attention import cudnn
from jaxnets.functional.attention.dot_product import dot_product_attention
from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.attention.scores import apply_attention_weights, attention_weights

BATCH, HEADS, SIZE = 2, 4, 8

needs_kernel = pytest.mark.skipif(
    cudnn._capability() < cudnn._AMPERE, reason="there is no such GPU here"
)


def operands(queries, keys, *, groups=HEADS, batch=(BATCH,), dtype=np.float32, size=SIZE):
    random = np.random.default_rng(queries * keys)
    shapes = ((queries, HEADS, size), (keys, groups, size), (keys, groups, size))
    drawn = [random.normal(size=(*batch, *shape)) for shape in shapes]
    return [jnp.asarray(x, dtype) for x in (*drawn, random.normal(size=drawn[0].shape))]


def hidden(shape):
    """A mask in which the last query of the first example, if queries differ, sees no key."""
    mask = np.random.default_rng(0).random(shape) < 0.6
    mask[..., 0] = True
    if shape[2] > 1:
        mask[0, :, -1] = False
    return jnp.asarray(mask)


def by_weights(query, key, value, mask=None, *, causal=False, window=None, scale=0.3):
    weights = attention_weights(query, key, mask=mask, scale=scale, causal=causal, window=window)
    return apply_attention_weights(weights, value)


def fused(query, key, value, mask=None, *, causal=False, window=None, scale=0.3):
    formula = functools.partial(by_weights, causal=causal, window=window, scale=scale)
    local_mask = LocalMask(causal, window)
    return cudnn.cudnn_attention(
        query, key, value, mask, scale=scale, local_mask=local_mask, formula=formula
    )


def results(function, query, key, value, cotangent, mask=None):
    """The output and the gradients."""

    def loss(*arguments):
        output = function(*arguments, mask)
        return jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32)), output

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    gradients, output = slopes(query, key, value)
    return output, *gradients


def assert_close(found, expected, **tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


@pytest.fixture
def stand_in(monkeypatch, forget_traces):
    """Takes only what cuDNN's kernel takes, and says what it was given."""
    seen = []

    def kernel(query, key, value, *, mask, **options):
        (batch, queries), keys = query.shape[:2], key.shape[1]
        assert queries % 2 == 0 and keys % 2 == 0
        assert mask is None or (
            mask.shape[0] in (1, batch) and mask.shape[2:] == (queries, keys) and mask.dtype == bool
        )
        seen.append(query.shape)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation="xla", **options
        )

    monkeypatch.setattr(cudnn, "_kernel", kernel)
    forget_traces()
    return seen


MASKS = {
    "none": lambda queries, keys: None,
    "each query": lambda queries, keys: hidden((BATCH, 1, queries, keys)),
    "padding": lambda queries, keys: hidden((BATCH, 1, 1, keys)),
    "for all": lambda queries, keys: hidden((1, 1, queries, keys)),
    "each head": lambda queries, keys: hidden((1, HEADS, queries, keys)),
    "later keys": lambda queries, keys: jnp.triu(jnp.ones((1, 1, queries, keys), bool), 1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("queries", "keys", "local_mask"),
    [
        *((6, 6, LocalMask()), (6, 6, LocalMask(causal=True)), (5, 5, LocalMask(causal=True))),
        *((5, 8, LocalMask()), (4, 7, LocalMask())),
        *((6, 6, LocalMask(causal=True, window=2)), (5, 5, LocalMask(window=3))),
    ],
)
def test_it_equals_attention_by_weights(stand_in, queries, keys, local_mask, mask):
    drawn = operands(queries, keys, groups=2)
    mask = MASKS[mask](queries, keys)
    options = local_mask._asdict()
    found = results(functools.partial(fused, **options), *drawn, mask)
    expected = results(functools.partial(by_weights, **options), *drawn, mask)
    assert_close(found, expected, atol=2e-6)
    assert stand_in


@pytest.mark.parametrize("mask_shape", [None, (BATCH, 1, 5, 6), (1, 1, 5, 6)])
@pytest.mark.parametrize("mask_axis", [None, 1])
def test_a_mapped_axis_joins_the_batch(stand_in, mask_shape, mask_axis):
    members = 3
    query, key, value, cotangent = operands(5, 6, batch=(members, BATCH))
    query, key = jnp.moveaxis(query, 0, 2), key[0]  # one axis elsewhere, one operand for all
    mask = None if mask_shape is None else hidden(mask_shape)
    if mask is not None and mask_axis is not None:
        mask = jnp.stack([mask, ~mask, mask], axis=mask_axis)
    axes = (2, None, 0, 0, mask_axis if mask is not None else None)
    arguments = (query, key, value, cotangent, mask)
    found = jax.vmap(functools.partial(results, fused), axes)(*arguments)
    assert {shape[0] for shape in stand_in if len(shape) == 4} >= {members * BATCH}
    expected = jax.vmap(functools.partial(results, by_weights), axes)(*arguments)
    assert_close(found, expected, atol=2e-6)


def test_populations_of_populations_join_the_batch_too(stand_in):
    arguments = operands(4, 4, batch=(2, 3, BATCH))
    twice = jax.vmap(jax.vmap(functools.partial(results, fused)))
    assert_close(
        twice(*arguments),
        jax.vmap(jax.vmap(functools.partial(results, by_weights)))(*arguments),
        atol=2e-6,
    )


def test_gradients_of_gradients_are_those_of_the_formula(stand_in):
    query, key, value, cotangent = operands(5, 5)
    mask = hidden((BATCH, 1, 5, 5))

    def penalty(function, query, key, value, cotangent):
        gradients = results(functools.partial(function, causal=True), query, key, value, cotangent)
        with_mask = results(function, query, key, value, cotangent, mask)
        return sum(jnp.sum(x**2) for x in (*gradients, *with_mask))

    gradient = jax.grad(penalty, argnums=(1, 2, 3, 4))
    arguments = (query, key, value, cotangent)
    found, expected = (gradient(function, *arguments) for function in (fused, by_weights))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_programs_for_other_platforms_go_without_it(monkeypatch, forget_traces):
    monkeypatch.setattr(cudnn, "fits", lambda *operands: True)
    monkeypatch.setattr(
        cudnn, "_kernel", lambda query, *_, **options: jnp.full_like(query, jnp.nan)
    )
    forget_traces()
    with jax.default_device(jax.devices("cpu")[0]):
        drawn = operands(6, 6)
        found = results(lambda *x: dot_product_attention(*x[:3], causal=True, scale=0.3), *drawn)
        expected = results(functools.partial(by_weights, causal=True), *drawn)
    assert_close(found, expected, atol=2e-6)


def test_the_kernel_is_for_16_bits_and_sizes_that_it_takes(monkeypatch):
    def fits(queries=1024, size=64, dtype=jnp.bfloat16, value_dim=None, key_dtype=None):
        sizes = (size, value_dim or size)
        query, value = (jax.ShapeDtypeStruct((2, queries, 4, each), dtype) for each in sizes)
        key = jax.ShapeDtypeStruct((2, 1024, 4, size), key_dtype or dtype)
        return cudnn.fits(query, key, value)

    monkeypatch.setattr(cudnn, "_capability", lambda: (9, 0))
    assert fits() and fits(dtype=jnp.float16) and fits(queries=501, size=128)
    assert not fits(dtype=jnp.float32)
    assert not fits(key_dtype=jnp.float32)
    assert not fits(size=60)
    assert not fits(size=136)
    assert not fits(value_dim=72)
    assert not fits(queries=128)
    monkeypatch.setattr(cudnn, "_FEW_WEIGHTS", 0)
    assert fits(queries=128)
    assert not fits(queries=1)
    monkeypatch.setattr(cudnn, "_capability", lambda: (7, 5))
    assert not fits()


def test_causal_attention_needs_as_many_queries_as_keys():
    query, key, value, _ = operands(3, 5)
    with pytest.raises(ValueError, match="as many queries as keys, not 3 and 5"):
        dot_product_attention(query, key, value, causal=True)


@pytest.fixture
def however_small(monkeypatch, forget_traces):
    monkeypatch.setattr(cudnn, "_FEW_WEIGHTS", 0)
    forget_traces()


def distance(found, expected):
    """The greatest of the relative distances of arrays."""
    pairs = zip(found, expected, strict=True)
    pairs = [(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in pairs]
    return max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs)


@needs_kernel
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(128, 128, True), (65, 65, False), (65, 65, True), (64, 77, False)],
)
def test_cudnns_kernel_agrees_with_float32(queries, keys, causal, mask, however_small):
    drawn = operands(queries, keys, groups=2, dtype=jnp.bfloat16, size=64)
    mask = MASKS[mask](queries, keys)
    expected = results(
        functools.partial(by_weights, causal=causal), *(x.astype(jnp.float32) for x in drawn), mask
    )

    def chosen(query, key, value, mask):
        return dot_product_attention(query, key, value, mask=mask, causal=causal, scale=0.3)

    assert cudnn.fits(*drawn[:3])
    assert distance(results(chosen, *drawn, mask), expected) < 1e-2
    # Side by side, as a population.
    stacked = [jnp.stack([x, 0.5 * x]) for x in drawn]
    mapped = jax.vmap(lambda *x: results(chosen, *x, mask))(*stacked)
    assert distance([x[0] for x in mapped], expected) < 1e-2


@needs_kernel
def test_cudnns_kernel_runs_once_forward_and_once_back(however_small):
    *drawn, cotangent = operands(128, 128, dtype=jnp.bfloat16, size=64)

    def loss(*arguments):
        return jnp.sum(dot_product_attention(*arguments, causal=True) * cotangent).astype(
            jnp.float32
        )

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*drawn).compile().as_text()
    assert program.count('custom_call_target="__cudnn$fmha') == 2
