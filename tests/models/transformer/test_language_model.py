"""The language model and the stack of blocks: causality, padding, parameters, presets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, check_preset, mostly_slow, shapes_of
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
from jaxnets.core import Precision
from jaxnets.models.transformer import Stack, TransformerLM, stack_layers, unstack_layers
from jaxnets.models.transformer.embeddings import PositionEmbedding

GPT = TransformerLM(11, 1, config(**DROPPING, activation="gelu_tanh"), max_length=7)
LLAMA = TransformerLM(
    11,
    2,
    config(
        positions="rotary",
        num_kv_heads=1,
        norm="rms",
        activation="swiglu",
        use_bias=False,
        qk_norm=True,
        scan_layers=True,
        remat=True,
        stochastic_depth_rate=0.2,
        **DROPPING,
    ),
    tied=False,
)


@pytest.mark.parametrize(
    ("module", "num_parameters"),
    [
        pytest.param(GPT, 11 * 8 + 7 * 8 + BLOCK + NORM, marks=pytest.mark.slow),
        (LLAMA, 2 * 11 * 8 + 2 * (2 * 8 + 2 * 64 + 2 * 32 + 2 * 4 + 3 * 96) + 8),
    ],
    ids=["gpt", "llama"],
)
def test_a_language_model_passes_every_check(module, num_parameters):
    check_module(module, tokens(), LENGTHS, num_parameters=num_parameters)


@pytest.mark.parametrize("window", [None, 3])
def test_future_tokens_do_not_change_past_logits(window):
    module, text = TransformerLM(11, 1, config(window=window)), tokens()
    variables = made(module, text)
    other = text.copy()
    other[:, 4] = (other[:, 4] + 1) % 11
    before, after = (forward(module, variables, x) for x in (text, other))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    changed = np.abs(before - after).max((0, 2)) > 1e-4
    assert changed[4 : 7 if window is None else 4 + window].all()


def test_a_window_reaches_back_as_far_as_the_blocks_allow():
    module, text = TransformerLM(11, 2, config(window=2, positions="rotary")), tokens()
    variables = made(module, text)
    other = text.copy()
    other[:, 1] = (other[:, 1] + 1) % 11
    before, after = (forward(module, variables, x) for x in (text, other))
    changed = np.abs(before - after).max((0, 2)) > 0
    np.testing.assert_array_equal(changed, [0, 1, 1, 1, 0, 0, 0])


def test_padding_changes_neither_logits_nor_gradients():
    check_padding(GPT.clone(max_length=10), tokens(), LENGTHS, more=3, stepwise=True)


def test_a_wrong_length_in_a_compiled_program_gives_nan_in_its_row_only():
    check_wrong_lengths(GPT, tokens())


def test_a_bias_of_the_keys_changes_nothing_without_rotary_positions():
    module, text = TransformerLM(11, 1, config(key_bias=True), 7), tokens()
    variables = made(module, text)
    plain = forward(module, variables, text)
    variables["params"]["stack"]["layer_0"]["attention"]["key"]["bias"] += 1.0
    close(forward(module, variables, text), plain)


@functools.cache
def logits_and_gradients(scan_layers=False, remat=False):
    text, fields = tokens(), {"positions": "rotary", "window": 5}
    variables = made(TransformerLM(11, 2, config(**fields)), text)
    module = TransformerLM(11, 2, config(**fields, scan_layers=scan_layers, remat=remat))
    if scan_layers:
        stacked = {"params": stack_layers(variables["params"])}
        close(unstack_layers(stacked["params"]), variables["params"], 0)
        variables = stacked

    def loss(variables):
        logits = module.apply(variables, text)
        return jnp.sum(jnp.square(logits)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
    return logits, unstack_layers(gradient) if scan_layers else gradient


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    mostly_slow([(True, True), (True, False), (False, True)], [(True, True)]),
)
def test_scanned_and_rematerialized_layers_equal_unrolled_ones(scan_layers, remat):
    close(logits_and_gradients(scan_layers, remat), logits_and_gradients())


def initial_layers(module, *names):
    """Return initial kernels of the scanned layers; the rest of the program is dropped."""

    @jax.jit
    def kernels():
        layers = module.init(jax.random.key(0), tokens())["params"]["stack"]["layers"]
        return [layers[branch][dense]["kernel"] for branch, dense in names]

    return map(np.asarray, kernels())


def test_a_scanned_network_starts_with_different_layers_of_the_same_shapes():
    text, scanned = tokens(), TransformerLM(11, 3, config(scan_layers=True))
    stacked, _ = shapes_of(scanned, text)
    unrolled, _ = shapes_of(scanned.clone(config=config()), text)
    unstacked = jax.eval_shape(unstack_layers, stacked["params"])
    assert jax.tree.map(jnp.shape, unstacked) == jax.tree.map(jnp.shape, unrolled["params"])
    (kernels,) = initial_layers(scanned, ("attention", "query"))
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_branches_end_with_smaller_kernels():
    module = TransformerLM(11, 8, config(features=64, num_heads=2, scan_layers=True))
    names = ("attention", "query"), ("attention", "output"), ("feed_forward", "output")
    deviations = [kernel.std() for kernel in initial_layers(module, *names)]
    np.testing.assert_allclose(deviations, [0.02, 0.02 / 4, 0.02 / 4], rtol=0.05)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_stochastic_depth_rises_linearly_and_keeps_the_mean(scan_layers):
    """The first block adds 1 to feature 0, the second to feature 1, unless they are skipped."""
    stack = Stack(config(stochastic_depth_rate=0.6, scan_layers=scan_layers), 2)
    x = np.zeros((4000, 1, 8), np.float32)
    shapes, _ = shapes_of(stack.clone(config=config()), x)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes["params"])
    for index in range(2):
        params[f"layer_{index}"]["feed_forward"]["output"]["bias"][index] = 1
    params["norm"]["scale"][...] = 1
    variables = {"params": stack_layers(params) if scan_layers else params}

    @jax.jit
    def train(variables, key):
        return stack.apply(variables, x, train=True, rngs={"dropout": key})[:, 0]

    y = np.asarray(train(variables, jax.random.key(0, impl="unsafe_rbg")))
    added = y[:, :2] - y[:, 2:3]  # up to the scale of the last norm
    np.testing.assert_allclose((added > 0).mean(0), [0.7, 0.4], atol=0.03)
    both = added[(added > 0).all(1)]
    np.testing.assert_allclose(both[:, 1] / both[:, 0], 0.7 / 0.4, rtol=1e-4)


def test_dropout_is_random_in_training():
    variables = made(GPT, tokens())

    @jax.jit
    def train(key):
        return GPT.apply(variables, tokens(), train=True, rngs={"dropout": key})

    assert np.abs(train(jax.random.key(0)) - train(jax.random.key(1))).max() > 1e-2


PRESETS = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "tinyllama": 1_100_048_384,
    "mistral_7b": 7_241_732_096,
    "smollm2_135m": 134_515_008,
    "qwen2_0_5b": 494_032_768,
    "qwen3_0_6b": 596_049_920,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name):
    # Scanned layers have the same parameters and trace one block only. So have those that differ in
    # their window.
    same_blocks = {"global_every": None, "window_rope_theta": None}
    module = getattr(transformer, name)(scan_layers=True, **same_blocks)
    check_preset(
        module,
        (1, 16),
        num_parameters=PRESETS[name],
        output_shape=(1, 16, module.vocabulary_size),
        dtype=jnp.int32,
    )


def test_a_preset_takes_fields_of_its_own_and_of_its_config():
    module = transformer.gpt2_small(num_layers=2, dropout_rate=0.0, precision=Precision())
    assert module.num_layers == 2 and module.config.dropout_rate == 0
    assert module.config.features == 768
    assert transformer.gpt2_small() == transformer.gpt2_small()
    assert hash(module.config) == hash(dataclasses.replace(module.config))


def apply(*inputs, **keywords):
    return GPT.apply(made(GPT, tokens()), *inputs, **keywords)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: config(num_heads=3), "8 features do not split into 3 heads"),
        (lambda: config(num_kv_heads=3), "2 heads do not share 3"),
        (lambda: config(positions="rotary", head_dim=3), "head size 3 is odd"),
        (lambda: config(positions="rope"), "'rope'; choose one of .*'rotary'"),
        (lambda: config(norm="batch"), "'batch'"),
        (lambda: config(activation="swish"), "'swish'"),
        (lambda: config(window=0), "window=0"),
        (lambda: config(norm_epsilon=-1.0), "norm_epsilon is -1.0; give a positive number"),
        (lambda: config(rope_theta=-1), "rope_theta is -1; give a positive number"),
        (lambda: config(rope_theta=float("nan")), "rope_theta is nan"),
        (lambda: config(dropout_rate=1.0), "dropout rate 1.0"),
        (lambda: config(features=0), "features=0"),
        (lambda: TransformerLM(0), "vocabulary_size=0"),
        (lambda: shapes_of(GPT.clone(num_layers=0), tokens()), "num_layers=0"),
        (lambda: apply(tokens(time=8)), "8 steps .* 7 learned positions"),
        (lambda: apply(tokens(vocabulary=99)), "outside the vocabulary of 11"),
        (lambda: apply(tokens()[0]), r"\(7,\).*\[batch, time\]"),
        (lambda: apply(tokens()[:, :0]), r"\(3, 0\) have no token"),
        (lambda: apply(tokens() * 1.0), "float"),
        (lambda: apply(tokens(), LENGTHS + 1), r"length 8 is not in \[0, 7\]"),
        (lambda: apply(tokens(), LENGTHS[:2]), r"\(2,\) .* do not fit 3"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("vocabulary_size", [256, 300])
def test_bytes_are_tokens_like_those_of_int32(dtype, vocabulary_size):
    module = TransformerLM(vocabulary_size, 1, config(), max_length=7)
    ids, lengths = np.array([[0, 5, 100, 127], [9, 3, 1, 2]]), np.array([4, 2])
    variables = made(module, ids)
    expected = forward(module, variables, ids, lengths)
    close(forward(module, variables, ids.astype(dtype), lengths.astype(dtype)), expected)


def test_learned_positions_that_do_not_exist_give_nan():
    module = PositionEmbedding(config(), max_length=4)
    x = jnp.zeros((2, 2, 8))
    variables = module.init(jax.random.key(0), x)
    positions = np.array([[0, 4], [-1, 3]], np.int8)
    embedded = jax.jit(module.apply)(variables, x, positions)
    np.testing.assert_array_equal(np.isnan(embedded).all(axis=-1), [[False, True], [True, False]])
    close(embedded[1, 1], variables["params"]["embedding"][3])
