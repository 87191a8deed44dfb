"""Convolutions of bfloat16 numbers as a product for each tap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxnets import functional
from jaxnets.functional.conv import offset_matmuls
from jaxnets.functional.windows import ConvSpec


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def exact(x, kernel, spec):
    """The plain operation on the same numbers, in float64's place: float32 at full precision."""
    axes = "HW"[: x.ndim - 2]
    return jax.lax.conv_general_dilated(
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
        window_strides=spec.strides,
        padding=spec.padding,
        rhs_dilation=spec.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        precision="highest",
    )


def assert_rounded_once(found, expected):
    """bfloat16 has 8 digits, so one rounding errs by 2^-8 of a number; sums add a little."""
    assert found.dtype == jnp.bfloat16
    error = jnp.abs(found.astype(jnp.float32) - expected)
    slack = 1e-5 * float(jnp.max(jnp.abs(expected)))
    assert bool(jnp.all(error <= 2**-8 * jnp.abs(expected) + slack)), float(jnp.max(error))


GEOMETRIES = {
    "same": ((6, 7), (3, 3), ConvSpec((1, 1), ((1, 1), (1, 1)), (1, 1), 1)),
    "strides": ((7, 6), (3, 2), ConvSpec((2, 2), ((1, 1), (0, 1)), (1, 1), 1)),
    "dilation": ((8, 8), (3, 3), ConvSpec((1, 1), ((0, 2), (2, 0)), (2, 1), 1)),
    "cut": ((8, 9), (2, 3), ConvSpec((1, 2), ((-1, 0), (1, -2)), (1, 1), 1)),
    "audio": ((11,), (4,), ConvSpec((2,), ((1, 2),), (1,), 1)),
}


@pytest.mark.parametrize("cached", [2**20, 1])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_and_gradients_are_the_plain_ones_rounded_once(name, cached, monkeypatch, on_cpu):
    monkeypatch.setattr(offset_matmuls, "_CACHED", cached)
    inputs, taps, spec = GEOMETRIES[name]
    x, kernel = normal((6, *inputs, 5), 0), normal((*taps, 5, 4), 1)
    expected, pull = jax.vjp(lambda k: exact(x, k, spec), kernel.astype(jnp.float32))
    sizes = expected.shape[1:-1]
    found = jax.jit(lambda x, kernel: offset_matmuls.convolve(x, kernel, sizes=sizes, spec=spec))(
        x, kernel
    )
    assert_rounded_once(found, expected)
    dy = normal(expected.shape, 2)
    found = jax.jit(lambda x, dy: offset_matmuls.kernel_gradient(x, dy, size=taps, spec=spec))(
        x, dy
    )
    assert_rounded_once(found, pull(dy.astype(jnp.float32))[0])


MANY = 128


@pytest.mark.parametrize(
    ("channels", "forward", "backward"), [(MANY, True, True), (32, False, True), (8, False, False)]
)
def test_it_is_taken_for_many_channels_and_on_cpu_only(channels, forward, backward):
    x, kernel = normal((2, 12, 12, channels), 0), normal((3, 3, channels, channels), 1)
    value = jax.jit(functional.convolution).trace(x, kernel)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(functional.convolution(x, k) ** 2))).trace(kernel)

    def products(traced, platform="cpu"):
        return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.dot_general")

    assert (products(value) == 9) == forward
    assert (products(gradient) >= 9) == backward
    assert products(value, "tpu") == products(gradient, "tpu") == 0


def loss(x, kernel):
    y = functional.convolution(x, kernel)
    return jnp.sum(jnp.tanh(y.astype(jnp.float32)))


def test_first_and_second_derivatives_are_near_those_of_float32():
    x, kernel = normal((2, 4, 4, MANY), 0), normal((3, 3, MANY, MANY), 1) / 32

    def slope(x, kernel):
        to_x, to_kernel = jax.grad(loss, (0, 1))(x, kernel)
        return jnp.sum(jnp.sin(to_x.astype(jnp.float32))) + jnp.sum(to_kernel.astype(jnp.float32))

    for function in (loss, slope):
        gradient = jax.jit(jax.grad(function, (0, 1)))
        wide = gradient(x.astype(jnp.float32), kernel.astype(jnp.float32))
        for found, expected in zip(gradient(x, kernel), wide, strict=True):
            distance = jnp.linalg.norm(found.astype(jnp.float32) - expected)
            assert float(distance) < 0.02 * float(jnp.linalg.norm(expected))


def test_members_of_a_population_do_not_mix():
    x, kernels = normal((2, 2, 4, 4, MANY), 0), normal((2, 1, 1, MANY, MANY), 1)
    kernels = jnp.concatenate([kernels] * 2, 1)  # two taps
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    together = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, kernels)
    for member in range(2):
        for found, expected in zip(together, gradient(x[member], kernels[member]), strict=True):
            distance = jnp.linalg.norm((found[member] - expected).astype(jnp.float32))
            assert float(distance) < 0.01 * float(jnp.linalg.norm(expected.astype(jnp.float32)))


@pytest.mark.four_devices
def test_a_batch_split_over_devices_stays_there(on_cpu):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    x, kernel = normal((8, 6, 6, MANY), 0), normal((3, 3, MANY, MANY), 1)
    gradient = jax.jit(jax.grad(loss, 1), in_shardings=(split, whole), out_shardings=whole)
    text = gradient.lower(x, kernel).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
