"""Attention in tiles of queries against its formula, and what is left of it in programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import normal

from jaxnets.functional.attention import tiling
from jaxnets.functional.attention.dot_product import _shared_attention, dot_product_attention
from jaxnets.functional.attention.masks import LocalMask

HEADS, GROUPS, SIZE = 4, 2, 3
# Queries, keys and local_mask: with tiles of unequal length, and many keys for few queries.
SHAPES = {
    "causal": (11, 11, LocalMask(causal=True)),
    "longer": (33, 33, LocalMask(causal=True)),
    "wide": (13, 40, LocalMask()),
    "window": (33, 33, LocalMask(window=5)),
    "causal window": (33, 33, LocalMask(causal=True, window=5)),
}
# Of each tile its queries, from and up to, and its keys.
BLOCKS = {
    "causal": [(0, 5, 0, 5), (5, 11, 0, 11)],
    "longer": [(0, 11, 0, 11), (11, 22, 0, 22), (22, 33, 0, 33)],
    "wide": [(0, 6, 0, 40), (6, 13, 0, 40)],
    "window": [(0, 11, 0, 15), (11, 22, 7, 26), (22, 33, 18, 33)],
    "causal window": [(0, 11, 0, 11), (11, 22, 7, 22), (22, 33, 18, 33)],
}


@pytest.fixture(params=["weights kept", "per head"])
def small_blocks(request, monkeypatch):
    many = 1 if request.param == "per head" else 10**9
    sizes = {"BLOCK": 4, "LARGE_BLOCK": 6, "LONG": 30, "MOST_BLOCKS": 3, "MANY_KEYS": 40}
    for name, size in {**sizes, "MANY_WEIGHTS": many}.items():
        monkeypatch.setattr(tiling, f"_{name}", size)
    shared = _shared_attention
    shared.clear_cache()
    yield request.param
    shared.clear_cache()


def formula(query, key, value, mask, bias, local_mask):
    """Attention as its definition says, with a copy of keys and values for each head."""
    key, value = (jnp.repeat(x, HEADS // GROUPS, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhs,bkhs->bhqk", query, key) / jnp.sqrt(SIZE)
    scores = scores if bias is None else scores + bias
    seen = jnp.ones(scores.shape, bool) if mask is None else jnp.broadcast_to(mask, scores.shape)
    behind = np.subtract.outer(np.arange(query.shape[1]), np.arange(key.shape[1]))[None, None]
    seen = seen & (behind >= 0) if local_mask.causal else seen
    seen = seen if local_mask.window is None else seen & (abs(behind) < local_mask.window)
    weights = jnp.where(seen, jnp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhs->bqhs", weights / jnp.where(total == 0, 1, total), value)


def operands(name, dtype=np.float64):
    queries, keys, local_mask = SHAPES[name]
    query = normal((2, queries, HEADS, SIZE), 0, dtype)
    key, value = (normal((2, keys, GROUPS, size), size, dtype) for size in (SIZE, 5))
    return query, key, value, local_mask


def pair(function, local_mask, mask):
    """The value, its gradients, and the gradients of something curved in these."""

    def value(query, key, value, bias):
        return function(query, key, value, mask, bias, local_mask)

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


def ours(query, key, value, mask, bias, local_mask):
    return dot_product_attention(query, key, value, mask=mask, bias=bias, **local_mask._asdict())


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
        ("per head", "causal", None, "q"),
        ("per head", "longer", None, "hqk"),
        ("per head", "wide", None, "bk"),
        ("per head", "window", None, "bhqk"),
        ("per head", "causal window", None, None),
    ],
    indirect=["small_blocks"],
)
def test_blocks_give_the_values_and_derivatives_of_the_formula(
    name, bias_axes, mask_axes, enable_x64, on_cpu, small_blocks
):
    query, key, value, local_mask = operands(name)
    lengths = {"b": 2, "h": HEADS, "q": query.shape[1], "k": key.shape[1]}

    def drawn(axes, seed):
        return normal(tuple(size if a in axes else 1 for a, size in lengths.items()), seed)

    bias = None if bias_axes is None else drawn(bias_axes, 7)
    mask = None if mask_axes is None else drawn(mask_axes, 8) > 0.3
    if mask is not None:
        mask = mask.at[0, :, 7 if "q" in mask_axes else 0].set(False)  # a query that sees nothing
    divided = tiling.tilings(query, key, local_mask, divisible=bias is None)
    assert [tuple(tile) for tile in divided.cpu.tiles] == BLOCKS[name]
    assert divided.cpu.per_head == (small_blocks == "per head")
    both = (pair(each, local_mask, mask) for each in (ours, formula))
    found, expected = (each(query, key, value, bias) for each in both)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for own, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.shape == plain.shape
        np.testing.assert_allclose(own, plain, rtol=1e-9, atol=1e-11)
    if mask is not None:
        np.testing.assert_array_equal(found[0][0, 7 if "q" in mask_axes else slice(None)], 0)


def test_members_of_a_population_attend_in_blocks(enable_x64, on_cpu, small_blocks):
    query, key, value, local_mask = operands("longer")

    def gradient(query, key):
        return jax.grad(lambda q: jnp.sin(ours(q, key, value, None, None, local_mask)).sum())(query)

    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(jnp.stack([query, 2 * query]), key)
    for number, member in enumerate(mapped):
        np.testing.assert_allclose(member, gradient((number + 1) * query, key), rtol=1e-10)


def test_large_scores_neither_overflow_nor_vanish(on_cpu, small_blocks):
    query, key, value, _ = operands("causal", np.float32)
    found = dot_product_attention(1e4 * query, key, value, causal=True)
    # The softmax is a choice of one key here.
    scores = np.einsum("bqhs,bkhs->bhqk", query, np.repeat(key, 2, axis=2))
    hidden = np.triu(np.ones((11, 11), bool), 1)
    chosen = np.where(hidden, -np.inf, scores).argmax(-1).swapaxes(1, 2)[..., None]
    expected = np.take_along_axis(np.repeat(value, 2, axis=2), chosen, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def layers(scanned, time=160):
    """The gradient of four layers of attention, in a loop or one after the other."""

    def layer(x, scale):
        return x + dot_product_attention(scale * x, x, x, causal=True)

    def loss(scales, x):
        if scanned:
            x, _ = jax.lax.scan(lambda x, scale: (layer(x, scale), None), x, scales)
        else:
            for scale in scales:
                x = layer(x, scale)
        return jnp.sum(x**2)

    return jax.jit(jax.value_and_grad(loss)), (jnp.ones(4), jnp.ones((2, time, HEADS, SIZE)))


@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "divisible", "per_head"),
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
def test_heads_are_computed_one_by_one_where_the_weights_of_one_are_many(
    queries, keys, dtype, divisible, per_head
):
    query, key = (jnp.zeros((1, time, 1, 1), dtype) for time in (queries, keys))
    divided = tiling.tilings(query, key, LocalMask(), divisible=divisible)
    assert divided.cpu.per_head == per_head
    assert not divided.default.per_head and len(divided.default.tiles) == 1
    assert (divided.partitioned is None) == (not per_head)
    assert divided.partitioned in (None, divided.cpu._replace(per_head=False))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_program_for_cpu_has_nothing_of_the_size_of_all_weights(scanned, on_cpu):
    gradient, arguments = layers(scanned)
    text = gradient.lower(*arguments).compile().as_text()
    assert re.search(r"f32\[[\d,]*80,160\]", text)  # the second tile
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
@pytest.mark.parametrize(("time", "tile"), [(160, "80,160"), (1024, "128,1024")])
def test_a_batch_that_is_split_over_devices_stays_where_it_is(time, tile, kind, on_cpu):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(dot_product_attention(x, x, x, causal=True) ** 2))(x)

    x = jax.ShapeDtypeStruct((8, time, HEADS, SIZE), jnp.float32, sharding=split)
    text = jax.jit(gradient, out_shardings=split).lower(x).compile().as_text()
    assert f"f32[2,4,{tile}]" in text
    assert not re.search(r" (all-gather|all-to-all|collective-permute|all-reduce)\(", text)
