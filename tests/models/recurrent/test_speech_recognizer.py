"""The recognizer of speech: its frames, padding, decoding, bad input, and learning by CTC."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import check_module, perturbed, shapes_of

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
    return perturbed(jax.jit(TINY.init)(jax.random.key(0), sounds(), LENGTHS), scale=0.3)


@pytest.fixture(scope="module")
def recognize():
    return jax.jit(TINY.apply)


def test_the_recognizer_is_a_sound_module():
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


def test_the_answer_is_that_of_convolutions_in_numpy_and_the_recurrent_stack(variables, recognize):
    x, params = sounds(batch=1, frames=9)[0], variables["params"]
    y = x.astype(np.float64)
    for name, stride in (("conv_0", 2), ("conv_1", 3)):
        kernel, bias = (np.asarray(params[name][part], np.float64) for part in ("kernel", "bias"))
        padded = np.pad(y, [(1, 1), (0, 0)])
        frames = [
            sum(padded[start + tap] @ kernel[tap] for tap in range(3)) + bias
            for start in range(0, len(y), stride)
        ]
        y = np.maximum(np.stack(frames), 0)
    recurrent = Recurrent(5, cell="gru", bidirectional=True)
    states, _ = recurrent.apply({"params": params["recurrent"]}, y[None].astype(np.float32))
    head = params["head"]
    logits, lengths = recognize(variables, x[None])
    expected = np.asarray(states) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert lengths.tolist() == [2] and logits.shape == (1, 2, 4)


@pytest.mark.parametrize("noise", [0.0, 1e3, np.nan])
def test_padding_never_changes_the_answer(noise, variables, recognize):
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
            alone, _ = TINY.apply(variables, x[row : row + 1, : LENGTHS[row]])
            np.testing.assert_allclose(alone[0], logits[row, :count], atol=1e-5)
    assert np.isfinite(padded).all()


@pytest.mark.parametrize("time", range(1, 9))
@pytest.mark.parametrize("strides", [(1,), (2,), (2, 2), (3, 2)])
def test_the_number_of_frames_is_that_of_the_logits(time, strides):
    module = SpeechRecognizer(num_outputs=3, strides=strides, features=1, hidden_size=1)
    _, (logits, _) = shapes_of(module, jax.ShapeDtypeStruct((1, time, 1), "float32"))
    assert logits.shape[1] == module.num_frames(time)
    assert module.num_frames(np.array([0, time])).tolist() == [0, logits.shape[1]]


@pytest.mark.parametrize("wrong", [-1, -5, 14, 15, 100])
def test_a_length_out_of_range_is_refused_or_makes_the_loss_nan(wrong, variables, recognize):
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
    state = create_train_state(variables, Update(ctc(TINY), optax.sgd(0.1)), rng=jax.random.key(0))
    loss = jax.jit(make_eval_step(ctc(TINY)))(state, batch)["loss"]
    assert np.isnan(loss.compute())


def test_a_label_longer_than_its_frames_is_found_beforehand():
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
def test_impossible_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeechRecognizer(**{"num_outputs": 3, **fields})


@pytest.mark.parametrize(
    ("shape", "message"),
    [((13, 2), r"Add a missing batch axis"), ((1, 0, 2), "have no frame; give at least 1")],
)
def test_inputs_of_another_shape_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(TINY, jax.ShapeDtypeStruct(shape, "float32"))


def test_a_population_draws_its_orthogonal_kernels_one_by_one():
    """Batches of QR decompositions can hang on CPU when they run at once."""
    program = jax.make_jaxpr(jax.vmap(lambda seed: TINY.init(jax.random.key(seed), sounds())))
    results = re.findall(r"(\S+) = qr\[", str(program(jnp.arange(3))))
    assert results and all(result.endswith(":f32[5,5]") for result in results), results


def test_it_learns_by_ctc_to_spell_what_it_hears():
    """Each label is a run of frames on a channel of its own, of random lengths, never aligned."""
    random = np.random.default_rng(0)
    labels = np.stack([random.permutation([1, 2, 3]) for _ in range(8)]).astype(np.int32)
    inputs, lengths = np.zeros((8, 40, 4), np.float32), np.zeros(8, np.int32)
    for row, word in enumerate(labels):
        runs = random.integers(4, 9, 3)
        spoken = np.eye(4, dtype=np.float32)[np.repeat(word, runs)]
        lengths[row], inputs[row, : len(spoken)] = len(spoken), spoken
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
    found, counts = ctc_greedy(logits, frames)
    assert counts.tolist() == [3] * 8
    np.testing.assert_array_equal(found[:, :3], labels)
