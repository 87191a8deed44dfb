"""The custom gradient of the scan against the default one of a loop over single steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mostly_exhaustive
from jax import lax

from jaxnets.functional.recurrence import scan
from jaxnets.functional.recurrence.cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.functional.recurrence.scan import recurrent_scan, select_valid

CELLS = {
    "rnn": ElmanCell(),
    "lstm": LSTMCell(peephole=True),
    "gru_after": GRUCell(),
    "gru_before": GRUCell(reset="before"),
    "mgu": MinimalGatedCell(),
}
VALID = np.arange(6)[:, None] < np.array([[6, 2, 0]])


def problem(cell, dtype, steps=6):
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(0.5 * rng.normal(size=shape), dtype)
        for name, (_, shape) in cell.parameters(3, 4).items()
    }
    x = jnp.asarray(rng.normal(size=(steps, 3, 3)), dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    carry = tuple(jnp.asarray(rng.normal(size=(3, 4)), wide) for _ in cell.states)
    return weights, x, carry


def stepwise(cell, weights, x, carry, reverse, valid=VALID):
    """Scan over single steps, with JAX's default gradient."""

    def step(carry, inputs):
        projected, valid = inputs
        wide = projected.astype(carry[0].dtype)
        carry = select_valid(valid, cell.step(weights, carry, wide), carry)
        return carry, carry[0].astype(projected.dtype)

    carry, outputs = lax.scan(step, carry, (cell.project(weights, x), valid), reverse=reverse)
    return jnp.where(valid[..., None], outputs, jnp.zeros((), outputs.dtype)), carry


def loss(run):
    def total(*arguments):
        outputs, carry = run(*arguments)
        terms = [outputs.astype(carry[0].dtype), *carry]
        return sum(jnp.sum(jnp.sin(y * (1 + i))) for i, y in enumerate(terms))

    return total


def losses_and_arguments(name, dtype, reverse, valid=VALID):
    cell = CELLS[name]
    arguments = problem(cell, dtype, len(valid))

    def ours(weights, x, carry):
        return recurrent_scan(cell, weights, x, carry, valid=valid, reverse=reverse)

    def reference(weights, x, carry):
        return stepwise(cell, weights, x, carry, reverse, valid)

    return [loss(ours), loss(reference)], arguments


@pytest.mark.parametrize(
    ("name", "direction"),
    mostly_exhaustive(
        itertools.product(CELLS, ["forward", "reverse"]),
        [
            *(("rnn", "forward"), ("lstm", "reverse"), ("gru_after", "forward")),
            *(("gru_before", "reverse"), ("mgu", "forward")),
        ],
    ),
)
def test_the_gradient_equals_the_default_one_in_double_precision(name, direction, enable_x64):
    losses, arguments = losses_and_arguments(name, jnp.float64, direction == "reverse")

    @jax.jit
    def gradients(*arguments):
        return [jax.grad(loss, argnums=(0, 1, 2))(*arguments) for loss in losses]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        *gradients(*arguments),
    )


def test_the_gradient_can_be_differentiated_again(enable_x64):
    losses, (weights, x, carry) = losses_and_arguments("gru_before", jnp.float64, False)

    def curvature(f):
        def squared(kernel):
            gradient = jax.grad(f)({**weights, "recurrent_kernel": kernel}, x, carry)
            return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))

        return jax.jit(jax.grad(squared))(weights["recurrent_kernel"])

    found, expected = map(curvature, losses)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_in_bfloat16_the_gradient_is_more_accurate_than_the_default_one():
    """The default gradient of the kernel accumulates over the steps in bfloat16."""
    errors, every = [], np.ones((100, 3), bool)
    losses, (weights, x, carry) = losses_and_arguments("lstm", jnp.float32, False, every)
    true = jax.jit(jax.grad(losses[1]))(weights, x, carry)["recurrent_kernel"]
    for f in losses_and_arguments("lstm", jnp.bfloat16, False, every)[0]:
        narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
        gradient = jax.jit(jax.grad(f))(narrow, x.astype(jnp.bfloat16), carry)["recurrent_kernel"]
        assert gradient.dtype == jnp.bfloat16
        errors.append(float(jnp.linalg.norm(gradient.astype(jnp.float32) - true)))
    assert errors[0] < errors[1]
    assert errors[0] < 0.01 * float(jnp.linalg.norm(true))


def test_an_unrolled_loop_takes_the_same_steps(monkeypatch, enable_x64):
    losses, arguments = losses_and_arguments("gru_after", jnp.float64, True)
    monkeypatch.setattr(scan, "_unroll", lambda: 4)  # of 6 steps
    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*arguments) for f in losses
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)
    program = str(
        jax.make_jaxpr(jax.grad(lambda weights: losses[0](weights, *arguments[1:])))(arguments[0])
    )
    assert program.count("unroll=4") == 2


def test_members_of_a_population_have_the_gradients_of_single_runs():
    losses, (weights, x, carry) = losses_and_arguments("lstm", jnp.float32, True)
    gradient = jax.grad(losses[0])
    pair = jax.tree.map(lambda w: jnp.stack([w, -0.5 * w]), weights)
    population = jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(pair, x, carry)
    single = jax.jit(lambda pair: lax.map(lambda weights: gradient(weights, x, carry), pair))(pair)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), population, single
    )


@pytest.mark.parametrize(
    ("shape", "carry", "valid", "message"),
    [
        ((4, 3), (jnp.zeros((2, 5)),), None, r"inputs of shape \(4, 3\)"),
        ((4, 2, 3), (jnp.zeros((1, 5)),), None, "a carry of shapes"),
        ((4, 2, 3), jnp.zeros((2, 5)), None, "a carry of shapes"),
        ((4, 2, 3), (jnp.zeros((2, 5)),), jnp.ones((2, 4), bool), "valid steps of shape"),
        ((4, 2, 3), (jnp.zeros((2, 5)),), jnp.ones((4, 2)), "type float32"),
    ],
)
def test_arguments_of_a_scan_that_do_not_fit_are_refused(shape, carry, valid, message):
    cell = ElmanCell()
    weights = {name: jnp.ones(size) for name, (_, size) in cell.parameters(3, 5).items()}
    with pytest.raises(ValueError, match=message):
        recurrent_scan(cell, weights, jnp.ones(shape), carry, valid=valid)
