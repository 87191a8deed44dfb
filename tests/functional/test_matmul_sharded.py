"""Products with a kernel: leading axes, and what is split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets.functional import matmul as module
from jaxnets.functional.matmul import linear
from jaxnets.training.executors import data_mesh

THREE = "BF16_BF16_F32_X3"
#: dtype, precision asked for, features: every way to compute a product.
WAYS = {
    "plain": (jnp.float32, None, 512),
    "turned": (jnp.float32, None, 4),
    "narrow": (jnp.bfloat16, None, 16),
    "split": (jnp.float32, THREE, 16),
    "half": (jnp.float16, None, 16),
}


def operands(name, shape=(4, 6, 32)):
    dtype, _, features = WAYS[name]
    random = np.random.default_rng(0)
    shapes = (shape, (shape[-1], features), (*shape[:-1], features))
    return [jnp.asarray(random.normal(size=each), dtype) for each in shapes]


def gradients(x, kernel, weights):
    return jax.grad(lambda x, kernel: jnp.sum(linear(x, kernel) * weights), (0, 1))(x, kernel)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (4, 6, 32), (2, 3, 2, 32), (0, 3, 32)])
@pytest.mark.parametrize("name", WAYS)
def test_leading_axes_are_rows(name, shape):
    x, kernel, weights = operands(name, shape)
    with jax.default_matmul_precision(WAYS[name][1]):
        value, (to_x, to_kernel) = linear(x, kernel), jax.jit(gradients)(x, kernel, weights)
    wide = [np.asarray(each, np.float64) for each in (x, kernel, weights)]
    rows, upstream = (each.reshape(-1, each.shape[-1]) for each in (wide[0], wide[2]))
    expected = (wide[0] @ wide[1], wide[2] @ wide[1].T, rows.T @ upstream)
    for found, exact in zip((value, to_x, to_kernel), expected, strict=True):
        assert found.dtype == x.dtype and found.shape == exact.shape
        digits = 1e-5 if x.dtype == jnp.float32 else 2**-6
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact, rtol=digits, atol=digits * 32
        )


@pytest.mark.parametrize("name", WAYS)
def test_only_the_cpu_makes_rows_of_them(name):
    with jax.default_matmul_precision(WAYS[name][1]):
        trace = jax.jit(gradients).trace(*operands(name))
        texts = {p: trace.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert "stablehlo.reshape" in texts["cpu"]
    assert "stablehlo.reshape" not in texts["tpu"]
    assert "contracting_dims = [0, 1] x [0, 1]" in texts["tpu"]


@pytest.mark.four_devices
@pytest.mark.parametrize("name", WAYS)
def test_elsewhere_a_batch_behind_the_steps_stays_where_it_is(name, on_cpu, monkeypatch):
    monkeypatch.setattr(
        module, "platform_dependent", lambda *arrays, cpu, default: default(*arrays)
    )
    mesh = data_mesh(jax.devices("cpu")[:4])
    steps, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "data"), ()))
    x, kernel, weights = operands(name, (6, 8, 32))
    shardings = {"in_shardings": (steps, everywhere, steps), "out_shardings": (steps, everywhere)}
    jax.clear_caches()
    with jax.default_matmul_precision(WAYS[name][1]):
        program = jax.jit(gradients, **shardings).lower(x, kernel, weights).compile().as_text()
    jax.clear_caches()
    assert "all-reduce" in program
    assert not any(each in program for each in ("all-gather", "all-to-all", "collective-permute"))
