"""The recurrent language model: against its parts, causality, padding, carries, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, perturbed, shapes_of

from jaxnets.layers import Dropout
from jaxnets.models.recurrent import Recurrent, RecurrentLM

TOKENS = np.random.default_rng(0).integers(0, 9, size=(3, 7)).astype(np.int32)
LENGTHS = np.array([7, 3, 0], np.int32)


def made(module, *inputs):
    variables, _ = shapes_of(module, *inputs)
    return perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables), scale=0.4)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


MODEL = RecurrentLM(9, embedding_size=4, hidden_size=5, cell="lstm", num_layers=2)
VARIABLES = made(MODEL, TOKENS)
run = jax.jit(MODEL.apply)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"cell": "gru", "num_layers": 2}, 36 + 15 * (10 + 11) + 2 * 5 + 6 * 9),
        (
            {"cell": "rnn", "tie_embeddings": True, "dropout_rate": 0.2, "locked_dropout": True},
            36 + 5 * 9 + 5 + 6 * 4,
        ),
    ],
    ids=["gru", "tied"],
)
def test_a_language_model_passes_every_check(fields, parameters):
    module = RecurrentLM(9, embedding_size=4, hidden_size=5, **fields)
    check_module(module, TOKENS, LENGTHS, num_parameters=parameters)


@pytest.mark.parametrize("tied", [None, "same size", "projected"])
def test_logits_are_a_table_a_stack_and_a_product(tied):
    hidden_size = 4 if tied == "same size" else 5
    module = RecurrentLM(
        9, embedding_size=4, hidden_size=hidden_size, cell="mingru", tie_embeddings=bool(tied)
    )
    variables = made(module, TOKENS)
    params = variables["params"]
    table = params["embedding"]["embedding"]
    stack = Recurrent(hidden_size, cell="mingru")
    x, _ = stack.apply({"params": params["recurrent"]}, table[TOKENS])
    if tied == "projected":
        x = x @ params["projection"]["kernel"] + params["projection"]["bias"].reshape(1, 1, -1)
    if tied:
        expected = x @ table.T
    else:
        expected = x @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, 1, -1)
    close(jax.jit(module.apply)(variables, TOKENS), expected)


def test_future_tokens_do_not_change_past_logits():
    changed = np.where(np.arange(7)[None] < 4, TOKENS, (TOKENS + 1) % 9)
    before, after = run(VARIABLES, TOKENS), run(VARIABLES, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before[:, 4:] - after[:, 4:]).max(axis=2) > 1e-4).all()


def test_padding_has_no_influence_on_valid_logits_and_the_carry():
    carry = MODEL.apply(VARIABLES, 3, method="start")
    valid = np.arange(7)[None] < LENGTHS[:, None]
    logits, after = run(VARIABLES, TOKENS, LENGTHS, carry=carry)
    # -1 is no token: it must be cleared before the table refuses it, or makes it NaN if compiled.
    for changed in (np.where(valid, TOKENS, (TOKENS + 1) % 9), np.where(valid, TOKENS, -1)):
        for apply in (run, MODEL.apply):
            other, same = apply(VARIABLES, changed, LENGTHS, carry=carry)
            close(other, logits, 1e-6)
            close(same, after, 1e-6)
    close(logits[valid], run(VARIABLES, TOKENS)[valid])


def test_a_piece_may_be_padded_with_what_is_no_token():
    lengths, carry = np.array([2, 1, 0]), MODEL.apply(VARIABLES, 3, method="start")
    piece = np.where(np.arange(2)[None] < lengths[:, None], TOKENS[:, :2], -1)

    def read(piece):
        return MODEL.apply(VARIABLES, piece, carry, lengths, method="extend")

    for found in (read(piece), jax.jit(read)(piece)):
        close(found, read(TOKENS[:, :2]), 1e-6)


@pytest.mark.parametrize("cell", ["gru", "minlstm"])
def test_decoding_in_ragged_pieces_equals_the_full_forward(cell):
    module = MODEL.clone(cell=cell)
    variables = made(module, TOKENS)
    carry = module.apply(variables, 3, 16, method="start")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {3}
    extend = jax.jit(lambda *arguments: module.apply(*arguments, method="extend"))
    full = jax.jit(module.apply)(variables, TOKENS)
    position = np.zeros(3, int)
    for lengths in ([3, 1, 0], [3, 3, 2], [0, 3, 1]):
        columns = np.minimum(position[:, None] + np.arange(3)[None], 6)
        piece = np.take_along_axis(TOKENS, columns, axis=1)
        logits, carry = extend(variables, piece, carry, np.array(lengths))
        for row, length in enumerate(lengths):
            start = position[row]
            close(logits[row, :length], full[row, start : start + length])
        position += lengths
    token = np.take_along_axis(TOKENS, np.minimum(position, 6)[:, None], axis=1)
    logits, _ = extend(variables, token, carry)
    for row in (0, 2):  # the other one is complete
        close(logits[row, 0], full[row, position[row]])
    at_once, _ = extend(variables, TOKENS, module.apply(variables, 3, method="start"))
    close(at_once, full)


def test_windows_with_the_carry_between_them_equal_one_long_window():
    carry, pieces = MODEL.apply(VARIABLES, 3, method="start"), []
    for window in (TOKENS[:, :4], TOKENS[:, 4:]):
        logits, carry = run(VARIABLES, window, carry=carry)
        pieces.append(logits)
    close(np.concatenate(pieces, axis=1), run(VARIABLES, TOKENS))


def test_no_gradient_crosses_the_border_of_a_window():
    def loss(variables, *, constant):
        carry = MODEL.apply(VARIABLES, 3, method="start")
        _, carry = MODEL.apply(VARIABLES if constant else variables, TOKENS[:, :4], carry=carry)
        logits, _ = MODEL.apply(variables, TOKENS[:, 4:], carry=carry)
        return jnp.sum(jnp.sin(logits))

    gradient = jax.jit(jax.grad(loss), static_argnames="constant")
    through, expected = gradient(VARIABLES, constant=False), gradient(VARIABLES, constant=True)
    close(through, expected, 1e-6)
    assert np.any(expected["params"]["recurrent"]["forward_0"]["recurrent_kernel"])


def test_locked_dropout_draws_one_mask_for_all_steps_and_another_for_each_sequence():
    ones, rngs = jnp.ones((4, 6, 50)), {"dropout": jax.random.key(0)}
    dropped = Dropout(0.5, shared_axes=(1,)).apply({}, ones, train=True, rngs=rngs)
    np.testing.assert_array_equal(dropped, np.repeat(dropped[:, :1], 6, axis=1))
    assert len(np.unique(dropped[:, 0], axis=0)) == 4
    assert set(np.unique(dropped)) == {0, 2}


def test_locked_dropout_reaches_the_layers_between():
    """A linear second layer that sees one constant vector tells whether its mask moves."""
    x = jnp.ones((2, 5, 3))
    stack = Recurrent(6, cell="rnn", num_layers=2, dropout_rate=0.5, locked_dropout=True)
    variables = made(stack, x)
    params = jax.tree.map(jnp.zeros_like, variables["params"])
    params["forward_0"]["bias"] = jnp.ones(6)
    params["forward_1"]["input_kernel"] = jnp.eye(6)
    rngs = {"dropout": jax.random.key(0)}
    locked, _ = stack.apply({"params": params}, x, train=True, rngs=rngs)
    free, _ = stack.clone(locked_dropout=False).apply({"params": params}, x, train=True, rngs=rngs)
    np.testing.assert_array_equal(locked, np.repeat(locked[:, :1], 5, axis=1))
    assert np.any(locked[0] != locked[1])
    assert np.any(free[:, 0] != free[:, 1])


def test_an_unknown_token_inside_a_compiled_program_gives_nan_from_there_on():
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
            lambda: MODEL.apply(VARIABLES, TOKENS, carry=MODEL.apply(VARIABLES, 2, method="start")),
            r"\(2, 5\).*zero_carry\(3\)",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
