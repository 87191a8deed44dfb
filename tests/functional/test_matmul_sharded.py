"""Matmuls with leading axes, and arrays that are sharded over devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_slow
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets.functional import matmul as module
from jaxnets.functional.matmul import linear, transposed_linear
from jaxnets.training.executors import data_mesh

BF16_X3 = "BF16_BF16_F32_X3"
#: dtype, default precision, features: one of each implementation.
IMPLEMENTATIONS = {
    "plain": (jnp.float32, None, 512),
    "few features": (jnp.float32, None, 4),
    "bfloat16": (jnp.bfloat16, None, 16),
    "bf16x3": (jnp.float32, BF16_X3, 16),
    "float16": (jnp.float16, None, 16),
}


def operands(name, shape=(4, 6, 32)):
    dtype, _, features = IMPLEMENTATIONS[name]
    random = np.random.default_rng(0)
    shapes = (shape, (shape[-1], features), (*shape[:-1], features))
    return [jnp.asarray(random.normal(size=each), dtype) for each in shapes]


def gradients(x, kernel, dy):
    return jax.grad(lambda x, kernel: jnp.sum(linear(x, kernel) * dy), (0, 1))(x, kernel)


@pytest.mark.parametrize(
    ("name", "shape"),
    mostly_slow(
        itertools.product(IMPLEMENTATIONS, [(32,), (5, 32), (4, 6, 32), (2, 3, 2, 32), (0, 3, 32)]),
        [(name, (4, 6, 32)) for name in IMPLEMENTATIONS]
        + [("plain", (0, 3, 32)), ("few features", (2, 3, 2, 32)), ("bf16x3", (32,))],
    ),
)
def test_leading_axes_are_rows(name, shape):
    x, kernel, dy = operands(name, shape)
    with jax.default_matmul_precision(IMPLEMENTATIONS[name][1]):
        results = jax.jit(lambda *arrays: (linear(*arrays[:2]), *gradients(*arrays)))(x, kernel, dy)
    wide = [np.asarray(each, np.float64) for each in (x, kernel, dy)]
    rows, cotangents = (each.reshape(-1, each.shape[-1]) for each in (wide[0], wide[2]))
    expected = (wide[0] @ wide[1], wide[2] @ wide[1].T, rows.T @ cotangents)
    for found, exact in zip(results, expected, strict=True):
        assert found.dtype == x.dtype and found.shape == exact.shape
        digits = 1e-5 if x.dtype == jnp.float32 else 2**-6
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact, rtol=digits, atol=digits * 32
        )


@pytest.mark.lowering
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_leading_axes_are_flattened_on_cpu_only(name):
    with jax.default_matmul_precision(IMPLEMENTATIONS[name][1]):
        trace = jax.jit(gradients).trace(*operands(name))
        texts = {p: trace.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert "stablehlo.reshape" in texts["cpu"]
    assert "stablehlo.reshape" not in texts["tpu"]
    assert "contracting_dims = [0, 1] x [0, 1]" in texts["tpu"]


@pytest.mark.lowering
@pytest.mark.four_devices
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_array_sharded_along_its_second_axis_stays_on_its_devices_elsewhere(
    name, on_cpu, monkeypatch
):
    monkeypatch.setattr(
        module, "platform_dependent", lambda *arrays, cpu, default, **others: default(*arrays)
    )
    mesh = data_mesh(jax.devices("cpu")[:4])
    steps, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "data"), ()))
    x, kernel, dy = operands(name, (6, 8, 32))  # of this test only: traces are cached by shape
    shardings = {"in_shardings": (steps, everywhere, steps), "out_shardings": (steps, everywhere)}
    with jax.default_matmul_precision(IMPLEMENTATIONS[name][1]):
        program = jax.jit(gradients, **shardings).lower(x, kernel, dy).compile().as_text()
    assert "all-reduce" in program
    assert not any(each in program for each in ("all-gather", "all-to-all", "collective-permute"))


#: 29 rows on each of four devices, and 29 slices of 4 rows.
TABLE = (116, 16)


@pytest.mark.four_devices
@pytest.mark.parametrize("axes", [("data", None), (None, "data"), ()], ids=str)
def test_a_table_that_is_sharded_stays_on_its_devices(axes):
    mesh = data_mesh(jax.devices("cpu")[:4])
    random = np.random.default_rng(0)
    shapes = ((3, 16), TABLE, (3, TABLE[0]))
    x, table, dy = (random.standard_normal(shape, np.float32) for shape in shapes)

    def results(x, table, dy):
        y, pull = jax.vjp(transposed_linear, x, table)
        return y, *pull(dy)

    everywhere, own = (NamedSharding(mesh, PartitionSpec(*one)) for one in ((), axes))
    outputs = NamedSharding(mesh, PartitionSpec(None, axes[0] if axes else None))
    shardings = {"in_shardings": (everywhere, own, outputs), "out_shardings": (outputs, None, own)}
    program = jax.jit(results, **shardings).lower(x, table, dy).compile()
    expected = (x @ table.T, dy @ table, dy.T @ x)
    found = program(*map(jax.device_put, (x, table, dy), (everywhere, own, outputs)))
    for one, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, exact, rtol=1e-4, atol=1e-4)
    moved = ("all-gather", "all-to-all", "collective-permute")
    assert not any(each in program.as_text() for each in moved)


@pytest.mark.four_devices
def test_a_table_that_is_sharded_by_its_type_is_multiplied_where_it_is():
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4,), ("data",), (explicit,), devices=jax.devices("cpu")[:4])
    x = np.ones((3, 16), np.float32)
    table = np.arange(TABLE[0] * TABLE[1], dtype=np.float32).reshape(TABLE)
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, NamedSharding(mesh, PartitionSpec("data", None)))
        y = jax.jit(transposed_linear)(jnp.asarray(x), placed)
    assert y.sharding.spec == PartitionSpec(None, "data")
    np.testing.assert_allclose(y, x @ table.T)
