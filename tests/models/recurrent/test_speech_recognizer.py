"""The speech recognizer: its frames, padding, decoding, bad input, and training with CTC."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import (
    check_gradients,
    check_module,
    check_precision,
    mostly_slow,
    perturbed,
    shapes_of,
)

from jaxnets.core import Update
from jaxnets.generation.ctc import ctc_greedy
from jaxnets.models.recurrent import SpeechRecognizer
from jaxnets.models.recurrent.layers import Recurrent
from jaxnets.objectives.sequence import check_ctc_batch, ctc
from jaxnets.training.step import create_train_state, make_eval_step, make_train_step

TINY = SpeechRecognizer(
    num_outputs=4, features=3, strides=(2, 3), hidden_size=5, num_layers=1, dropout_rate=0.3
)
LENGTHS = np.array([13, 7, 1, 0], np.int32)


def sounds(batch=4, frames=13, channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, frames, channels)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    shapes, _ = shapes_of(TINY, sounds(), LENGTHS)
    return perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), scale=0.4)


@pytest.fixture(scope="module")
def recognize():
    return jax.jit(TINY.apply)


def test_every_parameter_has_a_gradient_and_the_dtype_of_the_precision(variables):
    inputs, streams = (sounds(), np.array([13, 7, 9, 2], np.int32)), ("dropout",)
    check_gradients(TINY, variables, inputs, streams)
    check_precision(TINY, inputs, streams)


@pytest.mark.slow
def test_the_recognizer_passes_every_check():
    convolutions = (3 * 2 + 1) * 3 + (3 * 3 + 1) * 3
    recurrent = 2 * (3 * 5 * (3 + 5 + 1) + 5)
    expected = convolutions + recurrent + (10 + 1) * 4
    check_module(TINY, sounds(), np.array([13, 7, 9, 2], np.int32), num_parameters=expected)


def test_a_recognizer_of_full_size_has_the_parameters_of_its_parts():
    module = SpeechRecognizer(num_outputs=11, hidden_size=160, cell="lstm", num_layers=3)
    convolutions = (3 * 40 + 1) * 128 + (3 * 128 + 1) * 128
    layers = (2 * 4 * 160 * (inputs + 160 + 1) for inputs in (128, 320, 320))
    variables, (logits, lengths) = shapes_of(module, jax.ShapeDtypeStruct((2, 601, 40), "float32"))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == (
        convolutions + sum(layers) + 321 * 11
    )
    assert (logits.shape, lengths.shape, lengths.dtype) == ((2, 151, 11), (2,), jnp.int32)


def test_logits_are_those_of_convolutions_in_numpy_and_the_recurrent_stack(variables, recognize):
    x, params = sounds(batch=1)[0], variables["params"]
    y = x.astype(np.float64)
    for name, stride in (("conv_0", 2), ("conv_1", 3)):
        kernel, bias = (np.asarray(params[name][part], np.float64) for part in ("kernel", "bias"))
        padded = np.pad(y, [(1, 1), (0, 0)])
        frames = [
            sum(padded[start + offset] @ kernel[offset] for offset in range(3)) + bias
            for start in range(0, len(y), stride)
        ]
        y = np.maximum(np.stack(frames), 0)
    recurrent = Recurrent(5, cell="gru", bidirectional=True)
    states, _ = jax.jit(recurrent.apply)(
        {"params": params["recurrent"]}, y[None].astype(np.float32)
    )
    head = params["head"]
    logits, lengths = recognize(variables, x[None])
    expected = np.asarray(states) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert lengths.tolist() == [3] and logits.shape == (1, 3, 4)


@pytest.fixture(scope="module")
def unpadded(variables, recognize):
    """The logits of each sound recognized separately, without padding; None without a frame."""
    return [
        recognize(variables, sounds()[row : row + 1, :length])[0][0] if length else None
        for row, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("noise", [0.0, 1e3, np.nan])
def test_padding_does_not_change_the_logits(noise, variables, recognize, unpadded):
    x = sounds()
    logits, lengths = recognize(variables, x, LENGTHS)
    assert lengths.tolist() == [3, 2, 1, 0]
    longer = np.pad(x, [(0, 0), (0, 8), (0, 0)])
    longer[np.arange(21)[None] >= LENGTHS[:, None]] = noise
    padded, frames = recognize(variables, longer, LENGTHS)
    np.testing.assert_array_equal(frames, lengths)
    for row, count in enumerate(lengths):
        np.testing.assert_allclose(padded[row, :count], logits[row, :count], atol=1e-6)
        if count:
            np.testing.assert_allclose(unpadded[row], logits[row, :count], atol=1e-5)
    assert np.isfinite(padded).all()


CASES_OF_FRAMES = [
    (strides, time) for strides in ((1,), (2,), (2, 2), (3, 2)) for time in range(1, 9)
]


@pytest.mark.parametrize(
    ("strides", "time"),
    mostly_slow(
        CASES_OF_FRAMES,
        [
            (strides, time)
            for strides, time in CASES_OF_FRAMES
            if time in (1, 6) or (strides == (3, 2) and time in (2, 5, 7))
        ],
    ),
)
def test_the_number_of_frames_is_that_of_the_logits(strides, time):
    module = SpeechRecognizer(3, strides=strides, features=1, hidden_size=1, cell="rnn")
    _, (logits, _) = shapes_of(module, jax.ShapeDtypeStruct((1, time, 1), "float32"))
    assert logits.shape[1] == module.num_frames(time)
    assert module.num_frames(np.array([0, time])).tolist() == [0, logits.shape[1]]


@pytest.fixture(scope="module")
def ctc_loss(variables):
    """The loss of a batch, compiled."""
    state = create_train_state(variables, Update(ctc(TINY), optax.sgd(0.1)), rng=jax.random.key(0))
    evaluate = jax.jit(make_eval_step(ctc(TINY)))
    return lambda batch: evaluate(state, batch)["loss"].compute()


@pytest.mark.parametrize("wrong", [-1, -5, 14, 15, 100])
def test_a_length_out_of_range_is_refused_or_makes_the_loss_nan(
    wrong, variables, recognize, ctc_loss
):
    lengths = np.array([13, wrong, 5, 9], np.int32)
    with pytest.raises(ValueError, match=rf"length {wrong} is not in \[0, 13\]"):
        TINY.apply(variables, sounds(), lengths)
    logits, _ = recognize(variables, sounds(), lengths)
    assert np.isfinite(logits[jnp.array([0, 2, 3])]).all()
    batch = {
        "inputs": sounds(),
        "lengths": lengths,
        "labels": np.ones((4, 1), np.int32),
        "label_lengths": np.ones(4, np.int32),
    }
    assert np.isnan(ctc_loss(batch))
    assert np.isfinite(ctc_loss({**batch, "lengths": LENGTHS.clip(1)}))


def test_a_label_with_too_few_frames_is_refused():
    batch = {"labels": np.array([[1, 1], [1, 2]]), "label_lengths": np.array([2, 2])}
    check_ctc_batch(batch, TINY.num_frames(np.array([13, 12])), num_classes=4)
    with pytest.raises(ValueError, match="utterance 0 has 2 frames and its 2 labels need 3"):
        check_ctc_batch(batch, TINY.num_frames(np.array([12, 12])), num_classes=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_outputs": 0}, "num_outputs"),
        ({"strides": (2, 0)}, "strides"),
        ({"features": -1}, "features"),
        ({"dropout_rate": 1.0}, "1.0"),
        ({"cell": "transistor"}, "unknown cell 'transistor'; choose from rnn, lstm"),
    ],
)
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeechRecognizer(**{"num_outputs": 3, **fields})


@pytest.mark.parametrize(
    ("shape", "message"),
    [((13, 2), r"Add a missing batch axis"), ((1, 0, 2), "have no frame; give at least 1")],
)
def test_inputs_of_invalid_shape_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(TINY, jax.ShapeDtypeStruct(shape, "float32"))


@pytest.mark.lowering
def test_a_population_initializes_its_orthogonal_kernels_sequentially():
    """Batched QR decompositions can deadlock on CPU when they run concurrently."""
    program = jax.make_jaxpr(jax.vmap(lambda seed: TINY.init(jax.random.key(seed), sounds())))
    results = re.findall(r"(\S+) = qr\[", str(program(jnp.arange(3))))
    assert results and all(result.endswith(":f32[5,5]") for result in results), results


@pytest.mark.slow
def test_training_with_ctc_learns_to_transcribe():
    """Each label is a run of frames on a channel of its own; run lengths are random, unaligned."""
    random = np.random.default_rng(0)
    labels = np.stack([random.permutation([1, 2, 3]) for _ in range(8)]).astype(np.int32)
    inputs, lengths = np.zeros((8, 40, 4), np.float32), np.zeros(8, np.int32)
    for row, label in enumerate(labels):
        runs = random.integers(4, 9, 3)
        frames = np.eye(4, dtype=np.float32)[np.repeat(label, runs)]  # [frames, 4]
        lengths[row], inputs[row, : len(frames)] = len(frames), frames
    batch = {
        "inputs": inputs,
        "lengths": lengths,
        "labels": labels,
        "label_lengths": np.full(8, 3, np.int32),
    }
    module = SpeechRecognizer(num_outputs=4, features=8, strides=(2,), hidden_size=8, num_layers=1)
    update = Update(ctc(module), optax.adam(3e-2))
    variables = jax.jit(module.init)(jax.random.key(0), inputs, lengths)
    state = create_train_state(variables, update, rng=jax.random.key(1))
    step = jax.jit(make_train_step(update))
    for _ in range(60):
        state, _ = step(state, batch)
    logits, frames = jax.jit(module.apply)(state.variables, inputs, lengths)
    transcripts, counts = ctc_greedy(logits, frames)
    assert counts.tolist() == [3] * 8
    np.testing.assert_array_equal(transcripts[:, :3], labels)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64"])
def test_lengths_of_every_integer_type_are_divided_without_wrapping(dtype, variables):
    lengths = np.array([127, 31, 5, 0])
    expected = [22, 6, 1, 0]
    np.testing.assert_array_equal(TINY.num_frames(lengths.astype(dtype)), expected)
    frames = jax.jit(lambda x, lengths: TINY.apply(variables, x, lengths)[1])
    np.testing.assert_array_equal(frames(sounds(frames=127), lengths.astype(dtype)), expected)
