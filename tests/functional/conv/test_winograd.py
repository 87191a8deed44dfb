"""Minimal filtering against the plain convolution: values, gradients, transformations."""

import importlib
import itertools
import unittest.mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_slow, normal
from hypothesis import strategies as st
from jax import lax

from jaxnets import functional
from jaxnets.core import DATA_AXIS
from jaxnets.functional.conv import winograd
from jaxnets.functional.lowering import layout
from jaxnets.training.executors import data_mesh

# The package has a function of this name.
convolution = importlib.import_module("jaxnets.functional.conv.convolution")

# Every example compiles for its own shapes; a fixed seed keeps the run repeatable and cached.
some = hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def double_precision():
    """Compare in float64, where rounding cannot hide a wrong formula."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def everywhere(monkeypatch, forget_traces):
    """Let every 3x3 convolution of stride 1 go this way, however small."""
    monkeypatch.setattr(convolution, "_SAVED_FORWARD", 0.01)
    monkeypatch.setattr(convolution, "_SAVED_KERNEL_GRADIENT", 0.01)
    monkeypatch.setattr(layout, "_FEW", 0)
    forget_traces()


def plain(x, kernel, padding="SAME"):
    axes = "HW"[: x.ndim - 2]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(x, kernel, (1,) * len(axes), padding, dimension_numbers=names)


def test_four_products_make_two_outputs():
    # Inputs 1, 2, 4, 8 and taps 3, 5, 7: 3 + 10 + 28 = 41 and 6 + 20 + 56 = 82.
    x, kernel = jnp.array([1.0, 2, 4, 8]), jnp.array([3.0, 5, 7])
    y = winograd.convolve(x[None, :, None], kernel[:, None, None], padding=((0, 0),))
    assert y[0, :, 0].tolist() == [41, 82]
    # Outputs weighed by 1 and 10: tap k has x[k] + 10 x[k + 1].
    dy = jnp.array([1.0, 10])[None, :, None]
    gradient = winograd.kernel_gradient(x[None, :, None], dy, padding=((0, 0),))
    assert gradient[:, 0, 0].tolist() == [21, 42, 84]


def test_products_saved_are_counted():
    assert winograd.products_saved((8,)) == 3 - 2
    assert winograd.products_saved((8, 6)) == 9 - 4
    # 2 x 2 tiles of 16 products for 9 outputs.
    assert winograd.products_saved((3, 3)) == pytest.approx(9 - 64 / 9)


def cache(numbers):
    """Values of the constants that say how many numbers a chunk has; None leaves them."""
    return {n: numbers or getattr(winograd, n) for n in ("_CACHED_FORWARD", "_CACHED_GRADIENT")}


@st.composite
def cases(draw):
    num_axes = draw(st.integers(1, 2))
    sizes = [draw(st.integers(3, 8)) for _ in range(num_axes)]
    ends = st.integers(-1, 3)
    padding = []
    for size in sizes:
        low, high = draw(ends), draw(ends)
        padding.append((low, high) if size + low + high >= 3 else (1, 1))
    batch, cached = draw(st.sampled_from([(2, None), (7, 1), (11, 2000)]))
    return (batch, *sizes, draw(st.integers(1, 3))), draw(st.integers(1, 3)), padding, cached


@some
@hypothesis.given(cases())
def test_any_padding_and_any_size_equal_the_plain_convolution(case):
    shape, features, padding, cached = case
    x, kernel = normal(shape, 0), normal((*(3,) * (len(shape) - 2), shape[-1], features), 1)
    expected, pull = jax.vjp(lambda x, kernel: plain(x, kernel, padding), x, kernel)
    dy = jnp.cos(expected)
    # A small cache makes chunks, of one example or with a rest.
    with unittest.mock.patch.multiple(winograd, **cache(cached)):
        value = jax.jit(lambda x, k: winograd.convolve(x, k, padding=padding))(x, kernel)
        to_kernel = jax.jit(lambda x, y: winograd.kernel_gradient(x, y, padding=padding))(x, dy)
        to_input = jax.jit(lambda k, y: winograd.input_gradient(k, y, padding=padding))(kernel, dy)
    found = (value, to_input, to_kernel)
    for ours, theirs in zip(found, (expected, *pull(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_single_precision_loses_no_digit_that_counts():
    x, kernel = normal((4, 9, 9, 64), 0), normal((3, 3, 64, 64), 1)
    single = [a.astype(np.float32) for a in (x, kernel)]
    padding = ((1, 1), (1, 1))
    expected = plain(x, kernel)

    def error(found):
        return float(jnp.max(jnp.abs(found - expected)) / jnp.std(expected))

    assert error(winograd.convolve(*single, padding=padding)) < 5e-6
    # In half precision it would: such convolutions go another way.
    narrow = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    assert error(winograd.convolve(*narrow, padding=padding)) > error(plain(*narrow))


@pytest.mark.parametrize(
    ("shape", "features", "forward", "backward"),
    [
        ((32, 16, 16, 64), 64, True, True),
        ((32, 8, 8, 32), 64, False, True),
        ((32, 8, 8, 16), 16, False, False),
        ((32, 3, 3, 64), 64, False, False),
        ((32, 4, 4, 512), 512, True, True),
        ((4, 4, 4, 512), 512, False, False),  # fewer examples do not pay for the kernel's sums
    ],
)
def test_it_is_taken_where_it_pays_and_on_cpu_only(shape, features, forward, backward):
    x, kernel = normal(shape, 0), normal((3, 3, shape[-1], features), 1)
    value = jax.jit(functional.convolution).trace(x, kernel)
    loss = jax.grad(lambda k: jnp.sum(functional.convolution(x, k) ** 2))
    gradient = jax.jit(loss).trace(kernel)

    def products(traced, platform="cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.dot_general") + text.count("call @_plain_product")

    assert (products(value) >= 16) == forward
    assert (products(gradient) >= 16) == (forward or backward)
    assert products(value, "tpu") == products(gradient, "tpu") == 0


@pytest.mark.parametrize(
    ("taps", "options", "dtype"),
    [
        ((3, 3), {"strides": 2}, np.float32),
        ((3, 3), {"dilation": 2}, np.float32),
        ((3, 3), {"groups": 2}, np.float32),
        ((5, 5), {}, np.float32),
        ((3, 1), {}, np.float32),
        ((3, 3), {}, jnp.bfloat16),
    ],
)
def test_other_convolutions_go_another_way(taps, options, dtype, everywhere):
    groups = options.get("groups", 1)
    x, kernel = normal((2, 20, 20, 64), 0, dtype), normal((*taps, 64 // groups, 64), 1, dtype)

    def loss(x, kernel):
        y = functional.convolution(x, kernel, **options)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with unittest.mock.patch.object(convolution, "winograd", TAPS=winograd.TAPS) as fewer:
        jax.eval_shape(jax.grad(loss, (0, 1)), x, kernel)
    assert not fewer.mock_calls


def network(convolve):
    """Two convolutions with a function between them, so that both gradients are needed."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(jnp.tanh(convolve(x, kernel)), kernel)))

    return loss


TRANSFORMS = {
    "vmap": jax.vmap,
    "jit": lambda f: jax.jit(jax.vmap(f)),
    "map": lambda f: lambda *sets: lax.map(lambda one: f(*one), sets),
    "scan": lambda f: lambda *sets: lax.scan(lambda carry, one: (carry, f(*one)), 0, sets)[1],
    "pmap": jax.pmap,
}


WHOLE, CHUNKS = 2**21, 1


@pytest.mark.parametrize(
    ("name", "cached"),
    mostly_slow(
        itertools.product(TRANSFORMS, (WHOLE, CHUNKS)),
        [("vmap", WHOLE), ("scan", CHUNKS), ("pmap", CHUNKS)],
    ),
)
def test_gradients_are_the_same_under_every_transformation(name, cached, everywhere, monkeypatch):
    if name == "pmap" and jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    for constant, numbers in cache(cached).items():
        monkeypatch.setattr(winograd, constant, numbers)
    x, kernels = normal((4, 6, 5, 6, 2), 0), normal((4, 3, 3, 2, 2), 1)
    expected = jax.jit(jax.vmap(jax.grad(network(plain), (0, 1))))(x, kernels)
    transform = TRANSFORMS[name]
    found = transform(jax.grad(network(functional.convolution), (0, 1)))(x, kernels)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_reverse_mode_works_twice(everywhere):
    x, kernel, direction = (
        normal((2, 5, 6, 2), 0),
        normal((3, 3, 2, 2), 1),
        normal((3, 3, 2, 2), 2),
    )

    def curvature(convolve):
        def slope(x, kernel):
            return jnp.vdot(jax.grad(network(convolve), 1)(x, kernel), direction)

        return jax.jit(jax.grad(slope, (0, 1)))(x, kernel)

    for ours, theirs in zip(curvature(functional.convolution), curvature(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("axis", "cached"),
    mostly_slow(itertools.product(range(4), (WHOLE, CHUNKS)), [(0, CHUNKS), (1, WHOLE)]),
)
def test_arrays_may_be_split_over_devices(axis, cached, everywhere, monkeypatch):
    for constant, numbers in cache(cached).items():
        monkeypatch.setattr(winograd, constant, numbers)
    x, kernel = normal((8, 8, 8, 4), 0), normal((3, 3, 4, 4), 1)
    expected = jax.jit(jax.grad(network(plain), (0, 1)))(x, kernel)
    names = [None] * 4
    names[axis] = DATA_AXIS
    spec = jax.sharding.PartitionSpec(*names)
    split = jax.device_put(x, jax.NamedSharding(data_mesh(), spec))
    found = jax.jit(jax.grad(network(functional.convolution), (0, 1)))(split, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_an_empty_batch_has_no_outputs_and_no_gradient(everywhere):
    x, kernel = jnp.zeros((0, 6, 6, 2)), normal((3, 3, 2, 3), 0)
    value, pull = jax.vjp(functional.convolution, x, kernel)
    assert value.shape == (0, 6, 6, 3)
    dx, dkernel = pull(value)
    assert dx.shape == x.shape and not np.any(dkernel)
