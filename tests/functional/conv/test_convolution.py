"""Convolutions against XLA's own: values, gradients, transformations; dtypes and errors of all."""

import importlib
import itertools
import unittest.mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import loss_and_gradients, normal
from hypothesis import strategies as st
from jax import lax

from jaxnets import functional
from jaxnets.functional import pooling

# The package has a function of this name.
convolution = importlib.import_module("jaxnets.functional.conv.convolution")

# Every example compiles for its own shapes; a fixed seed keeps the run repeatable and cached.
some = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def double_precision():
    """Compare in float64, where rounding cannot hide a wrong formula."""
    with jax.enable_x64(True):
        yield


def reference_convolution(x, kernel, *, strides, padding, dilation, groups):
    axes = "HW"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
    )


@st.composite
def convolutions(draw):
    spatial = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    taps, strides, dilation = each(1, 3), each(1, 3), each(1, 2)
    sizes = each(5, 8)
    padding = draw(st.sampled_from(["SAME", "VALID", "pairs"]))
    if padding == "pairs":
        padding = tuple(zip(each(0, 3), each(0, 3), strict=True))
    groups, width, multiplier = draw(st.integers(1, 3)), draw(st.integers(1, 2)), each(1, 2)[0]
    if draw(st.booleans()):  # more than a few channels, or features, take other ways
        groups, width, multiplier = 1, *draw(st.sampled_from([(17, 2), (2, 17), (17, 18)]))
    batch, cached = draw(st.sampled_from([(2, None), (7, 1), (11, 4000)]))
    return {
        "cached": cached,  # a small cache makes chunks, of one example or with a rest
        "x": (batch, *sizes, groups * width),
        "kernel": (*taps, width, groups * multiplier),
        "options": {
            "strides": strides,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        },
    }


@some
@hypothesis.given(convolutions())
def test_convolution_and_its_gradients_equal_xla_for_any_geometry(case):
    x, kernel = normal(case["x"], 0), normal(case["kernel"], 1)

    def ours(x, kernel):
        return functional.convolution(x, kernel, **case["options"])

    def theirs(x, kernel):
        return reference_convolution(x, kernel, **case["options"])

    cached = case["cached"] or convolution._CACHED_PATCHES
    with unittest.mock.patch.object(convolution, "_CACHED_PATCHES", cached):
        value, gradients = loss_and_gradients(ours, x, kernel)
    expected, expected_gradients = loss_and_gradients(theirs, x, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-10)


def strided_network(x, kernel):
    """A convolution of stride 2, one of stride 1, and a pool: every own gradient at once."""
    x = functional.convolution(x, kernel, strides=2, padding=1)
    x = functional.convolution(jnp.tanh(x), kernel)
    return jnp.sum(jnp.sin(functional.max_pool(x, 2)))


def plain_network(x, kernel):
    options = {"dilation": (1, 1), "groups": 1}
    x = reference_convolution(x, kernel, strides=(2, 2), padding=[(1, 1)] * 2, **options)
    x = reference_convolution(jnp.tanh(x), kernel, strides=(1, 1), padding="SAME", **options)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.sum(jnp.sin(x))


@pytest.fixture(params=[2, 17], ids=["few channels", "more channels"])
def operands(request):
    channels = request.param
    # Four sets of them.
    return normal((4, 3, 8, 8, channels), 0), normal((4, 3, 3, channels, channels), 1)


@pytest.mark.parametrize(
    "transform",
    [
        jax.vmap,
        lambda f: jax.jit(jax.vmap(f)),
        lambda f: lambda *sets: lax.map(lambda one: f(*one), sets),
        lambda f: lambda *sets: lax.scan(lambda carry, one: (carry, f(*one)), 0, sets)[1],
        pytest.param(lambda f: lambda *sets: jax.pmap(f)(*sets), marks=pytest.mark.four_devices),
        lambda f: (
            lambda *sets: jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(f(*one) for one in zip(*sets, strict=True)),
            )
        ),
    ],
    ids=["vmap", "jit", "map", "scan", "pmap", "eager"],
)
def test_gradients_are_the_same_under_every_transformation(operands, transform):
    gradient = jax.grad(strided_network, argnums=(0, 1))
    expected = jax.jit(jax.vmap(jax.grad(plain_network, argnums=(0, 1))))(*operands)
    for ours, plain in zip(transform(gradient)(*operands), expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-10)


def test_a_population_sharing_its_batch_has_the_gradients_of_its_members(operands):
    x, kernels = operands[0][0], operands[1]
    population = jax.jit(jax.vmap(jax.grad(strided_network, 1), in_axes=(None, 0)))(x, kernels)
    for member, kernel in zip(population, kernels, strict=True):
        alone = jax.jit(jax.grad(plain_network, 1))(x, kernel)
        np.testing.assert_allclose(member, alone, rtol=1e-10, atol=1e-10)


def test_reverse_mode_works_twice(operands):
    x, kernel = operands[0][0], operands[1][0]
    direction = normal(kernel.shape, 2)

    def curvature(network):
        def slope(kernel):
            return jnp.vdot(jax.grad(network, 1)(x, kernel), direction)

        return jax.jit(jax.grad(slope))(kernel)

    np.testing.assert_allclose(
        curvature(strided_network), curvature(plain_network), rtol=1e-9, atol=1e-9
    )


def test_the_kernel_gradient_is_no_convolution_on_cpu(on_cpu):
    x, kernel = normal((2, 8, 8, 20), 0), normal((3, 3, 20, 20), 1)
    gradient = jax.grad(lambda k: jnp.sum(functional.convolution(x, k) ** 2))
    text = jax.jit(gradient).lower(kernel).as_text()
    assert text.count("stablehlo.convolution") == 1  # the forward pass


def test_large_batches_are_summed_chunk_by_chunk_on_cpu(on_cpu, monkeypatch, forget_traces):
    x, kernel = normal((12, 8, 8, 17), 0), normal((3, 3, 17, 18), 1)
    gradient = jax.grad(lambda k: jnp.sum(functional.convolution(x, k) ** 2))
    assert "stablehlo.while" not in jax.jit(gradient).lower(kernel).as_text()
    monkeypatch.setattr(convolution, "_CACHED_PATCHES", 2 * 8 * 8 * 9 * 17)
    forget_traces()
    assert "stablehlo.while" in jax.jit(gradient).lower(kernel).as_text()


@pytest.mark.parametrize(
    ("shape", "features"),
    [((2, 2, 2, 20), 4), ((2, 9, 9, 1), 8), ((2, 9, 9, 16), 16)],
    ids=["small map", "one channel", "few channels"],
)
def test_what_xla_is_slow_at_is_one_product_on_cpu_only(shape, features):
    x, kernel = normal(shape, 0), normal((3, 3, shape[-1], features), 1)
    traced = jax.jit(functional.convolution).trace(x, kernel)
    own, other = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu"))
    assert "stablehlo.convolution" not in own and own.count("stablehlo.dot") == 1
    assert "stablehlo.dot" not in other and other.count("stablehlo.convolution") == 1


def test_one_tap_with_strides_is_a_product_on_cpu_only():
    x, kernel = normal((2, 6, 6, 3), 0), normal((1, 1, 3, 4), 1)
    thinned = jax.jit(lambda x, kernel: functional.convolution(x, kernel, strides=(2, 3)))
    texts = (
        thinned.trace(x, kernel).lower(lowering_platforms=(name,)).as_text()
        for name in ("cpu", "cuda")
    )
    counts = [(text.count("stablehlo.dot"), text.count("stablehlo.convolution")) for text in texts]
    assert counts == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("shape", "features"), [((2, 4, 4, 17), 4), ((2, 9, 9, 1), 17), ((2, 9, 9, 17), 16)]
)
def test_other_convolutions_are_those_of_xla(shape, features):
    x, kernel = normal(shape, 0), normal((3, 3, shape[-1], features), 1)
    text = jax.jit(functional.convolution).trace(x, kernel).lower().as_text()
    assert text.count("stablehlo.convolution") == 1


def test_other_platforms_get_the_gradients_of_xla(operands, monkeypatch, forget_traces):
    x, kernel = operands[0][0], operands[1][0]
    gradient = jax.grad(strided_network, argnums=(0, 1))
    program = jax.jit(gradient).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("stablehlo.convolution") == 2 + 4  # forward, and two gradients each
    assert program.count("stablehlo.select_and_scatter") == 1
    assert "stablehlo.dot" not in program
    for module in (convolution, pooling):
        monkeypatch.setattr(
            module, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
    forget_traces()
    expected = jax.jit(jax.grad(plain_network, argnums=(0, 1)))(x, kernel)
    for other, plain in zip(jax.jit(gradient)(x, kernel), expected, strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_every_function_keeps_the_dtype_of_its_input(dtype):
    x, kernel = normal((2, 6, 6, 2), 0, dtype), normal((3, 3, 2, 2), 1, dtype)
    for strides, groups in itertools.product((1, 2), (1, 2)):

        def convolve(x, kernel, strides=strides, groups=groups):
            kernel = kernel[:, :, : 2 // groups]
            return functional.convolution(x, kernel, strides=strides, groups=groups)

        value, gradients = jax.eval_shape(
            lambda x, k, f=convolve: (f(x, k), jax.vjp(f, x, k)[1](f(x, k))), x, kernel
        )
        assert {a.dtype for a in (value, *gradients)} == {jnp.dtype(dtype)}
    for pooled in (
        functional.max_pool(x, 2),
        functional.max_pool(x, 3, 1, "SAME"),
        functional.average_pool(x, 2),
        functional.global_average_pool(x),
        functional.linear(x, kernel[0, 0]),
    ):
        assert pooled.dtype == dtype


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.convolution(jnp.ones((2, 8)), jnp.ones((3, 3))), r"\(2, 8\)"),
        (
            lambda: functional.convolution(jnp.ones((1, 8, 3)), jnp.ones((3, 2, 4))),
            r"3 channels in 1 groups",
        ),
        (
            lambda: functional.convolution(jnp.ones((1, 8, 3)), jnp.ones((3, 3, 4)), padding="X"),
            "padding='X'",
        ),
        (
            lambda: functional.convolution(
                jnp.ones((1, 2, 1)), jnp.ones((3, 1, 4)), padding="VALID"
            ),
            "a window of 3 does not fit",
        ),
        (
            lambda: functional.convolution(jnp.ones((1, 8, 1)), jnp.ones((3, 1, 4)), strides=0),
            "strides=0",
        ),
        (lambda: functional.max_pool(jnp.ones((1, 8, 8, 1)), (2, 2, 2)), "window="),
        (lambda: functional.max_pool(jnp.ones((1, 8)), 2), r"\(1, 8\)"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_gradient_of_a_narrow_product_is_that_of_the_plain_one():
    random = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(random.normal(size=shape), jnp.bfloat16)
        for shape in ((2, 6, 5), (5, 3), (2, 6, 3))
    )

    def gradients(function):
        def loss(x, kernel):
            return jnp.sum((function(x, kernel) * weights).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))

    own, plain = gradients(functional.linear), gradients(jnp.matmul)
    for found, expected in zip(own(x, kernel), plain(x, kernel), strict=True):
        assert found.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(expected)))
        # Sums of bfloat16 products may be rounded in another order.
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(jnp.float32), atol=2**-7 * scale
        )
    stacked = jax.vmap(own)(jnp.stack([x, -x]), jnp.stack([kernel, kernel]))
    np.testing.assert_array_equal(stacked[1][0], own(x, kernel)[1])
