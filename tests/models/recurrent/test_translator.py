"""The recurrent translator: attention by hand, padding, causality, decoding piece by piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, perturbed, shapes_of

from jaxnets.core import capture
from jaxnets.models.recurrent import RecurrentTranslator
from jaxnets.models.recurrent.attention_decoder import attend

RANDOM = np.random.default_rng(0)
SOURCE = RANDOM.integers(0, 9, size=(3, 5)).astype(np.int32)
TARGET = RANDOM.integers(0, 7, size=(3, 4)).astype(np.int32)
LENGTHS = np.array([5, 2, 3], np.int32)
MODES = {
    "bahdanau": {"attention": "bahdanau"},
    "luong_fed": {"attention": "luong"},
    "luong": {"attention": "luong", "input_feeding": False},
}


def made(module, *inputs):
    variables, _ = shapes_of(module, *inputs)
    return perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables), scale=0.5)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


MODELS = {
    name: RecurrentTranslator(9, 7, embedding_size=4, hidden_size=5, cell="rnn", **fields)
    for name, fields in MODES.items()
}
VARIABLES = {name: made(module, SOURCE, TARGET) for name, module in MODELS.items()}
RUN = {name: jax.jit(module.apply) for name, module in MODELS.items()}


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"dropout_rate": 0.2}, 961),
        pytest.param(
            {"attention": "luong", "cell": "lstm", "num_decoder_layers": 2, "dropout_rate": 0.2},
            1371,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bahdanau", "luong"],
)
def test_a_translator_passes_every_check(fields, parameters):
    module = RecurrentTranslator(9, 7, embedding_size=4, hidden_size=5, **fields)
    check_module(module, SOURCE, TARGET, LENGTHS, num_parameters=parameters)


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def logits_by_hand(name, params, memory, start, length, words):
    """Decode one sentence in NumPy, position by position, as the papers write it."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    decoder, head = params["decoder"], params["head"]
    layer = decoder["layers"]["forward_0" if name == "luong" else "layer_0"]
    keys = [row @ params["key"]["kernel"] + params["key"].get("bias", 0) for row in memory]
    hidden, output = start, np.zeros(5)
    logits, attention = [], np.zeros((len(words), len(memory)))
    for time, word in enumerate(words):
        x = params["target_embedding"]["embedding"][word]
        total = x @ layer["input_kernel"] + layer["bias"] + hidden @ layer["recurrent_kernel"]
        if name == "bahdanau":
            query = hidden @ decoder["query_kernel"]
            scores = [
                decoder["energy_kernel"][:, 0] @ np.tanh(query + keys[s]) for s in range(length)
            ]
            attention[time, :length] = softmax(np.array(scores))
            context = sum(attention[time, s] * memory[s] for s in range(length))
            hidden = np.tanh(total + context @ decoder["layers"]["feed_kernel"])
            seen = np.concatenate([hidden, context, x])
            output = np.tanh(seen @ decoder["readout"]["kernel"] + decoder["readout"]["bias"])
        else:
            if name == "luong_fed":
                total = total + output @ decoder["layers"]["feed_kernel"]
            hidden = np.tanh(total)
            attention[time, :length] = softmax(np.array([hidden @ keys[s] for s in range(length)]))
            context = sum(attention[time, s] * memory[s] for s in range(length))
            output = np.tanh(np.concatenate([hidden, context]) @ decoder["readout_kernel"])
        logits.append(output @ head["kernel"] + head["bias"])
    return np.stack(logits), attention


@pytest.mark.parametrize("name", MODES)
def test_logits_and_attention_equal_a_numpy_loop(name):
    module, variables = MODELS[name], VARIABLES[name]
    logits, recorded = capture(module, variables, SOURCE, decoder_inputs=TARGET, lengths=LENGTHS)
    carry = module.apply(variables, SOURCE, LENGTHS, method="start")
    for index, length in enumerate(LENGTHS):
        expected, attention = logits_by_hand(
            name,
            variables["params"],
            np.asarray(carry["memory"][index], np.float64),
            np.asarray(carry["states"][0][0][index], np.float64),
            length,
            TARGET[index],
        )
        close(logits[index], expected)
        close(recorded["attention"][index], attention)


def test_the_decoder_starts_from_a_tanh_layer_of_both_final_states():
    module = MODELS["bahdanau"].clone(cell="lstm", num_decoder_layers=2, num_encoder_layers=2)
    variables = made(module, SOURCE, TARGET)
    params = variables["params"]
    carry = module.apply(variables, SOURCE, LENGTHS, method="start")
    encoder = module.bind(variables).encoder
    vectors = params["source_embedding"]["embedding"][SOURCE]
    _, last = encoder(vectors, LENGTHS)
    for place, state in enumerate(("hidden", "memory")):
        both = np.concatenate([last["forward_1"][place], last["backward_1"][place]], axis=1)
        layer = params[f"initial_{state}"]
        expected = np.tanh(both @ layer["kernel"] + layer["bias"][None])
        for index in range(2):
            close(carry["states"][index][place], expected[:, 5 * index : 5 * (index + 1)])


@pytest.mark.parametrize("name", MODES)
def test_source_padding_has_no_influence(name):
    valid = np.arange(5)[None] < LENGTHS[:, None]
    changed = np.where(valid, SOURCE, (SOURCE + 1) % 9)
    longer = np.concatenate([changed, changed], axis=1)
    unknown = np.where(valid, SOURCE, -1)
    expected = RUN[name](VARIABLES[name], SOURCE, TARGET, LENGTHS)
    for source in (changed, longer, unknown):
        close(RUN[name](VARIABLES[name], source, TARGET, LENGTHS), expected, 1e-6)
    close(MODELS[name].apply(VARIABLES[name], unknown, TARGET, LENGTHS), expected, 1e-6)


@pytest.mark.parametrize("name", MODES)
def test_a_piece_of_a_target_may_be_padded_with_what_is_no_token(name):
    carry = MODELS[name].apply(VARIABLES[name], SOURCE, LENGTHS, method="start")
    lengths = np.array([2, 1, 0])
    piece = np.where(np.arange(2)[None] < lengths[:, None], TARGET[:, :2], -1)

    def read(piece):
        return MODELS[name].apply(VARIABLES[name], piece, carry, lengths, method="extend")

    for found in (read(piece), jax.jit(read)(piece)):
        close(found, read(TARGET[:, :2]), 1e-6)


@pytest.mark.parametrize("name", MODES)
def test_future_tokens_do_not_change_past_logits(name):
    changed = TARGET.copy()
    changed[:, 2:] = (changed[:, 2:] + 1) % 7
    before, after = (RUN[name](VARIABLES[name], SOURCE, t, LENGTHS) for t in (TARGET, changed))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (np.abs(before[:, 2:] - after[:, 2:]).max(axis=2) > 1e-4).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_decoder_layers": 2},
        {"attention": "luong", "cell": "lstm", "num_decoder_layers": 2},
        {"attention": "luong", "input_feeding": False, "num_decoder_layers": 2, "cell": "mingru"},
    ],
    ids=MODES,
)
def test_decoding_in_ragged_pieces_equals_the_full_forward(fields):
    module = RecurrentTranslator(9, 7, embedding_size=4, hidden_size=5, **fields)
    variables = made(module, SOURCE, TARGET)
    full = jax.jit(module.apply)(variables, SOURCE, TARGET, LENGTHS)
    carry = module.apply(variables, SOURCE, LENGTHS, 16, method="start")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {3}
    extend = jax.jit(lambda *arguments: module.apply(*arguments, method="extend"))
    close(extend(variables, TARGET, carry)[0], full)
    position = np.zeros(3, int)
    for lengths in ([2, 1, 0], [1, 0, 2], [1, 2, 2]):
        columns = np.minimum(position[:, None] + np.arange(2)[None], 3)
        piece = np.take_along_axis(TARGET, columns, axis=1)
        logits, carry = extend(variables, piece, carry, np.array(lengths))
        for row, length in enumerate(lengths):
            start = position[row]
            close(logits[row, :length], full[row, start : start + length])
        position += lengths


def test_an_empty_source_gets_no_attention_and_finite_logits_and_gradients():
    lengths, module = np.array([5, 0, 3], np.int32), MODELS["bahdanau"]
    _, recorded = capture(
        module, VARIABLES["bahdanau"], SOURCE, decoder_inputs=TARGET, lengths=lengths
    )
    close(recorded["attention"].sum(axis=2), np.repeat([[1.0], [0.0], [1.0]], 4, axis=1))

    def loss(variables):
        return jnp.sum(jnp.sin(module.apply(variables, SOURCE, TARGET, lengths)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(VARIABLES["bahdanau"])
    for leaf in jax.tree.leaves((value, gradient)):
        assert np.isfinite(leaf).all()


def test_scores_of_any_size_give_weights_that_add_up_to_one():
    keys = jnp.asarray(1e4 * RANDOM.normal(size=(2, 6, 3)), jnp.float32)
    valid = jnp.asarray(np.arange(6)[None] < np.array([[6], [2]]))
    context, weights = attend(keys[:, :2], keys, keys, valid)
    close(weights.sum(axis=2), np.ones((2, 2)))
    np.testing.assert_array_equal(weights[1, :, 2:], 0)
    assert np.isfinite(context).all()


def test_one_table_may_read_both_languages_and_write_the_logits():
    module = RecurrentTranslator(
        9, embedding_size=4, hidden_size=5, cell="rnn", share_embeddings=True, tie_embeddings=True
    )
    variables, logits = shapes_of(module, SOURCE, TARGET)
    assert logits.shape == (3, 4, 9)
    params = variables["params"]
    assert {"source_embedding", "head"}.isdisjoint(params) and "projection" in params
    assert params["target_embedding"]["embedding"].shape == (9, 4)


def test_a_length_out_of_range_inside_a_compiled_program_gives_nan_for_its_sentence_alone():
    for wrong in (-1, 6):
        lengths = np.array([5, wrong, 3], np.int32)
        logits = RUN["luong_fed"](VARIABLES["luong_fed"], SOURCE, TARGET, lengths)
        assert np.isnan(logits[1]).all() and np.isfinite(logits[::2]).all()


def translate(*inputs):
    return MODELS["bahdanau"].apply(VARIABLES["bahdanau"], *inputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecurrentTranslator(0), "source_vocabulary_size=0"),
        (lambda: RecurrentTranslator(9, 0), "target_vocabulary_size=0"),
        (lambda: RecurrentTranslator(9, attention="dot"), "'dot'; choose 'bahdanau' or 'luong'"),
        (lambda: RecurrentTranslator(9, dropout_rate=-0.1), "dropout rate -0.1"),
        (
            lambda: RecurrentTranslator(9, 7, share_embeddings=True),
            "9 source and 7 target.*share_embeddings=False",
        ),
        (lambda: translate(SOURCE + 5, TARGET), "outside the vocabulary of 9"),
        (lambda: translate(SOURCE, TARGET + 5), "outside the vocabulary of 7"),
        (lambda: translate(SOURCE[0], TARGET), r"\(5,\); give \[batch, source\]"),
        (lambda: translate(SOURCE, TARGET[0]), r"\(4,\); give \[batch, target\]"),
        (lambda: translate(SOURCE, TARGET, np.array([6, 1, 1])), r"length 6 is not in \[0, 5\]"),
        (lambda: translate(SOURCE, TARGET[:2]), r"2 targets.*3 sources"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
