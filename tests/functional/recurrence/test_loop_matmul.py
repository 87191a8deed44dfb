"""Products with one kernel at every step of a loop, small and large, against the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxnets.functional.recurrence import loop_matmul
from jaxnets.functional.recurrence.cells import GRUCell, LSTMCell
from jaxnets.functional.recurrence.loop_matmul import (
    LoopKernel,
    kernel_gradient,
    loop_matmuls,
    matmul_with_tap,
)
from jaxnets.functional.recurrence.scan import recurrent_scan

# One below and one from `_LARGE_KERNEL` on; the last one's columns fall into the same cache sets.
KERNELS = [(7, 12), (512, 513), (128, 2048)]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(found, expected):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("steps", [2, 50])
@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_products_of_a_loop_equal_plain_ones(shape, steps):
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
        def total(rows, tap):
            loop_kernel = LoopKernel.of(kernel)
            products = [matmul_with_tap(loop_kernel, tap[i], rows[i]) for i in range(len(rows))]
            return jnp.sum(jnp.sin(jnp.stack(products) / hidden**0.5) * weights)

        drows, tapped = jax.grad(total, (0, 1))(rows, jnp.zeros_like(weights))
        return kernel_gradient(rows, tapped), drows

    for ours, plain in zip(found(kernel, rows), jax.grad(loss, (0, 1))(kernel, rows), strict=True):
        close(ours, plain)


@pytest.mark.parametrize("cell", [LSTMCell(), GRUCell(reset="before")], ids=["lstm", "gru"])
def test_a_recurrent_layer_with_a_large_kernel_equals_its_single_steps(cell, monkeypatch):
    """Value, gradient and the gradient of the gradient's norm; alone and in a population."""
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
    for make in (jax.value_and_grad, curvature):
        found = jax.jit(jax.vmap(make(ours)))(pair)
        for index in range(2):
            alone = jax.tree.map(lambda w, i=index: w[i], pair)
            expected = jax.jit(make(plain))(alone)
            jax.tree.map(
                lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=2e-4),
                found,
                expected,
            )


@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_narrow_products_are_not_rounded_and_their_gradients_once(shape):
    kernel, rows = normal(*shape), normal(3, 5, shape[0], seed=1)
    cotangents = normal(3, 5, shape[1], seed=2)
    kernel, rows, cotangents = (x.astype(jnp.bfloat16) for x in (kernel, rows, cotangents))
    wide = [x.astype(jnp.float32) for x in (kernel, rows, cotangents)]
    (product,) = loop_matmuls([kernel], steps=3)
    close(jax.jit(product)(rows[0]), wide[1][0] @ wide[0])
    expected = jnp.einsum("tbh,tbc->hc", *wide[1:])
    gradient = jax.jit(kernel_gradient)(rows, cotangents)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)
