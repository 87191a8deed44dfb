"""The product with a matrix, whose gradient is turned round for few features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.matmul import kernel_gradient, linear

# Rows, channels, features: turned round are those with few features.
TURNED = [(8, 6, 3), (64, 32, 10), (300, 256, 128)]
PLAIN = [(8, 6, 1), (8, 6, 4), (5, 12, 3), (512, 400, 130)]


def arrays(rows, channels, features, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (rows, channels), (channels, features), (rows, features)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def calls(function, *arguments):
    lines = jax.jit(function).lower(*arguments).compile().as_text().splitlines()
    return sum(" call(" in line and 'inlineable="false"' in line for line in lines)


@pytest.mark.parametrize("shape", TURNED + PLAIN)
def test_product_and_gradients_are_the_plain_ones(shape):
    x, kernel, dy = arrays(*shape)
    y, pull = jax.vjp(jax.jit(linear), x, kernel)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-4)
    dx, dkernel = pull(jnp.asarray(dy))
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dkernel, x.T @ dy, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kernel_gradient(x, dy), x.T @ dy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", TURNED + PLAIN)
def test_few_features_turn_the_gradient_round(shape, on_cpu):
    x, kernel, dy = arrays(*shape)

    def gradient(x, kernel, dy):
        return jax.vjp(lambda kernel: linear(x, kernel), kernel)[1](dy)

    marks = 2 * (shape in TURNED)
    assert calls(gradient, x, kernel, dy) == marks
    assert calls(kernel_gradient, x, dy) == marks
    narrow = [each.astype(jnp.bfloat16) for each in (x, dy)]
    assert calls(kernel_gradient, *narrow) == 0


def test_narrow_products_have_narrow_operands_and_wide_results(on_cpu):
    narrow = [jnp.asarray(each, jnp.bfloat16) for each in arrays(64, 32, 48)]

    def gradients(x, kernel, dy):
        y, pull = jax.vjp(linear, x, kernel)
        return y, *pull(dy)

    found = jax.jit(gradients)(*narrow)
    x, kernel, dy = (np.asarray(each, np.float64) for each in narrow)
    for result, expected in zip(found, (x @ kernel, dy @ kernel.T, x.T @ dy), strict=True):
        assert result.dtype == jnp.bfloat16
        # Each number is rounded once: 8 bits.
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=2**-8, atol=1e-4)
    program = jax.jit(gradients).lower(*narrow).as_text().splitlines()
    products = [line.split(" : ")[-1] for line in program if "stablehlo.dot_general" in line]
    assert len(products) == 3
    for types in products:
        assert types.count("xbf16>") == 2 and types.endswith("xf32>")


def smooth(product):
    return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)))


def test_forward_mode_and_second_derivatives():
    x, kernel, _ = arrays(*TURNED[0])
    own, plain = smooth(linear), smooth(jnp.matmul)
    tangents = (jnp.cos(x), jnp.cos(kernel))
    np.testing.assert_allclose(
        *(jax.jvp(function, (x, kernel), tangents)[1] for function in (own, plain)), rtol=1e-5
    )
    for second in (jax.hessian, lambda f, n: jax.jacrev(jax.grad(f, n), n)):
        hessians = (
            jax.tree.leaves(second(function, (0, 1))(x, kernel)) for function in (own, plain)
        )
        for actual, expected in zip(*hessians, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_population_of_kernels():
    x, kernel, dy = arrays(*TURNED[1])
    kernels = jnp.stack([kernel, 2 * kernel])

    def gradient(kernel):
        return jax.grad(lambda kernel: jnp.vdot(linear(x, kernel), dy))(kernel)

    np.testing.assert_allclose(
        jax.jit(jax.vmap(gradient))(kernels), np.stack([x.T @ dy] * 2), rtol=1e-4, atol=1e-4
    )
