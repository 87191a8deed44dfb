"""cuDNN's attention: a stand-in for its kernel on any machine, the kernel itself on its GPUs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_exhaustive

from jaxnets.functional.attention import cudnn
from jaxnets.functional.attention.dot_product import (
    _jitted_attention,
    dot_product_attention,
    reference_attention,
)
from jaxnets.functional.attention.masks import LocalMask

BATCH, HEADS, HEAD_DIM, SCALE = 2, 4, 8, 0.3

needs_kernel = pytest.mark.skipif(
    cudnn._capability() < cudnn._AMPERE, reason="needs a GPU with the kernel"
)


def operands(queries, keys, *, kv_heads=HEADS, batch=(BATCH,), dtype=np.float32, dim=HEAD_DIM):
    """Query, key, value and the cotangent of the output."""
    random = np.random.default_rng(queries * keys)
    shapes = ((queries, HEADS, dim), (keys, kv_heads, dim), (keys, kv_heads, dim))
    drawn = [random.normal(size=(*batch, *shape)) for shape in shapes]
    return [jnp.asarray(x, dtype) for x in (*drawn, random.normal(size=drawn[0].shape))]


def partly_masked(shape):
    """A mask in which all keys of the first example's last query, if queries differ, are masked."""
    mask = np.random.default_rng(0).random(shape) < 0.6
    mask[..., 0] = True
    if shape[2] > 1:
        mask[0, :, -1] = False
    return jnp.asarray(mask)


def reference(query, key, value, mask=None, *, causal=False, window=None):
    options = {"causal": causal, "window": window, "scale": SCALE}
    return reference_attention(query, key, value, mask=mask, **options)


def fused(query, key, value, mask=None, *, causal=False, window=None):
    unfused = functools.partial(reference, causal=causal, window=window)
    local_mask = LocalMask(causal, window)
    return cudnn.cudnn_attention(
        query, key, value, mask, scale=SCALE, local_mask=local_mask, unfused=unfused
    )


def value_and_gradients(function):
    """A jitted function of query, key, value, cotangent and mask."""

    @jax.jit
    def run(query, key, value, cotangent, mask=None):
        def loss(*arguments):
            output = function(*arguments, mask)
            return jnp.sum(output.astype(jnp.float32) * cotangent.astype(jnp.float32)), output

        gradients, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return output, *gradients

    return run


reference_value_and_gradients = value_and_gradients(reference)


def assert_close(found, expected, **tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


@pytest.fixture
def stand_in(monkeypatch):
    """Replace the kernel by one with its restrictions, and return the query shapes of its calls.

    It is traced anew for each function that calls it, because the function is new.
    """
    shapes = []

    def kernel(query, key, value, *, mask, **options):
        (batch, queries), keys = query.shape[:2], key.shape[1]
        assert queries % 2 == 0 and keys % 2 == 0
        assert mask is None or (
            mask.shape[0] in (1, batch) and mask.shape[2:] == (queries, keys) and mask.dtype == bool
        )
        shapes.append(query.shape)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation="xla", **options
        )

    monkeypatch.setattr(cudnn, "_kernel", kernel)
    return shapes


MASKS = {
    "none": lambda queries, keys: None,
    "each query": lambda queries, keys: partly_masked((BATCH, 1, queries, keys)),
    "padding": lambda queries, keys: partly_masked((BATCH, 1, 1, keys)),
    "shared": lambda queries, keys: partly_masked((1, 1, queries, keys)),
    "each head": lambda queries, keys: partly_masked((1, HEADS, queries, keys)),
    "later keys": lambda queries, keys: jnp.triu(jnp.ones((1, 1, queries, keys), bool), 1),
}
SHAPES = {  # queries, keys and local mask
    "even": (6, 6, LocalMask()),
    "even causal": (6, 6, LocalMask(causal=True)),
    "odd causal": (5, 5, LocalMask(causal=True)),
    "odd queries": (5, 8, LocalMask()),
    "odd keys": (4, 7, LocalMask()),
    "causal window": (6, 6, LocalMask(causal=True, window=2)),
    "odd window": (5, 5, LocalMask(window=3)),
}
# Each mask and each shape at least once; every kind of mask is padded in one of them.
DEFAULT = [
    *(("even", "none"), ("even causal", "later keys"), ("odd causal", "each query")),
    *(("odd causal", "none"), ("odd queries", "padding"), ("odd keys", "shared")),
    *(("odd keys", "each head"), ("causal window", "each query"), ("causal window", "none")),
    *(("odd window", "later keys"), ("odd window", "none")),
]


@pytest.mark.parametrize(
    ("shape", "mask"),
    mostly_exhaustive(itertools.product(SHAPES, MASKS), DEFAULT),
)
def test_it_equals_the_reference(stand_in, shape, mask):
    queries, keys, local_mask = SHAPES[shape]
    arguments = operands(queries, keys, kv_heads=2)
    mask = MASKS[mask](queries, keys)
    found = value_and_gradients(functools.partial(fused, **local_mask._asdict()))(*arguments, mask)
    distance = np.subtract.outer(np.arange(queries), np.arange(keys))
    visible = np.broadcast_to(True if mask is None else mask, (BATCH, HEADS, queries, keys))
    visible = visible & ((distance >= 0) | (not local_mask.causal))
    visible = visible & (abs(distance) < (local_mask.window or np.inf))
    expected = reference_value_and_gradients(*arguments, visible)
    assert_close(found, expected, atol=2e-6)
    assert stand_in


@pytest.mark.parametrize(
    ("mask_shape", "mask_axis"),
    [(None, None), *itertools.product([(BATCH, 1, 5, 6), (1, 1, 5, 6)], [None, 1])],
)
def test_a_mapped_axis_is_merged_into_the_batch(stand_in, mask_shape, mask_axis):
    members = 3
    query, key, value, cotangent = operands(5, 6, batch=(members, BATCH))
    query, key = jnp.moveaxis(query, 0, 2), key[0]  # mapped along another axis, and not mapped
    mask = None if mask_shape is None else partly_masked(mask_shape)
    if mask_axis is not None:
        mask = jnp.stack([mask, ~mask, mask], axis=mask_axis)
    axes = (2, None, 0, 0, mask_axis)
    arguments = (query, key, value, cotangent, mask)
    found = jax.vmap(value_and_gradients(fused), axes)(*arguments)
    assert {shape[0] for shape in stand_in if len(shape) == 4} >= {members * BATCH}
    expected = jax.vmap(reference_value_and_gradients, axes)(*arguments)
    assert_close(found, expected, atol=2e-6)


def test_two_mapped_axes_are_merged_into_the_batch(stand_in):
    arguments = operands(4, 4, batch=(2, 3, BATCH))
    found = jax.vmap(jax.vmap(value_and_gradients(fused)))(*arguments)
    assert {shape[0] for shape in stand_in if len(shape) == 4} >= {2 * 3 * BATCH}
    expected = jax.vmap(jax.vmap(reference_value_and_gradients))(*arguments)
    assert_close(found, expected, atol=2e-6)


def test_second_derivatives_are_those_of_the_reference(stand_in):
    query, key, value, cotangent = operands(5, 5)
    mask = partly_masked((BATCH, 1, 5, 5))

    def penalty(function, *arguments):
        causal = value_and_gradients(functools.partial(function, causal=True))(*arguments)
        masked = value_and_gradients(function)(*arguments, mask)
        return sum(jnp.sum(x**2) for x in (*causal, *masked))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(function, *arguments):
        return jax.grad(penalty, argnums=(1, 2, 3, 4))(function, *arguments)

    arguments = (query, key, value, cotangent)
    found, expected = (gradient(function, *arguments) for function in (fused, reference))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def untraced_attention():
    _jitted_attention.clear_cache()
    yield
    _jitted_attention.clear_cache()


def test_programs_for_other_platforms_do_not_use_the_kernel(monkeypatch, untraced_attention):
    monkeypatch.setattr(cudnn, "is_eligible", lambda *operands: True)
    monkeypatch.setattr(
        cudnn, "_kernel", lambda query, *_, **options: jnp.full_like(query, jnp.nan)
    )

    def attention(query, key, value, mask):
        return dot_product_attention(query, key, value, causal=True, scale=SCALE)

    with jax.default_device(jax.devices("cpu")[0]):
        arguments = operands(6, 6)
        found = value_and_gradients(attention)(*arguments)
        visible = np.tril(np.ones((1, 1, 6, 6), bool))
        expected = reference_value_and_gradients(*arguments, visible)
    assert_close(found, expected, atol=2e-6)


def test_bounded_scores_and_biases_do_not_use_the_kernel(monkeypatch, untraced_attention):
    def refuse(*operands, **options):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(cudnn, "is_eligible", lambda *operands: True)
    monkeypatch.setattr(cudnn, "cudnn_attention", refuse)
    query, key, value, _ = operands(6, 6)
    dot_product_attention(query, key, value, causal=True, softcap=5.0)
    dot_product_attention(query, key, value, causal=True, bias=jnp.zeros((6, 6)))
    with pytest.raises(AssertionError, match="the kernel was called"):
        dot_product_attention(query, key, value, causal=True)


def test_the_kernel_is_eligible_for_its_dtypes_and_sizes(monkeypatch):
    def eligible(queries=1024, dim=64, dtype=jnp.bfloat16, value_dim=None, key_dtype=None):
        dims = (dim, value_dim or dim)
        query, value = (jax.ShapeDtypeStruct((2, queries, 4, each), dtype) for each in dims)
        key = jax.ShapeDtypeStruct((2, 1024, 4, dim), key_dtype or dtype)
        return cudnn.is_eligible(query, key, value)

    monkeypatch.setattr(cudnn, "_capability", lambda: (9, 0))
    assert eligible() and eligible(dtype=jnp.float16) and eligible(queries=501, dim=128)
    assert not eligible(dtype=jnp.float32)
    assert not eligible(key_dtype=jnp.float32)
    assert not eligible(dim=60)
    assert not eligible(dim=136)
    assert not eligible(value_dim=72)
    assert not eligible(queries=128)
    monkeypatch.setattr(cudnn, "_MIN_WEIGHTS", 0)
    assert eligible(queries=128)
    assert not eligible(queries=1)
    monkeypatch.setattr(cudnn, "_capability", lambda: (7, 5))
    assert not eligible()


def test_causal_attention_needs_as_many_queries_as_keys():
    query, key, value, _ = operands(3, 5)
    with pytest.raises(ValueError, match="as many queries as keys, not 3 and 5"):
        dot_product_attention(query, key, value, causal=True)


@pytest.fixture
def however_small(monkeypatch, untraced_attention):
    monkeypatch.setattr(cudnn, "_MIN_WEIGHTS", 0)


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
    arguments = operands(queries, keys, kv_heads=2, dtype=jnp.bfloat16, dim=64)
    mask = MASKS[mask](queries, keys)
    expected = value_and_gradients(functools.partial(reference, causal=causal))(
        *(x.astype(jnp.float32) for x in arguments), mask
    )

    @value_and_gradients
    def dispatched(query, key, value, mask):
        return dot_product_attention(query, key, value, mask=mask, causal=causal, scale=SCALE)

    assert cudnn.is_eligible(*arguments[:3])
    assert distance(dispatched(*arguments, mask), expected) < 1e-2
    # And under `vmap`, as a population.
    stacked = [jnp.stack([x, 0.5 * x]) for x in arguments]
    mapped = jax.vmap(lambda *x: dispatched(*x, mask))(*stacked)
    assert distance([x[0] for x in mapped], expected) < 1e-2


@needs_kernel
@pytest.mark.lowering
def test_cudnns_kernel_runs_once_forward_and_once_backward(however_small):
    *arguments, cotangent = operands(128, 128, dtype=jnp.bfloat16, dim=64)

    def loss(*arguments):
        output = dot_product_attention(*arguments, causal=True)
        return jnp.sum(output * cotangent).astype(jnp.float32)

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile().as_text()
    assert program.count('custom_call_target="__cudnn$fmha') == 2
