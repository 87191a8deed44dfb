"""The matmul of a linear layer, whose kernel gradient is computed transposed for few features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.matmul import linear, transposed_lhs_matmul, transposed_linear

# Rows, channels, features. Few features: the kernel gradient is computed transposed.
FEW_FEATURES = [(8, 6, 3), (64, 32, 10), (300, 256, 128)]
OTHERS = [(8, 6, 1), (8, 6, 4), (5, 12, 3), (512, 400, 130)]


def arrays(rows, channels, features, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (rows, channels), (channels, features), (rows, features)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def with_gradients(x, kernel, dy):
    y, pull = jax.vjp(linear, x, kernel)
    return y, *pull(dy)


@pytest.mark.parametrize("shape", FEW_FEATURES + OTHERS)
def test_the_product_and_its_gradients_are_those_of_numpy(shape):
    x, kernel, dy = arrays(*shape)
    expected = (x @ kernel, dy @ kernel.T, x.T @ dy, x.T @ dy)

    @jax.jit
    def results(x, kernel, dy):
        return *with_gradients(x, kernel, dy), transposed_lhs_matmul(x, dy)

    for ours, exact in zip(results(x, kernel, dy), expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


# Few rows are multiplied by slices of the table; 74 features have two, 37 have none.
TABLES = [((1, 1, 16), 64), ((3, 16), 74), ((2, 16, 16), 64), ((33, 16), 64), ((3, 16), 37)]


@pytest.mark.parametrize(("shape", "features"), TABLES)
def test_a_product_with_a_transposed_table_and_its_gradients_are_those_of_numpy(shape, features):
    rng = np.random.default_rng(0)
    x, table, dy = (
        rng.standard_normal(each, np.float32)
        for each in (shape, (features, shape[-1]), (*shape[:-1], features))
    )

    @jax.jit
    def results(x, table, dy):
        y, pull = jax.vjp(transposed_linear, x, table)
        return y, *pull(dy)

    rows, cotangents = x.reshape(-1, shape[-1]), dy.reshape(-1, features)
    expected = (x @ table.T, dy @ table, cotangents.T @ rows)
    for ours, exact in zip(results(x, table, dy), expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.lowering
@pytest.mark.parametrize(("rows", "transposed"), [(1, False), (8, False), (32, False), (33, True)])
def test_few_rows_do_not_transpose_the_table(rows, transposed, on_cpu):
    x, table = np.ones((rows, 16), np.float32), np.ones((640, 16), np.float32)
    program = jax.jit(transposed_linear).lower(x, table).as_text()
    assert ("tensor<16x640xf32>" in program) == transposed


@pytest.mark.lowering
@pytest.mark.parametrize("shape", FEW_FEATURES + OTHERS)
def test_few_features_transpose_the_kernel_gradient(shape, on_cpu):
    x, kernel, dy = arrays(*shape)

    def materialized(function, *operands):
        lines = jax.jit(function).lower(*operands).as_text().splitlines()
        return sum("call @" in line and 'inlineable = "false"' in line for line in lines)

    def gradient(x, kernel, dy):
        return jax.vjp(lambda kernel: linear(x, kernel), kernel)[1](dy)

    transposes = 2 * (shape in FEW_FEATURES)  # of dy and of the result
    assert materialized(gradient, x, kernel, dy) == transposes
    assert materialized(transposed_lhs_matmul, x, dy) == transposes
    narrow = [each.astype(jnp.bfloat16) for each in (x, dy)]
    assert materialized(transposed_lhs_matmul, *narrow) == 0


def test_bfloat16_products_are_rounded_once(on_cpu):
    narrow = [jnp.asarray(each, jnp.bfloat16) for each in arrays(64, 32, 48)]
    x, kernel, dy = (np.asarray(each, np.float64) for each in narrow)
    found, expected = jax.jit(with_gradients)(*narrow), (x @ kernel, dy @ kernel.T, x.T @ dy)
    for result, exact in zip(found, expected, strict=True):
        assert result.dtype == jnp.bfloat16
        # bfloat16 has 8 bits.
        np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.lowering
def test_bfloat16_matmuls_have_bfloat16_operands_and_float32_results(on_cpu):
    narrow = [jnp.asarray(each, jnp.bfloat16) for each in arrays(64, 32, 48)]
    program = jax.jit(with_gradients).lower(*narrow).as_text().splitlines()
    products = [line.split(" : ")[-1] for line in program if "stablehlo.dot_general" in line]
    assert len(products) == 3
    for types in products:
        assert types.count("xbf16>") == 2 and types.endswith("xf32>")


def test_forward_mode_and_second_derivatives_are_those_of_the_plain_product():
    x, kernel, _ = arrays(*FEW_FEATURES[0])
    tangents = (jnp.cos(x), jnp.cos(kernel))

    @jax.jit
    def derivatives(x, kernel, tangents):
        results = []
        for matmul in (linear, jnp.matmul):

            def loss(x, kernel, matmul=matmul):
                return jnp.sum(jnp.sin(matmul(x, kernel)))

            first = jax.jvp(loss, (x, kernel), tangents)[1]
            forward_over_reverse = jax.hessian(loss, (0, 1))(x, kernel)
            reverse_over_reverse = jax.jacrev(jax.grad(loss, (0, 1)), (0, 1))(x, kernel)
            results.append(jax.tree.leaves((first, forward_over_reverse, reverse_over_reverse)))
        return results

    for ours, plain in zip(*derivatives(x, kernel, tangents), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradients_of_a_population_are_those_of_its_members(dtype):
    x, kernel, _ = (jnp.asarray(each, dtype) for each in arrays(*FEW_FEATURES[1]))
    kernels = jnp.stack([kernel, 2 * kernel])

    def gradient(kernel):  # in proportion to the kernel
        return jax.grad(lambda kernel: jnp.sum(linear(x, kernel) ** 2, dtype=jnp.float32))(kernel)

    found = np.asarray(jax.jit(jax.vmap(gradient))(kernels), np.float64)
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    exact = 2 * x.T @ (x @ kernel)
    # In bfloat16 the cotangents are rounded before they are summed.
    digits = 1e-4 if dtype == jnp.float32 else 2**-7
    scale = np.max(np.abs(exact))
    np.testing.assert_allclose(found, [exact, 2 * exact], rtol=digits, atol=digits * scale)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3,)), ((2, 3), (4, 2)), ((), (3, 2)), ((2, 3), (2, 3, 4))]
)
def test_shapes_that_do_not_multiply_are_refused(shapes):
    x, kernel = map(jnp.ones, shapes)
    with pytest.raises(ValueError, match="do not fit a kernel of shape"):
        linear(x, kernel)
