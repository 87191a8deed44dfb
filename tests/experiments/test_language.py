"""Language modeling and translation with tiny networks on synthetic texts."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import pytest
from executor_losses import assert_executors_train_alike
from stopping import stopped_at

import jaxnets as jn
from experiments import language_model, translation
from experiments.harness.problem import Measured, member
from experiments.harness.run_folder import RunError
from experiments.harness.training import run
from jaxnets.data.datasets.text import TextDataset, TranslationDataset
from jaxnets.tools import read_result

SHORT = {
    "steps": 6,
    "steps_per_dispatch": 3,
    "log_every": 3,
    "eval_every": 6,
    "checkpoint_every": 3,
    "batch_size": 4,
    "width": 8,
    "heads": 2,
}
MODELS = ("rnn", "lstm", "gru", "mgu", "mingru", "minlstm", "transformer")


@pytest.fixture(autouse=True)
def text(monkeypatch):
    """A text in which only the first letter of a line is random."""
    words = np.random.default_rng(0).choice(["abc\n", "xyz\n"], 500)
    dataset = TextDataset("two words", "".join(words[:450]), "".join(words[450:]))
    monkeypatch.setattr("jaxnets.data.tiny_shakespeare", lambda directory: dataset)
    return dataset


@pytest.fixture(autouse=True)
def captions(monkeypatch):
    english = ["a dog", "a cat", "two dogs", "two cats", "a red dog", "a red cat", "the cat runs"]
    german = ["ein hund", "eine katze", "zwei hunde", "zwei katzen"]
    german += ["ein roter hund", "eine rote katze", "die katze rennt"]
    pairs = tuple(zip(english, german, strict=True))
    dataset = TranslationDataset("captions", pairs * 8, pairs, pairs[:4], "en", "de")
    monkeypatch.setattr("jaxnets.data.multi30k", lambda directory: dataset)
    return dataset


def model_language(out, **changes):
    recipe = language_model.RECIPES[changes.get("model", "transformer")]
    options = {**SHORT, "context": 8, "layers": 1, "embedding": 4, "sample_tokens": 20}
    config = dataclasses.replace(recipe, out=out, **{**options, **changes})
    return run("language_model", config, language_model.LanguageModel)


def translate(out, **changes):
    recipe = translation.RECIPES[changes.get("model", "transformer")]
    options = {**SHORT, "embedding": 8, "hidden": 8, "encoder_layers": 1, "decoder_layers": 1}
    options |= {"vocabulary": 300, "buckets": 1, "beams": 2}
    config = dataclasses.replace(recipe, out=out, **{**options, **changes})
    return run("translation", config, translation.Translation)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_language_model_writes_result_curves_samples_and_tokenizer(model, tmp_path):
    result = model_language(tmp_path, model=model)
    assert read_result(tmp_path) == result
    assert (result["metric"], result["unit"]) == ("validation loss", "nats per character")
    # Every character of the validation text but the first is predicted once.
    assert result["evaluated_tokens"] == 199
    assert result["bits"] == pytest.approx(result["value"] / np.log(2), abs=1e-3)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (tmp_path / "samples.txt").read_text().removesuffix("\n").split("\n\n---\n\n")
    assert [len(sample) for sample in samples] == [21, 21, 21]
    assert all(sample[0] == "\n" and set(sample[1:]) <= set("abcxyz\n") for sample in samples)
    tokenizer = jn.data.load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("abc\nxyz")) == "abc\nxyz"


@pytest.mark.slow
def test_a_context_of_one_token_is_sampled_from_too(tmp_path):
    result = model_language(tmp_path, context=1, sample_tokens=3)
    assert np.isfinite(result["value"])
    samples = (tmp_path / "samples.txt").read_text().removesuffix("\n").split("\n\n---\n\n")
    assert [len(sample) for sample in samples] == [4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_the_loss_is_near_that_of_the_text(model, tmp_path):
    # One of four characters is random, with probability 1/2: ln(2) / 4 nats per character.
    result = model_language(
        tmp_path,
        model=model,
        prompt="abc\nxyz\n",
        **{"steps": 240, "eval_every": 240, "checkpoint_every": 240, "steps_per_dispatch": 60},
        **{"width": 32, "batch_size": 16, "context": 16, "learning_rate": 1e-2, "dropout": 0.0},
    )
    assert np.log(2) / 4 - 0.05 < result["value"] < np.log(2) / 4 + 0.1


def test_the_value_is_the_mean_loss_over_every_character():
    config = language_model.Config(
        model="transformer", layers=1, width=8, heads=2, context=8, seeds=2
    )
    problem = language_model.LanguageModel(config)
    states = problem.create_states()
    tokens = problem.validation
    # [seeds, windows, time, vocabulary], of the window that starts at each token.
    padded = np.pad(tokens, (0, 8))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 8)[: len(tokens) - 1]

    @jax.jit
    @jax.vmap
    def window_losses(params):
        return -jax.nn.log_softmax(problem.module.apply({"params": params}, windows))

    losses = np.asarray(window_losses(states.params))
    for stride in (None, 3):
        problem.config = problem.options = dataclasses.replace(config, stride=stride)
        for index, value in enumerate(problem.measure(states).values):
            # Each character counts in the first window that predicts it.
            per_character = {}
            for start in range(0, len(tokens) - 1, stride or 8):
                for place, label in enumerate(tokens[start + 1 : start + 9]):
                    loss = losses[index, start, place, label]
                    per_character.setdefault(start + place, loss)
            assert len(per_character) == len(tokens) - 1
            assert value == pytest.approx(np.mean(list(per_character.values())), abs=1e-5)


@pytest.mark.slow
def test_bytes_and_the_help_topics_of_python_are_modeled_too(tmp_path, monkeypatch, text):
    monkeypatch.setattr("jaxnets.data.python_topics", lambda: text)
    result = model_language(tmp_path, corpus="python_topics", tokens="bytes", executor="pmap")
    assert result["unit"] == "nats per byte" and result["dataset"] == "two words"


@pytest.mark.slow
def test_streams_with_a_carry_are_trained_by_every_executor():
    options = {**SHORT, "model": "gru", "context": 8, "layers": 1, "embedding": 4, "dropout": 0.0}
    config = dataclasses.replace(language_model.RECIPES["gru"], **options, seeds=2)
    executors = ["scan", "jit", "pmap", "sharded"]
    assert_executors_train_alike(language_model.LanguageModel, config, executors)


@pytest.mark.slow
@pytest.mark.parametrize("make", [model_language, translate])
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_a_stopped_run_ends_bitwise_as_one_that_was_not(make, model, tmp_path, monkeypatch):
    # What is measured and drawn at the end does not matter here, and takes longest.
    for kind in (language_model.LanguageModel, translation.Translation):
        monkeypatch.setattr(kind, "measure", lambda *_: Measured("nothing", np.zeros(1)))
        monkeypatch.setattr(kind, "draw", lambda *_: {})
    whole = make(tmp_path / "whole", model=model, executor="jit")
    with stopped_at(3, monkeypatch):
        make(tmp_path / "stopped", model=model, executor="jit")
    result = make(tmp_path / "stopped", model=model, executor="jit", resume=True)
    assert result["parameters_sha256"] == whole["parameters_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "lstm", "transformer"])
def test_a_translation_writes_result_translations_and_attention(captions, model, tmp_path):
    seeds = 2 if model == "gru" else 1
    result = translate(tmp_path, model=model, seeds=seeds)
    assert (result["metric"], result["unit"]) == ("test2016 score", "BLEU")
    assert result["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    assert len(result["values"]) == seeds
    for figure in ("curves.png", "attention.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "translations.txt").read_text().rstrip("\n").split("\n\n")
    for lines, (source, target) in zip(written, captions.test, strict=True):
        first, second, third = lines.split("\n")
        assert first == f"source      {source}" and second == f"reference   {target}"
        assert third.startswith("translation")
    tokenizer = jn.data.load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("ein hund")) == "ein hund"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_captions_are_memorized(captions, model, tmp_path):
    result = translate(
        tmp_path,
        model=model,
        **{"steps": 150, "eval_every": 150, "checkpoint_every": 150, "log_every": 50},
        **{"width": 32, "embedding": 32, "hidden": 64, "batch_size": 16, "learning_rate": 1e-2},
        **{"dropout": 0.0, "average_decay": 0.0, "label_smoothing": 0.0},
    )
    # Sentences of two words have no 4-grams, so BLEU itself is smoothed below 100.
    text = (tmp_path / "translations.txt").read_text()
    for _, target in captions.test:
        assert f"reference   {target}\ntranslation {target}\n" in text
    assert result["greedy"] == result["value"]


def test_a_missing_sacrebleu_is_reported_before_the_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(RunError, match=r"needs the package sacrebleu; pip install 'jaxnets\["):
        translate(tmp_path)


@functools.cache
def untrained_translator(model):
    """Return a problem and one state of it."""
    config = dataclasses.replace(
        translation.RECIPES[model],
        **{"width": 8, "hidden": 8, "heads": 2, "embedding": 8, "vocabulary": 300, "buckets": 2},
        **{"encoder_layers": 1, "decoder_layers": 2, "average_decay": 0.0},
    )
    problem = translation.Translation(config)
    return problem, member(problem.create_states(), 0)


def test_translations_are_in_the_order_of_the_sentences(captions):
    problem, state = untrained_translator("transformer")
    sentences = [source for source, _ in captions.train[:7]]
    together = problem.translate(state, sentences, num_beams=2)
    compiled = problem.start._cache_size()
    assert problem.translate(state, sentences, num_beams=2) == together
    problem.translate(state, sentences, num_beams=1)
    assert problem.start._cache_size() == compiled
    assert problem.translate(state, sentences[6:], num_beams=2) == [together[6]]


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_attention_has_a_row_for_each_target_token_and_sums_to_one(model):
    problem, state = untrained_translator(model)
    weights, (read, said) = problem.attention(state, "a red dog", "ein roter hund")
    assert weights.shape == (len(said), len(read)) and said[-1] == "(end)"
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert "".join(read) == "areddog"


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (model_language, {"prompt": ""}, "--prompt is empty"),
        (model_language, {"prompt": "!"}, "'!'"),
        (model_language, {"context": 0}, "--context is 0; give a number above 0"),
        (model_language, {"context": 5000}, "5000"),
        (model_language, {"width": 9}, "9 features do not split into 2 heads"),
        (model_language, {"temperature": -1.0}, "--temperature is -1.0"),
        (model_language, {"model": "gru", "batch_size": 1000}, "1000"),
        (translate, {"vocabulary": 10}, "vocabulary_size=10"),
        (translate, {"beams": 0}, "--beams is 0; give a number above 0"),
        (translate, {"dropout": 1.0}, "dropout rate 1.0"),
        (translate, {"label_smoothing": 1.5}, "1.5"),
    ],
)
def test_impossible_options_are_named(make, changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        make(tmp_path, **changes)
