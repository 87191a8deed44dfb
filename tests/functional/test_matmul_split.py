"""Float32 matmuls made of three bfloat16 matmuls, the algorithm BF16_BF16_F32_X3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.functional.matmul import linear

BF16_X3 = "BF16_BF16_F32_X3"


def normal(shape, seed, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def error(found, x, kernel):
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    return np.max(np.abs(np.asarray(found, np.float64) - exact)) / np.max(np.abs(exact))


@jax.jit
def products(x, kernel):
    """Return the products of three, of one float32 and of one bfloat16 matmul."""
    with jax.default_matmul_precision(BF16_X3):
        three = linear(x, kernel)
    return three, linear(x, kernel), linear(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))


@pytest.mark.parametrize("channels", [1, 16, 384, 4096])
def test_the_error_lies_between_those_of_float32_and_bfloat16(channels):
    x, kernel = normal((64, channels), 0), normal((channels, 32), 1)
    three, wide, narrow = (error(found, x, kernel) for found in products(x, kernel))
    assert three < 1e-5
    assert wide < three < narrow / 100


def test_sixteen_bits_of_an_element_are_multiplied_exactly():
    # 257 / 256 has 9 significant bits, more than a bfloat16: 1 and 1 / 256.
    x, kernel = jnp.full((1, 1), 257 / 256), jnp.full((1, 1), 3.0)
    assert float(products(x, kernel)[0][0, 0]) == 771 / 256
    three, wide, _ = products(x, x)
    # Low times low is left out, 2^-16.
    assert float(three[0, 0]) == 1 + 2 / 256
    assert float(wide[0, 0]) == (257 / 256) ** 2


def test_first_and_second_derivatives_are_those_of_the_plain_product():
    def slope(x, kernel):
        grads = jax.grad(lambda x, kernel: jnp.sum(linear(x, kernel) ** 3), (0, 1))(x, kernel)
        return sum(jnp.sum(jnp.cos(0.01 * each)) for each in grads)

    @jax.jit
    def derivatives(x, kernel):
        with jax.default_matmul_precision(BF16_X3):
            ours = jax.grad(slope, (0, 1))(x, kernel)
        return ours, jax.grad(slope, (0, 1))(x, kernel)

    for ours, plain in zip(*derivatives(normal((3, 4, 8), 0), normal((8, 5), 1)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-4 * float(jnp.max(abs(plain))))


FOUR = pytest.param(jax.pmap, marks=pytest.mark.four_devices)


@pytest.mark.parametrize("transform", [jax.vmap, FOUR, lambda f: jax.jit(jax.vmap(f))])
def test_it_may_be_transformed(transform):
    x, kernel = normal((4, 6, 8), 0), normal((4, 8, 5), 1)
    with jax.default_matmul_precision(BF16_X3):
        found = transform(linear)(x, kernel)
    assert error(found, x, kernel) < 3e-5


@pytest.mark.lowering
@pytest.mark.parametrize(("precision", "dtype"), [(None, jnp.float32), (BF16_X3, jnp.bfloat16)])
def test_other_precisions_and_dtypes_are_one_matmul(precision, dtype):
    x, kernel = normal((2, 8), 0, dtype), normal((8, 4), 1, dtype)
    with jax.default_matmul_precision(precision):
        text = jax.jit(linear).lower(x, kernel).as_text()
    assert text.count("stablehlo.dot") == 1


@pytest.mark.lowering
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_get_the_precision_itself(platform):
    x, kernel = normal((2, 8), 0), normal((8, 4), 1)
    with jax.default_matmul_precision(BF16_X3):
        text = jax.jit(linear).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot") == (3 if platform == "cpu" else 1)
    assert ("num_primitive_operations = 3" in text) == (platform == "tpu")


@pytest.mark.lowering
def test_a_whole_network_uses_the_default_precision(on_cpu):
    module, x = jn.MLP(features=(8,), num_outputs=3), jax.ShapeDtypeStruct((2, 5), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    with jax.default_matmul_precision(BF16_X3):
        text = jax.jit(module.apply).lower(variables, x).as_text()
    assert text.count("stablehlo.dot") == 6
