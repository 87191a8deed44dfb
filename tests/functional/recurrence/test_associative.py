"""minGRU and minLSTM: the parallel scan against loops, long sequences, extreme gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, perturbed, shapes_of
from jax import lax

from jaxnets.functional.recurrence.associative import MinGRUCell, MinLSTMCell, linear_recurrence
from jaxnets.functional.recurrence.scan import recurrent_scan
from jaxnets.models.recurrent import Recurrent, SequenceClassifier

CELLS = {
    "mingru": MinGRUCell(),
    "minlstm": MinLSTMCell(),
    "mingru_identity": MinGRUCell(candidate="identity"),
    "minlstm_identity": MinLSTMCell(candidate="identity"),
}
LENGTHS = np.array([7, 3, 0, 5], np.int32)


def sequences(batch=4, time=7, channels=3):
    return np.random.default_rng(0).normal(size=(batch, time, channels)).astype(np.float32)


def made(module, *inputs):
    variables, _ = shapes_of(module, *inputs)
    return perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables), scale=0.4)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_loop(name, weights, x, length, start, *, reverse):
    """Run one sequence in NumPy, with the formulas of the paper."""
    weights = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    state, outputs = start, np.zeros((len(x), len(start)))
    for time in reversed(range(length)) if reverse else range(length):
        gates = x[time].astype(np.float64) @ weights["input_kernel"] + weights["bias"]
        *gates, candidate = np.split(gates, 2 if "gru" in name else 3)
        if "identity" not in name:
            candidate = np.where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
        if "gru" in name:
            update = sigmoid(gates[0])
            state = (1 - update) * state + update * candidate
        else:
            forget, input_gate = sigmoid(gates[0]), sigmoid(gates[1])
            state = (forget * state + input_gate * candidate) / (forget + input_gate)
        outputs[time] = state
    return outputs, state


@pytest.mark.parametrize("name", CELLS)
def test_a_layer_equals_its_formula_in_a_numpy_loop_in_both_directions(name):
    x, module = sequences(), Recurrent(5, cell=CELLS[name], bidirectional=True)
    variables = made(module, x)
    start = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    carry = {"forward_0": (start,), "backward_0": (start,)}
    outputs, carry = jax.jit(module.apply)(variables, x, LENGTHS, carry=carry)
    for index, length in enumerate(LENGTHS):
        for direction, half in (("forward_0", slice(0, 5)), ("backward_0", slice(5, 10))):
            expected, state = numpy_loop(
                name,
                variables["params"][direction],
                x[index],
                length,
                start[index],
                reverse=direction == "backward_0",
            )
            close(outputs[index, :, half], expected)
            close(carry[direction][0][index], state)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_recurrence_and_its_gradients_equal_a_loop(reverse, enable_x64):
    rng = np.random.default_rng(0)
    decay = jnp.asarray(rng.uniform(size=(9, 2, 3)))
    update, start = jnp.asarray(rng.normal(size=(9, 2, 3))), jnp.asarray(rng.normal(size=(2, 3)))

    def ours(decay, update, start):
        return linear_recurrence(decay, update, start, reverse=reverse)

    def loop(decay, update, start):
        def step(state, inputs):
            state = inputs[0] * state + inputs[1]
            return state, state

        return lax.scan(step, start, (decay, update), reverse=reverse)[1]

    def derivatives(run):
        def total(*arguments):
            return jnp.sum(jnp.sin(run(*arguments)))

        def second(*arguments):
            gradient = jax.grad(total, argnums=(0, 1, 2))(*arguments)
            return sum(jnp.sum(jnp.square(leaf)) for leaf in gradient)

        def all_of(*arguments):
            return (
                run(*arguments),
                jax.grad(total, argnums=(0, 1, 2))(*arguments),
                jax.grad(second, argnums=(0, 1, 2))(*arguments),
            )

        return jax.jit(all_of)(decay, update, start)

    close(derivatives(ours), derivatives(loop), 1e-10)


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_long_sequences_equal_single_steps_and_keep_finite_gradients(name):
    cell, time = CELLS[name], 4096
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(time, 2, 3)), jnp.float32)
    weights = {
        key: jnp.asarray(2 * rng.normal(size=shape), jnp.float32)
        for key, (_, shape) in cell.parameters(3, 4).items()
    }
    start = (jnp.zeros((2, 4)),)

    @jax.jit
    def run(weights, x):
        def loss(weights, x):
            outputs, carry = recurrent_scan(cell, weights, x, start)
            return jnp.mean(jnp.square(outputs)), (outputs, carry)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)

    @jax.jit
    def one_by_one(weights, x):
        def step(carry, now):
            carry = cell.step(weights, carry, cell.project(weights, now))
            return carry, carry[0]

        return lax.scan(step, start, x)

    (_, (outputs, carry)), gradients = run(weights, x)
    final, expected = one_by_one(weights, x)
    close((outputs, carry), (expected, final))
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all() and np.any(leaf)


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_gates_that_are_open_or_shut_give_the_limits_of_the_formula(name):
    cell = CELLS[name]
    signs = np.array(np.meshgrid(*[[-1, 0, 1]] * cell.num_gates)).reshape(cell.num_gates, -1)
    x = jnp.asarray(1e4 * signs[..., None], jnp.float32)

    @jax.jit
    def run(x):
        def total(x):
            states = linear_recurrence(*cell.coefficients(x), jnp.ones(1))
            return jnp.sum(states), states[:, 0]

        return jax.grad(total, has_aux=True)(x)

    gradient, states = run(x)
    assert np.isfinite(gradient).all()
    # Indexed by the gates, each shut, half open or open: update; forget and input.
    decays = {
        "mingru": np.array([1, 1 / 2, 0]),
        "minlstm": np.array([[1 / 2, 0, 0], [1, 1 / 2, 1 / 3], [1, 2 / 3, 1 / 2]]),
    }
    candidates, state, expected = {-1: 0.0, 0: 0.5, 1: 1e4 + 0.5}, 1.0, []
    for *gates, candidate in signs.T:
        decay = decays[name][tuple(gate + 1 for gate in gates)]
        state = decay * state + (1 - decay) * candidates[candidate]
        expected.append(state)
    np.testing.assert_allclose(states, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_chunks_of_a_sequence_with_the_carry_between_them_equal_the_whole(name):
    x, module = sequences(), Recurrent(5, cell=name, num_layers=2, residual=True)
    variables, run = made(module, x), jax.jit(module.apply)
    whole, final = run(variables, x)
    carry, pieces = module.zero_carry(4), []
    for piece in np.split(x, [1, 2, 4], axis=1):
        output, carry = run(variables, piece, carry=carry)
        pieces.append(output)
    close(np.concatenate(pieces, axis=1), whole)
    close(carry, final)


def test_padding_changes_neither_the_logits_nor_the_gradients():
    module = SequenceClassifier(3, 5, cell="minlstm", bidirectional=True)
    x, lengths = sequences(time=5), np.array([5, 2, 0, 4], np.int32)
    variables = made(module, x)
    padded = np.concatenate([x, x], axis=1)
    padded[np.arange(10)[None] >= lengths[:, None]] = np.nan

    @jax.jit
    def run(variables, x):
        return jax.value_and_grad(lambda v: jnp.sum(jnp.square(module.apply(v, x, lengths))))(
            variables
        )

    close(run(variables, padded), run(variables, x))


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"cell": "mingru", "num_layers": 2, "learned_carry": True}, 10 * 4 + 10 * 6 + 2 * 5),
        ({"cell": "minlstm", "bidirectional": True}, 2 * 15 * 4),
    ],
    ids=["mingru", "minlstm"],
)
def test_a_stack_passes_every_check(fields, parameters):
    check_module(Recurrent(5, **fields), sequences(), LENGTHS, num_parameters=parameters)


def test_an_unknown_candidate_is_refused_with_its_value():
    with pytest.raises(ValueError, match="candidate is 'tanh'; choose 'positive' or 'identity'"):
        MinGRUCell(candidate="tanh")


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((3, 2), (3, 2), (1,)), jnp.float32, "do not fit"),
        (((3, 1), (3, 2), (2,)), jnp.float32, "do not fit"),
        (((0, 2), (0, 2), (2,)), jnp.float32, "have no step"),
        (((3, 2), (3, 2), (2,)), jnp.int32, "give floats"),
    ],
)
def test_operands_of_a_recurrence_that_do_not_fit_are_refused(shapes, dtype, message):
    with pytest.raises(ValueError, match=message):
        linear_recurrence(*(jnp.ones(shape, dtype) for shape in shapes))


def test_a_recurrence_has_the_widest_type_of_its_operands():
    half, ones = jnp.full(3, 0.5, jnp.float32), jnp.ones(3, jnp.bfloat16)
    states = linear_recurrence(half, ones, jnp.array(2.001, jnp.bfloat16))
    assert states.dtype == jnp.float32
