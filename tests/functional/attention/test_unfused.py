"""Tiled attention against the reference, and what its compiled programs contain."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_exhaustive, normal

from jaxnets.functional.attention import tiling
from jaxnets.functional.attention.dot_product import (
    _jitted_attention,
    dot_product_attention,
    reference_attention,
)
from jaxnets.functional.attention.masks import LocalMask

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 3, 5
# Queries, keys and local mask: with tiles of unequal length, and many keys for few queries.
SHAPES = {
    "one tile": (3, 5, LocalMask()),
    "causal": (11, 11, LocalMask(causal=True)),
    "longer": (33, 33, LocalMask(causal=True)),
    "wide": (13, 40, LocalMask()),
    "window": (33, 33, LocalMask(window=5)),
    "causal window": (33, 33, LocalMask(causal=True, window=5)),
}
# Of each tile the start and stop of its queries, and of its keys.
TILES = {
    "one tile": [(0, 3, 0, 5)],
    "causal": [(0, 5, 0, 5), (5, 11, 0, 11)],
    "longer": [(0, 11, 0, 11), (11, 22, 0, 22), (22, 33, 0, 33)],
    "wide": [(0, 6, 0, 40), (6, 13, 0, 40)],
    "window": [(0, 11, 0, 15), (11, 22, 7, 26), (22, 33, 18, 33)],
    "causal window": [(0, 11, 0, 11), (11, 22, 7, 22), (22, 33, 18, 33)],
}


@pytest.fixture(params=["weights saved", "per head"])
def small_tiles(request, monkeypatch):
    """Divide short sequences into tiles, and save or recompute their weights."""
    many = 1 if request.param == "per head" else 10**9
    sizes = {"TILE_QUERIES": 4, "LARGE_TILE_QUERIES": 6, "LONG_SEQUENCE": 30, "MAX_TILES": 3}
    for name, size in {**sizes, "MANY_KEYS": 40, "RECOMPUTED_WEIGHTS": many}.items():
        monkeypatch.setattr(tiling, f"_{name}", size)
    _jitted_attention.clear_cache()
    yield request.param
    _jitted_attention.clear_cache()


def operands(name, dtype=np.float64):
    queries, keys, local_mask = SHAPES[name]
    query = normal((2, queries, HEADS, HEAD_DIM), 0, dtype)
    key, value = (normal((2, keys, KV_HEADS, dim), dim, dtype) for dim in (HEAD_DIM, VALUE_DIM))
    return query, key, value, local_mask


def draw_bias_and_mask(name, bias_axes, mask_axes):
    """Draw both with the given axes of "bhqk", and 1 elsewhere; one query has no visible key.

    Returns:
        bias, mask and which outputs of the first example have no visible key.
    """
    queries, keys, _ = SHAPES[name]
    lengths = {"b": 2, "h": HEADS, "q": queries, "k": keys}

    def drawn(axes, seed):
        return normal(tuple(size if a in axes else 1 for a, size in lengths.items()), seed)

    bias = None if bias_axes is None else drawn(bias_axes, 7)
    if mask_axes is None:
        return bias, None, slice(0)
    masked = 7 % queries if "q" in mask_axes else slice(None)
    return bias, (drawn(mask_axes, 8) > 0.3).at[0, :, masked].set(False), masked


def whole_mask(name, mask):
    """The mask with all its axes and the local mask in it."""
    queries, keys, local_mask = SHAPES[name]
    distance = np.subtract.outer(np.arange(queries), np.arange(keys))
    visible = np.full((2, HEADS, queries, keys), True if mask is None else mask)
    visible &= (distance >= 0) | (not local_mask.causal)
    return visible & (abs(distance) < (local_mask.window or np.inf))


def tiled(local_mask, softcap=None):
    def attention(query, key, value, bias, mask):
        options = {**local_mask._asdict(), "softcap": softcap}
        return dot_product_attention(query, key, value, bias=bias, mask=mask, **options)

    return attention


def reference(query, key, value, bias, mask, softcap=None):
    return reference_attention(query, key, value, bias=bias, mask=mask, softcap=softcap)


def gradients_of(attention):
    def loss(query, key, value, bias, mask):
        return jnp.sum(jnp.cos(attention(query, key, value, bias, mask)) + 0.5)

    return jax.grad(loss, (0, 1, 2, 3))


def value_and_gradients(attention):
    return jax.jit(lambda *arrays: (attention(*arrays), gradients_of(attention)(*arrays)))


def second_derivatives(attention):
    """The gradients of a nonlinear function of the gradients."""

    def curvature(*arrays):
        leaves = jax.tree.leaves(gradients_of(attention)(*arrays))
        return sum(jnp.sum(jnp.sin(each)) for each in leaves)

    return jax.jit(jax.grad(curvature, (0, 1, 2, 3)))


def assert_close(found, expected):
    """Compare the arrays of two trees, in which a bias of None has no gradient."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for own, plain in pairs:
        assert own.shape == plain.shape
        np.testing.assert_allclose(own, plain, rtol=1e-9, atol=1e-11)


# Compiled once for each number of queries and keys: its masks and biases have all axes.
reference_value_and_gradients = value_and_gradients(reference)

CASES = [
    # (small_tiles, name, bias_axes, mask_axes)
    ("weights saved", "one tile", "bk", "bqk"),
    ("weights saved", "causal", None, "q"),
    ("weights saved", "causal", "hqk", "bqk"),
    ("weights saved", "longer", "bk", None),
    ("weights saved", "longer", "q", "hqk"),
    ("weights saved", "wide", "", "bqk"),
    ("weights saved", "wide", "hqk", None),
    ("weights saved", "window", "hqk", None),
    ("weights saved", "causal window", "bk", "bqk"),
    ("per head", "one tile", None, "q"),
    ("per head", "causal", None, "q"),
    ("per head", "longer", None, "hqk"),
    ("per head", "wide", None, "bk"),
    ("per head", "window", None, "bhqk"),
    ("per head", "causal window", None, None),
]


def cases(default):
    """Parametrize with all cases, of which only the default ones run every time."""
    return pytest.mark.parametrize(
        ("small_tiles", "name", "bias_axes", "mask_axes"),
        mostly_exhaustive(CASES, default),
        indirect=["small_tiles"],
    )


@cases(
    [
        ("weights saved", "one tile", "bk", "bqk"),
        ("weights saved", "causal", "hqk", "bqk"),
        ("weights saved", "longer", "q", "hqk"),
        ("weights saved", "causal window", "bk", "bqk"),
        ("per head", "causal", None, "q"),
        ("per head", "wide", None, "bk"),
        ("per head", "window", None, "bhqk"),
    ]
)
def test_tiles_give_the_value_and_the_gradients_of_the_reference(
    name, bias_axes, mask_axes, enable_x64, on_cpu, small_tiles
):
    query, key, value, local_mask = operands(name)
    bias, mask, masked = draw_bias_and_mask(name, bias_axes, mask_axes)
    choice = tiling.tilings(query, key, local_mask, allow_per_head=bias is None)
    assert [tuple(tile) for tile in choice.cpu.tiles] == TILES[name]
    assert choice.cpu.per_head == (small_tiles == "per head")

    found = value_and_gradients(tiled(local_mask))(query, key, value, bias, mask)
    np.testing.assert_array_equal(found[0][0, masked], 0)
    visible = whole_mask(name, mask)
    whole_bias = np.broadcast_to(0.0 if bias is None else bias, visible.shape)
    expected, (*slopes, whole_slope) = reference_value_and_gradients(
        query, key, value, whole_bias, visible
    )
    if bias is not None:
        broadcast = tuple(np.flatnonzero(np.equal(bias.shape, 1)))
        slopes.append(np.sum(whole_slope, axis=broadcast, keepdims=True))
    assert_close(found, (expected, slopes))


@cases([("weights saved", "one tile", "bk", "bqk"), ("per head", "one tile", None, "q")])
def test_tiles_give_the_second_derivatives_of_the_reference(
    name, bias_axes, mask_axes, enable_x64, on_cpu, small_tiles
):
    query, key, value, local_mask = operands(name)
    bias, mask, _ = draw_bias_and_mask(name, bias_axes, mask_axes)
    found = second_derivatives(tiled(local_mask))(query, key, value, bias, mask)
    visible = whole_mask(name, mask)
    assert_close(found, second_derivatives(reference)(query, key, value, bias, visible))


@cases([("weights saved", "causal", "hqk", "bqk"), ("per head", "causal", None, "q")])
def test_bounded_scores_give_the_gradients_of_the_reference(
    name, bias_axes, mask_axes, enable_x64, on_cpu, small_tiles
):
    query, key, value, local_mask = operands(name)
    bias, mask, _ = draw_bias_and_mask(name, bias_axes, mask_axes)
    found = value_and_gradients(tiled(local_mask, 0.4))(query, key, value, bias, mask)
    visible = whole_mask(name, mask)
    whole_bias = np.broadcast_to(0.0 if bias is None else bias, visible.shape)
    bounded = value_and_gradients(functools.partial(reference, softcap=0.4))
    expected, (*slopes, whole_slope) = bounded(query, key, value, whole_bias, visible)
    if bias is not None:
        broadcast = tuple(np.flatnonzero(np.equal(bias.shape, 1)))
        slopes.append(np.sum(whole_slope, axis=broadcast, keepdims=True))
    assert_close(found, (expected, slopes))


def test_members_of_a_population_attend_in_tiles(enable_x64, on_cpu, small_tiles):
    query, key, value, local_mask = operands("longer")

    @jax.jit
    def gradient(query, key):
        attention = tiled(local_mask)
        return jax.grad(lambda q: jnp.sum(jnp.sin(attention(q, key, value, None, None))))(query)

    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(jnp.stack([query, 2 * query]), key)
    for index, member in enumerate(mapped):
        np.testing.assert_allclose(member, gradient((index + 1) * query, key), rtol=1e-10)


def test_large_scores_neither_overflow_nor_vanish(on_cpu, small_tiles):
    query, key, value = map(np.asarray, operands("causal", np.float32)[:3])
    found = dot_product_attention(1e4 * query, key, value, causal=True)
    # The softmax selects a single key here.
    key, value = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key)
    hidden = np.triu(np.ones((11, 11), bool), 1)
    selected = np.where(hidden, -np.inf, scores).argmax(-1)  # [batch, heads, queries]
    selected = selected.swapaxes(1, 2)[..., None]  # [batch, queries, heads, 1]
    np.testing.assert_allclose(found, np.take_along_axis(value, selected, axis=1), rtol=1e-6)


def layers(*, scanned, time=160):
    """The gradient of two layers of attention, in a loop or one after the other."""

    def layer(x, scale):
        return x + dot_product_attention(scale * x, x, x, causal=True)

    def loss(scales, x):
        if scanned:
            x, _ = jax.lax.scan(lambda x, scale: (layer(x, scale), None), x, scales)
        else:
            for scale in scales:
                x = layer(x, scale)
        return jnp.sum(x**2)

    arguments = jnp.ones(2), jnp.ones((2, time, HEADS, HEAD_DIM))
    return jax.jit(jax.value_and_grad(loss)), arguments


@pytest.mark.parametrize(
    ("queries", "keys", "dtype", "allow_per_head", "per_head"),
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
def test_heads_are_computed_one_at_a_time_if_the_weights_of_one_are_many(
    queries, keys, dtype, allow_per_head, per_head
):
    query, key = (jax.ShapeDtypeStruct((1, time, 1, 1), dtype) for time in (queries, keys))
    choices = []
    jax.eval_shape(
        lambda *x: choices.append(tiling.tilings(*x, LocalMask(), allow_per_head=allow_per_head)),
        *(query, key),
    )
    (choice,) = choices
    assert choice.cpu.per_head == per_head
    assert not choice.default.per_head and len(choice.default.tiles) == 1
    assert (choice.partitioned is None) == (not per_head)
    assert choice.partitioned in (None, choice.cpu._replace(per_head=False))


@pytest.mark.lowering
@pytest.mark.parametrize("scanned", [False, True])
def test_a_program_for_cpu_does_not_materialize_the_whole_weights(scanned, on_cpu):
    gradient, arguments = layers(scanned=scanned)
    text = gradient.lower(*arguments).compile().as_text()
    assert re.search(r"f32\[[\d,]*80,160\]", text)  # the second tile
    assert not re.search(r"f32\[[\d,]*160,160\]", text)


@pytest.mark.lowering
@pytest.mark.parametrize("scanned", [False, True])
def test_long_contexts_materialize_the_weights_of_one_head_at_a_time(scanned, on_cpu):
    gradient, arguments = layers(scanned=scanned, time=1024)
    program = gradient.lower(*arguments).compile()
    shapes = set(re.findall(r"f32\[([\d,]*)\d{3},1024\]", program.as_text()))
    assert shapes and all(set(shape.split(",")) <= {"1", ""} for shape in shapes)
    weights_of_one_layer = 2 * HEADS * 1024**2 * 4  # bytes
    assert program.memory_analysis().temp_size_in_bytes < weights_of_one_layer / 2


@pytest.mark.lowering
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
    assert set(products["cuda"]) == {"160x160", f"160x{HEAD_DIM}"}


@pytest.mark.lowering
@pytest.mark.four_devices
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(("time", "tile"), [(160, "80,160"), (1024, "128,1024")])
def test_a_batch_that_is_split_over_devices_is_not_gathered(time, tile, kind, on_cpu):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(dot_product_attention(x, x, x, causal=True) ** 2))(x)

    x = jax.ShapeDtypeStruct((8, time, HEADS, HEAD_DIM), jnp.float32, sharding=split)
    text = jax.jit(gradient, out_shardings=split).lower(x).compile().as_text()
    assert f"f32[2,4,{tile}]" in text
    assert not re.search(r" (all-gather|all-to-all|collective-permute|all-reduce)\(", text)
