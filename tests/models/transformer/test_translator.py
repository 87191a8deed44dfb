"""The encoder-decoder transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, count_parameters, shapes_of
from transformer_problem import (
    ATTENTION,
    BLOCK,
    DROPPING,
    LENGTHS,
    NORM,
    close,
    config,
    forward,
    made,
    tokens,
)

from jaxnets import transformer
from jaxnets.core import capture
from jaxnets.models.transformer import TransformerTranslator

SOURCE, TARGET = tokens(), tokens(time=4, vocabulary=5)
SHARED = TransformerTranslator(11, num_layers=1, config=config(positions="sinusoidal", **DROPPING))
APART = TransformerTranslator(
    11, 5, 1, config=config(positions="sinusoidal", norm_first=False, init_std=None)
)


@pytest.mark.parametrize(
    ("module", "num_parameters"),
    [
        pytest.param(
            SHARED, 11 * 8 + 2 * BLOCK + ATTENTION + NORM + 2 * NORM, marks=pytest.mark.slow
        ),
        (APART, (11 + 5) * 8 + 2 * BLOCK + ATTENTION + NORM),
    ],
    ids=["shared_table_norm_first", "two_tables_norm_last"],
)
def test_a_translator_passes_every_check(module, num_parameters):
    check_module(module, SOURCE, TARGET, LENGTHS, num_parameters=num_parameters)


def test_padding_of_the_source_changes_neither_logits_nor_gradients():
    variables = made(SHARED, SOURCE, TARGET)
    padded = np.concatenate([SOURCE, SOURCE], axis=1)
    padded[np.arange(14)[None] >= LENGTHS[:, None]] = 99

    @jax.jit
    def run(variables, source):
        return jax.value_and_grad(
            lambda v: jnp.sum(jnp.square(SHARED.apply(v, source, TARGET, LENGTHS)))
        )(variables)

    close(run(variables, padded), run(variables, SOURCE))


def test_logits_depend_on_the_whole_source_and_on_the_target_so_far():
    variables, full = made(SHARED, SOURCE, TARGET), np.full(3, 7, np.int32)
    before = forward(SHARED, variables, SOURCE, TARGET, full)
    target = TARGET.copy()
    target[:, 2] = (target[:, 2] + 1) % 11
    after = forward(SHARED, variables, SOURCE, target, full)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (np.abs(before - after)[:, 2:].max((0, 2)) > 1e-4).all()
    source = SOURCE.copy()
    source[:, 6] = (source[:, 6] + 1) % 11
    other = forward(SHARED, variables, source, TARGET, full)
    assert (np.abs(before - other).max((0, 2)) > 1e-5).all()


def test_capture_records_the_attention_of_a_translator_without_changing_its_output():
    variables = made(SHARED, SOURCE, TARGET)

    @jax.jit
    def captured(variables):
        return capture(SHARED, variables, SOURCE, decoder_inputs=TARGET, lengths=LENGTHS)

    output, recorded = captured(variables)
    close(output, forward(SHARED, variables, SOURCE, TARGET, LENGTHS), 1e-6)
    weights = recorded["decoder"]["layer_0"]["cross_attention"]["weights"]
    assert weights.shape == (3, 2, 4, 7)
    np.testing.assert_allclose(weights[:2].sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights[1, ..., 3:], 0)
    np.testing.assert_array_equal(weights[2], 0)  # an empty source


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("transformer_base", 63_073_280),
        ("transformer_big", 214_226_944),
        ("t5_small", 60_506_624),
        ("t5_base", 222_903_552),
        ("t5_large", 737_668_096),
        ("flan_t5_small", 76_961_152),
        ("flan_t5_base", 247_577_856),
        ("flan_t5_large", 783_150_080),
    ],
)
def test_presets_have_the_number_of_parameters_stated(name, num_parameters):
    source = jax.ShapeDtypeStruct((1, 6), jnp.int32)
    module = getattr(transformer, name)(scan_layers=True)
    variables, logits = shapes_of(module, source, source)
    assert count_parameters(variables) == num_parameters
    assert logits.shape == (1, 6, 32_128 if "t5" in name else 37_000)


def apply(*inputs):
    return APART.apply(made(APART, SOURCE, TARGET), *inputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TransformerTranslator(0), "vocabulary_size=0"),
        (lambda: TransformerTranslator(11, -1), "target_vocabulary_size=-1"),
        (lambda: TransformerTranslator(11, num_layers=0), "num_layers=0"),
        (lambda: TransformerTranslator(11, num_decoder_layers=0), "num_decoder_layers=0"),
        (lambda: apply(SOURCE, TARGET, LENGTHS + 1), r"length 8 is not in \[0, 7\]"),
        (lambda: apply(SOURCE + 11, TARGET), "outside the vocabulary of 11"),
        (lambda: apply(SOURCE, TARGET + 5), "outside the vocabulary of 5"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
