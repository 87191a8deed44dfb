"""Convolution against its definition and XLA's: values, gradients, transformations, errors."""

import functools
import importlib
import itertools
import re
import unittest.mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import loss_and_gradients, mostly_slow, normal
from direct_convolution import direct_convolution
from hypothesis import strategies as st
from jax import lax

from jaxnets import functional
from jaxnets.functional import pooling
from jaxnets.functional.conv import im2col_matmul

# The package has a function of this name.
convolution = importlib.import_module("jaxnets.functional.conv.convolution")


@pytest.fixture(autouse=True)
def double_precision():
    """Compare in float64, where rounding cannot hide a wrong formula."""
    with jax.enable_x64(True):
        yield


def check_against_the_definition(x, kernel, cached=None, **options):
    """Compare the outputs and both gradients; a small cache splits the batch into chunks."""
    x, kernel = normal(x, 0), normal(kernel, 1)
    expected = direct_convolution(x, kernel, lambda y: np.cos(y) + 0.5, **options)
    cached = cached or im2col_matmul._CACHED_PATCHES
    with unittest.mock.patch.object(im2col_matmul, "_CACHED_PATCHES", cached):
        value, gradients = loss_and_gradients(
            functools.partial(functional.convolution, **options), x, kernel
        )
    for ours, exact in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-10, atol=1e-10)


PLAIN = {"strides": (1, 1), "padding": "SAME", "dilation": (1, 1), "groups": 1}
CASES = {
    "batch innermost, time": (
        (2, 7, 3),
        (3, 3, 2),
        {"strides": (2,), "padding": ((1, 2),), "dilation": (1,), "groups": 1},
    ),
    "batch innermost, dilation": (
        (2, 7, 8, 2),
        (2, 3, 2, 4),
        {**PLAIN, "padding": "VALID", "dilation": (2, 1)},
    ),
    "im2col of dy": ((2, 5, 6, 17), (2, 3, 17, 2), PLAIN),
    "all offsets joined": ((2, 5, 5, 2), (3, 2, 2, 17), PLAIN),
    "one row of offsets joined": ((2, 6, 5, 17), (2, 3, 17, 18), {**PLAIN, "dilation": (1, 2)}),
    "chunks of one example": ((7, 5, 6, 17), (3, 2, 17, 18), {**PLAIN, "strides": (2, 1)}, 1),
    "chunks and a remainder": ((11, 5, 5, 17), (3, 1, 17, 18), {**PLAIN, "strides": (1, 2)}, 4000),
    "small outputs": ((2, 4, 4, 20), (3, 3, 20, 4), {**PLAIN, "strides": (2, 2)}),
    "cropped": ((2, 7, 8, 3), (2, 3, 3, 2), {**PLAIN, "padding": ((-1, 0), (2, -2))}),
    "groups": ((2, 5, 6, 6), (3, 2, 2, 3), {**PLAIN, "groups": 3}),
    "groups and strides": ((2, 6, 5, 4), (3, 3, 2, 6), {**PLAIN, "groups": 2, "strides": (2, 3)}),
    "depthwise": ((2, 6, 5, 3), (3, 2, 1, 6), {**PLAIN, "groups": 3, "dilation": (2, 1)}),
    "depthwise, strides": (
        (2, 9, 3),
        (3, 1, 3),
        {"strides": (2,), "padding": "SAME", "dilation": (1,), "groups": 3},
    ),
    "pointwise": ((2, 6, 5, 3), (1, 1, 3, 4), PLAIN),
    "pointwise, strides": ((2, 6, 5, 3), (1, 1, 3, 4), {**PLAIN, "strides": (2, 3)}),
    "one element, padded": (
        (2, 3, 17),
        (1, 17, 2),
        {"strides": (1,), "padding": ((1, 0),), "dilation": (1,), "groups": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_computes_the_convolution_and_its_gradients(name):
    x, kernel, options, *cached = CASES[name]
    check_against_the_definition(x, kernel, *cached, **options)


@st.composite
def convolutions(draw):
    spatial = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    kernel_size, strides, dilation = each(1, 3), each(1, 3), each(1, 2)
    sizes = each(5, 8)
    padding = draw(st.sampled_from(["SAME", "VALID", "pairs"]))
    if padding == "pairs":
        padding = tuple(zip(each(0, 3), each(0, 3), strict=True))
    groups, width, multiplier = draw(st.integers(1, 3)), draw(st.integers(1, 2)), each(1, 2)[0]
    if draw(st.booleans()):  # more channels, or features, select other algorithms
        groups, width, multiplier = 1, *draw(st.sampled_from([(17, 2), (2, 17), (17, 18)]))
    batch, cached = draw(st.sampled_from([(2, None), (7, 1), (11, 4000)]))
    options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    shapes = (batch, *sizes, groups * width), (*kernel_size, width, groups * multiplier)
    return (*shapes, options, cached)


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(convolutions())
def test_any_convolution_and_its_gradients_equal_the_definition(case):
    x, kernel, options, cached = case
    check_against_the_definition(x, kernel, cached, **options)


def strided_network(x, kernel):
    """A convolution of stride 2, one of stride 1, and a pool: every custom gradient at once."""
    x = functional.convolution(x, kernel, strides=2, padding=1)
    x = functional.convolution(jnp.tanh(x), kernel)
    return jnp.sum(jnp.sin(functional.max_pool(x, 2)))


def plain_network(x, kernel):
    axes = "HW"[: x.ndim - 2]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")

    def convolve(x, stride, padding):
        strides = (stride,) * len(axes)
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=names)

    x = convolve(jnp.tanh(convolve(x, 2, [(1, 1)] * len(axes))), 1, "SAME")
    window = (1, *(2,) * len(axes), 1)
    x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
    return jnp.sum(jnp.sin(x))


FEW, MORE = 2, 17
gradients = jax.grad(strided_network, argnums=(0, 1))
plain_gradients = jax.jit(jax.vmap(jax.grad(plain_network, argnums=(0, 1))))


@functools.cache
def operands(channels):
    """Four inputs, four kernels, and the gradients of the plain network."""
    x, kernels = normal((4, 3, 8, 8, channels), 0), normal((4, 3, 3, channels, channels), 1)
    return x, kernels, plain_gradients(x, kernels)


TRANSFORMS = {
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "map": lambda f: lambda *sets: lax.map(lambda one: f(*one), sets),
    "scan": lambda f: lambda *sets: lax.scan(lambda carry, one: (carry, f(*one)), 0, sets)[1],
    "pmap": jax.pmap,
    "vmap": jax.vmap,
    "eager": lambda f: (
        lambda *sets: jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(f(*one) for one in zip(*sets, strict=True))
        )
    ),
}


@pytest.mark.parametrize(
    ("name", "channels"),
    mostly_slow(
        itertools.product(TRANSFORMS, (FEW, MORE)),
        [
            ("jit of vmap", MORE),
            ("scan", FEW),
            ("pmap", MORE),
            ("eager", FEW),
        ],
    ),
)
def test_gradients_are_the_same_under_every_transformation(name, channels):
    if name == "pmap" and jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    *sets, expected = operands(channels)
    for ours, plain in zip(TRANSFORMS[name](gradients)(*sets), expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [FEW, pytest.param(MORE, marks=pytest.mark.slow)])
def test_a_population_sharing_its_batch_has_the_gradients_of_its_members(channels):
    x, kernels, _ = operands(channels)
    population = jax.jit(jax.vmap(gradients, in_axes=(None, 0)))(x[0], kernels)
    expected = plain_gradients(jnp.broadcast_to(x[:1], x.shape), kernels)
    for ours, plain in zip(population, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "channels"),
    mostly_slow(itertools.product([(12,), (8, 8)], (FEW, MORE)), [((12,), FEW)]),
)
def test_reverse_mode_works_twice(size, channels):
    kernel_shape = (*(3,) * len(size), channels, channels)
    x, kernel, direction = (
        normal(shape, seed)
        for seed, shape in enumerate([(3, *size, channels), kernel_shape, kernel_shape])
    )

    def slope(network, kernel):
        return jnp.vdot(jax.grad(network, 1)(x, kernel), direction)

    ours, plain = jax.jit(
        lambda kernel: [
            jax.grad(functools.partial(slope, each))(kernel)
            for each in (strided_network, plain_network)
        ]
    )(kernel)
    np.testing.assert_allclose(ours, plain, rtol=1e-9, atol=1e-9)


def lowered(function, *operands, platform):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def operations(text):
    """Count the convolutions and matmuls that a program executes, those of called functions too."""
    bodies = dict(re.findall(r"func\.func \w+ @(\w+)(.*?)\n  }\n", text, re.DOTALL))

    def count(operation, name):
        called = re.findall(r"(?<!custom_)call @(\w+)", bodies[name])
        return bodies[name].count(operation) + sum(count(operation, each) for each in called)

    return tuple(count(f"stablehlo.{each}", "main") for each in ("convolution", "dot_general"))


# Shape of the input, features, dtype -> matmuls forward and for the kernel gradient.
LOWERED = {
    "winograd": ((32, 16, 16, 64), 64, jnp.float32, 16, 16),
    "offset matmuls": ((2, 12, 12, 128), 128, jnp.bfloat16, 9, 9),
    "batch innermost": ((2, 9, 9, 16), 16, jnp.float32, 1, 1),
    "im2col": ((2, 2, 2, 20), 40, jnp.float32, 1, 3),
}


@pytest.mark.lowering
@pytest.mark.parametrize("name", LOWERED)
def test_the_algorithm_of_the_table_is_lowered_on_cpu_only(name):
    shape, features, dtype, forward, backward = LOWERED[name]
    x, kernel = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, (3, 3, shape[-1], features)))

    def kernel_gradient(x, kernel):
        return jax.grad(lambda k: jnp.sum(functional.convolution(x, k), dtype=jnp.float32))(kernel)

    for function, matmuls in ((functional.convolution, forward), (kernel_gradient, backward)):
        assert operations(lowered(function, x, kernel, platform="cpu")) == (0, matmuls)
        assert operations(lowered(function, x, kernel, platform="tpu")) == (1, 0)


@pytest.mark.lowering
def test_a_pointwise_convolution_with_strides_is_a_matmul_on_cpu_only():
    x, kernel = normal((2, 6, 6, 3), 0), normal((1, 1, 3, 4), 1)
    strided = functools.partial(functional.convolution, strides=(2, 3))
    assert operations(lowered(strided, x, kernel, platform="cpu")) == (0, 1)
    assert operations(lowered(strided, x, kernel, platform="cuda")) == (1, 0)


@pytest.mark.lowering
@pytest.mark.parametrize(
    ("shape", "features"), [((2, 4, 4, 17), 4), ((2, 9, 9, 1), 17), ((2, 9, 9, 17), 16)]
)
def test_the_kernel_gradient_is_no_convolution_where_the_forward_pass_is_one(shape, features):
    x, kernel = normal(shape, 0), normal((3, 3, shape[-1], features), 1)
    assert operations(lowered(functional.convolution, x, kernel, platform="cpu")) == (1, 0)
    gradient = jax.grad(lambda k: jnp.sum(functional.convolution(x, k) ** 2))
    assert operations(lowered(gradient, kernel, platform="cpu"))[0] == 1


@pytest.mark.lowering
def test_large_batches_are_summed_chunk_by_chunk_on_cpu(monkeypatch):
    def gradient(x):
        kernel = jnp.ones((3, 3, 17, 18))
        return jax.grad(lambda k: jnp.sum(functional.convolution(x, k) ** 2))(kernel)

    # Batches of their own: the trace of a shape is cached, with the constant.
    assert "stablehlo.while" not in lowered(gradient, jnp.ones((12, 8, 7, 17)), platform="cpu")
    monkeypatch.setattr(im2col_matmul, "_CACHED_PATCHES", 2 * 8 * 7 * 9 * 17)
    assert "stablehlo.while" in lowered(gradient, jnp.ones((14, 8, 7, 17)), platform="cpu")


@pytest.mark.parametrize("channels", [FEW, pytest.param(MORE, marks=pytest.mark.slow)])
def test_other_platforms_get_the_gradients_of_xla(channels, monkeypatch, forget_traces):
    *sets, expected = operands(channels)
    x, kernel = (each[0] for each in sets)
    program = lowered(gradients, x, kernel, platform="tpu")
    assert program.count("stablehlo.convolution") == 2 + 4  # forward, and two gradients each
    assert program.count("stablehlo.select_and_scatter") == 1
    assert "stablehlo.dot" not in program
    for module in (convolution, pooling):
        monkeypatch.setattr(
            module, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
    forget_traces()
    for other, plain in zip(jax.jit(gradients)(x, kernel), expected, strict=True):
        np.testing.assert_allclose(other, plain[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dtype",
    mostly_slow([jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64], [jnp.bfloat16, jnp.float64]),
)
def test_every_function_keeps_the_dtype_of_its_input(dtype):
    x = jax.ShapeDtypeStruct((2, 6, 6, 2), dtype)

    def convolve(x, kernel, strides, groups):
        kernel = kernel[:, :, : 2 // groups]
        return functional.convolution(x, kernel, strides=strides, groups=groups)

    def results(x, kernel):
        yield functional.max_pool(x, 2)
        yield functional.max_pool(x, 3, 1, "SAME")
        yield functional.average_pool(x, 2)
        yield functional.global_average_pool(x)
        yield functional.linear(x, kernel[0, 0])
        for strides, groups in itertools.product((1, 2), (1, 2)):
            f = functools.partial(convolve, strides=strides, groups=groups)
            y, pull = jax.vjp(f, x, kernel)
            yield from (y, *pull(y))

    kernel = jax.ShapeDtypeStruct((3, 3, 2, 2), dtype)
    shapes = jax.eval_shape(lambda *arrays: list(results(*arrays)), x, kernel)
    assert len(shapes) == 17
    assert {each.dtype for each in shapes} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        ((2, 8), (3, 3), {}, r"\(2, 8\)"),
        ((1, 8, 3), (3, 2, 4), {}, "3 channels in 1 groups"),
        ((1, 8, 3), (3, 3, 4), {"padding": "X"}, "padding='X'"),
        ((1, 8, 8, 3), (3, 3, 3, 4), {"padding": [(1, 1)]}, r"or 2 \(low, high\) pairs"),
        ((1, 8, 8, 3), (3, 3, 3, 4), {"padding": [1, 1]}, r"padding=\[1, 1\]"),
        ((1, 8, 3), (3, 3, 4), {"padding": -1}, "padding=-1 must be"),
        ((1, 8, 3), (3, 3, 4), {"padding": 1.5}, r"padding=1\.5 must be"),
        ((1, 8, 3), (3, 3, 4), {"strides": 1.5}, r"strides=1\.5 must be"),
        ((1, 8, 3), (3, 3, 4), {"groups": 0}, "groups=0 must be"),
        ((1, 8, 3), (0, 3, 4), {}, "has no elements"),
        ((1, 2, 1), (3, 1, 4), {"padding": "VALID"}, "a window of 3 does not fit"),
        ((1, 8, 1), (3, 1, 4), {"strides": 0}, "strides=0"),
        ((1, 8, 1), (3, 1, 4), {"dilation": (1, 1)}, "dilation="),
    ],
)
def test_a_wrong_argument_is_refused_with_its_value(x, kernel, options, message):
    with pytest.raises(ValueError, match=message):
        functional.convolution(np.ones(x), np.ones(kernel), **options)


def test_operands_of_different_types_are_refused():
    with pytest.raises(ValueError, match="has type float64 and the kernel float32"):
        functional.convolution(np.ones((1, 8, 3)), np.ones((3, 3, 4), np.float32))
