"""Recurrent classifiers of sequences and of texts: pooling, padding, tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import check_module, perturbed, shapes_of

from jaxnets.core import Update, capture
from jaxnets.models.recurrent import Recurrent, SequenceClassifier, TextClassifier
from jaxnets.objectives.supervised import classification
from jaxnets.training.executors import jit_step
from jaxnets.training.step import create_train_state, make_train_step

LENGTHS = np.array([7, 3, 0, 5], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 9, (4, 7))


def sequences(batch=4, time=7, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, time, channels)).astype(np.float32)


def made(module, *inputs):
    """Return random variables without compiling the initializers."""
    variables, _ = shapes_of(module, *inputs)
    return perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables), scale=0.4)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"cell": "gru", "bidirectional": True}, 2 * (15 * 9 + 5) + 10 * 3 + 3),
        ({"cell": "rnn", "pool": "mean", "dropout_rate": 0.2}, 5 * 9 + 5 * 3 + 3),
        ({"cell": "rnn", "pool": "max", "bidirectional": True}, 2 * 5 * 9 + 10 * 3 + 3),
    ],
    ids=["last", "mean", "max"],
)
def test_a_classifier_passes_every_check(fields, parameters):
    check_module(
        SequenceClassifier(3, 5, **fields), sequences(), LENGTHS, num_parameters=parameters
    )


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_padding_changes_neither_the_logits_nor_the_gradients_of_a_classifier(pool):
    module = SequenceClassifier(3, 5, cell="mgu", bidirectional=True, pool=pool, residual=True)
    x = sequences(time=5, channels=10)
    lengths, variables = np.array([5, 2, 0, 4], np.int32), made(module, x)
    padded = np.concatenate([x, x], axis=1)
    padded[np.arange(10)[None] >= lengths[:, None]] = np.nan

    @jax.jit
    def run(variables, x):
        return jax.value_and_grad(lambda v: jnp.sum(jnp.square(module.apply(v, x, lengths))))(
            variables
        )

    close(run(variables, padded), run(variables, x))


def test_a_classifier_reads_the_last_step_of_each_direction_or_the_mean_or_the_maximum():
    x, lengths = sequences(), np.array([7, 3, 1, 5], np.int32)
    module = SequenceClassifier(3, 5, bidirectional=True)
    variables = made(module, x)
    inner = {"params": variables["params"]["recurrent"]}
    run = jax.jit(Recurrent(5, bidirectional=True).apply)
    outputs, _ = run(inner, x, lengths)
    for keywords in ({}, {"lengths": lengths}):
        _, expected = run(inner, x, **keywords)
        expected = np.concatenate([expected["forward_0"][0], expected["backward_0"][0]], axis=1)
        _, recorded = capture(module, variables, x, **keywords)
        close(recorded["features"], expected)
    _, recorded = capture(module.clone(pool="mean"), variables, x, lengths=lengths)
    means = [outputs[index, :length].mean(0) for index, length in enumerate(lengths)]
    close(recorded["features"], np.stack(means))
    _, recorded = capture(module.clone(pool="max"), variables, x, lengths=lengths)
    highest = [outputs[index, :length].max(0) for index, length in enumerate(lengths)]
    close(recorded["features"], np.stack(highest))


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_a_length_out_of_range_makes_nan_logits_and_none_at_all_those_of_the_bias(pool):
    module = SequenceClassifier(3, 5, cell="rnn", pool=pool)
    x, lengths = sequences(), np.array([-1, 8, 0, 7], np.int32)
    variables = made(module, x)
    logits = jax.jit(module.apply)(variables, x, lengths)
    assert np.isnan(logits[:2]).all() and np.isfinite(logits[2:]).all()
    close(logits[2], variables["params"]["head"]["bias"])


def test_a_text_classifier_passes_every_check():
    module = TextClassifier(9, 3, 4, 5, cell="rnn", pool="max", dropout_rate=0.1)
    tokens = np.arange(28).reshape(4, 7) % 9  # every token has a gradient only if it is read
    golden = 9 * 4 + 5 * (4 + 5 + 1) + 5 * 3 + 3
    check_module(module, tokens, LENGTHS, num_parameters=golden)


@pytest.mark.parametrize("padding", [3, 9, -1])
def test_tokens_beyond_the_length_change_neither_logits_nor_gradients_of_a_text(padding):
    module = TextClassifier(9, 3, 4, 5, cell="gru", bidirectional=True, pool="max")
    variables = made(module, TOKENS)

    def run(variables, tokens):
        def loss(variables):
            return jnp.sum(jnp.square(module.apply(variables, tokens, LENGTHS)))

        return jax.value_and_grad(loss)(variables)

    padded = np.where(np.arange(7)[None] < LENGTHS[:, None], TOKENS, padding)
    expected = jax.jit(run)(variables, TOKENS)
    for found in (jax.jit(run)(variables, padded), run(variables, padded)):
        close(found, expected)


def test_a_text_classifier_is_a_table_in_front_of_a_sequence_classifier():
    module = TextClassifier(9, 3, 4, 5, cell="rnn")
    variables = made(module, TOKENS)
    params = variables["params"]
    vectors = params["embedding"]["embedding"][TOKENS]
    inner = {"params": params["classifier"]}
    close(
        module.apply(variables, TOKENS, LENGTHS),
        SequenceClassifier(3, 5, cell="rnn").apply(inner, vectors, LENGTHS),
    )


def test_an_objective_hands_the_lengths_of_the_batch_to_the_module():
    x, module = sequences(), SequenceClassifier(3, 8, cell="gru")
    batch = {
        "inputs": np.where(np.arange(7)[None, :, None] < LENGTHS[:, None, None], x, np.nan),
        "labels": np.array([0, 1, 2, 1], np.int32),
        "lengths": LENGTHS,
    }
    update = Update(classification(module), optax.sgd(0.1))
    state = create_train_state(made(module, x), update, rng=jax.random.key(0))
    state, metrics = jit_step(make_train_step(update))(state, batch)
    # Nothing but the lengths keeps the NaN of the padding out.
    for leaf in jax.tree.leaves((state.params, metrics)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SequenceClassifier(3, num_layers=0), "num_layers=0"),
        (lambda: SequenceClassifier(3, pool="sum"), "'sum'; choose one of"),
        (lambda: TextClassifier(0), "vocabulary_size=0"),
        (lambda: TextClassifier(9, pool="sum"), "'sum'"),
        (lambda: shapes_of(TextClassifier(9), TOKENS[0]), r"\(7,\)"),
        (lambda: apply_text(TOKENS + 1), "token id 9 is outside the vocabulary of 9"),
        (lambda: apply_text(TOKENS, np.full(4, 8)), r"length 8 is not in \[0, 7\]"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def apply_text(*inputs):
    module = TextClassifier(9, cell="rnn")
    return module.apply(made(module, TOKENS), *inputs)
