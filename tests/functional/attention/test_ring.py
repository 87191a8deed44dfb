"""Ring attention on four devices against the definition on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxnets as jn
from jaxnets.functional.attention import ring
from jaxnets.functional.attention.dot_product import dot_product_attention, reference_attention
from jaxnets.functional.attention.masks import LocalMask
from jaxnets.functional.lengths import padding_mask

pytestmark = pytest.mark.four_devices

BATCH, TIME, HEADS, HEAD_DIM, VALUE_DIM = 2, 16, 4, 6, 5
MESHES = {
    "sequence": {"sequence": 4},
    "data": {"data": 2, "sequence": 2},
    "fsdp": {"fsdp": 2, "sequence": 2},
    "tensor": {"sequence": 2, "tensor": 2},
}


def mesh_of(name, kind=AxisType.Auto):
    sizes = MESHES[name]
    devices = jax.devices()[:4]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (kind,) * len(sizes), devices=devices)


def operands(kv_heads=HEADS, batch=(BATCH,), time=TIME):
    """Query, key, value and the cotangent of the output."""
    random = np.random.default_rng(kv_heads)
    kinds = ((HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, VALUE_DIM), (HEADS, VALUE_DIM))
    return [random.normal(size=(*batch, time, *kind)) for kind in kinds]


def key_padding(lengths):
    return jnp.asarray(padding_mask(np.array(lengths), (len(lengths), TIME)))[:, None, None]


def value_and_gradients(attention, **options):
    def run(query, key, value, cotangent):
        output, pull = jax.vjp(lambda *x: attention(*x, **options), query, key, value)
        return output, *pull(cotangent)

    return run


def assert_close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


# name -> (mesh, number of key-value heads, options)
CASES = {
    "plain": ("sequence", 4, {}),
    "causal": ("sequence", 4, {"causal": True}),
    "window": ("sequence", 4, {"window": 3}),  # the chunks of 4 keys next to the own one
    "causal window of two chunks": ("sequence", 4, {"causal": True, "window": 6}),
    "causal window of the own position": ("sequence", 4, {"causal": True, "window": 1}),
    "lengths": ("data", 4, {"mask": [16, 0]}),
    "lengths that end in a chunk": ("fsdp", 2, {"mask": [5, 11], "causal": True}),
    "softcap, shared heads": ("tensor", 2, {"softcap": 0.7, "causal": True, "scale": 0.9}),
    "one shared head, which the devices do not divide": ("tensor", 1, {"mask": [0, 9]}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_device(name, enable_x64):
    mesh, kv_heads, options = CASES[name]
    options = {k: key_padding(x) if k == "mask" else x for k, x in options.items()}
    arrays = operands(kv_heads)
    expected = jax.jit(value_and_gradients(reference_attention, **options))(*arrays)
    with jax.set_mesh(mesh_of(mesh)):
        lowered = jax.jit(value_and_gradients(dot_product_attention, **options)).lower(*arrays)
        found = lowered.compile()(*arrays)
    assert "collective_permute" in lowered.as_text()
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if "mask" in options and not options["mask"].any(-1).all():
        empty = int(np.flatnonzero(~options["mask"].any((1, 2, 3)))[0])
        assert all((np.asarray(x[empty]) == 0).all() for x in found)


@pytest.mark.parametrize(
    "options", [{"causal": True, "window": 6, "softcap": 0.7}, {"mask": [3, 0], "window": 5}]
)
def test_chunks_are_folded_in_blocks(options, enable_x64, monkeypatch, forget_traces):
    monkeypatch.setattr(ring, "_BLOCK_KEYS", 2)
    forget_traces()
    options = {k: key_padding(x) if k == "mask" else x for k, x in options.items()}
    expected = jax.jit(value_and_gradients(reference_attention, **options))(*operands(2))
    with jax.set_mesh(mesh_of("sequence")):
        found = jax.jit(value_and_gradients(dot_product_attention, **options))(*operands(2))
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_and_vmap_are_those_of_one_device(enable_x64):
    query, key, value, _ = operands(2, batch=(2, BATCH))
    mask = key_padding([0, 13])

    def run(attention):
        def slope(*arrays):
            def loss(*arrays):
                return jnp.sum(jnp.sin(attention(*arrays, mask=mask, causal=True)))

            return sum(jnp.sum(jnp.cos(x)) for x in jax.grad(loss, (0, 1, 2))(*arrays))

        return jax.jit(jax.vmap(jax.grad(slope, (0, 1, 2))))

    expected = run(reference_attention)(query, key, value)
    with jax.set_mesh(mesh_of("data")):
        found = run(dot_product_attention)(query, key, value)
    assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_softmax_of_16_bits_is_computed_in_32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in operands()]
    exact = value_and_gradients(reference_attention)(*(x.astype(jnp.float32) for x in arrays))
    with jax.set_mesh(mesh_of("sequence")):
        found = jax.jit(value_and_gradients(dot_product_attention))(*arrays)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    assert_close([x.astype(jnp.float32) for x in found], exact, rtol=2e-2, atol=2e-2)


def test_other_calls_are_partitioned_by_xla():
    mask = np.random.default_rng(0).random((TIME, TIME)) < 0.5
    bias = np.random.default_rng(1).normal(size=(TIME, TIME)).astype(np.float32)
    query, key, value, _ = (np.float32(x) for x in operands())
    longer = [np.float32(x) for x in operands(time=TIME + 2)]

    def several(attention, manual):
        yield attention(query, key, value, mask=mask)
        yield attention(query, key, value, bias=bias)
        yield attention(query[:, -1:], key, value)  # as in cached decoding
        yield attention(*longer[:3], causal=True)  # 4 devices do not divide it
        yield manual(attention)(query, key, value)

    mesh, heads = mesh_of("sequence"), PartitionSpec(None, None, "sequence")
    split = {"in_specs": (heads,) * 3, "out_specs": heads}
    expected = list(several(reference_attention, lambda f: f))
    with jax.set_mesh(mesh):
        program = jax.jit(
            lambda: list(several(dot_product_attention, lambda f: jax.shard_map(f, **split)))
        ).lower()
        found = program.compile()()
    assert "collective_permute" not in program.as_text()
    assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_batch_and_heads_are_split_where_they_divide():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 4}
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))

    def specs(batch, kv_heads, mask):
        shapes = ((batch, TIME, HEADS, 1), (batch, TIME, kv_heads, 1), mask)
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return tuple(ring._Ring(1.0, LocalMask(), None, mesh).specs(*arrays))

    rows = ("fsdp", "data")
    assert specs(4, 2, (4, HEADS, 1, TIME)) == (
        PartitionSpec(rows, "sequence", "tensor"),
        PartitionSpec(rows, "tensor", "sequence"),
        PartitionSpec(rows, "tensor", None, "sequence"),
    )
    assert specs(6, 1, (6, 1, 1, 1)) == (
        PartitionSpec(("fsdp",), "sequence", None),
        PartitionSpec(("fsdp",), None, "sequence"),
        PartitionSpec(("fsdp",), None, None, None),
    )


@pytest.mark.lowering
def test_a_trace_belongs_to_its_mesh():
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands()[:3]]
    attention = jax.jit(dot_product_attention)
    pairs = {None: [], "sequence": ["0, 1", "3, 0"], "data": ["0, 1", "3, 2"]}
    for name in (None, "sequence", "data", None, "sequence"):
        if name is None:
            text = attention.lower(*shapes).as_text()
        else:
            with jax.set_mesh(mesh_of(name)):
                text = attention.lower(*shapes).as_text()
        assert ("collective_permute" in text) == (name is not None)
        assert all(f"[{pair}]" in text for pair in pairs[name])
    with jax.set_mesh(mesh_of("sequence", AxisType.Explicit)):
        assert "collective_permute" not in attention.lower(*shapes).as_text()


@pytest.mark.lowering
def test_no_device_holds_the_whole_sequence():
    time = 4096
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in operands(2, time=time)]
    mesh = mesh_of("sequence")
    split = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    with jax.set_mesh(mesh):
        run = value_and_gradients(dot_product_attention, causal=True)
        program = jax.jit(run, in_shardings=split, out_shardings=split).lower(*shapes).compile()
    text = program.as_text()
    assert re.search(rf"f32\[2,4,{time // 4},512\]", text)
    assert not re.search(rf"\[(\d+,)*({time}(,\d+)*|{time // 4},{time // 4})\]", text)
    assert "all-gather" not in text and "all-to-all" not in text


def test_a_language_model_learns_as_on_one_device():
    config = jn.BlockConfig(num_heads=4, num_kv_heads=2, mlp_dim=8, head_dim=4, features=8)
    module = jn.TransformerLM(11, 1, config, max_length=TIME)
    tokens = np.random.default_rng(0).integers(11, size=(4, TIME))
    variables = jax.jit(module.init)(jax.random.key(0), tokens)

    def step(variables, tokens):
        def loss(variables):
            logits = module.apply(variables, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        value, gradients = jax.value_and_grad(loss)(variables)
        return value, jax.tree.map(lambda x, d: x - 0.1 * d, variables, gradients)

    expected = jax.jit(step)(variables, tokens)
    mesh = mesh_of("data")
    everywhere, split = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data", "sequence"))
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, in_shardings=(everywhere, split)).lower(variables, tokens)
        found = lowered.compile()(*map(jax.device_put, (variables, tokens), (everywhere, split)))
    assert "collective_permute" in lowered.as_text()
    assert_close(*map(jax.tree.leaves, (found, expected)), rtol=1e-5, atol=1e-6)
