"""Attention against a loop, masks and positions against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.attention.dot_product import dot_product_attention
from jaxnets.functional.attention.masks import causal_mask, window_mask
from jaxnets.functional.attention.positions import (
    alibi_bias,
    alibi_slopes,
    relative_buckets,
    rotary,
    sinusoidal_positions,
)
from jaxnets.functional.attention.scores import apply_attention_weights, attention_weights
from jaxnets.functional.lengths import padding_mask

HEADS, SIZE = 4, 6


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def looped(query, key, value, mask, bias, scale):
    """Attention query by query, in double precision, without a shared key-value head."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, _ = query.shape
    mask = np.broadcast_to(mask, (batch, heads, queries, key.shape[1]))
    bias = np.broadcast_to(bias, mask.shape)
    output = np.zeros((batch, queries, heads, value.shape[3]))
    for b, t, h in np.ndindex(batch, queries, heads):
        shared = h // (heads // key.shape[2])
        seen = [s for s in range(key.shape[1]) if mask[b, h, t, s]]
        scores = [scale * query[b, t, h] @ key[b, s, shared] + bias[b, h, t, s] for s in seen]
        if seen:
            weights = np.exp(np.array(scores) - max(scores))
            output[b, t, h] = (weights / weights.sum()) @ value[b, seen, shared]
    return output


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_equals_a_loop_over_queries_with_shared_key_heads(groups):
    q, k, v, bias = arrays(
        (2, 3, HEADS, SIZE), (2, 5, groups, SIZE), (2, 5, groups, 7), (1, HEADS, 3, 5)
    )
    mask = np.random.default_rng(1).random((2, 1, 3, 5)) < 0.5
    mask[0, 0, 1] = False  # this query sees nothing
    found = dot_product_attention(q, k, v, mask=mask, bias=jnp.asarray(bias), scale=0.3)
    np.testing.assert_allclose(found, looped(q, k, v, mask, bias, 0.3), atol=2e-6)
    found = dot_product_attention(q, k, v)
    np.testing.assert_allclose(found, looped(q, k, v, True, 0.0, SIZE**-0.5), atol=2e-6)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("bias_shape", [None, (1, HEADS, 3, 5), (2, 1, 1, 5), (1, 1, 1, 1)])
def test_the_gradients_of_attention_are_those_of_its_formula(groups, bias_shape):
    with jax.enable_x64(True):
        shapes = ((2, 3, HEADS, SIZE), (2, 5, groups, SIZE), (2, 5, groups, 7))
        operands = [jnp.asarray(x, jnp.float64) for x in arrays(*shapes)]
        if bias_shape is not None:
            operands.append(jnp.asarray(arrays(bias_shape, seed=3)[0], jnp.float64))
        mask = np.random.default_rng(1).random((2, 1, 3, 5)) < 0.5
        mask[0, 0, 1] = False

        def formula(q, k, v, *bias):
            weights = attention_weights(q, k, mask=mask, bias=bias[0] if bias else None, scale=0.3)
            return apply_attention_weights(weights, v)

        def own(q, k, v, *bias):
            return dot_product_attention(
                q, k, v, mask=mask, bias=bias[0] if bias else None, scale=0.3
            )

        def slope(function, *operands):
            return jnp.sum(jnp.cos(function(*operands)) + 0.5)

        def curvature(function, *operands):
            numbers = tuple(range(len(operands)))
            gradients = jax.grad(slope, tuple(n + 1 for n in numbers))(function, *operands)
            return sum(jnp.sum(jnp.sin(gradient)) for gradient in gradients)

        for measure in (slope, curvature):  # first and second derivatives
            numbers = tuple(n + 1 for n in range(len(operands)))
            both = [
                jax.jit(jax.grad(measure, numbers), static_argnums=0)(function, *operands)
                for function in (own, formula)
            ]
            for found, expected in zip(*both, strict=True):
                assert found.dtype == expected.dtype
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_a_query_that_sees_no_key_gives_zero_and_a_finite_gradient():
    q, k, v = arrays((2, 3, HEADS, SIZE), (2, 5, HEADS, SIZE), (2, 5, HEADS, SIZE))
    mask = padding_mask(jnp.array([4, 0]), (2, 5))[:, None, None]

    def loss(q, k, v):
        y = dot_product_attention(q, k, v, mask=mask)
        return jnp.sum(jnp.square(y)), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    np.testing.assert_array_equal(y[1], 0)
    assert np.any(y[0])
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.any(gradient[0])
        np.testing.assert_array_equal(gradient[1], 0)


def test_weights_sum_to_one_in_float32_where_the_arithmetic_is_bfloat16():
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in arrays((2, 3, HEADS, SIZE), (2, 9, 2, SIZE)))
    weights = attention_weights(q, k)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert dot_product_attention(q, k, k).dtype == jnp.bfloat16


def test_narrow_products_have_narrow_operands_and_wide_results(on_cpu):
    shapes = [(2, 5, HEADS, SIZE), (2, 5, 2, SIZE), (2, 5, 2, SIZE)]
    narrow = [jnp.asarray(each, jnp.bfloat16) for each in arrays(*shapes)]

    def gradients(query, key, value):
        output, pull = jax.vjp(
            lambda *arrays: dot_product_attention(*arrays, causal=True), query, key, value
        )
        return output, *pull(jnp.ones_like(output))

    wide = jax.jit(gradients)(*(each.astype(jnp.float32) for each in narrow))
    for result, expected in zip(jax.jit(gradients)(*narrow), wide, strict=True):
        assert result.dtype == jnp.bfloat16
        close = 2**-6 * np.abs(expected).max()  # a few roundings of 8 bits
        np.testing.assert_allclose(result.astype(jnp.float32), expected, atol=close)
    program = jax.jit(gradients).lower(*narrow).as_text().splitlines()
    products = [line.split(" : ")[-1] for line in program if "stablehlo.dot_general" in line]
    assert len(products) == 2 + 4
    for types in products:
        assert types.count("xbf16>") == 2 and types.endswith("xf32>")


def test_the_keys_and_values_of_one_query_are_read_where_they_lie(on_cpu):
    query, *keys = arrays((2, 1, HEADS, SIZE), (2, 64, HEADS, SIZE), (2, 64, HEADS, SIZE))
    program = jax.jit(dot_product_attention).lower(query, *keys).as_text()
    row_major = [line for line in program.splitlines() if "LayoutConstraint" in line]
    assert len(row_major) == 1 and "tensor<2x4x1x6xf32>" in row_major[0]


def test_large_scores_do_not_overflow():
    q, k, v = (100 * x for x in arrays((1, 2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4)))
    mask = causal_mask(jnp.array([[1, 2]]), jnp.arange(3)[None])
    assert np.isfinite(dot_product_attention(q, k, v, mask=mask)).all()


def test_a_sliding_window_sees_the_last_positions_only():
    expected = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    )
    np.testing.assert_array_equal(causal_mask(5, window=3)[0, 0], expected)
    np.testing.assert_array_equal(causal_mask(5)[0, 0], np.tril(np.ones((5, 5))))
    np.testing.assert_array_equal(window_mask(5, window=3)[0, 0], expected | expected.T)


def test_masks_take_the_positions_of_each_row():
    positions = jnp.array([[0, 1], [3, 4]])
    mask = causal_mask(positions, jnp.arange(6)[None], window=2)
    assert mask.shape == (2, 1, 2, 6)
    np.testing.assert_array_equal(mask[0, 0], [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask[1, 0], [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]])


def test_products_of_rotated_vectors_depend_on_the_distance_only():
    q, k = arrays((1, 1, 1, 8), (1, 1, 1, 8))

    def product(i, j):
        turned = (rotary(x, np.array([[n]]), theta=50.0) for x, n in ((q, i), (k, j)))
        return float(jnp.vdot(*turned))

    assert product(0, 0) == pytest.approx(float(np.vdot(q, k)), abs=1e-5)
    assert product(3, 1) == pytest.approx(product(13, 11), abs=1e-5)
    assert abs(product(3, 1) - product(1, 3)) > 1e-2


def test_rotary_turns_pairs_by_hand():
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
    """Of 8 buckets 4 are exact; the others begin at 4, 8, 16, 32 with distances up to 64."""
    behind = np.array([[0, 1, 3, 4, 7, 8, 15, 16, 31, 32, 64, 1000]])
    queries = jnp.array([[1000]])
    buckets = relative_buckets(
        queries, 1000 - behind, bidirectional=False, num_buckets=8, max_distance=64
    )
    np.testing.assert_array_equal(buckets[0, 0], [0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7])
    ahead = relative_buckets(queries, queries + 5, bidirectional=False)
    assert ahead.item() == 0
    both = relative_buckets(3, bidirectional=True, num_buckets=16, max_distance=64)
    np.testing.assert_array_equal(both[0], [[0, 9, 10], [1, 0, 9], [2, 1, 0]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
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
        (lambda: dot_product_attention(*arrays(*3 * [(1, 3, 1, 6)]), window=0), "window is 0"),
        (
            lambda: dot_product_attention(
                *arrays(*3 * [(1, 3, 1, 6)]), mask=jnp.ones((3, 4), bool)
            ),
            "mask of",
        ),
        (lambda: attention_weights(*arrays(*2 * [(1, 3, 1, 6)]), bias=jnp.ones((2, 3))), "bias of"),
        (lambda: causal_mask(4, window=0), "window is 0"),
        (lambda: sinusoidal_positions(np.arange(3), 5), "5 features"),
        (lambda: rotary(jnp.ones((1, 2, 1, 3)), np.arange(2)[None]), "3 features"),
        (lambda: relative_buckets(3, bidirectional=True, num_buckets=2), "1 buckets"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
