"""Attention in blocks of queries against its formula, and what is left of it in programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal

from jaxnets.functional.attention import tiling
from jaxnets.functional.attention.dot_product import _shared_attention, attention
from jaxnets.functional.attention.masks import Reach

HEADS, GROUPS, SIZE = 4, 2, 3
# Queries, keys and reach: with blocks of unequal length, and many keys for few queries.
SHAPES = {
    "causal": (11, 11, Reach(causal=True)),
    "longer": (33, 33, Reach(causal=True)),
    "wide": (13, 40, Reach()),
    "window": (33, 33, Reach(window=5)),
    "causal window": (33, 33, Reach(causal=True, window=5)),
}
# Of each block its queries, from and up to, and its keys.
BLOCKS = {
    "causal": [(0, 5, 0, 5), (5, 11, 0, 11)],
    "longer": [(0, 11, 0, 11), (11, 22, 0, 22), (22, 33, 0, 33)],
    "wide": [(0, 6, 0, 40), (6, 13, 0, 40)],
    "window": [(0, 11, 0, 15), (11, 22, 7, 26), (22, 33, 18, 33)],
    "causal window": [(0, 11, 0, 11), (11, 22, 7, 22), (22, 33, 18, 33)],
}


@pytest.fixture(params=["weights kept", "heads alone"])
def small_blocks(request, monkeypatch):
    many = 1 if request.param == "heads alone" else 10**9
    sizes = {"BLOCK": 4, "LARGE_BLOCK": 6, "LONG": 30, "MOST_BLOCKS": 3, "MANY_KEYS": 40}
    for name, size in {**sizes, "MANY_WEIGHTS": many}.items():
        monkeypatch.setattr(tiling, f"_{name}", size)
    shared = _shared_attention
    shared.clear_cache()
    yield request.param
    shared.clear_cache()


def formula(query, key, value, mask, bias, reach):
    """Attention as its definition says, with a copy of keys and values for each head."""
    key, value = (jnp.repeat(x, HEADS // GROUPS, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhs,bkhs->bhqk", query, key) / jnp.sqrt(SIZE)
    scores = scores if bias is None else scores + bias
    seen = jnp.ones(scores.shape, bool) if mask is None else jnp.broadcast_to(mask, scores.shape)
    behind = np.subtract.outer(np.arange(query.shape[1]), np.arange(key.shape[1]))[None, None]
    seen = seen & (behind >= 0) if reach.causal else seen
    seen = seen if reach.window is None else seen & (abs(behind) < reach.window)
    weights = jnp.where(seen, jnp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhs->bqhs", weights / jnp.where(total == 0, 1, total), value)


def operands(name, dtype=np.float64):
    queries, keys, reach = SHAPES[name]
    query = normal((2, queries, HEADS, SIZE), 0, dtype)
    key, value = (normal((2, keys, GROUPS, size), size, dtype) for size in (SIZE, 5))
    return query, key, value, reach


def pair(function, reach, mask):
    """The value, its gradients, and the gradients of something curved in these."""

    def value(query, key, value, bias):
        return function(query, key, value, mask, bias, reach)

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


def ours(query, key, value, mask, bias, reach):
    return attention(query, key, value, mask=mask, bias=bias, **reach._asdict())


@pytest.mark.parametrize(
    ("small_blocks", "name", "bias_axes", "mask_axes"),
    [
        ("weights kept", "causal", None, "q"),
        ("weights kept", "causal", "hqk", "bqk"),
        ("weights kept", "longer", "bk", None),
        ("weights kept", "longer", "q", "hqk"),
        ("weights kept", "wide", "", "bqk"),
        ("weights kept", "wide", "hqk", None),
        ("weights kept", "window", "hqk", None),
        ("weights kept", "causal window", "bk", "bqk"),
        ("heads alone", "causal", None, "q"),
        ("heads alone", "longer", None, "hqk"),
        ("heads alone", "wide", None, "bk"),
        ("heads alone", "window", None, "bhqk"),
        ("heads alone", "causal window", None, None),
    ],
    indirect=["small_blocks"],
)
def test_blocks_give_the_values_and_derivatives_of_the_formula(
    name, bias_axes, mask_axes, enable_x64, on_cpu, small_blocks
):
    query, key, value, reach = operands(name)
    lengths = {"b": 2, "h": HEADS, "q": query.shape[1], "k": key.shape[1]}

    def drawn(axes, seed):
        return normal(tuple(size if a in axes else 1 for a, size in lengths.items()), seed)

    bias = None if bias_axes is None else drawn(bias_axes, 7)
    mask = None if mask_axes is None else drawn(mask_axes, 8) > 0.3
    if mask is not None:
        mask = mask.at[0, :, 7 if "q" in mask_axes else 0].set(False)  # a query that sees nothing
    divided = tiling.plans(query, key, reach, divisible=bias is None)
    assert [tuple(block) for block in divided.cpu.blocks] == BLOCKS[name]
    assert divided.cpu.alone == (small_blocks == "heads alone")
    both = (pair(each, reach, mask) for each in (ours, formula))
    found, expected = (each(query, key, value, bias) for each in both)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for own, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.shape == plain.shape
        np.testing.assert_allclose(own, plain, rtol=1e-9, atol=1e-11)
    if mask is not None:
        np.testing.assert_array_equal(found[0][0, 7 if "q" in mask_axes else slice(None)], 0)


def test_members_of_a_population_attend_in_blocks(enable_x64, on_cpu, small_blocks):
    query, key, value, reach = operands("longer")

    def gradient(query, key):
        return jax.grad(lambda q: jnp.sin(ours(q, key, value, None, None, reach)).sum())(query)

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


def layers(scanned, time=160):
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

    return jax.jit(jax.value_and_grad(loss)), (jnp.ones(4), jnp.ones((2, time, HEADS, SIZE)))


@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "divisible", "alone"),
    [
        (1024, 1024, "float32", True, True),
        (256, 4096, "float32", True, True),
        (1000, 1000, "float32", True, False),
        (1, 4096, "float32", True, False),
        (1024, 1024, "float32", False, False),
        (1024, 1024, "bfloat16", True, False),
        (2048, 2048, "bfloat16", True, True),
    ],
)
def test_heads_are_alone_where_the_weights_of_one_are_many(queries, keys, dtype, divisible, alone):
    query, key = (jnp.zeros((1, time, 1, 1), dtype) for time in (queries, keys))
    divided = tiling.plans(query, key, Reach(), divisible=divisible)
    assert divided.cpu.alone == alone
    assert not divided.default.alone and len(divided.default.blocks) == 1
    assert (divided.partitioned is None) == (not alone)
    assert divided.partitioned in (None, divided.cpu._replace(alone=False))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_program_for_cpu_has_nothing_of_the_size_of_all_weights(scanned, on_cpu):
    gradient, arguments = layers(scanned)
    text = gradient.lower(*arguments).compile().as_text()
    assert re.search(r"f32\[[\d,]*80,160\]", text)  # the second block
    assert not re.search(r"f32\[[\d,]*160,160\]", text)


@pytest.mark.parametrize("scanned", [False, True])
def test_of_long_contexts_the_weights_of_one_head_are_there_at_a_time(scanned, on_cpu):
    gradient, arguments = layers(scanned, time=1024)
    program = gradient.lower(*arguments).compile()
    shapes = set(re.findall(r"f32\[([\d,]*)\d{3},1024\]", program.as_text()))
    assert shapes and all(set(shape.split(",")) <= {"1", ""} for shape in shapes)
    of_one_layer = 2 * HEADS * 1024**2 * 4
    assert program.memory_analysis().temp_size_in_bytes < of_one_layer / 2


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
@pytest.mark.parametrize(("time", "block"), [(160, "80,160"), (1024, "128,1024")])
def test_a_batch_that_is_split_over_devices_stays_where_it_is(time, block, kind, on_cpu):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(attention(x, x, x, causal=True) ** 2))(x)

    x = jax.ShapeDtypeStruct((8, time, HEADS, SIZE), jnp.float32, sharding=split)
    text = jax.jit(gradient, out_shardings=split).lower(x).compile().as_text()
    assert f"f32[2,4,{block}]" in text
    assert not re.search(r" (all-gather|all-to-all|collective-permute|all-reduce)\(", text)
