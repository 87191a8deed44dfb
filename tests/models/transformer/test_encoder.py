"""The encoder, and its subclasses: classifier and masked language model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, check_preset, count_parameters, shapes_of
from transformer_problem import (
    BLOCK,
    DROPPING,
    LENGTHS,
    NORM,
    check_padding,
    check_wrong_lengths,
    close,
    config,
    forward,
    made,
    tokens,
)

from jaxnets import transformer
from jaxnets.models.transformer import (
    MaskedLM,
    SentenceEncoder,
    TransformerClassifier,
    TransformerEncoder,
)

BERT = TransformerClassifier(
    11,
    1,
    config(norm_first=False, **DROPPING),
    7,
    num_segments=2,
    embedding_norm=True,
    num_outputs=3,
)
MEAN = TransformerClassifier(
    11, 1, config(positions="relative", window=3), num_outputs=3, pool="mean"
)
MASKED = MaskedLM(11, 1, config(positions="alibi"))


ENCODERS = {
    "bert": (BERT, (11 + 7 + 2) * 8 + NORM + BLOCK + 72 + 27, (3, 3)),
    "mean_relative": (MEAN, 11 * 8 + 32 * 2 + BLOCK + NORM + 27, (3, 3)),
    "masked": (MASKED, 11 * 8 + BLOCK + NORM + 72 + NORM + 11, (3, 7, 11)),
}


@pytest.mark.slow  # the default group has padding and gradients below
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_passes_every_check(name):
    module, num_parameters, _ = ENCODERS[name]
    check_module(module, tokens(), LENGTHS, num_parameters=num_parameters)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_the_parameters_of_its_parts(name):
    module, num_parameters, shape = ENCODERS[name]
    variables, output = shapes_of(module, tokens(), LENGTHS)
    assert count_parameters(variables) == num_parameters
    assert output.shape == shape


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(BERT, marks=pytest.mark.slow),
        MEAN,
        pytest.param(MASKED, marks=pytest.mark.slow),
    ],
    ids=["bert", "mean_relative", "masked"],
)
def test_padding_changes_neither_output_nor_gradients(module):
    longer = module.clone(max_length=10)
    check_padding(longer, tokens(), LENGTHS, more=3, stepwise=isinstance(module, MaskedLM))


@pytest.mark.parametrize("module", [BERT, MASKED], ids=["bert", "masked"])
def test_a_wrong_length_in_a_compiled_program_gives_nan_in_its_row_only(module):
    check_wrong_lengths(module, tokens())


def test_an_encoder_attends_to_the_whole_text_and_returns_zero_beyond_it():
    module, text = TransformerEncoder(11, 1, config(), max_length=7), tokens()
    variables = made(module, text)
    other = text.copy()
    other[:, 6] = (other[:, 6] + 1) % 11
    features, moved = (forward(module, variables, x) for x in (text, other))
    assert (np.abs(features - moved).max((0, 2)) > 1e-4).all()
    features = forward(module, variables, text, LENGTHS)
    assert np.any(features[1, 2])
    np.testing.assert_array_equal(features[1, 3:], 0)


def test_segments_are_zero_by_default_and_change_the_features():
    module, text = TransformerEncoder(11, 1, config(), 7, num_segments=2), tokens()
    variables = made(module, text)
    zeros = np.zeros_like(text)
    other = zeros.copy()
    other[:, 4:] = 1

    @jax.jit
    def features_of(segments):
        return module.apply(variables, text, segments=segments)

    plain = forward(module, variables, text)
    close(features_of(zeros), plain)
    assert np.abs(features_of(other) - plain).max() > 1e-2


def test_the_classifier_contains_the_encoder_under_the_same_names():
    text = tokens()
    encoder = TransformerEncoder(11, 1, config(), 7)
    classifier = TransformerClassifier(11, 1, config(), 7, num_outputs=None, pool="mean")
    variables = made(classifier, text)
    features = np.asarray(forward(encoder, variables, text))
    close(forward(classifier, variables, text), features.mean(1))


@pytest.mark.parametrize(
    ("name", "num_parameters"), [("bert_base", 109_482_240), ("bert_large", 335_141_888)]
)
def test_a_preset_has_the_published_number_of_parameters(name, num_parameters):
    module = getattr(transformer, name)(scan_layers=True)
    check_preset(
        module,
        (1, 16),
        num_parameters=num_parameters,
        output_shape=(1, module.config.features),
        dtype=jnp.int32,
    )


def apply(module, *inputs, **keywords):
    return module.apply(made(module, tokens()), *inputs, **keywords)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TransformerClassifier(11, pool="max"), "'max'"),
        (lambda: TransformerClassifier(11, num_outputs=0), "num_outputs=0"),
        (lambda: apply(MEAN, tokens(), segments=tokens()), "num_segments"),
        (lambda: apply(BERT, tokens(), segments=tokens()), "outside the vocabulary of 2"),
        (
            lambda: apply(BERT, tokens(), segments=np.zeros((1, 7), int)),
            r"segments of shape \(1, 7\) do not fit tokens of shape \(3, 7\); give one for each",
        ),
        (lambda: apply(BERT, tokens(time=8)), "8 steps .* 7 learned positions"),
        (lambda: apply(BERT, tokens(), LENGTHS + 1), "length 8"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5)])
def test_floats_in_place_of_tokens_are_refused_with_what_takes_them(shape):
    module = TransformerEncoder(11, 1, config())
    message = r"have type float32; give integers.*Networks of floats .* are AudioTransformer"
    for lengths in (None, np.array([5, 2])):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), np.ones(shape, np.float32), lengths)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((3,), r"\. Add a missing batch axis with inputs\[None\]"), ((1, 2, 3), "")],
)
def test_tokens_of_another_rank_are_told_what_is_missing_and_nothing_else(shape, remedy):
    module = TransformerEncoder(11, 1, config())
    with pytest.raises(ValueError, match=rf"give \[batch, time\]{remedy}(\n|$)"):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros(shape, int))


SENTENCES = SentenceEncoder(11, 1, config(positions="alibi"))


@pytest.mark.slow  # padding is below
def test_a_sentence_encoder_passes_every_check():
    num_parameters = 11 * 8 + BLOCK + NORM
    check_module(SENTENCES, tokens(), LENGTHS, num_parameters=num_parameters)


def test_padding_changes_no_sentence():
    check_padding(SENTENCES, tokens(), LENGTHS, more=3, stepwise=False)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pool", ["mean", "first", "max", "mean_sqrt_length"])
def test_a_sentence_is_the_pool_of_its_tokens(pool, normalize):
    module = SENTENCES.clone(pool=pool, normalize=normalize)
    variables, lengths = made(module, tokens()), np.array([7, 4, 1])
    features = np.asarray(
        forward(TransformerEncoder(11, 1, module.config), variables, tokens(), lengths)
    )
    rows = [row[:length] for row, length in zip(features, lengths, strict=True)]
    pools = {
        "mean": lambda row: row.mean(0),
        "first": lambda row: row[0],
        "max": lambda row: row.max(0),
        "mean_sqrt_length": lambda row: row.sum(0) / len(row) ** 0.5,
    }
    expected = np.stack([pools[pool](row) for row in rows])
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    close(forward(module, variables, tokens(), lengths), expected, 1e-5)


def test_an_empty_sentence_is_0_with_a_finite_gradient():
    variables = made(SENTENCES, tokens())

    @jax.jit
    @jax.value_and_grad
    def run(variables):
        return jnp.sum(SENTENCES.apply(variables, tokens(), np.array([7, 0, 1]))[1])

    total, gradients = run(variables)
    assert total == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_the_pooler_has_the_activation_that_is_given():
    pooler = BERT.clone(num_outputs=None)
    variables = made(pooler, tokens())
    encode = jax.jit(functools.partial(pooler.apply, method=TransformerEncoder.encode))
    first = encode(variables, tokens(), LENGTHS)[:, 0]
    dense = variables["params"]["pooler"]
    hidden = np.asarray(first) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    assert (hidden < 0).any()
    relu = pooler.clone(pooler_activation="relu")
    close(forward(relu, variables, tokens(), LENGTHS), np.maximum(hidden, 0), 1e-5)
    close(forward(pooler, variables, tokens(), LENGTHS), np.tanh(hidden), 1e-5)
    with pytest.raises(ValueError, match="unknown activation 'rule'"):
        BERT.clone(pooler_activation="rule")


def test_an_unknown_pool_of_sentences_is_refused():
    with pytest.raises(ValueError, match="pool is 'sum'; choose one of"):
        SENTENCES.clone(pool="sum")
