"""The encoder-decoder transformer from sound to text, against its formulas written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, count_parameters, shapes_of
from scipy.special import erf
from transformer_problem import (
    ATTENTION,
    BLOCK,
    DROPPING,
    NORM,
    PIECES,
    append_pieces,
    close,
    compiled_extend,
    config,
    floats,
    made,
    tokens,
)

from jaxnets import transformer
from jaxnets.generation.beam_search import beam_search
from jaxnets.generation.generate import generate
from jaxnets.generation.sampling import Sampling
from jaxnets.models.transformer import SpeechTransformer

OPTIONS = {"num_layers": 1, "num_decoder_layers": 2, "max_source_length": 6, "max_length": 9}
MODULE = SpeechTransformer(11, config=config(), **OPTIONS)
DROPS = MODULE.clone(config=config(mlp_dropout_rate=0.1, **DROPPING))
FRAMES, TARGET, LENGTHS = floats(3, 11, 5), tokens(), np.array([11, 4, 0], np.int32)
VARIABLES = made(MODULE, FRAMES, TARGET)
CONVOLUTIONS = 3 * 5 * 8 + 8 + 3 * 8 * 8 + 8
forward = jax.jit(MODULE.apply)
start = jax.jit(lambda variables: MODULE.apply(variables, FRAMES, LENGTHS, 9, method="start"))


def by_hand(variables, frames, target):
    """Return the logits of one example, [target, vocabulary]."""
    params = jax.tree.map(np.float64, variables["params"])
    encoder, constants = params["encoder"], variables["constants"]["encoder"]
    x = gelu(convolution(encoder["conv_0"], frames, stride=1))
    x = gelu(convolution(encoder["conv_1"], x, stride=2))
    context = stack(encoder["stack"], x + constants["position"][: len(x)], 1)
    embedding = params["embedding"]
    x = embedding["token"]["embedding"][target] + embedding["position"]["embedding"][: len(target)]
    return stack(params["decoder"], x, 2, context) @ embedding["token"]["embedding"].T


def convolution(params, x, stride):
    padded = np.pad(x, ((1, 1), (0, 0)))
    windows = [padded[start : start + 3] for start in range(0, len(x), stride)]
    return np.einsum("tkc,kcd->td", windows, params["kernel"]) + params["bias"]


def gelu(x):
    return x / 2 * (1 + erf(x / np.sqrt(2)))


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


def layer_norm(params, x):
    centered = x - x.mean(-1, keepdims=True)
    variance = np.mean(centered**2, axis=-1, keepdims=True)
    return centered / np.sqrt(variance + 1e-6) * params["scale"] + params["bias"]


def attention(params, x, context, visible):
    assert "bias" not in params["key"]
    query = dense(params["query"], x).reshape(-1, 2, 4)
    key = dense(params["key"], context).reshape(-1, 2, 4)
    value = dense(params["value"], context).reshape(-1, 2, 4)
    weights = np.exp(np.einsum("qhd,khd->hqk", query, key) / 2) * visible
    weights /= weights.sum(-1, keepdims=True)
    return dense(params["output"], np.einsum("hqk,khd->qhd", weights, value).reshape(-1, 8))


def stack(params, x, num_layers, context=None):
    for index in range(num_layers):
        layer = params[f"layer_{index}"]
        y = layer_norm(layer["attention_norm"], x)
        visible = 1 if context is None else np.tri(len(x))
        x = x + attention(layer["attention"], y, y, visible)
        if context is not None:
            y = layer_norm(layer["cross_attention_norm"], x)
            x = x + attention(layer["cross_attention"], y, context, 1)
        y = gelu(dense(layer["feed_forward"]["hidden"], layer_norm(layer["feed_forward_norm"], x)))
        x = x + dense(layer["feed_forward"]["output"], y)
    return layer_norm(params["norm"], x)


def test_logits_are_those_of_the_formulas():
    found = forward(VARIABLES, FRAMES, TARGET, np.array([11, 4, 1]))
    for row, length in enumerate([11, 4, 1]):
        close(found[row], by_hand(VARIABLES, FRAMES[row, :length], TARGET[row]))


def test_positions_are_sines_and_then_cosines_from_1_to_a_ten_thousandth():
    module = MODULE.clone(config=config(features=32), max_source_length=1500)
    constants = jax.jit(lambda key: module.init(key, FRAMES, TARGET)["constants"])
    positions = np.asarray(constants(jax.random.key(0))["encoder"]["position"])
    for i in range(16):
        frequency = 10_000 ** (-i / 15)
        np.testing.assert_allclose(positions[:, i], np.sin(np.arange(1500) * frequency), atol=1e-6)
        cosines = np.cos(np.arange(1500) * frequency)
        np.testing.assert_allclose(positions[:, 16 + i], cosines, atol=1e-6)


@pytest.mark.slow  # the default group has formulas, padding and gradients here
def test_a_speech_transformer_passes_every_check():
    parameters = 11 * 8 + 9 * 8 + CONVOLUTIONS + BLOCK + 2 * (BLOCK + ATTENTION + NORM) + 2 * NORM
    check_module(DROPS, FRAMES, TARGET, LENGTHS, num_parameters=parameters)


def test_frames_beyond_the_lengths_change_neither_logits_nor_gradients():
    valid = np.arange(12)[None, :, None] < LENGTHS[:, None, None]
    padded = np.where(valid, np.pad(FRAMES, [(0, 0), (0, 1), (0, 0)]), np.float32(np.nan))

    @jax.jit
    def run(params, frames):
        def loss(params):
            logits = MODULE.apply(VARIABLES | {"params": params}, frames, TARGET, LENGTHS)
            return jnp.sum(jnp.square(logits))

        return jax.value_and_grad(loss)(params)

    params = VARIABLES["params"]
    close(run(params, padded), run(params, FRAMES))


def test_ragged_pieces_of_a_text_give_the_logits_of_the_whole():
    whole = forward(VARIABLES, FRAMES, TARGET, LENGTHS)
    carry = start(VARIABLES)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {3}
    assert MODULE.room(carry) == 9
    found, position, _ = append_pieces(compiled_extend(MODULE), VARIABLES, carry, TARGET, PIECES)
    for row, end in enumerate(position):
        np.testing.assert_allclose(found[row, :end], whole[row, :end], atol=2e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.02


def test_greedy_and_beam_search_continue_the_prompt_of_the_decoder():
    prompt, text = np.array([[7, 2]] * 3), np.array([[7, 2]] * 3)
    for _ in range(4):  # the most likely next token, by the whole forward pass
        padded = np.pad(text, [(0, 0), (0, 7 - text.shape[1])])
        logits = forward(VARIABLES, FRAMES, padded, LENGTHS)[:, text.shape[1] - 1]
        text = np.concatenate([text, np.argmax(logits, axis=-1)[:, None]], axis=1)
    options = {"num_tokens": 4, "carry": start(VARIABLES)}
    greedy = generate(
        *(MODULE, VARIABLES, prompt),
        rng=jax.random.key(0),
        sampling=Sampling(temperature=0.0),
        **options,
    )
    np.testing.assert_array_equal(greedy.tokens, text[:, 2:])
    beams = beam_search(
        *(MODULE, VARIABLES, prompt),
        num_beams=3,
        stop_token=None,
        length_penalty=0.0,
        **options,
    )
    continued = np.concatenate([prompt, beams.tokens[:, 0]], axis=1)
    log_probabilities = jax.nn.log_softmax(
        forward(VARIABLES, FRAMES, np.pad(continued, [(0, 0), (0, 1)]), LENGTHS)[:, 1:5]
    )
    scores = np.take_along_axis(log_probabilities, np.asarray(beams.tokens[:, 0, :, None]), axis=2)
    np.testing.assert_allclose(beams.scores[:, 0], scores.sum((1, 2)), atol=1e-4)
    assert (beams.scores[:, 0] >= greedy.log_probabilities.sum(1) - 1e-5).all()


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("whisper_tiny", 37_184_640),
        ("whisper_base", 71_825_920),
        ("whisper_small", 240_582_912),
        ("whisper_medium", 762_321_920),
        ("whisper_large", 1_541_384_960),
        ("whisper_large_v3", 1_541_570_560),
        ("whisper_turbo", 806_958_080),
    ],
)
def test_presets_have_the_number_of_parameters_stated(name, num_parameters):
    module = getattr(transformer, name)(scan_layers=True)
    num_mels = 128 if name in ("whisper_large_v3", "whisper_turbo") else 80
    frames = jax.ShapeDtypeStruct((1, 3000, num_mels), jnp.float32)
    variables, logits = shapes_of(module, frames, jax.ShapeDtypeStruct((1, 6), jnp.int32))
    assert count_parameters(variables) == num_parameters
    assert logits.shape == (1, 6, module.vocabulary_size)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SpeechTransformer(0), "vocabulary_size=0"),
        (lambda: SpeechTransformer(11, num_layers=0), "num_layers=0"),
        (lambda: SpeechTransformer(11, num_decoder_layers=0), "num_decoder_layers=0"),
        (lambda: SpeechTransformer(11, max_source_length=0), "max_source_length=0"),
        (lambda: SpeechTransformer(11, strides=(1, 0)), r"strides=\(1, 0\)"),
        (lambda: SpeechTransformer(11, config=config(features=7, head_dim=4)), "7 features"),
        (lambda: SpeechTransformer(11, config=config(features=2)), "2 features"),
        (lambda: MODULE.apply(VARIABLES, floats(3, 13, 5), TARGET), "13 frames are 7 steps"),
        (lambda: MODULE.apply(VARIABLES, FRAMES[:, :0], TARGET), "have no frame"),
        (lambda: MODULE.apply(VARIABLES, FRAMES[0], TARGET), r"\[batch, frames, channels\]"),
        (lambda: MODULE.apply(VARIABLES, FRAMES, TARGET, LENGTHS + 1), r"length 12 is not in"),
        (lambda: MODULE.apply(VARIABLES, FRAMES, TARGET + 11), "outside the vocabulary of 11"),
        (lambda: MODULE.apply(VARIABLES, FRAMES, None, 10, method="start"), "capacity of 10"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
