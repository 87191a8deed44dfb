"""Loop-invariant matmuls with small and large kernels, against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxnets.functional.recurrence import loop_matmul
from jaxnets.functional.recurrence.cells import GRUCell, LSTMCell
from jaxnets.functional.recurrence.loop_matmul import (
    LoopKernel,
    kernel_gradient_over_time,
    loop_matmuls,
    perturbed_matmul,
)
from jaxnets.functional.recurrence.scan import recurrent_scan

# One kernel smaller than `_LARGE_KERNEL`, two that are not; the columns of the last one alias.
KERNELS = [(7, 12), (512, 513), (128, 2048)]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(found, expected):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("steps", [2, 50])
@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_matmuls_in_a_loop_equal_plain_ones(shape, steps):
    kernel, rows = normal(*shape), normal(5, shape[0], seed=1)

    @jax.jit
    def run(kernel, rows):
        (product,) = loop_matmuls([kernel], steps=steps)
        return product(rows)

    close(run(kernel, rows), rows @ kernel)


@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_gradients_equal_plain_ones(shape):
    hidden, columns = shape
    kernel, rows, weights = normal(*shape), normal(3, 4, hidden, seed=1), normal(3, 4, columns)

    def loss(kernel, rows):
        return jnp.sum(jnp.sin(rows @ kernel / hidden**0.5) * weights)

    @jax.jit
    def found(kernel, rows):
        def total(rows, perturbations):
            loop_kernel, steps = LoopKernel.of(kernel), zip(perturbations, rows, strict=True)
            products = [perturbed_matmul(loop_kernel, *step) for step in steps]
            return jnp.sum(jnp.sin(jnp.stack(products) / hidden**0.5) * weights)

        drows, cotangents = jax.grad(total, (0, 1))(rows, jnp.zeros_like(weights))
        return kernel_gradient_over_time(rows, cotangents), drows

    expected = jax.jit(jax.grad(loss, (0, 1)))(kernel, rows)
    for ours, plain in zip(found(kernel, rows), expected, strict=True):
        close(ours, plain)


@pytest.mark.parametrize("cell", [LSTMCell(), GRUCell(reset="before")], ids=["lstm", "gru"])
def test_a_recurrent_layer_with_a_large_kernel_equals_its_single_steps(cell, monkeypatch):
    """Value, gradient and the gradient of its squared norm; alone and in a population."""
    monkeypatch.setattr(loop_matmul, "_LARGE_KERNEL", 1)
    monkeypatch.setattr(loop_matmul, "_ALIASED_FEATURES", 4)
    weights = {
        name: 0.5 * normal(*shape, seed=index)
        for index, (name, (_, shape)) in enumerate(cell.parameters(3, 4).items())
    }
    x, carry = normal(9, 2, 3, seed=7), tuple(normal(2, 4, seed=8) for _ in cell.states)

    def ours(weights):
        outputs, _ = recurrent_scan(cell, weights, x, carry)
        return jnp.sum(jnp.sin(outputs))

    def plain(weights):
        def step(carry, now):
            carry = cell.step(weights, carry, now)
            return carry, carry[0]

        return jnp.sum(jnp.sin(lax.scan(step, carry, cell.project(weights, x))[1]))

    def curvature(loss):
        def squared(weights):
            gradient = jax.grad(loss)(weights)
            return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))

        return jax.grad(squared)

    pair = jax.tree.map(lambda w: jnp.stack([w, -0.5 * w]), weights)

    @jax.jit
    def results(pair):
        population = [jax.vmap(make(ours))(pair) for make in (jax.grad, curvature)]
        alone = lax.map(jax.value_and_grad(ours), pair)
        return [*population, alone]

    @jax.jit
    def expected_results(pair):
        value, gradient = lax.map(jax.value_and_grad(plain), pair)
        return [gradient, lax.map(curvature(plain), pair), (value, gradient)]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
        *(results(pair), expected_results(pair)),
    )


@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_bfloat16_products_are_not_rounded_and_their_gradients_once(shape):
    kernel, rows = normal(*shape), normal(3, 5, shape[0], seed=1)
    cotangents = normal(3, 5, shape[1], seed=2)
    kernel, rows, cotangents = (x.astype(jnp.bfloat16) for x in (kernel, rows, cotangents))
    wide = [x.astype(jnp.float32) for x in (kernel, rows, cotangents)]
    (product,) = loop_matmuls([kernel], steps=3)
    close(jax.jit(product)(rows[0]), wide[1][0] @ wide[0])
    expected = jnp.einsum("tbh,tbc->hc", *wide[1:])
    gradient = jax.jit(kernel_gradient_over_time)(rows, cotangents)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)
