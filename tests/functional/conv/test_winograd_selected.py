"""Convolutions for which Winograd's filtering is selected, however small, under transformations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_slow, normal
from jax import lax

from jaxnets import functional
from jaxnets.core import DATA_AXIS
from jaxnets.functional.conv import selection, winograd
from jaxnets.functional.lowering import layout
from jaxnets.training.executors import data_mesh


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def winograd_everywhere():
    """Select it for every kernel of 3 of stride 1. Traces are forgotten once before and after."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_WINOGRAD_GAIN", 0.01)
        patch.setattr(selection, "_WINOGRAD_KERNEL_GRADIENT_GAIN", 0.01)
        patch.setattr(layout, "_FEW", 0)
        yield
    jax.clear_caches()


def xla_convolution(x, kernel):
    axes = "HW"[: x.ndim - 2]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(x, kernel, (1,) * len(axes), "SAME", dimension_numbers=names)


def loss(convolve, x, kernel):
    """Two convolutions with a function between them, so that both gradients are needed."""
    return jnp.sum(jnp.sin(convolve(jnp.tanh(convolve(x, kernel)), kernel)))


def gradients(convolve):
    return jax.grad(functools.partial(loss, convolve), (0, 1))


ours, plain = gradients(functional.convolution), gradients(xla_convolution)
TRANSFORMS = {
    "vmap": jax.vmap,
    "jit": lambda f: jax.jit(jax.vmap(f)),
    "map": lambda f: lambda *sets: lax.map(lambda one: f(*one), sets),
    "scan": lambda f: lambda *sets: lax.scan(lambda carry, one: (carry, f(*one)), 0, sets)[1],
    "pmap": jax.pmap,
}
TIME, IMAGE = (7,), (5, 6)
#: Number of elements of a chunk.
WHOLE, CHUNKS = 2**21, 1


@functools.cache
def sets(size, batch):
    """Four inputs, four kernels, and the gradients by XLA's convolution."""
    x = normal((4, batch, *size, 2), 0)
    kernels = normal((4, *(3,) * len(size), 2, 2), 1)
    return x, kernels, jax.jit(jax.vmap(plain))(x, kernels)


def set_chunks(monkeypatch, elements):
    """Set the size of a chunk. Traces are cached by shape, so every size needs its own batch."""
    for name in ("_CACHED_FORWARD", "_CACHED_GRADIENT"):
        monkeypatch.setattr(winograd, name, elements)


@pytest.mark.parametrize(
    ("name", "size", "elements"),
    mostly_slow(
        itertools.product(TRANSFORMS, (TIME, IMAGE), (WHOLE, CHUNKS)),
        [
            ("vmap", TIME, WHOLE),
            ("jit", IMAGE, WHOLE),
            ("scan", TIME, CHUNKS),
            ("pmap", TIME, CHUNKS),
        ],
    ),
)
def test_gradients_are_the_same_under_every_transformation(name, size, elements, monkeypatch):
    if name == "pmap" and jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    set_chunks(monkeypatch, elements)
    x, kernels, expected = sets(size, batch=2 if elements == WHOLE else 6)
    for found, exact in zip(TRANSFORMS[name](ours)(x, kernels), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-10)


def test_reverse_mode_works_twice():
    x, kernel = normal((2, 6, 2), 0), normal((3, 2, 2), 1)
    directions = normal(x.shape, 2), normal(kernel.shape, 3)

    def slope(convolve, *operands):
        to_operands = gradients(convolve)(*operands)
        return sum(jnp.vdot(*pair) for pair in zip(to_operands, directions, strict=True))

    @jax.jit
    def curvatures(*operands):
        return [
            jax.grad(functools.partial(slope, each), (0, 1))(*operands)
            for each in (functional.convolution, xla_convolution)
        ]

    for found, exact in zip(*curvatures(x, kernel), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-9)


@functools.cache
def one_set(batch):
    x, kernel = normal((batch, 8, 8, 4), 0), normal((3, 3, 4, 4), 1)
    return x, kernel, jax.jit(plain)(x, kernel)


@pytest.mark.parametrize(
    ("axis", "elements"),
    mostly_slow(itertools.product(range(4), (WHOLE, CHUNKS)), [(0, CHUNKS), (1, WHOLE)]),
)
def test_arrays_may_be_sharded_along_any_axis(axis, elements, monkeypatch):
    set_chunks(monkeypatch, elements)
    x, kernel, expected = one_set(batch=4 if elements == WHOLE else 8)
    names = [None] * 4
    names[axis] = DATA_AXIS
    sharding = jax.NamedSharding(data_mesh(), jax.sharding.PartitionSpec(*names))
    found = jax.jit(ours)(jax.device_put(x, sharding), kernel)
    for each, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(each, exact, rtol=1e-10, atol=1e-10)


def test_an_empty_batch_has_no_outputs_and_no_gradient():
    x, kernel = jnp.zeros((0, 6, 6, 2)), normal((3, 3, 2, 3), 0)

    @jax.jit
    def results(x, kernel):
        value, pull = jax.vjp(functional.convolution, x, kernel)
        return value, *pull(value)

    value, dx, dkernel = results(x, kernel)
    assert value.shape == (0, 6, 6, 3)
    assert dx.shape == x.shape and dkernel.shape == kernel.shape and not np.any(dkernel)
