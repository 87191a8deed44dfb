"""Convolution in bfloat16 as one matmul per kernel offset."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_slow
from direct_convolution import direct_convolution
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets import functional
from jaxnets.functional.conv import offset_matmuls
from jaxnets.functional.windows import ConvSpec, output_size


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def assert_rounded_once(found, expected):
    """bfloat16 has 8 digits, so one rounding errs by 2^-8 of an element; sums add a little."""
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - expected)
    slack = 1e-5 * np.max(np.abs(expected))
    assert np.all(error <= 2**-8 * np.abs(expected) + slack), np.max(error)


SPECS = {
    "same": ((6, 7), (3, 3), ConvSpec((1, 1), ((1, 1), (1, 1)), (1, 1), 1)),
    "strides": ((7, 6), (3, 2), ConvSpec((2, 2), ((1, 1), (0, 1)), (1, 1), 1)),
    "dilation": ((8, 8), (3, 3), ConvSpec((1, 1), ((0, 2), (2, 0)), (2, 1), 1)),
    "crop": ((8, 9), (2, 3), ConvSpec((1, 2), ((-1, 0), (1, -2)), (1, 1), 1)),
    "audio": ((11,), (4,), ConvSpec((2,), ((1, 2),), (1,), 1)),
}
WHOLE, CHUNKS = 2**20, 1


@pytest.mark.parametrize(
    ("name", "elements"),
    mostly_slow(
        itertools.product(SPECS, (WHOLE, CHUNKS)),
        [("dilation", WHOLE), ("crop", WHOLE), ("audio", WHOLE), ("strides", CHUNKS)],
    ),
)
def test_outputs_and_gradients_are_rounded_once(name, elements, monkeypatch, on_cpu):
    monkeypatch.setattr(offset_matmuls, "_CACHED", elements)
    sizes, kernel_size, spec = SPECS[name]
    outputs = output_size(sizes, kernel_size, spec)
    x, kernel = normal((6, *sizes, 5), 0), normal((*kernel_size, 5, 4), 1)
    dy = normal((6, *outputs, 4), 2)
    expected = direct_convolution(x, kernel, lambda y: dy, **spec._asdict())

    @jax.jit
    def results(x, kernel, dy):
        y = offset_matmuls.convolve(x, kernel, output_size=outputs, spec=spec)
        return y, offset_matmuls.kernel_gradient(x, dy, kernel_size=kernel_size, spec=spec)

    y, dkernel = results(x, kernel, dy)
    assert_rounded_once(y, expected.y)
    assert_rounded_once(dkernel, expected.dkernel)


# With fewer channels another algorithm is selected.
MANY = 128


def loss(x, kernel):
    y = functional.convolution(x, kernel)
    return jnp.sum(jnp.tanh(y.astype(jnp.float32)))


def slope(x, kernel):
    to_x, to_kernel = jax.grad(loss, (0, 1))(x, kernel)
    return jnp.sum(jnp.sin(to_x.astype(jnp.float32))) + jnp.sum(to_kernel.astype(jnp.float32))


@pytest.mark.parametrize("function", [loss, slope], ids=["first", "second"])
def test_derivatives_are_near_those_of_float32(function):
    x, kernel = normal((2, 4, MANY), 0), normal((3, MANY, MANY), 1) / 32

    @jax.jit
    def gradients(x, kernel):
        wide = (x.astype(jnp.float32), kernel.astype(jnp.float32))
        return [jax.grad(function, (0, 1))(*operands) for operands in ((x, kernel), wide)]

    for found, expected in zip(*gradients(x, kernel), strict=True):
        distance = np.linalg.norm(np.asarray(found, np.float32) - expected)
        assert distance < 0.02 * np.linalg.norm(expected)


def test_members_of_a_population_do_not_mix():
    x, kernels = normal((2, 2, 4, 4, MANY), 0), normal((2, 2, 1, MANY, MANY), 1)
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    population = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, kernels)
    for member in range(2):
        for found, expected in zip(population, gradient(x[member], kernels[member]), strict=True):
            found, expected = (np.asarray(each, np.float32) for each in (found[member], expected))
            assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.lowering
@pytest.mark.four_devices
def test_a_sharded_batch_stays_on_its_devices(on_cpu):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    operand = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, kernel = operand((8, 6, 6, MANY)), operand((3, 3, MANY, MANY))
    gradient = jax.jit(jax.grad(loss, 1), in_shardings=(split, whole), out_shardings=whole)
    text = gradient.lower(x, kernel).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
