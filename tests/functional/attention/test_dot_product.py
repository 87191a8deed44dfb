"""Attention against a loop; masks and position encodings against values computed by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.attention.dot_product import dot_product_attention, reference_attention
from jaxnets.functional.attention.masks import causal_mask, window_mask
from jaxnets.functional.attention.positions import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    alibi_bias,
    alibi_slopes,
    relative_buckets,
    rotary,
    sinusoidal_positions,
)
from jaxnets.functional.attention.scores import apply_attention_weights, attention_weights
from jaxnets.functional.lengths import padding_mask

HEADS, HEAD_DIM = 4, 6


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def loop(query, key, value, mask, bias, scale, softcap=np.inf):
    """Attention query by query, in NumPy and double precision."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, _ = query.shape
    mask = np.broadcast_to(mask, (batch, heads, queries, key.shape[1]))
    bias = np.broadcast_to(bias, mask.shape)
    output = np.zeros((batch, queries, heads, value.shape[3]))
    for b, t, h in np.ndindex(batch, queries, heads):
        kv_head = h // (heads // key.shape[2])
        keys = np.flatnonzero(mask[b, h, t])
        if len(keys):
            scores = scale * key[b, keys, kv_head] @ query[b, t, h]
            scores = scores if softcap == np.inf else softcap * np.tanh(scores / softcap)
            scores = scores + bias[b, h, t, keys]
            weights = np.exp(scores - scores.max())
            output[b, t, h] = (weights / weights.sum()) @ value[b, keys, kv_head]
    return output


def materialized_attention(query, key, value, **options):
    return apply_attention_weights(attention_weights(query, key, **options), value)


IMPLEMENTATIONS = {
    "reference": reference_attention,
    "dispatched": dot_product_attention,
    "materialized": materialized_attention,
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_equals_a_loop_over_queries_with_shared_key_heads(name, kv_heads):
    q, k, v, bias = arrays(
        (2, 3, HEADS, HEAD_DIM), (2, 5, kv_heads, HEAD_DIM), (2, 5, kv_heads, 7), (1, HEADS, 3, 5)
    )
    mask = np.random.default_rng(1).random((2, 1, 3, 5)) < 0.5
    mask[0, 0, 1] = False  # all keys of this query are masked
    attention = jax.jit(IMPLEMENTATIONS[name], static_argnames=("scale", "softcap"))
    found = attention(q, k, v, mask=mask, bias=bias, scale=0.3)
    np.testing.assert_allclose(found, loop(q, k, v, mask, bias, 0.3), atol=2e-6)
    np.testing.assert_array_equal(found[0, 1], 0)
    found = attention(q, k, v, mask=mask, bias=bias, scale=0.9, softcap=0.5)
    np.testing.assert_allclose(found, loop(q, k, v, mask, bias, 0.9, 0.5), atol=2e-6)
    found = attention(q, k, v)
    np.testing.assert_allclose(found, loop(q, k, v, True, 0.0, HEAD_DIM**-0.5), atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_bias_of_minus_infinity_hides_keys_in_value_and_gradients(name):
    q, k, v = arrays((1, 3, HEADS, HEAD_DIM), *2 * [(1, 5, HEADS, HEAD_DIM)])
    mask = np.ones((3, 5), bool)
    mask[0, :2] = mask[2, :2] = False
    bias = np.where([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], -np.inf, 0.5)
    bias[1, 3] = 0.25  # query 1 sees one key; query 2 none, its mask hides the rest
    visible = mask & np.isfinite(bias)

    @jax.jit
    def both(*operands):
        def attend(query, key, value, bias):
            return IMPLEMENTATIONS[name](query, key, value, mask=mask, bias=bias)

        value, pull = jax.vjp(attend, *operands)
        return value, pull(jnp.cos(value) + 0.5)

    found, gradients = both(q, k, v, jnp.asarray(bias, jnp.float32))
    expected = loop(q, k, v, visible, np.where(visible, bias, 0), HEAD_DIM**-0.5)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_array_equal(found[0, 2], 0)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(np.asarray(gradients[3])[~visible], 0)
    np.testing.assert_array_equal(gradients[0][0, 2], 0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_local_masks_hide_keys_by_their_distance(name):
    q, k, v = arrays(*3 * [(2, 5, HEADS, HEAD_DIM)])
    mask, distance = np.array([1, 1, 0, 1, 1], bool), np.subtract.outer(*2 * [np.arange(5)])
    hidden = {"causal": distance < 0, "window": abs(distance) >= 2}

    @functools.partial(jax.jit, static_argnames=("causal", "window"))
    def attention(q, k, v, **options):
        return IMPLEMENTATIONS[name](q, k, v, mask=mask, **options)

    for options in ({"causal": True}, {"window": 2}, {"causal": True, "window": 2}):
        visible = mask & ~np.any([hidden[each] for each in options], axis=0)
        expected = loop(q, k, v, visible, 0.0, HEAD_DIM**-0.5)
        np.testing.assert_allclose(attention(q, k, v, **options), expected, atol=2e-6)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("bias_shape", [None, (1, HEADS, 3, 5), (2, 1, 1, 5), (1, 1, 1, 1)])
def test_the_gradients_of_attention_are_those_of_the_reference(kv_heads, bias_shape):
    shapes = ((2, 3, HEADS, HEAD_DIM), (2, 5, kv_heads, HEAD_DIM), (2, 5, kv_heads, 7))
    mask = np.random.default_rng(1).random((2, 1, 3, 5)) < 0.5
    mask[0, 0, 1] = False
    with jax.enable_x64(True):
        operands = [x.astype(np.float64) for x in arrays(*shapes)]
        if bias_shape is not None:
            operands.append(arrays(bias_shape, seed=3)[0].astype(np.float64))

        def gradients(attention, *operands):
            def loss(q, k, v, bias=None):
                output = attention(q, k, v, mask=mask, bias=bias, scale=0.3)
                return jnp.sum(jnp.cos(output) + 0.5)

            return jax.grad(loss, tuple(range(len(operands))))(*operands)

        @jax.jit
        def both(*operands):
            functions = (dot_product_attention, reference_attention)
            return [gradients(attention, *operands) for attention in functions]

        for found, expected in zip(*both(*operands), strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_a_query_whose_keys_are_all_masked_gives_zero_and_no_gradient():
    q, k, v = arrays(*[(2, 3, HEADS, HEAD_DIM), *2 * [(2, 5, HEADS, HEAD_DIM)]])
    mask = padding_mask(jnp.array([4, 0]), (2, 5))[:, None, None]

    def loss(q, k, v):
        y = dot_product_attention(q, k, v, mask=mask)
        return jnp.sum(jnp.square(y)), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_array_equal(y[1], 0)
    assert np.any(y[0])
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.any(gradient[0])
        np.testing.assert_array_equal(gradient[1], 0)


def test_weights_sum_to_one_in_float32_where_the_arithmetic_is_bfloat16():
    q, k = (
        jnp.asarray(x, jnp.bfloat16) for x in arrays((2, 3, HEADS, HEAD_DIM), (2, 9, 2, HEAD_DIM))
    )
    weights = attention_weights(q, k)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert dot_product_attention(q, k, k).dtype == jnp.bfloat16


@pytest.mark.lowering
def test_matmuls_of_16_bit_operands_accumulate_in_float32(on_cpu):
    shapes = [(2, 5, HEADS, HEAD_DIM), (2, 5, 2, HEAD_DIM), (2, 5, 2, HEAD_DIM)]
    narrow = [jnp.asarray(each, jnp.bfloat16) for each in arrays(*shapes)]

    @jax.jit
    def gradients(query, key, value):
        output, pull = jax.vjp(
            lambda *arrays: dot_product_attention(*arrays, causal=True), query, key, value
        )
        return output, *pull(jnp.ones_like(output))

    wide = gradients(*(each.astype(jnp.float32) for each in narrow))
    for result, expected in zip(gradients(*narrow), wide, strict=True):
        assert result.dtype == jnp.bfloat16
        close = 2**-6 * np.abs(expected).max()  # a few roundings to 8 bits
        np.testing.assert_allclose(result.astype(jnp.float32), expected, atol=close)
    program = gradients.lower(*narrow).as_text().splitlines()
    products = [line.split(" : ")[-1] for line in program if "stablehlo.dot_general" in line]
    assert len(products) == 2 + 4
    for types in products:
        assert types.count("xbf16>") == 2 and types.endswith("xf32>")


@pytest.mark.lowering
def test_the_keys_and_values_of_a_single_query_are_not_copied(on_cpu):
    query, *keys = arrays((2, 1, HEADS, HEAD_DIM), *2 * [(2, 64, HEADS, HEAD_DIM)])
    program = jax.jit(dot_product_attention).lower(query, *keys).as_text()
    copied = [line for line in program.splitlines() if "LayoutConstraint" in line]
    assert len(copied) == 1 and "tensor<2x4x1x6xf32>" in copied[0]  # the query


def test_large_scores_do_not_overflow():
    """The softmax selects a single key."""
    q, k, v = (100 * x for x in arrays((1, 2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4)))
    mask = causal_mask(jnp.array([[1, 2]]), jnp.arange(3)[None])
    expected = loop(q, k, v, mask, 0.0, 4**-0.5)
    np.testing.assert_allclose(dot_product_attention(q, k, v, mask=mask), expected, rtol=1e-6)


def test_a_sliding_window_shows_the_last_positions_only():
    expected = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    )
    np.testing.assert_array_equal(causal_mask(5, window=3)[0, 0], expected)
    np.testing.assert_array_equal(causal_mask(5)[0, 0], np.tril(np.ones((5, 5))))
    np.testing.assert_array_equal(window_mask(5, window=3)[0, 0], expected | expected.T)


def test_masks_take_the_positions_of_each_example():
    positions = jnp.array([[0, 1], [3, 4]])
    mask = causal_mask(positions, jnp.arange(6)[None], window=2)
    assert mask.shape == (2, 1, 2, 6)
    np.testing.assert_array_equal(mask[0, 0], [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask[1, 0], [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]])


def test_dot_products_of_rotated_vectors_depend_on_the_distance_only():
    q, k = arrays((1, 1, 1, 8), (1, 1, 1, 8))

    @jax.jit
    def rotated_dot(i, j):
        rotated = (rotary(x, n[None, None], theta=50.0) for x, n in ((q, i), (k, j)))
        return jnp.vdot(*rotated)

    def product(i, j):
        return float(rotated_dot(jnp.asarray(i), jnp.asarray(j)))

    assert product(0, 0) == pytest.approx(float(np.vdot(q, k)), abs=1e-5)
    assert product(3, 1) == pytest.approx(product(13, 11), abs=1e-5)
    assert abs(product(3, 1) - product(1, 3)) > 1e-2


def test_rotary_equals_rotations_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    angles = np.array([2.0, 2.0 / 100**0.5])
    expected = [
        1 * np.cos(angles[0]) - 3 * np.sin(angles[0]),
        2 * np.cos(angles[1]) - 4 * np.sin(angles[1]),
        3 * np.cos(angles[0]) + 1 * np.sin(angles[0]),
        4 * np.cos(angles[1]) + 2 * np.sin(angles[1]),
    ]
    np.testing.assert_allclose(
        rotary(x, jnp.array([[2]]), theta=100.0)[0, 0, 0], expected, rtol=1e-6
    )


FREQUENCIES = 100.0 ** -np.array([0, 0.25, 0.5, 0.75])  # of 8 features and base 100


def rotated_angles(scaling):
    """Return the angles by which `rotary` rotates at position 1, and the factor of the result."""
    x = jnp.concatenate([jnp.ones(4), jnp.zeros(4)])[None, None, None]
    cosine, sine = jnp.split(rotary(x, jnp.array([[1]]), theta=100.0, scaling=scaling)[0, 0, 0], 2)
    return np.arctan2(sine, cosine), np.hypot(sine, cosine)


def test_linear_scaling_divides_all_frequencies():
    angles, factor = rotated_angles(LinearScaling(4.0))
    np.testing.assert_allclose(angles, FREQUENCIES / 4, rtol=1e-6)
    np.testing.assert_allclose(factor, 1, rtol=1e-6)


def test_llama3_scaling_divides_low_frequencies_and_mixes_between():
    """With 2 pi 20 as the original length the frequencies have 20, 6.3, 2 and 0.63 periods."""
    angles, factor = rotated_angles(Llama3Scaling(8.0, 126, 1.0, 4.0))
    mixed = (126 * 0.1 / (2 * np.pi) - 1) / 3
    expected = FREQUENCIES * [1, 1, mixed + (1 - mixed) / 8, 1 / 8]
    np.testing.assert_allclose(angles, expected, rtol=1e-6)
    np.testing.assert_allclose(factor, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("truncate", "scaled"),
    # A frequency has b periods in the original context at index 4 log(126 / (2 pi b)) / log(100).
    [(True, np.array([0, 1 / 3, 2 / 3, 1])), (False, (np.arange(4) - 0.604381) / 2)],
)
def test_yarn_mixes_frequencies_by_their_index_and_scales_the_result(truncate, scaled):
    scaling = YarnScaling(4.0, 126, beta_fast=10.0, beta_slow=1.0, truncate=truncate)
    angles, factor = rotated_angles(scaling)
    scaled = np.clip(scaled, 0, 1)
    np.testing.assert_allclose(angles, FREQUENCIES * (1 - scaled + scaled / 4), rtol=1e-5)
    np.testing.assert_allclose(factor, 0.1 * np.log(4) + 1, rtol=1e-6)
    _, factor = rotated_angles(dataclasses.replace(scaling, attention_scaling=1.5))
    np.testing.assert_allclose(factor, 1.5, rtol=1e-6)


def test_sinusoids_follow_the_formula_of_the_paper():
    positions = np.array([0, 3, 70])
    expected = np.zeros((3, 6))
    for row, position in enumerate(positions):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            expected[row, 2 * i : 2 * i + 2] = np.sin(angle), np.cos(angle)
    np.testing.assert_allclose(sinusoidal_positions(positions, 6), expected, atol=1e-5)


def test_alibi_slopes_by_hand():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(1) == [1 / 256]
    # Four slopes of four heads, then the first and third of eight.
    assert alibi_slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert len(set(alibi_slopes(12))) == 12


def test_alibi_falls_with_the_distance_in_both_directions():
    bias = alibi_bias(2, jnp.array([[1, 2]]), jnp.arange(4)[None])
    assert bias.shape == (1, 2, 2, 4)
    np.testing.assert_allclose(bias[0, 0], -np.array([[1, 0, 1, 2], [2, 1, 0, 1]]) / 16)
    np.testing.assert_allclose(bias[0, 1], bias[0, 0] / 16)


def test_relative_buckets_by_hand():
    """Four of 8 buckets hold one distance; the others begin at 4, 8, 16, 32, up to 64."""
    distances = np.array([[0, 1, 3, 4, 7, 8, 15, 16, 31, 32, 64, 1000]])
    queries = jnp.array([[1000]])
    buckets = relative_buckets(
        queries, 1000 - distances, bidirectional=False, num_buckets=8, max_distance=64
    )
    np.testing.assert_array_equal(buckets[0, 0], [0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7])
    later = relative_buckets(queries, queries + 5, bidirectional=False)
    assert later.item() == 0
    both = relative_buckets(3, bidirectional=True, num_buckets=16, max_distance=64)
    np.testing.assert_array_equal(both[0], [[0, 9, 10], [1, 0, 9], [2, 1, 0]])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_distances_of_positions_of_every_integer_type_do_not_wrap(dtype):
    positions = np.array([[100, 3, 127]], dtype)
    wide = positions.astype(np.int64)
    expected = wide[0][:, None] - wide[0][None]
    np.testing.assert_array_equal(jax.jit(causal_mask)(positions)[0, 0], expected >= 0)
    np.testing.assert_array_equal(causal_mask(positions)[0, 0], expected >= 0)
    np.testing.assert_allclose(alibi_bias(1, positions)[0, 0], -abs(expected) / 256)
    buckets = jax.jit(lambda p: relative_buckets(p, bidirectional=True, max_distance=300))
    np.testing.assert_array_equal(buckets(positions), buckets(wide))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: dot_product_attention(*[jnp.ones((1, 3, 1, 4), int)] * 3),
            "queries of shape .* and type int32 do not fit; give floats",
        ),
        (
            lambda: attention_weights(*arrays(*2 * [(1, 3, 1, 6)]), bias=jnp.ones((3, 3), bool)),
            "the bias has dtype bool; give floats",
        ),
        (
            lambda: dot_product_attention(*arrays((1, 3, 1, 6), *2 * [(1, 0, 1, 6)])),
            "with at least one key",
        ),
        (
            lambda: dot_product_attention(*arrays(*3 * [(1, 3, 1, 6)]), window=2.5),
            r"window=2\.5 must be a positive integer",
        ),
        (lambda: causal_mask(jnp.arange(3)), r"positions have shape \(3,\) and type int32"),
        (lambda: causal_mask(jnp.ones((1, 3))), "type float32; give integers"),
        (lambda: causal_mask(*[jnp.zeros((n, 3), int) for n in (2, 4)]), "different batches"),
        (
            lambda: dot_product_attention(*arrays(*3 * [(1, 3, 1, 6)]), softcap=0.0),
            "softcap is 0.0; give a positive number",
        ),
        (lambda: attention_weights(*arrays(*2 * [(1, 3, 1, 6)]), softcap=-1.0), "softcap is -1"),
        (lambda: LinearScaling(0.5), "factor is 0.5; give a number of 1 or more"),
        (lambda: Llama3Scaling(8.0, 0), "original_length=0"),
        (lambda: Llama3Scaling(8.0, 8192, 4.0, 1.0), "low_frequency_factor is 4.0 and .* 1.0"),
        (lambda: YarnScaling(float("nan"), 32), "factor is nan"),
        (lambda: YarnScaling(4.0, 32, beta_fast=1.0), "beta_slow is 1.0 and beta_fast 1.0"),
        (lambda: YarnScaling(4.0, 32, attention_scaling=0.0), "attention_scaling is 0.0"),
        (lambda: rotary(jnp.ones((2, 3, 4)), np.arange(3)[None]), r"of shape \(2, 3, 4\)"),
        (lambda: rotary(jnp.ones((2, 3, 1, 4), int), np.arange(3)[None]), "int32 do not fit"),
        (
            lambda: rotary(jnp.ones((2, 3, 1, 4)), np.arange(1)[None]),
            r"positions of shape \(1, 1\)",
        ),
        (lambda: sinusoidal_positions(np.arange(3), -2), "features=-2"),
        (lambda: alibi_slopes(0), "num_heads=0"),
        (
            lambda: dot_product_attention(*arrays((1, 2, 4, 6), (1, 3, 3, 6), (1, 3, 3, 6))),
            r"\(1, 3, 3, 6\)",
        ),
        (
            lambda: dot_product_attention(*arrays((1, 2, 4, 6), (1, 3, 4, 5), (1, 3, 4, 5))),
            r"\(1, 3, 4, 5\)",
        ),
        (
            lambda: dot_product_attention(*arrays((1, 2, 4, 6), (1, 3, 4, 6), (1, 2, 4, 6))),
            r"\(1, 2, 4, 6\)",
        ),
        (
            lambda: dot_product_attention(*arrays((1, 2, 1, 6), *2 * [(1, 3, 1, 6)]), window=2),
            "not 2 and 3",
        ),
        (
            lambda: dot_product_attention(*arrays(*3 * [(1, 3, 1, 6)]), window=0),
            "window=0 must be a positive integer",
        ),
        (
            lambda: dot_product_attention(
                *arrays(*3 * [(1, 3, 1, 6)]), mask=jnp.ones((3, 4), bool)
            ),
            "mask of",
        ),
        (lambda: attention_weights(*arrays(*2 * [(1, 3, 1, 6)]), bias=jnp.ones((2, 3))), "bias of"),
        (
            lambda: dot_product_attention(*arrays(*3 * [(1, 3, 1, 6)]), mask=jnp.zeros((3, 3))),
            "the mask has dtype float32; give bool",
        ),
        (
            lambda: dot_product_attention(*arrays((3, 1, 6), *2 * [(1, 3, 1, 6)])),
            r"queries of shape \(3, 1, 6\) and type float32 do not fit",
        ),
        (
            lambda: dot_product_attention(
                *arrays(*3 * [(1, 3, 1, 6)]), bias=jnp.ones((1, 1, 1, 3, 3))
            ),
            "bias of",
        ),
        (lambda: causal_mask(4, window=0), "window=0 must be a positive integer"),
        (lambda: sinusoidal_positions(np.arange(3), 5), "5 features"),
        (lambda: rotary(jnp.ones((1, 2, 1, 3)), np.arange(2)[None]), "3 features"),
        (lambda: relative_buckets(3, bidirectional=True, num_buckets=2), "1 buckets"),
    ],
)
def test_an_error_names_the_value_that_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()
