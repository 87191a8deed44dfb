"""Attention in blocks of queries against its formula, and what is left of it in programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal

import jaxnets.attention as attention_module
from jaxnets import weighted_attention
from jaxnets.attention import attention

HEADS, GROUPS, SIZE = 4, 2, 3
# Queries, keys, and whether causal: with blocks of unequal length, and many keys for few queries.
SHAPES = {"causal": (11, 11, True), "longer": (33, 33, True), "wide": (13, 40, False)}
BLOCKS = {"causal": 2, "longer": 3, "wide": 2}


@pytest.fixture
def small_blocks(monkeypatch):
    sizes = {"BLOCK": 4, "LARGE_BLOCK": 6, "LONG": 30, "MOST_BLOCKS": 3, "MANY_KEYS": 40}
    for name, size in sizes.items():
        monkeypatch.setattr(weighted_attention, f"_{name}", size)
    shared = attention_module._shared_attention
    shared.clear_cache()
    yield
    shared.clear_cache()


def formula(query, key, value, mask, bias, causal):
    """Attention as its definition says, with a copy of keys and values for each head."""
    key, value = (jnp.repeat(x, HEADS // GROUPS, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhs,bkhs->bhqk", query, key) / jnp.sqrt(SIZE)
    scores = scores if bias is None else scores + bias
    seen = jnp.ones(scores.shape, bool) if mask is None else jnp.broadcast_to(mask, scores.shape)
    seen = jnp.tril(seen) if causal else seen
    weights = jnp.where(seen, jnp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhs->bqhs", weights / jnp.where(total == 0, 1, total), value)


def operands(name, dtype=np.float64):
    queries, keys, causal = SHAPES[name]
    query = normal((2, queries, HEADS, SIZE), 0, dtype)
    key, value = (normal((2, keys, GROUPS, size), size, dtype) for size in (SIZE, 5))
    return query, key, value, causal


def pair(function, causal, mask):
    """The value, its gradients, and the gradients of something curved in these."""

    def value(query, key, value, bias):
        return function(query, key, value, mask, bias, causal)

    def gradients(*arrays):
        return jax.grad(lambda *arrays: jnp.sum(jnp.cos(value(*arrays)) + 0.5), (0, 1, 2, 3))(
            *arrays
        )

    def curvature(*arrays):
        return sum(jnp.sum(jnp.sin(each)) for each in jax.tree.leaves(gradients(*arrays)))

    return jax.jit(
        lambda *arrays: (
            value(*arrays),
            gradients(*arrays),
            jax.grad(curvature, (0, 1, 2, 3))(*arrays),
        )
    )


def ours(query, key, value, mask, bias, causal):
    return attention(query, key, value, mask=mask, bias=bias, causal=causal)


@pytest.mark.parametrize(
    ("name", "bias_axes", "masked"),
    [
        ("causal", None, False),
        ("causal", "hqk", True),
        ("longer", "bk", False),
        ("longer", "q", True),
        ("wide", "", True),
        ("wide", "hqk", False),
    ],
)
def test_blocks_give_the_values_and_derivatives_of_the_formula(
    name, bias_axes, masked, enable_x64, on_cpu, small_blocks
):
    query, key, value, causal = operands(name)
    lengths = {"b": 2, "h": HEADS, "q": query.shape[1], "k": key.shape[1]}
    bias = mask = None
    if bias_axes is not None:
        bias = normal(tuple(size if a in bias_axes else 1 for a, size in lengths.items()), 7)
    if masked:
        mask = normal((2, 1, query.shape[1], key.shape[1]), 8) > 0.5
        mask = mask.at[0, :, 7].set(False)  # this query sees nothing
    blocks = weighted_attention._divisions(query.shape[1], key.shape[1], causal)[1]
    assert len(blocks) == BLOCKS[name]
    both = (pair(each, causal, mask) for each in (ours, formula))
    found, expected = (each(query, key, value, bias) for each in both)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for own, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.shape == plain.shape
        np.testing.assert_allclose(own, plain, rtol=1e-9, atol=1e-11)
    if masked:
        np.testing.assert_array_equal(found[0][0, 7], 0)


def test_members_of_a_population_attend_in_blocks(enable_x64, on_cpu, small_blocks):
    query, key, value, causal = operands("longer")

    def gradient(query, key):
        return jax.grad(lambda q: ours(q, key, value, None, None, causal).sum())(query)

    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(jnp.stack([query, 2 * query]), key)
    for number, member in enumerate(mapped):
        np.testing.assert_allclose(member, gradient((number + 1) * query, key), rtol=1e-10)


def test_large_scores_neither_overflow_nor_vanish(on_cpu, small_blocks):
    query, key, value, _ = operands("causal", np.float32)
    found = attention(1e4 * query, key, value, causal=True)
    # The softmax is a choice of one key here.
    scores = np.einsum("bqhs,bkhs->bhqk", query, np.repeat(key, 2, axis=2))
    hidden = np.triu(np.ones((11, 11), bool), 1)
    chosen = np.where(hidden, -np.inf, scores).argmax(-1).swapaxes(1, 2)[..., None]
    expected = np.take_along_axis(np.repeat(value, 2, axis=2), chosen, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def layers(scanned):
    """The gradient of four layers of attention, in a loop or one after the other."""

    def layer(x, scale):
        return x + attention(scale * x, x, x, causal=True)

    def loss(scales, x):
        if scanned:
            x, _ = jax.lax.scan(lambda x, scale: (layer(x, scale), None), x, scales)
        else:
            for scale in scales:
                x = layer(x, scale)
        return jnp.sum(x**2)

    return jax.jit(jax.value_and_grad(loss)), (jnp.ones(4), jnp.ones((2, 160, HEADS, SIZE)))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_program_for_cpu_has_nothing_of_the_size_of_all_weights(scanned, on_cpu):
    gradient, arguments = layers(scanned)
    text = gradient.lower(*arguments).compile().as_text()
    assert re.search(r"f32\[[\d,]*80,160\]", text)  # the second block
    assert not re.search(r"f32\[[\d,]*160,160\]", text)


def test_other_platforms_multiply_whole_matrices():
    gradient, arguments = layers(scanned=False)
    trace = gradient.trace(*arguments)
    products = {
        platform: re.findall(
            r"dot_general.*-> tensor<2x4x(\d+x\d+)x",
            trace.lower(lowering_platforms=(platform,)).as_text(),
        )
        for platform in ("cpu", "cuda", "tpu")
    }
    assert set(products["cpu"]) >= {"80x80", "80x160"} and "160x160" not in products["cpu"]
    assert products["cuda"] == products["tpu"]
    assert set(products["cuda"]) == {"160x160", f"160x{SIZE}"}


@pytest.mark.four_devices
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_batch_that_is_split_over_devices_stays_where_it_is(kind, on_cpu):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(attention(x, x, x, causal=True) ** 2))(x)

    x = jax.ShapeDtypeStruct((8, 160, HEADS, SIZE), jnp.float32, sharding=split)
    text = jax.jit(gradient, out_shardings=split).lower(x).compile().as_text()
    assert "f32[2,4,80,160]" in text
    assert not re.search(r" (all-gather|all-to-all|collective-permute|all-reduce)\(", text)
