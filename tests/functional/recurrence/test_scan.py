"""The scan's own gradient against the plain one of a loop over single steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxnets.functional.recurrence import scan
from jaxnets.functional.recurrence.cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.functional.recurrence.scan import keep, recurrent_scan

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


def plain(cell, weights, x, carry, reverse, valid=VALID):
    """Scan over single steps, with the gradient that JAX gives it."""

    def step(carry, inputs):
        projected, now = inputs
        wide = projected.astype(carry[0].dtype)
        carry = keep(now, cell.step(weights, carry, wide), carry)
        return carry, carry[0].astype(projected.dtype)

    carry, outputs = lax.scan(step, carry, (cell.project(weights, x), valid), reverse=reverse)
    return jnp.where(valid[..., None], outputs, jnp.zeros((), outputs.dtype)), carry


def loss(run):
    def total(*arguments):
        outputs, carry = run(*arguments)
        terms = [outputs.astype(carry[0].dtype), *carry]
        return sum(jnp.sum(jnp.sin(y * (1 + i))) for i, y in enumerate(terms))

    return total


def both(name, dtype, reverse, valid=VALID):
    cell = CELLS[name]
    arguments = problem(cell, dtype, len(valid))

    def ours(weights, x, carry):
        return recurrent_scan(cell, weights, x, carry, valid=valid, reverse=reverse)

    def reference(weights, x, carry):
        return plain(cell, weights, x, carry, reverse, valid)

    return [loss(ours), loss(reference)], arguments


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", CELLS)
def test_the_gradient_equals_the_plain_one_in_double_precision(name, reverse, enable_x64):
    losses, arguments = both(name, jnp.float64, reverse)
    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in losses)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        *(
            found,
            expected,
        ),
    )


def test_the_gradient_can_be_differentiated_again(enable_x64):
    losses, (weights, x, carry) = both("gru_before", jnp.float64, False)

    def curvature(f):
        def squared(kernel):
            gradient = jax.grad(f)({**weights, "recurrent_kernel": kernel}, x, carry)
            return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))

        return jax.jit(jax.grad(squared))(weights["recurrent_kernel"])

    found, expected = map(curvature, losses)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_in_bfloat16_the_gradient_is_nearer_to_the_true_one_than_the_plain_one():
    """The plain gradient of the kernel adds up over the steps in bfloat16."""
    errors, every = [], np.ones((100, 3), bool)
    losses, (weights, x, carry) = both("lstm", jnp.float32, False, every)
    true = jax.jit(jax.grad(losses[1]))(weights, x, carry)["recurrent_kernel"]
    for f in both("lstm", jnp.bfloat16, False, every)[0]:
        narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
        gradient = jax.jit(jax.grad(f))(narrow, x.astype(jnp.bfloat16), carry)["recurrent_kernel"]
        assert gradient.dtype == jnp.bfloat16
        errors.append(float(jnp.linalg.norm(gradient.astype(jnp.float32) - true)))
    assert errors[0] < errors[1]
    assert errors[0] < 0.01 * float(jnp.linalg.norm(true))


def test_several_steps_at_once_are_the_same_steps(monkeypatch, enable_x64):
    losses, arguments = both("gru_after", jnp.float64, True)
    monkeypatch.setattr(scan, "_steps_at_once", lambda: 4)  # and two are left over
    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*arguments) for f in losses
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)
    program = str(
        jax.make_jaxpr(jax.grad(lambda weights: losses[0](weights, *arguments[1:])))(arguments[0])
    )
    assert program.count("unroll=4") == 2


def test_members_of_a_population_get_the_gradients_of_single_runs():
    losses, (weights, x, carry) = both("lstm", jnp.float32, True)
    gradient = jax.jit(jax.grad(losses[0]))
    pair = jax.tree.map(lambda w: jnp.stack([w, -0.5 * w]), weights)
    together = jax.jit(jax.vmap(jax.grad(losses[0]), in_axes=(0, None, None)))(pair, x, carry)
    for index in range(2):
        alone = gradient(jax.tree.map(lambda w, i=index: w[i], pair), x, carry)
        jax.tree.map(
            lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5),
            together,
            alone,
        )
