"""The experiments on speech with tiny networks and synthetic words."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import pytest
from checks import perturbed

import jaxnets as jn
from experiments import digit_strings, speech
from experiments.harness.run_folder import RunError
from experiments.harness.training import run
from experiments.sound import SoundTransform, choose_parts
from jaxnets.tools import read_result

SHORT = {"words": "tone_words", "steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 4}
SHORT |= {"width": 4, "layers": 1, "steps_per_dispatch": 2, "checkpoint_every": 2}
SPEECH = dataclasses.replace(speech.RECIPES["convnet"], **SHORT)
STRINGS = dataclasses.replace(
    digit_strings.RECIPES["gru"], **SHORT, max_digits=4, max_seconds=1.5, test_strings=7, beams=2
)


#: No augmentation, which compiles faster.
PLAIN = dict.fromkeys(("shift", "speed", "noise", "gain"), 0.0) | {"time_mask": 0}
PLAIN |= {"frequency_mask": 0}


def run_words(out, **changes):
    config = dataclasses.replace(SPEECH, out=out, **{**PLAIN, **changes})
    return run("speech", config, speech.SpokenWords)


def run_strings(out, **changes):
    config = dataclasses.replace(STRINGS, out=out, **{**PLAIN, **changes})
    return run("digit_strings", config, digit_strings.DigitStrings)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    out = tmp_path_factory.mktemp("words")
    return out, run_words(out, seeds=2)


@pytest.fixture(scope="module")
def strings(tmp_path_factory):
    out = tmp_path_factory.mktemp("strings")
    return out, run_strings(out, seeds=2)


@pytest.mark.slow
def test_a_run_on_words_writes_its_result_and_figures(words):
    out, result = words
    assert read_result(out) == result
    assert (result["metric"], result["dataset"]) == ("test accuracy", "tone words")
    assert len(result["values"]) == 2 and all(0 <= value <= 1 for value in result["values"])
    # The speakers do not have equally many test recordings.
    assert set(result["accuracy_by_speaker"]) == {"low", "high"}
    by_speaker = result["accuracy_by_speaker"].values()
    assert min(by_speaker) - 1e-6 <= result["value"] <= max(by_speaker) + 1e-6
    for figure in ("curves.png", "confusion.png", "mistakes.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_on_strings_writes_its_result_and_transcripts(strings):
    out, result = strings
    assert read_result(out) == result
    assert (result["metric"], result["dataset"]) == (
        "test word error rate",
        "strings of tone words",
    )
    assert result["tested_strings"] == 7 and len(result["values"]) == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "recognized.txt").read_text().count("said ") == 7


PROBLEMS = {
    "words": lambda: speech.SpokenWords(dataclasses.replace(SPEECH)),
    "strings": lambda: digit_strings.DigitStrings(STRINGS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_resumed_run_ends_bitwise_the_same(name):
    problem = PROBLEMS[name]()
    executor, create = problem.executor(), jax.jit(problem.create_states)

    def train(states, num_steps):  # the batches begin where the states stopped
        return jn.fit(executor, states, problem.batches(), num_steps=num_steps)[0]

    whole, resumed = train(create(), 4), train(train(create(), 2), 4)
    assert jn.parameters_sha256(resumed.params) == jn.parameters_sha256(whole.params)
    assert jn.parameters_sha256(whole.params) != jn.parameters_sha256(create().params)


def small(model):
    changes = {"model": model, "words": "tone_words", "width": 8, "layers": 1, "batch_size": 8}
    return speech.SpokenWords(dataclasses.replace(speech.RECIPES[model], **changes))


@pytest.mark.parametrize("model", speech.RECIPES)
def test_every_model_reads_the_features(model):
    problem = small(model)
    (inputs,) = problem.example()
    batch = {name: array[:1] for name, array in problem.train.items()}
    features = problem._transform(batch, jax.random.key(0), False)
    assert features["inputs"].shape == inputs.shape
    assert ("lengths" in features) == (model != "convnet")
    output, _ = jax.eval_shape(problem.module.init_with_output, jax.random.key(0), inputs)
    assert output.shape == (1, 10)


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_padding_does_not_change_the_logits_of_networks_with_lengths(model):
    problem = small(model)
    batch = {name: array[:4] for name, array in problem.test.items()}
    longer = {**batch, "inputs": np.pad(batch["inputs"], [(0, 0), (0, 800)])}
    shapes = jax.eval_shape(problem.initial_variables, jax.random.key(0))
    variables = perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), scale=0.3)

    @jax.jit
    def answer(batch):
        batch = problem._transform(batch, jax.random.key(0), False)
        return problem.module.apply(variables, batch["inputs"], batch["lengths"])

    np.testing.assert_allclose(answer(batch), answer(longer), atol=1e-5)


@functools.partial(jax.jit, static_argnames=("train", "keep_time"))
def features(batch, seed, *, train, keep_time=True):
    transform = SoundTransform(SPEECH, 8000, keep_time=keep_time)
    return transform(batch, jax.random.key(seed), train)


@pytest.fixture(scope="module")
def batch():
    return {name: array[:6] for name, array in jn.data.tone_words().test.items()}


def test_features_are_standardized_over_the_frames_and_features_of_each_word(batch):
    plain = features(batch, 0, train=False)
    assert plain["inputs"].shape == (6, 21, 40)
    assert plain["lengths"].tolist() == (1 + batch["lengths"] // 80).tolist()
    for row, length in zip(np.asarray(plain["inputs"]), plain["lengths"], strict=True):
        assert row[:length].mean() == pytest.approx(0, abs=1e-4)
        assert row[:length].std() == pytest.approx(1, abs=1e-3)
        assert row[:length].mean(axis=0).std() > 0.3, "the mean spectrum is gone"
        assert not row[length:].any()
    louder = features({**batch, "inputs": 2 * batch["inputs"]}, 0, train=False)
    np.testing.assert_allclose(louder["inputs"], plain["inputs"], atol=0.1)


def test_sound_is_changed_in_training_only_and_each_time_in_another_way(batch):
    plain = features(batch, 0, train=False)
    np.testing.assert_array_equal(plain["inputs"], features(batch, 1, train=False)["inputs"])
    first, second = (features(batch, seed, train=True) for seed in (0, 1))
    assert np.abs(first["inputs"] - second["inputs"]).max() > 0.1
    assert first["inputs"].shape == plain["inputs"].shape
    longer = features(batch, 0, train=True, keep_time=False)
    assert longer["inputs"].shape[1] > plain["inputs"].shape[1]
    assert (longer["lengths"] >= first["lengths"]).all()


def test_held_out_recordings_come_from_the_training_part_and_are_not_trained_on():
    labels = np.repeat(np.arange(10), 2 * 45)
    part = {
        "labels": labels.astype(np.int32),
        "speakers": np.tile(np.repeat([0, 1], 45), 10).astype(np.int32),
        "inputs": np.tile(np.arange(5, 50), 20)[:, None].astype(np.int16),  # their numbers
        "lengths": np.ones(900, np.int32),
    }
    test = {name: array[:1] for name, array in part.items()}
    digits = tuple("0123456789")
    dataset = jn.data.SpeechDataset("digits", part, test, digits, ("first", "second"), 8000)
    train, held_out, name = choose_parts(dataset, dataclasses.replace(SPEECH, held_out=True))
    assert name == "held-out"
    assert np.unique(held_out["inputs"]).tolist() == [5, 6, 7, 8, 9]
    assert np.unique(train["inputs"]).tolist() == list(range(10, 50))
    assert (len(train["labels"]), len(held_out["labels"])) == (800, 100)
    whole, last, name = choose_parts(dataset, SPEECH)
    assert (len(whole["labels"]), len(last["labels"]), name) == (900, 1, "test")


def test_the_word_error_rate_counts_edits_per_word():
    said = ["one two three", "four", "five six"]
    heard = ["one three", "four four", "five six"]
    assert digit_strings.word_error_rate(said, heard) == pytest.approx(2 / 6)
    assert digit_strings.word_error_rate(said, ["", "", ""]) == 1
    assert jn.metrics.error_rate(map(str.split, heard), map(str.split, said)).compute() == (
        pytest.approx(2 / 6)
    )


def test_a_missing_jiwer_is_reported_before_the_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(RunError, match=r"needs the package jiwer; pip install 'jaxnets\["):
        run_strings(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers is 0"),
        ({"speed": -0.1}, "--speed is -0.1"),
        ({"speed": 1.0}, "give a speed of at least"),
        ({"frequency_mask": 41}, "masks of up to 0 frames and 41 features do not fit"),
        ({"mels": 400}, "400 filters are too many"),
        ({"dropout": 1.0}, "1.0"),
        ({"batch_size": 500}, "batch size 500 is larger than the 200 examples"),
    ],
)
def test_impossible_options_of_words_are_named(changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        run_words(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_digits": 5}, "strings of 5 to 4 digits are out of range"),
        ({"test_strings": 0}, "--test-strings is 0"),
        ({"beams": 0}, "--beams is 0"),
    ],
)
def test_impossible_options_of_strings_are_named(changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        run_strings(tmp_path, **changes)
