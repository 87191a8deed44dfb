"""The recurrent language model: its layers, causality, padding, carries, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import (
    assert_trees_near,
    check_gradients,
    check_module,
    check_precision,
    count_parameters,
    random_variables,
)

from jaxnets.layers import Dropout
from jaxnets.models.recurrent import Recurrent, RecurrentLM

TOKENS = np.random.default_rng(0).integers(0, 9, size=(3, 7)).astype(np.int32)
LENGTHS = np.array([7, 3, 0], np.int32)


MODEL = RecurrentLM(9, embedding_size=4, hidden_size=5, cell="lstm", num_layers=2)
VARIABLES = random_variables(MODEL, TOKENS)
run = jax.jit(MODEL.apply)


@functools.cache
def decoding(cell):
    """Return a model, its variables, and its method `extend`, compiled."""
    module = MODEL.clone(cell=cell)
    extend = jax.jit(lambda *arguments: module.apply(*arguments, method="extend"))
    return module, random_variables(module, TOKENS), extend


def zero_carry(batch_size=3, module=MODEL):
    return module.apply(VARIABLES, batch_size, method="start")  # does not depend on the variables


FIELDS = {
    "gru": ({"cell": "gru", "num_layers": 2}, 36 + 15 * (10 + 11) + 2 * 5 + 6 * 9),
    "tied": (
        {"cell": "rnn", "tie_embeddings": True, "dropout_rate": 0.2, "locked_dropout": True},
        36 + 5 * 9 + 5 + 6 * 4,
    ),
}


def test_every_parameter_has_a_gradient_and_the_dtype_of_the_precision():
    fields, parameters = FIELDS["tied"]
    module = RecurrentLM(9, embedding_size=4, hidden_size=5, **fields)
    variables, inputs = random_variables(module, TOKENS), (TOKENS, LENGTHS)
    assert count_parameters(variables) == parameters
    check_gradients(module, variables, inputs, ("dropout",))
    check_precision(module, inputs, ("dropout",))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_a_language_model_passes_every_check(name):
    fields, parameters = FIELDS[name]
    module = RecurrentLM(9, embedding_size=4, hidden_size=5, **fields)
    check_module(module, TOKENS, LENGTHS, num_parameters=parameters)


@pytest.mark.parametrize("tied", [None, "same size", "projected"])
def test_logits_are_an_embedding_a_stack_and_a_matrix_product(tied):
    hidden_size = 4 if tied == "same size" else 5
    module = RecurrentLM(
        9, embedding_size=4, hidden_size=hidden_size, cell="mingru", tie_embeddings=bool(tied)
    )
    variables = random_variables(module, TOKENS)
    params = variables["params"]
    table = params["embedding"]["embedding"]
    stack = Recurrent(hidden_size, cell="mingru")
    x, _ = jax.jit(stack.apply)({"params": params["recurrent"]}, table[TOKENS])
    x, table = np.asarray(x), np.asarray(table)
    if tied == "projected":
        x = x @ np.asarray(params["projection"]["kernel"]) + np.asarray(
            params["projection"]["bias"]
        )
    if tied:
        expected = x @ table.T
    else:
        expected = x @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    assert_trees_near(jax.jit(module.apply)(variables, TOKENS), expected)


def test_future_tokens_do_not_change_past_logits():
    changed = np.where(np.arange(7)[None] < 4, TOKENS, (TOKENS + 1) % 9)
    before, after = run(VARIABLES, TOKENS), run(VARIABLES, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before[:, 4:] - after[:, 4:]).max(axis=2) > 1e-4).all()


def test_padding_changes_neither_valid_logits_nor_the_carry():
    carry = zero_carry()
    valid = np.arange(7)[None] < LENGTHS[:, None]
    logits, after = run(VARIABLES, TOKENS, LENGTHS, carry=carry)
    # -1 is no token: it is cleared before the embedding refuses it, or makes it NaN if compiled.
    unknown = np.where(valid, TOKENS, -1)
    for changed, apply in (
        (np.where(valid, TOKENS, (TOKENS + 1) % 9), run),
        (unknown, run),
        (unknown, MODEL.apply),
    ):
        other, same = apply(VARIABLES, changed, LENGTHS, carry=carry)
        assert_trees_near(other, logits, 1e-6)
        assert_trees_near(same, after, 1e-6)
    assert_trees_near(logits[valid], run(VARIABLES, TOKENS)[valid])


def test_decoding_accepts_padding_outside_the_vocabulary():
    module, variables, extend = decoding("gru")
    lengths, carry = np.array([3, 1, 0]), zero_carry(module=module)
    piece = np.where(np.arange(3)[None] < lengths[:, None], TOKENS[:, :3], -1)
    expected = extend(variables, TOKENS[:, :3], carry, lengths)
    assert_trees_near(extend(variables, piece, carry, lengths), expected, 1e-6)
    # Padding known while tracing: it must not reach the check of the embedding.
    jax.eval_shape(lambda v: module.apply(v, piece, carry, lengths, method="extend"), variables)


@pytest.mark.parametrize("cell", ["gru", "minlstm"])
def test_decoding_in_ragged_pieces_equals_the_full_forward(cell):
    module, variables, extend = decoding(cell)
    carry = module.apply(variables, 3, 16, method="start")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {3}
    full = jax.jit(module.apply)(variables, TOKENS)
    position = np.zeros(3, int)
    for lengths in ([3, 1, 0], [3, 3, 2], [0, 3, 1]):
        columns = np.minimum(position[:, None] + np.arange(3)[None], 6)
        piece = np.take_along_axis(TOKENS, columns, axis=1)
        logits, carry = extend(variables, piece, carry, np.array(lengths))
        for row, length in enumerate(lengths):
            start = position[row]
            assert_trees_near(logits[row, :length], full[row, start : start + length])
        position += lengths
    token = np.take_along_axis(TOKENS, np.minimum(position, 6)[:, None], axis=1)
    logits, _ = extend(variables, token, carry)
    for row in (0, 2):  # the other sequence is complete
        assert_trees_near(logits[row, 0], full[row, position[row]])
    at_once, _ = extend(variables, TOKENS, zero_carry(module=module))
    assert_trees_near(at_once, full)


def test_windows_with_the_carry_passed_on_equal_one_long_window():
    carry, pieces = zero_carry(), []
    for window in (TOKENS[:, :3], TOKENS[:, 3:6]):
        logits, carry = run(VARIABLES, window, carry=carry)
        pieces.append(logits)
    assert_trees_near(np.concatenate(pieces, axis=1), run(VARIABLES, TOKENS)[:, :6])


def test_no_gradient_crosses_the_boundary_of_a_window():
    module = MODEL.clone(num_layers=1)
    variables, carry = random_variables(module, TOKENS), zero_carry(module=module)

    def loss(first, second):
        _, between = module.apply(first, TOKENS[:, :4], carry=carry)
        logits, _ = module.apply(second, TOKENS[:, 4:], carry=between)
        return jnp.sum(jnp.sin(logits))

    of_first, of_second = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, variables)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_first))
    assert np.any(of_second["params"]["recurrent"]["forward_0"]["recurrent_kernel"])


def test_locked_dropout_draws_one_mask_for_all_steps_and_another_for_each_sequence():
    ones, rngs = jnp.ones((4, 6, 50)), {"dropout": jax.random.key(0)}
    dropped = Dropout(0.5, shared_axes=(1,)).apply({}, ones, train=True, rngs=rngs)
    np.testing.assert_array_equal(dropped, np.repeat(dropped[:, :1], 6, axis=1))
    assert len(np.unique(dropped[:, 0], axis=0)) == 4
    assert set(np.unique(dropped)) == {0, 2}


def test_locked_dropout_is_applied_between_layers():
    """The first layer's output is constant, so the second layer shows whether the mask varies."""
    x = jnp.ones((2, 5, 3))
    stack = Recurrent(6, cell="rnn", num_layers=2, dropout_rate=0.5, locked_dropout=True)
    variables = random_variables(stack, x)
    params = jax.tree.map(np.zeros_like, variables["params"])
    params["forward_0"]["bias"] = np.ones(6, np.float32)
    params["forward_1"]["input_kernel"] = np.eye(6, dtype=np.float32)

    @jax.jit
    def run(params, key):
        return [
            module.apply({"params": params}, x, train=True, rngs={"dropout": key})[0]
            for module in (stack, stack.clone(locked_dropout=False))
        ]

    locked, free = run(params, jax.random.key(0))
    np.testing.assert_array_equal(locked, np.repeat(locked[:, :1], 5, axis=1))
    assert np.any(locked[0] != locked[1])
    assert np.any(free[:, 0] != free[:, 1])


def test_an_unknown_token_in_a_compiled_program_gives_nan_logits_from_there_on():
    wrong = TOKENS.copy()
    wrong[1, 3] = 9
    logits = run(VARIABLES, wrong)
    assert np.isnan(logits[1, 3:]).all()
    assert np.isfinite(logits[1, :3]).all() and np.isfinite(logits[::2]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecurrentLM(0), "vocabulary_size=0"),
        (lambda: RecurrentLM(9, embedding_size=-1), "embedding_size=-1"),
        (lambda: RecurrentLM(9, dropout_rate=1.5), "dropout rate 1.5"),
        (lambda: RecurrentLM(9, cell="gpt"), "'gpt'; choose from .*mingru, minlstm"),
        (lambda: MODEL.apply(VARIABLES, TOKENS + 3), "token id .* outside the vocabulary of 9"),
        (lambda: MODEL.apply(VARIABLES, TOKENS * 0.5), "float.*give integers"),
        (lambda: MODEL.apply(VARIABLES, TOKENS[0]), r"\(7,\); give \[batch, time\]"),
        (lambda: MODEL.apply(VARIABLES, TOKENS[:, :0]), "no time step"),
        (lambda: MODEL.apply(VARIABLES, TOKENS, np.array([8, 1, 1])), r"length 8 is not in"),
        (
            lambda: MODEL.apply(VARIABLES, TOKENS, carry=zero_carry(2)),
            r"\(2, 5\).*zero_carry\(3\)",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
