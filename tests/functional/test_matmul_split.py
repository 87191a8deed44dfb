"""Float32 products made of three bfloat16 products, where JAX's precision asks for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.functional.matmul import linear

THREE = "BF16_BF16_F32_X3"


def normal(shape, seed, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def error(found, x, kernel):
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    return np.max(np.abs(np.asarray(found, np.float64) - exact)) / np.max(np.abs(exact))


@pytest.mark.parametrize("channels", [1, 16, 384, 4096])
def test_the_error_lies_between_those_of_float32_and_bfloat16(channels):
    x, kernel = normal((64, channels), 0), normal((channels, 32), 1)
    with jax.default_matmul_precision(THREE):
        three = error(jax.jit(linear)(x, kernel), x, kernel)
    narrow = linear(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert three < 1e-5
    assert error(linear(x, kernel), x, kernel) < three < error(narrow, x, kernel) / 100


def test_numbers_of_sixteen_bits_are_multiplied_exactly():
    # 257 / 256 has 9 significant bits, more than a bfloat16: 1 and 1 / 256.
    x, kernel = jnp.full((1, 1), 257 / 256), jnp.full((1, 1), 3.0)
    with jax.default_matmul_precision(THREE):
        assert float(linear(x, kernel)[0, 0]) == 771 / 256
        # Left out is the product of the two small parts, 2^-16.
        assert float(linear(x, x)[0, 0]) == 1 + 2 / 256
    assert float(linear(x, x)[0, 0]) == (257 / 256) ** 2


def test_first_and_second_derivatives_are_those_of_the_plain_product():
    x, kernel = normal((3, 4, 8), 0), normal((8, 5), 1)

    def slope(x, kernel):
        grads = jax.grad(lambda x, kernel: jnp.sum(linear(x, kernel) ** 3), (0, 1))(x, kernel)
        return sum(jnp.sum(jnp.cos(0.01 * each)) for each in grads)

    expected = jax.grad(slope, (0, 1))(x, kernel)
    with jax.default_matmul_precision(THREE):
        found = jax.jit(jax.grad(slope, (0, 1)))(x, kernel)
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-4 * float(jnp.max(abs(plain))))


FOUR = pytest.param(jax.pmap, marks=pytest.mark.four_devices)


@pytest.mark.parametrize("transform", [jax.vmap, FOUR, lambda f: jax.jit(jax.vmap(f))])
def test_it_may_be_transformed(transform):
    x, kernel = normal((4, 6, 8), 0), normal((4, 8, 5), 1)
    with jax.default_matmul_precision(THREE):
        found = transform(linear)(x, kernel)
    assert error(found, x, kernel) < 3e-5


@pytest.mark.parametrize(("wish", "dtype"), [(None, jnp.float32), (THREE, jnp.bfloat16)])
def test_nothing_else_changes(wish, dtype):
    x, kernel = normal((2, 8), 0, dtype), normal((8, 4), 1, dtype)
    with jax.default_matmul_precision(wish):
        text = jax.jit(linear).lower(x, kernel).as_text()
    assert text.count("stablehlo.dot") == 1


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_get_the_wish_itself(platform):
    x, kernel = normal((2, 8), 0), normal((8, 4), 1)
    with jax.default_matmul_precision(THREE):
        text = jax.jit(linear).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot") == (3 if platform == "cpu" else 1)
    assert ("num_primitive_operations = 3" in text) == (platform == "tpu")


def test_a_whole_network_asks_for_them(on_cpu):
    module, x = jn.MLP(features=(8,), num_outputs=3), normal((2, 5), 0)
    variables = module.init(jax.random.key(0), x)
    with jax.default_matmul_precision(THREE):
        text = jax.jit(module.apply).lower(variables, x).as_text()
    assert text.count("stablehlo.dot") == 6
