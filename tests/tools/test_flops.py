"""Counts of operations against counts by hand, XLA's analysis and the platform's algorithm."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxnets as jn
from jaxnets import functional
from jaxnets.tools.flops import count_flops


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_a_scan_counts_all_its_steps_and_states_that_only_later_steps_read():
    def run(start, matrix, xs):
        def step(carry, x):
            used, between, unused = carry
            return (used + between, x @ matrix, jnp.sin(unused)), jnp.exp(x)

        return lax.scan(step, (start, start, start), xs)[0][0]

    # Ten steps of a product [3] x [3, 3], of which the sum of 3 elements reads the earlier one.
    assert count_flops(run, shape(3), shape(3, 3), shape(10, 3)) == 10 * (2 * 9 + 3)


def test_an_lstm_over_a_longer_sequence_takes_proportionally_more():
    module = jn.Recurrent(8)

    def flops(time):
        variables = jax.eval_shape(module.init, jax.random.key(0), shape(2, time, 4))
        return count_flops(module.apply, variables, shape(2, time, 4))

    assert flops(60) == pytest.approx(6 * flops(10), rel=0.01)
    products = 60 * 2 * 2 * (4 + 8) * 32
    assert products < flops(60) < 1.5 * products


def test_a_convolution_has_the_operations_of_its_definition_whatever_computes_it():
    x, kernel = shape(2, 16, 16, 32), shape(3, 3, 32, 32)
    products = 2 * (2 * 16 * 16 * 32) * (9 * 32)
    assert count_flops(functional.convolution, x, kernel) == products

    def loss(x, kernel):
        return jnp.sum(functional.convolution(x, kernel))

    # The gradient of the kernel, and that of both; the forward pass of a sum is not needed.
    assert count_flops(jax.grad(loss, 1), x, kernel) == pytest.approx(products, rel=0.01)
    assert count_flops(jax.grad(loss, (0, 1)), x, kernel) == pytest.approx(2 * products, rel=0.01)


def test_strided_grouped_and_transposed_convolutions_count_what_they_multiply():
    x = shape(2, 8, 8, 4)

    def convolve(x, kernel, **options):
        numbers = ("NHWC", "HWIO", "NHWC")
        options = {"window_strides": (1, 1), "padding": "SAME", **options}
        return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)

    strided = count_flops(lambda *o: convolve(*o, window_strides=(2, 2)), x, shape(3, 3, 4, 6))
    assert strided == 2 * (2 * 4 * 4 * 6) * 9 * 4
    grouped = count_flops(lambda *o: convolve(*o, feature_group_count=4), x, shape(3, 3, 1, 8))
    assert grouped == 2 * (2 * 8 * 8 * 8) * 9
    up = count_flops(
        lambda *o: convolve(*o, lhs_dilation=(2, 2), padding=((2, 2), (2, 2))),
        x,
        shape(4, 4, 4, 6),
    )
    assert up == 2 * (2 * 16 * 16 * 6) * 16 * 4 / 4


def test_branches_loops_integers_and_unused_results():
    def branch(x):
        return lax.cond(x[0] > 0, lambda x: x, lambda x: jnp.exp(jnp.sin(x)), x)

    assert count_flops(branch, shape(5)) == 10
    assert count_flops(lambda x: lax.while_loop(lambda x: x[0] < 9, jnp.exp, x), shape(5)) == 5
    assert count_flops(lambda x: x * x + 1, shape(5, dtype=jnp.int32)) == 0
    assert count_flops(lambda x: (jnp.exp(x), x + 1)[1], shape(5)) == 5
    assert count_flops(lambda x: jax.jit(lambda x: (jnp.exp(x), x + 1))(x)[1], shape(5)) == 5


def test_the_count_of_a_network_without_loops_is_about_that_of_xla():
    module = jn.MLP(features=(32, 32), num_outputs=4, norm="layer")
    x = jnp.ones((16, 8))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    ours = count_flops(module.apply, variables, x)
    xla = jax.jit(module.apply).lower(variables, x).compile().cost_analysis()["flops"]
    assert ours == pytest.approx(xla, rel=0.1)
