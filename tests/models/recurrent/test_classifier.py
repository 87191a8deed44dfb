"""Recurrent classifiers of sequences and of texts: reduction over time, padding, tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import (
    assert_trees_near,
    check_module,
    count_parameters,
    mostly_slow,
    random_variables,
    shapes_of,
)

from jaxnets.core import Update, capture
from jaxnets.models.recurrent import Recurrent, SequenceClassifier, TextClassifier
from jaxnets.objectives.supervised import classification
from jaxnets.training.executors import jit_step
from jaxnets.training.step import create_train_state, make_train_step

LENGTHS = np.array([7, 3, 0, 5], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 9, (4, 7)).astype(np.int32)


def sequences(batch=4, time=7, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, time, channels)).astype(np.float32)


CLASSIFIERS = {
    "last": ({"cell": "gru", "bidirectional": True}, 2 * (15 * 9 + 5) + 10 * 3 + 3),
    "mean": ({"cell": "rnn", "pool": "mean", "dropout_rate": 0.2}, 5 * 9 + 5 * 3 + 3),
    "max": ({"cell": "rnn", "pool": "max", "bidirectional": True}, 2 * 5 * 9 + 10 * 3 + 3),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_has_the_parameters_of_its_layers(name):
    fields, parameters = CLASSIFIERS[name]
    variables, _ = shapes_of(SequenceClassifier(3, 5, **fields), sequences(), LENGTHS)
    assert count_parameters(variables) == parameters


@pytest.mark.parametrize("name", mostly_slow(CLASSIFIERS, []))
def test_a_classifier_passes_every_check(name):
    fields, parameters = CLASSIFIERS[name]
    module = SequenceClassifier(3, 5, **fields)
    check_module(module, sequences(), LENGTHS, num_parameters=parameters)


@pytest.mark.parametrize(
    ("pool", "cell"),
    mostly_slow(
        [(pool, cell) for cell in ("rnn", "mgu") for pool in ("last", "mean", "max")],
        [("last", "rnn"), ("mean", "rnn"), ("max", "rnn")],
    ),
)
def test_padding_changes_neither_the_logits_nor_the_gradients_of_a_classifier(pool, cell):
    both = pool == "last" or cell == "mgu"
    module = SequenceClassifier(3, 5, cell=cell, bidirectional=both, pool=pool, residual=True)
    x = sequences(time=5, channels=10 if both else 5)
    lengths, variables = np.array([5, 2, 0, 4], np.int32), random_variables(module, x)
    padded = np.concatenate([x, x], axis=1)
    padded[np.arange(10)[None] >= lengths[:, None]] = np.nan

    @jax.jit
    def run(variables, x):
        return jax.value_and_grad(lambda v: jnp.sum(jnp.square(module.apply(v, x, lengths))))(
            variables
        )

    assert_trees_near(run(variables, padded), run(variables, x))


def test_features_are_the_last_outputs_of_each_direction_or_the_mean_or_the_maximum():
    x, lengths = sequences(), np.array([7, 3, 1, 5], np.int32)
    module = SequenceClassifier(3, 5, cell="rnn", bidirectional=True)
    variables = random_variables(module, x)

    @jax.jit
    def run(variables, lengths):
        inner = {"params": variables["params"]["recurrent"]}
        features = {}
        for pool in ("last", "mean", "max"):
            _, recorded = capture(module.clone(pool=pool), variables, x, lengths=lengths)
            features[pool] = recorded["features"]
        return features, Recurrent(5, cell="rnn", bidirectional=True).apply(inner, x, lengths)

    for valid in (lengths, None):
        features, (outputs, carry) = run(variables, valid)
        outputs = np.asarray(outputs)
        steps = [outputs[index, :length] for index, length in enumerate(lengths)]
        steps = steps if valid is not None else list(outputs)
        last = np.concatenate([carry["forward_0"][0], carry["backward_0"][0]], axis=1)
        assert_trees_near(features["last"], last)
        assert_trees_near(features["mean"], np.stack([y.mean(0) for y in steps]))
        assert_trees_near(features["max"], np.stack([y.max(0) for y in steps]))


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_a_length_out_of_range_gives_nan_logits_and_length_0_the_bias_of_the_head(pool):
    module = SequenceClassifier(3, 5, cell="rnn", pool=pool)
    x, lengths = sequences(), np.array([-1, 8, 0, 7], np.int32)
    variables = random_variables(module, x)
    logits = jax.jit(module.apply)(variables, x, lengths)
    assert np.isnan(logits[:2]).all() and np.isfinite(logits[2:]).all()
    assert_trees_near(logits[2], variables["params"]["head"]["bias"])


def test_a_text_classifier_passes_every_check():
    module = TextClassifier(9, 3, 4, 5, cell="rnn", pool="max", dropout_rate=0.1)
    tokens = np.arange(28).reshape(4, 7) % 9  # only tokens that occur have a gradient
    golden = 9 * 4 + 5 * (4 + 5 + 1) + 5 * 3 + 3
    check_module(module, tokens, LENGTHS, num_parameters=golden)


TEXT = TextClassifier(9, 3, 4, 5, cell="rnn", bidirectional=True, pool="max")


@functools.cache
def text_variables():
    return random_variables(TEXT, TOKENS)


@jax.jit
def text_loss_and_gradient(variables, tokens):
    def loss(variables):
        return jnp.sum(jnp.square(TEXT.apply(variables, tokens, LENGTHS)))

    return jax.value_and_grad(loss)(variables)


@pytest.mark.parametrize("padding", [3, 9, -1])
def test_tokens_beyond_the_length_change_neither_logits_nor_gradients_of_a_text(padding):
    variables = text_variables()
    padded = np.where(np.arange(7)[None] < LENGTHS[:, None], TOKENS, padding)
    actual, expected = (text_loss_and_gradient(variables, tokens) for tokens in (padded, TOKENS))
    assert_trees_near(actual, expected)


def test_a_text_classifier_is_an_embedding_and_a_sequence_classifier():
    variables = text_variables()
    params = variables["params"]
    embeddings = params["embedding"]["embedding"][TOKENS]  # [batch, time, embedding_size]
    classifier = SequenceClassifier(3, 5, cell="rnn", bidirectional=True, pool="max")
    # Without compilation the embedding refuses unknown tokens.
    padded = np.where(np.arange(7)[None] < LENGTHS[:, None], TOKENS, -1)
    assert_trees_near(
        TEXT.apply(variables, padded, LENGTHS),
        jax.jit(classifier.apply)({"params": params["classifier"]}, embeddings, LENGTHS),
    )


def test_an_objective_passes_the_lengths_of_the_batch_to_the_module():
    x, module = sequences(), SequenceClassifier(3, 5, cell="rnn")
    batch = {
        "inputs": np.where(np.arange(7)[None, :, None] < LENGTHS[:, None, None], x, np.nan),
        "labels": np.array([0, 1, 2, 1], np.int32),
        "lengths": LENGTHS,
    }
    update = Update(classification(module), optax.sgd(0.1))
    state = create_train_state(random_variables(module, x), update, rng=jax.random.key(0))
    state, metrics = jit_step(make_train_step(update))(state, batch)
    # Only the lengths mask the NaN of the padding.
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
    return TEXT.apply(text_variables(), *inputs)
