"""Recurrent stacks: cells against their formulas, the scan against loops, padding, carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import (
    assert_trees_near,
    check_module,
    count_parameters,
    mostly_slow,
    random_variables,
    shapes_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets.core import Precision
from jaxnets.functional.recurrence import scan
from jaxnets.functional.recurrence.cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.models.recurrent import Recurrent

CELLS = {
    "rnn": ElmanCell(),
    "rnn_relu": ElmanCell(activation=jax.nn.relu),
    "lstm": LSTMCell(),
    "lstm_peephole": LSTMCell(peephole=True),
    "lstm_layer_norm": LSTMCell(layer_norm=True),
    "gru_after": GRUCell(reset="after"),
    "gru_before": GRUCell(reset="before"),
    "mgu": MinimalGatedCell(),
}
LENGTHS = np.array([7, 3, 0, 5], np.int32)


def sequences(batch=4, time=7, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, time, channels)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def standardized(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def numpy_step(name, weights, x, states):
    """One step of one sequence in NumPy, gate by gate, from the formula of the paper."""
    weights = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    h, size = states[0], len(states[0])

    def gate(kernel, vector, index):
        return (vector @ weights[kernel])[index * size : (index + 1) * size]

    def summed(index, hidden=h):
        bias = weights["bias"][index * size : (index + 1) * size]
        return gate("input_kernel", x, index) + gate("recurrent_kernel", hidden, index) + bias

    if name.startswith("rnn"):
        return (np.tanh(summed(0)) if name == "rnn" else np.maximum(summed(0), 0),)
    if name == "mgu":
        f = sigmoid(summed(0))
        return ((1 - f) * h + f * np.tanh(summed(1, f * h)),)
    if name == "gru_before":
        r, z = sigmoid(summed(0)), sigmoid(summed(1))
        return (z * h + (1 - z) * np.tanh(summed(2, r * h)),)
    if name == "gru_after":
        r, z = sigmoid(summed(0)), sigmoid(summed(1))
        inner = gate("recurrent_kernel", h, 2) + weights["candidate_bias"]
        n = np.tanh(gate("input_kernel", x, 2) + weights["bias"][2 * size :] + r * inner)
        return (z * h + (1 - z) * n,)
    c = states[1]
    if name == "lstm_layer_norm":
        projected = standardized(x @ weights["input_kernel"]) * weights["input_scale"]
        recurrent = standardized(h @ weights["recurrent_kernel"]) * weights["recurrent_scale"]
        i, f, g, o = np.split(projected + recurrent + weights["bias"], 4)
    else:
        i, f, g, o = (summed(index) for index in range(4))
    p = weights.get("peephole", np.zeros((3, size)))
    after = sigmoid(f + p[1] * c) * c + sigmoid(i + p[0] * c) * np.tanh(g)
    normed = after
    if name == "lstm_layer_norm":
        normed = standardized(after) * weights["memory_scale"] + weights["memory_bias"]
    return sigmoid(o + p[2] * after) * np.tanh(normed), after


def numpy_loop(name, weights, x, length, *, reverse):
    size = weights["recurrent_kernel"].shape[0]
    states = (np.zeros(size),) * len(CELLS[name].states)
    outputs = np.zeros((len(x), size))
    for time in reversed(range(length)) if reverse else range(length):
        states = numpy_step(name, weights, x[time].astype(np.float64), states)
        outputs[time] = states[0]
    return outputs, states


@pytest.mark.parametrize("name", CELLS)
def test_a_layer_equals_its_formula_in_a_numpy_loop_in_both_directions(name):
    x, module = sequences(), Recurrent(5, cell=CELLS[name], bidirectional=True)
    variables = random_variables(module, x)
    outputs, carry = jax.jit(module.apply)(variables, x, LENGTHS)
    for index, length in enumerate(LENGTHS):
        for direction, half in (("forward_0", slice(0, 5)), ("backward_0", slice(5, 10))):
            expected, states = numpy_loop(
                name,
                variables["params"][direction],
                x[index],
                length,
                reverse=direction == "backward_0",
            )
            assert_trees_near(outputs[index, :, half], expected)
            assert_trees_near(tuple(state[index] for state in carry[direction]), states)


@pytest.mark.parametrize(
    ("name", "reverse"),
    mostly_slow(
        [
            ("rnn", False),
            ("lstm_peephole", True),
            ("lstm_layer_norm", False),
            ("gru_after", True),
            ("gru_before", False),
            ("mgu", True),
        ],
        [("lstm_layer_norm", False), ("mgu", True)],
    ),
)
def test_the_scan_and_its_gradients_equal_a_loop_of_single_steps(name, reverse):
    """The loop runs each sequence separately, cut to its length, without a mask."""
    cell, lengths = CELLS[name], np.array([3, 1])
    x = jnp.asarray(np.swapaxes(sequences(batch=2, time=3), 0, 1))  # [time, batch, channels]
    rng = np.random.default_rng(1)
    weights = {
        key: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)
        for key, (_, shape) in cell.parameters(3, 5).items()
    }
    start = tuple(jnp.asarray(rng.normal(size=(2, 5)), jnp.float32) for _ in cell.states)
    valid = np.arange(3)[:, None] < lengths[None]

    def scanned(weights, x, start):
        return scan.recurrent_scan(cell, weights, x, start, valid=valid, reverse=reverse)

    def looped(weights, x, start):
        outputs, finals = [], []
        for index, length in enumerate(lengths):
            states = tuple(state[index : index + 1] for state in start)
            rows = [jnp.zeros((1, 5))] * 3
            for time in reversed(range(length)) if reverse else range(length):
                projected = cell.project(weights, x[time, index : index + 1])
                states = cell.step(weights, states, projected)
                rows[time] = states[0]
            outputs.append(jnp.stack(rows))
            finals.append(states)
        return jnp.concatenate(outputs, axis=1), jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *finals
        )

    def result_and_gradients(run):
        def loss(*arguments):
            result = run(*arguments)
            leaves = jax.tree.leaves(result)
            random = np.random.default_rng(2)
            noise = [jnp.asarray(random.normal(size=y.shape), y.dtype) for y in leaves]
            return sum(jnp.vdot(a, b) for a, b in zip(noise, leaves, strict=True)), result

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(weights, x, start)

    assert_trees_near(result_and_gradients(scanned), result_and_gradients(looped), 3e-5)


STACKS = {
    "lstm_options": (
        {"cell": LSTMCell(peephole=True, layer_norm=True)},
        20 * 9 + 15 + 2 * 20 + 2 * 5,
    ),
    "bidirectional_gru": (
        {"cell": "gru", "bidirectional": True, "num_layers": 2},
        2 * (15 * (9 + 16) + 2 * 5),
    ),
    "residual_mgu": (
        {"cell": "mgu", "num_layers": 2, "residual": True, "dropout_rate": 0.2},
        10 * (9 + 11),
    ),
    "learned_carry": ({"cell": GRUCell(reset="before"), "learned_carry": True}, 15 * 9 + 5),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_has_the_parameters_of_its_layers(name):
    fields, parameters = STACKS[name]
    variables, _ = shapes_of(Recurrent(5, **fields), sequences(), LENGTHS)
    assert count_parameters(variables) == parameters


@pytest.mark.parametrize("name", mostly_slow(STACKS, ["learned_carry"]))
def test_a_stack_passes_every_check(name):
    fields, parameters = STACKS[name]
    check_module(Recurrent(5, **fields), sequences(), LENGTHS, num_parameters=parameters)


STACK = Recurrent(4, cell="lstm", num_layers=2, bidirectional=True, residual=True)
X = sequences(3, 6, 8)
STACK_VARIABLES = random_variables(STACK, X)
run_stack = jax.jit(STACK.apply)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 6), min_size=3, max_size=3), st.sampled_from([0, 1e3, np.nan]))
def test_padding_changes_neither_outputs_nor_carry(lengths, padding):
    lengths = np.array(lengths, np.int32)
    padded = np.concatenate([X, np.zeros((3, 4, 8), np.float32)], axis=1)
    padded = np.where(np.arange(10)[None, :, None] < lengths[:, None, None], padded, padding)
    outputs, carry = run_stack(STACK_VARIABLES, X, lengths)
    more, same_carry = run_stack(STACK_VARIABLES, padded.astype(np.float32), lengths)
    assert_trees_near(more[:, :6], outputs, 1e-6)
    np.testing.assert_array_equal(more[:, 6:], 0)
    assert_trees_near(same_carry, carry, 1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_two_windows_with_the_carry_passed_on_equal_one_call(cell):
    x, module = sequences(time=6), Recurrent(5, cell=cell, num_layers=2, residual=True)
    variables, run = random_variables(module, x), jax.jit(module.apply)
    whole, final = run(variables, x)
    first, carry = run(variables, x[:, :3], carry=module.zero_carry(4))
    second, carry = run(variables, x[:, 3:], carry=carry)
    assert_trees_near(np.concatenate([first, second], axis=1), whole)
    assert_trees_near(carry, final)


def test_single_steps_in_a_compiled_loop_equal_one_call():
    x, module = sequences(), Recurrent(5, num_layers=2)
    variables = random_variables(module, x)

    @jax.jit
    def both(variables, x):
        def step(carry, now):
            output, carry = module.apply(variables, now[:, None], carry=carry)
            return carry, output[:, 0]

        single_steps = jax.lax.scan(step, module.zero_carry(4), jnp.swapaxes(x, 0, 1))
        return single_steps, module.apply(variables, x)

    (carry, outputs), (whole, final) = both(variables, x)
    assert_trees_near(np.swapaxes(outputs, 0, 1), whole)
    assert_trees_near(carry, final)


def test_a_learned_carry_is_the_initial_one_unless_a_carry_is_given():
    x, module = sequences(), Recurrent(5, learned_carry=True)
    variables, run = random_variables(module, x), jax.jit(module.apply)
    params = variables["params"]["forward_0"]
    rows = (params["initial_hidden"], params["initial_memory"])
    start = {"forward_0": tuple(np.repeat(row[None], 4, axis=0) for row in rows)}
    outputs, carry = run(variables, x)
    assert_trees_near((outputs, carry), run(variables, x, carry=start))
    zero, _ = run(variables, x, carry=module.zero_carry(4))
    assert np.abs(zero - outputs).max() > 1e-3
    outputs, carry = run(variables, x, np.zeros(4, np.int32))  # sequences without a step
    np.testing.assert_array_equal(outputs, 0)
    assert_trees_near(carry, start)


def test_dropout_is_applied_between_layers_only():
    x = sequences()
    single = Recurrent(5, cell="rnn", dropout_rate=0.9)
    # Without the rng stream "dropout": a single layer draws no mask.
    trained, evaluated = jax.jit(
        lambda variables: [single.apply(variables, x, train=train) for train in (True, False)]
    )(random_variables(single, x))
    assert_trees_near(trained, evaluated)
    double = Recurrent(5, cell="rnn", num_layers=2, dropout_rate=0.9)
    run = jax.jit(double.apply, static_argnames="train")
    variables, rngs = random_variables(double, x), {"dropout": jax.random.key(0)}
    trained, carry = run(variables, x, train=True, rngs=rngs)
    evaluated, same = run(variables, x)
    assert_trees_near(carry["forward_0"], same["forward_0"])
    assert np.abs(trained - evaluated).max() > 1e-2


def test_recurrent_kernels_start_orthogonal_per_gate_and_the_forget_gate_starts_open():
    module = Recurrent(8, cell=LSTMCell(forget_bias=2.0))
    variables = jax.jit(module.init)(jax.random.key(0), sequences())
    params = jax.tree.map(np.asarray, variables["params"]["forward_0"])
    for gate in np.split(params["recurrent_kernel"], 4, axis=1):
        assert_trees_near(gate.T @ gate, np.eye(8))
    np.testing.assert_array_equal(params["bias"], np.repeat([0.0, 2.0, 0.0, 0.0], 8))


@pytest.mark.parametrize("name", ["lstm_layer_norm", "gru_before"])
def test_bfloat16_arithmetic_is_close_to_float32_and_the_carry_stays_float32(name):
    x, module = sequences(), Recurrent(16, cell=CELLS[name])
    variables = random_variables(module, x)
    half = module.clone(precision=Precision(compute=jnp.bfloat16))
    outputs, _ = jax.jit(module.apply)(variables, x)
    half_outputs, carry = jax.jit(half.apply)(variables, x)
    assert {state.dtype for state in carry["forward_0"]} == {jnp.dtype(jnp.float32)}
    assert np.abs(half_outputs - outputs).max() < 0.05 * np.abs(outputs).max()


@pytest.mark.parametrize("cell", mostly_slow(["gru", "lstm", "mingru"], ["gru"]))
def test_gradients_of_a_long_sequence_are_summed_in_float32_by_bfloat16_arithmetic(cell):
    x = sequences(batch=2, time=2048)

    def gradients(compute):
        module = Recurrent(4, cell=cell, precision=Precision(compute=compute))
        params = module.init(jax.random.key(0), x)["params"]

        def total(params):
            return jnp.sum(module.apply({"params": params}, x)[0].astype(jnp.float32))

        return jax.jit(jax.grad(total))(params)

    def check(narrow, wide):
        assert jnp.linalg.norm(narrow - wide) < 0.03 * jnp.linalg.norm(wide)

    jax.tree.map(check, gradients(jnp.bfloat16), gradients(jnp.float32))


def test_a_length_out_of_range_in_a_compiled_program_gives_nan_for_its_sequence_only():
    for wrong in (-1, 7):
        lengths = np.array([6, wrong, 2], np.int32)
        outputs, carry = run_stack(STACK_VARIABLES, X, lengths)
        for leaf in jax.tree.leaves((outputs, carry)):
            assert np.isnan(leaf[1]).all() and np.isfinite(leaf[::2]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recurrent(0), "hidden_size=0"),
        (lambda: Recurrent(5, dropout_rate=1.0), "dropout rate 1.0"),
        (lambda: Recurrent(5, cell="ltsm"), "'ltsm'; choose from rnn, lstm, gru, mgu"),
        (lambda: GRUCell(reset="never"), "'never'"),
        (lambda: shapes_of(Recurrent(5), X[0]), r"\(6, 8\).*inputs\[None\]"),
        (lambda: shapes_of(Recurrent(5), X[:, :0]), r"\(3, 0, 8\) have no time step"),
        (lambda: apply_stack(np.array([6, 7, 1])), r"length 7 is not in \[0, 6\]"),
        (lambda: apply_stack(np.array([6, -2, 1])), r"length -2 is not in \[0, 6\]"),
        (lambda: apply_stack(np.array([6.0, 2.0, 1.0])), "float.*one integer for each"),
        (lambda: apply_stack(np.array([6, 2])), r"\(2,\).*fit 3 rows"),
        (lambda: apply_stack(carry=STACK.zero_carry(2)), r"\(2, 4\).*zero_carry\(3\)"),
        (lambda: apply_stack(carry=Recurrent(4).zero_carry(3)), "backward_1"),
        (
            lambda: apply_stack(carry=STACK.clone(cell="gru").zero_carry(3)),
            r"'forward_0': \(\(3, 4\),\)",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def apply_stack(*inputs, **keywords):
    return STACK.apply(STACK_VARIABLES, X, *inputs, **keywords)
