"""The recurrent translator: attention in NumPy, padding, causality, decoding in pieces."""

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
    mostly_exhaustive,
    random_variables,
    shapes_of,
)

from jaxnets.core import Precision, capture
from jaxnets.models.recurrent import RecurrentTranslator
from jaxnets.models.recurrent.attention_decoder import cross_attention

RANDOM = np.random.default_rng(0)
SOURCE = RANDOM.integers(0, 9, size=(3, 5)).astype(np.int32)
TARGET = RANDOM.integers(0, 7, size=(3, 4)).astype(np.int32)
LENGTHS = np.array([5, 2, 3], np.int32)
MODES = {
    "bahdanau": {"attention": "bahdanau"},
    "luong_fed": {"attention": "luong"},
    "luong": {"attention": "luong", "input_feeding": False},
}


MODELS = {
    name: RecurrentTranslator(9, 7, embedding_size=4, hidden_size=5, cell="rnn", **fields)
    for name, fields in MODES.items()
}
VARIABLES = {name: random_variables(module, SOURCE, TARGET) for name, module in MODELS.items()}
RUN = {name: jax.jit(module.apply) for name, module in MODELS.items()}


def method(module, name):
    """Compile a method of a module."""
    return jax.jit(lambda *arguments: module.apply(*arguments, method=name))


START = {name: method(module, "start") for name, module in MODELS.items()}
EXTEND = {name: method(module, "extend") for name, module in MODELS.items()}


def test_every_parameter_has_a_gradient_and_the_dtype_of_the_precision():
    module = MODELS["bahdanau"].clone(dropout_rate=0.2)
    inputs, streams = (SOURCE, TARGET, LENGTHS), ("dropout",)
    check_gradients(module, VARIABLES["bahdanau"], inputs, streams)
    check_precision(module, inputs, streams)


@pytest.mark.parametrize("name", MODES)
def test_a_translator_has_the_parameters_of_its_layers(name):
    embeddings, head = (9 + 7) * 4, 5 * 7 + 7
    encoder, initial, key = 2 * 5 * (4 + 5 + 1), 10 * 5 + 5, 10 * 5
    layer, readout = 5 * (4 + 5 + 1), (5 + 10) * 5
    decoder = {
        # query, energy, biases of key and readout, embedding in the readout; context fed
        "bahdanau": layer + readout + 25 + 5 + 5 + 5 + 4 * 5 + 10 * 5,
        "luong_fed": layer + readout + 5 * 5,
        "luong": layer + readout,
    }[name]
    expected = embeddings + encoder + initial + key + decoder + head
    assert count_parameters(VARIABLES[name]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"dropout_rate": 0.2}, 961),
        (
            {"attention": "luong", "cell": "lstm", "num_decoder_layers": 2, "dropout_rate": 0.2},
            1371,
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


def numpy_decoder(name, params, memory, start, length, tokens):
    """Decode one sentence in NumPy, position by position, by the equations of the papers."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    decoder, head = params["decoder"], params["head"]
    layer = decoder["layers"]["forward_0" if name == "luong" else "layer_0"]
    keys = [row @ params["key"]["kernel"] + params["key"].get("bias", 0) for row in memory]
    hidden, output = start, np.zeros(5)
    logits, attention = [], np.zeros((len(tokens), len(memory)))
    for time, token in enumerate(tokens):
        x = params["target_embedding"]["embedding"][token]
        total = x @ layer["input_kernel"] + layer["bias"] + hidden @ layer["recurrent_kernel"]
        if name == "bahdanau":
            query = hidden @ decoder["query_kernel"]
            scores = [
                decoder["energy_kernel"][:, 0] @ np.tanh(query + keys[s]) for s in range(length)
            ]
            attention[time, :length] = softmax(np.array(scores))
            context = sum(attention[time, s] * memory[s] for s in range(length))
            hidden = np.tanh(total + context @ decoder["layers"]["feed_kernel"])
            features = np.concatenate([hidden, context, x])
            output = np.tanh(features @ decoder["readout"]["kernel"] + decoder["readout"]["bias"])
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

    @jax.jit
    def run(variables):
        return capture(module, variables, SOURCE, decoder_inputs=TARGET, lengths=LENGTHS)

    logits, recorded = run(variables)
    carry = START[name](variables, SOURCE, LENGTHS)
    for index, length in enumerate(LENGTHS):
        expected, attention = numpy_decoder(
            name,
            variables["params"],
            np.asarray(carry["memory"][index], np.float64),
            np.asarray(carry["states"][0][0][index], np.float64),
            length,
            TARGET[index],
        )
        assert_trees_near(logits[index], expected)
        assert_trees_near(recorded["attention"][index], attention)


def test_the_initial_decoder_state_is_a_tanh_layer_of_both_final_encoder_states():
    module = MODELS["bahdanau"].clone(cell="lstm", num_decoder_layers=2, num_encoder_layers=2)
    variables = random_variables(module, SOURCE, TARGET)
    params = variables["params"]

    @jax.jit
    def run(variables):
        return module.apply(
            *(variables, SOURCE, LENGTHS),
            method="start",
            capture_intermediates=True,
            mutable="intermediates",
        )

    carry, state = run(variables)
    ((_, last),) = state["intermediates"]["encoder"]["__call__"]
    for place, state in enumerate(("hidden", "memory")):
        both = np.concatenate([last["forward_1"][place], last["backward_1"][place]], axis=1)
        layer = params[f"initial_{state}"]
        expected = np.tanh(both @ layer["kernel"] + layer["bias"][None])
        for index in range(2):
            assert_trees_near(
                carry["states"][index][place], expected[:, 5 * index : 5 * (index + 1)]
            )


@pytest.mark.parametrize("name", MODES)
def test_source_padding_does_not_change_the_logits(name):
    valid = np.arange(5)[None] < LENGTHS[:, None]
    changed = np.where(valid, SOURCE, (SOURCE + 1) % 9)
    longer = np.concatenate([changed, changed], axis=1)
    unknown = np.where(valid, SOURCE, -1)
    expected = RUN[name](VARIABLES[name], SOURCE, TARGET, LENGTHS)
    for source in (changed, longer, unknown):
        assert_trees_near(RUN[name](VARIABLES[name], source, TARGET, LENGTHS), expected, 1e-6)


@pytest.mark.parametrize("name", MODES)
def test_decoding_accepts_padding_outside_the_vocabulary(name):
    variables, lengths = VARIABLES[name], np.array([2, 1, 0])
    carry = START[name](variables, SOURCE, LENGTHS)
    piece = np.where(np.arange(2)[None] < lengths[:, None], TARGET[:, :2], -1)
    expected = EXTEND[name](variables, TARGET[:, :2], carry, lengths)
    assert_trees_near(EXTEND[name](variables, piece, carry, lengths), expected, 1e-6)
    # Padding known while tracing: it must not reach the check of the embeddings.
    source = np.where(np.arange(5)[None] < LENGTHS[:, None], SOURCE, -1)

    def decode(variables):
        carry = MODELS[name].apply(variables, source, LENGTHS, method="start")
        return MODELS[name].apply(variables, piece, carry, lengths, method="extend")

    jax.eval_shape(decode, variables)


@pytest.mark.parametrize("name", MODES)
def test_future_tokens_do_not_change_past_logits(name):
    changed = TARGET.copy()
    changed[:, 2:] = (changed[:, 2:] + 1) % 7
    before, after = (RUN[name](VARIABLES[name], SOURCE, t, LENGTHS) for t in (TARGET, changed))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (np.abs(before[:, 2:] - after[:, 2:]).max(axis=2) > 1e-4).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bahdanau", {}),
        ("luong_fed", {}),
        ("luong", {}),
        ("luong_fed", {"num_decoder_layers": 2}),
        pytest.param(
            "luong_fed", {"cell": "lstm", "num_decoder_layers": 2}, marks=pytest.mark.slow
        ),
        pytest.param("bahdanau", {"cell": "gru", "num_decoder_layers": 2}, marks=pytest.mark.slow),
        pytest.param("luong", {"cell": "mingru", "num_decoder_layers": 2}, marks=pytest.mark.slow),
    ],
    ids=[*MODES, "luong_fed_deep", "luong_fed_lstm", "bahdanau_gru", "luong_mingru"],
)
def test_decoding_in_ragged_pieces_equals_the_full_forward(name, fields):
    module, variables, run, extend = MODELS[name], VARIABLES[name], RUN[name], EXTEND[name]
    if fields:
        module = module.clone(**fields)
        variables, run = random_variables(module, SOURCE, TARGET), jax.jit(module.apply)
        extend = method(module, "extend")
    full = run(variables, SOURCE, TARGET, LENGTHS)
    carry = method(module, "start")(variables, SOURCE, LENGTHS, 16)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {3}
    assert_trees_near(extend(variables, TARGET, carry)[0], full)
    position = np.zeros(3, int)
    for lengths in ([2, 1, 0], [1, 0, 2], [1, 2, 2]):
        columns = np.minimum(position[:, None] + np.arange(2)[None], 3)
        piece = np.take_along_axis(TARGET, columns, axis=1)
        logits, carry = extend(variables, piece, carry, np.array(lengths))
        for row, length in enumerate(lengths):
            start = position[row]
            assert_trees_near(logits[row, :length], full[row, start : start + length])
        position += lengths


@pytest.mark.slow
@pytest.mark.parametrize("attention", mostly_exhaustive(["bahdanau", "luong"], ["luong"]))
def test_gradients_of_a_long_target_are_summed_in_float32_by_bfloat16_arithmetic(attention):
    rng = np.random.default_rng(0)
    source, target = rng.integers(1, 9, (2, 5)), rng.integers(1, 9, (2, 1024))

    def gradients(compute):
        module = RecurrentTranslator(
            9,
            embedding_size=4,
            hidden_size=4,
            attention=attention,
            precision=Precision(compute=compute),
        )
        params = jax.jit(module.init)(jax.random.key(0), source[:, :1], target[:, :1])["params"]

        def likelihood(params):
            logits = module.apply({"params": params}, source, target)
            return jnp.sum(jax.nn.log_softmax(logits)[..., 3])

        return jax.jit(jax.grad(likelihood))(params)

    def check(narrow, wide):
        assert jnp.linalg.norm(narrow - wide) < 0.1 * jnp.linalg.norm(wide)

    jax.tree.map(check, gradients(jnp.bfloat16), gradients(jnp.float32))


def test_an_empty_source_gets_no_attention_and_finite_logits_and_gradients():
    lengths, module = np.array([5, 0, 3], np.int32), MODELS["bahdanau"]

    def loss(variables):
        logits, recorded = capture(
            module, variables, SOURCE, decoder_inputs=TARGET, lengths=lengths
        )
        return jnp.sum(jnp.sin(logits)), recorded

    (value, recorded), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        VARIABLES["bahdanau"]
    )
    assert_trees_near(
        recorded["attention"].sum(axis=2), np.repeat([[1.0], [0.0], [1.0]], 4, axis=1)
    )
    for leaf in jax.tree.leaves((value, gradient)):
        assert np.isfinite(leaf).all()


def test_scores_of_any_size_give_probabilities_that_sum_to_one():
    keys = jnp.asarray(1e4 * RANDOM.normal(size=(2, 6, 3)), jnp.float32)
    valid = jnp.asarray(np.arange(6)[None] < np.array([[6], [2]]))
    context, probabilities = jax.jit(cross_attention)(keys[:, :2], keys, keys, valid)
    assert_trees_near(probabilities.sum(axis=2), np.ones((2, 2)))
    np.testing.assert_array_equal(probabilities[1, :, 2:], 0)
    assert np.isfinite(context).all()


@pytest.mark.parametrize("hidden_size", [4, 5])
def test_one_embedding_table_may_serve_both_languages_and_the_logits(hidden_size):
    module = RecurrentTranslator(
        9,
        embedding_size=4,
        hidden_size=hidden_size,
        cell="rnn",
        share_embeddings=True,
        tie_embeddings=True,
    )
    variables, logits = shapes_of(module, SOURCE, TARGET)
    assert logits.shape == (3, 4, 9)
    params = variables["params"]
    assert {"source_embedding", "head"}.isdisjoint(params)
    assert ("projection" in params) == (hidden_size != 4)
    assert params["target_embedding"]["embedding"].shape == (9, 4)


def test_a_length_out_of_range_in_a_compiled_program_gives_nan_for_its_sentence_only():
    for wrong in (-1, 6):
        lengths = np.array([5, wrong, 3], np.int32)
        logits = RUN["luong_fed"](VARIABLES["luong_fed"], SOURCE, TARGET, lengths)
        assert np.isnan(logits[1]).all() and np.isfinite(logits[::2]).all()


def translate(*inputs):
    return jax.eval_shape(lambda v: MODELS["bahdanau"].apply(v, *inputs), VARIABLES["bahdanau"])


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
