"""The experiments on addition and sentiment with tiny networks."""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executor_losses import assert_executors_train_alike
from stopping import stopped_at

import jaxnets as jn
from experiments import addition, sentiment
from experiments.harness.problem import Measured
from experiments.harness.run_folder import RunError
from experiments.harness.training import main, run
from jaxnets.data.datasets.text import SentenceDataset, Sentences
from jaxnets.pretrained.processors import TextProcessor
from jaxnets.tools import read_result

SHORT = {
    "steps": 6,
    "steps_per_dispatch": 3,
    "log_every": 3,
    "eval_every": 6,
    "checkpoint_every": 3,
}


ADDER = addition.Config(width=8, batch_size=16, digits=2, seeds=2, **SHORT)


def add(out, **changes):
    return run("addition", dataclasses.replace(ADDER, out=out, **changes), addition.Addition)


def words(seed, count):
    """Draw sentences whose class is determined by one word."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count).astype(np.int32)
    texts = []
    for label in labels:
        sentence = random.choice(["the", "film", "is", "and", "a"], random.integers(1, 9)).tolist()
        sentence.insert(random.integers(0, len(sentence) + 1), ("bad", "good")[label])
        texts.append(" ".join(sentence))
    return Sentences(tuple(texts), labels)


@pytest.fixture
def reviews(monkeypatch):
    dataset = SentenceDataset(
        "reviews", words(0, 200), words(1, 30), words(2, 50), ("negative", "positive")
    )
    monkeypatch.setattr("jaxnets.data.sst2", lambda directory: dataset)
    return dataset


def judge(out, **changes):
    config = sentiment.Config(
        width=8, embedding=8, heads=2, batch_size=16, buckets=2, min_count=1, **SHORT
    )
    return run("sentiment", dataclasses.replace(config, out=out, **changes), sentiment.Sentiment)


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    out = tmp_path_factory.mktemp("added")
    return out, add(out)


@pytest.mark.slow
def test_an_addition_run_writes_result_curves_and_mistakes(added):
    out, result = added
    assert read_result(out) == result
    assert result["metric"] == "exact sums" and len(result["values"]) == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # After six steps nearly all of the 2,000 sums are wrong; each is listed with the right one.
    lines = (out / "mistakes.txt").read_text().splitlines()
    assert len(lines) == round(2000 * (1 - result["values"][0])) > 1900
    for line in lines:
        question, truth = line.split(", not")[0].split(" = ")
        assert sum(map(int, question.split("+"))) == int(truth)


@pytest.mark.slow
def test_a_stopped_addition_ends_bitwise_as_one_that_was_not(added, tmp_path, monkeypatch):
    with stopped_at(3, monkeypatch):
        add(tmp_path)
    result = add(tmp_path, resume=True)
    assert result["parameters_sha256"] == added[1]["parameters_sha256"]


@pytest.mark.slow
def test_every_executor_trains_the_same_adders():
    config = dataclasses.replace(ADDER, model="rnn")
    assert_executors_train_alike(addition.Addition, config, ["scan", "jit", "pmap", "sharded"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_every_adder_runs(model, tmp_path):
    assert add(tmp_path, model=model, seeds=1)["model"] == model


def test_the_value_is_the_fraction_of_exact_answers(monkeypatch):
    problem = addition.Addition(addition.Config(digits=2, width=8))
    right = [str(a + b) for a, b in problem.pairs.tolist()]
    monkeypatch.setattr(problem, "answers", lambda state: right)
    states = None  # of networks that answer as above
    assert problem.measure(states).values.tolist() == [1.0] and problem.mistakes == []
    monkeypatch.setattr(problem, "answers", lambda state: ["-", *right[1:]])
    assert problem.measure(states).values.tolist() == [1 - 1 / 2000]
    assert len(problem.mistakes) == 1


def test_sums_are_encoded_in_reverse_between_special_ids_and_decoded():
    batch = addition.encode(np.array([[12, 9], [99, 99]]), 2)
    assert batch["inputs"].tolist() == [[5, 6, 14, 13, 0], [13, 13, 14, 13, 13]]
    assert batch["lengths"].tolist() == [4, 5]
    assert batch["decoder_inputs"].tolist() == [[1, 5, 6, 0], [1, 12, 13, 5]]
    assert batch["labels"].tolist() == [[5, 6, 2, 0], [12, 13, 5, 2]]
    assert batch["label_lengths"].tolist() == [3, 4]
    assert [addition.decode(row)[::-1] for row in batch["labels"]] == ["21", "198"]


def test_sums_are_a_function_of_seed_and_step_and_exclude_the_test_set():
    source = addition.Sums(digits=2, batch_size=64, seed=3)
    batches = list(itertools.islice(source(0), 20))
    for name, array in next(source(5)).items():
        np.testing.assert_array_equal(array, batches[5][name])
    other = next(addition.Sums(digits=2, batch_size=64, seed=4)(0))
    assert (other["inputs"] != batches[0]["inputs"]).any()
    trained = {tuple(row) for batch in batches for row in batch["inputs"].tolist()}
    tested = addition.draw_pairs(np.random.default_rng(0), 200, 2, held_out=True)
    assert trained.isdisjoint(map(tuple, addition.encode(tested, 2)["inputs"].tolist()))


@pytest.mark.parametrize("digits", [1, 2, 3, 9])
def test_about_a_twentieth_of_the_sums_is_held_out(digits):
    pairs = np.random.default_rng(0).integers(0, 10**digits, (20_000, 2))
    assert np.mean(addition.is_held_out(pairs, digits)) == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digits": 0}, "--digits is 0"),
        ({"digits": 10}, "--digits is 10; give 1 to 9"),
        ({"width": 0}, "--width is 0; give a number above 0"),
        ({"model": "transformer", "width": 10}, "10 features do not split into 4 heads"),
        pytest.param(
            {"executor": "pmap", "batch_size": 6},
            "batch size 6 is not divisible by 4 devices",
            marks=[pytest.mark.four_devices, pytest.mark.slow],
        ),
    ],
)
def test_impossible_options_of_addition_are_named(changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        add(tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_a_sentiment_run_writes_result_figures_tokenizer_and_mistakes(reviews, model, tmp_path):
    result = judge(tmp_path, model=model, seeds=2, executor="jit")
    assert result["dataset"] == "reviews" and len(result["values"]) == 2
    assert 0 <= result["validation_accuracy"] <= 1
    for figure in ("curves.png", "confusion.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    tokenizer = jn.data.load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocabulary_size == result["vocabulary"] == 4 + 7
    for line in (tmp_path / "mistakes.txt").read_text().splitlines():
        verdict, text = line.split(": ")
        said, truth = verdict.split()[0], verdict.split()[-1]
        assert (
            said != truth
            and reviews.class_names[reviews.test.labels[reviews.test.texts.index(text)]] == truth
        )


@pytest.fixture
def encoder(tmp_path):
    """Return the folder of a tiny sentence encoder and its variables."""
    module = jn.transformer.SentenceEncoder(
        12, 1, jn.BlockConfig(8, 2, mlp_dim=8, norm_first=False, key_bias=True), 16
    ).clone(num_segments=2, embedding_norm=True)
    variables = module.init(jax.random.key(0), np.zeros((1, 2), np.int32))
    folder = tmp_path / "encoder"
    network = jn.pretrained.PretrainedNetwork(module, variables)
    jn.pretrained.save(folder, network, layout="torch")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names += ["the", "film", "is", "and", "a", "good", "bad"]
    (folder / "vocab.txt").write_text("\n".join(names))
    return folder, variables["params"]


def test_a_pretrained_encoder_is_where_every_seed_starts(reviews, encoder):
    folder, params = encoder
    problem = sentiment.Sentiment(sentiment.Config(pretrained=folder, seeds=2, buckets=2))
    states = problem.create_states()
    for name in ("embedding", "stack"):
        for found, expected in zip(
            jax.tree.leaves(states.params[name]), jax.tree.leaves(params[name]), strict=True
        ):
            np.testing.assert_array_equal(found, np.stack([expected] * 2))
    heads = states.params["head"]["kernel"]
    assert (heads[0] != heads[1]).any()
    assert problem.train[0][0][0] == 2  # [CLS]


def test_an_adapter_starts_as_the_encoder_with_a_head_of_its_own(reviews, encoder):
    folder, _ = encoder
    options = sentiment.Config(pretrained=folder, seeds=2, buckets=1, lora_rank=2)
    problem = sentiment.Sentiment(options)
    states = problem.create_states()
    whole = sentiment.Sentiment(dataclasses.replace(options, lora_rank=0))
    same = whole.create_states()
    for one, other in zip(
        jax.tree.leaves(states.params["head"]), jax.tree.leaves(same.params["head"]), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert "embedding" not in states.params
    a = states.params["stack"]["layer_0"]["attention"]["query"]["kernel"]["lora_a"]
    assert a.shape == (2, 8, 2) and (a[0] != a[1]).any()
    # 2 (8 + 8) for each of four kernels of attention and of two of the MLP, 18 of the head.
    assert "trained: 210 of" in problem.prepare(None, 0, states)
    batch = problem.eval_batches[0]
    losses = [
        each.eval_step()(own, batch)["loss"] for each, own in ((problem, states), (whole, same))
    ]
    np.testing.assert_allclose(losses[0].total, losses[1].total, rtol=1e-6)
    sentences = reviews.validation
    np.testing.assert_allclose(
        problem.probabilities(states, sentences), whole.probabilities(same, sentences), atol=1e-6
    )


@pytest.mark.slow
def test_an_adapter_is_not_resumed_above_another_encoder(reviews, encoder, tmp_path, monkeypatch):
    folder, _ = encoder
    options = {"pretrained": folder, "executor": "jit", "lora_rank": 2}
    with stopped_at(3, monkeypatch):
        judge(tmp_path / "run", **options)
    network = jn.pretrained.load(folder)
    other = jax.tree.map(lambda leaf: leaf + 1, network.variables)
    moved = dataclasses.replace(network, variables=other, processor=None)
    jn.pretrained.save(tmp_path / "moved", moved, layout="torch")
    (tmp_path / "moved" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(RunError, match="data"):
        judge(tmp_path / "run", resume=True, **options)


@pytest.mark.slow
def test_an_adapter_is_fine_tuned(reviews, encoder, tmp_path):
    result = judge(
        tmp_path / "run",
        pretrained=encoder[0],
        executor="jit",
        lora_rank=2,
        average_decay=0.9,
        seeds=2,
    )
    assert result["parameters"] == 210 and 0 < result["trained_share"] < 1
    assert result["network_parameters"] * result["trained_share"] == pytest.approx(210)


@pytest.mark.slow
def test_a_pretrained_encoder_is_fine_tuned(reviews, encoder, tmp_path):
    result = judge(tmp_path / "run", pretrained=encoder[0], executor="jit")
    assert result["model"] == "pretrained"
    assert result["vocabulary"] == 12
    assert TextProcessor.from_folder(tmp_path / "run").vocabulary_size == 12


@pytest.mark.slow
def test_words_that_determine_the_class_are_learned(reviews, tmp_path):
    result = judge(
        tmp_path,
        executor="jit",
        steps=60,
        learning_rate=3e-2,
        average_decay=0.9,
        dropout=0.2,
        log_every=60,
        eval_every=60,
        checkpoint_every=60,
    )
    assert result["value"] == 1.0


@pytest.mark.slow
def test_a_stopped_sentiment_run_ends_bitwise_as_one_that_was_not(reviews, tmp_path, monkeypatch):
    # What is measured and drawn at the end does not matter here, and takes longest.
    monkeypatch.setattr(sentiment.Sentiment, "measure", lambda *_: Measured("nothing", np.zeros(1)))
    monkeypatch.setattr(sentiment.Sentiment, "draw", lambda *_: {})
    whole = judge(tmp_path / "whole", executor="jit")
    with stopped_at(3, monkeypatch):
        judge(tmp_path / "stopped", executor="jit")
    result = judge(tmp_path / "stopped", executor="jit", resume=True)
    assert result["parameters_sha256"] == whole["parameters_sha256"]


@pytest.mark.slow
def test_sentiment_is_trained_by_every_executor(reviews):
    # As many tokens as 18 sentences have are 8 padded ones, a multiple of the devices.
    config = sentiment.Config(
        **{"model": "gru", "width": 8, "embedding": 8, "dropout": 0.0, "word_dropout": 0.0},
        **{"batch_size": 18, "buckets": 1, "min_count": 1, "seeds": 2},
        **SHORT,
    )
    executors = ["scan", "jit", "pmap", "sharded"]
    assert_executors_train_alike(sentiment.Sentiment, config, executors)


def test_dropped_words_become_unknown_in_training_only(reviews):
    problem = sentiment.Sentiment(sentiment.Config(word_dropout=0.5))
    tokens = jnp.full((50, 40), 7)
    drop = functools.partial(problem.drop_words, {"inputs": tokens}, jax.random.key(0))
    assert (np.asarray(drop(train=False)["inputs"]) == 7).all()
    dropped = np.asarray(drop(train=True)["inputs"])
    assert set(np.unique(dropped)) == {jn.data.UNKNOWN, 7}
    assert np.mean(dropped == 7) == pytest.approx(0.5, abs=0.05)


def test_probabilities_are_in_the_order_of_the_sentences(reviews):
    problem = sentiment.Sentiment(sentiment.Config(width=8, embedding=8, seeds=2, buckets=2))
    states = problem.create_states()
    probabilities = problem.probabilities(states, reviews.test)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))  # over the seeds
    def one_sentence(params, ids, length):
        logits = problem.module.apply({"params": params}, ids[None], length[None])
        return jax.nn.softmax(logits)[0]

    for index in (0, 17, 49):
        ids = problem.tokenizer.encode(reviews.test.texts[index])
        padded = np.pad(ids, (0, 16 - len(ids)))
        expected = np.mean(one_sentence(states.params, padded, np.array(len(ids))), axis=0)
        np.testing.assert_allclose(probabilities[index], expected, atol=1e-6)


def test_the_most_confident_mistakes_come_first():
    lines = sentiment.mistakes(
        ["dull", "fine", "odd", "grand"],
        np.array([0, 1, 1, 1]),
        np.array([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1], [0.55, 0.45]]),
        ("negative", "positive"),
        num_shown=2,
    )
    assert lines == ["negative 90.0%, not positive: odd\n", "positive 80.0%, not negative: dull\n"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "--lora-rank is 4, but nothing is pretrained; give"),
        ({"word_dropout": 1.0}, r"--word-dropout is 1.0; give a number in \[0, 1\)"),
        ({"dropout": 1.0}, "dropout rate 1.0"),
        ({"min_count": 10_000}, "none of the 7 words of the texts occurs 10000 times"),
        ({"tokens": "subwords", "vocabulary": 100}, "vocabulary_size=100"),
        ({"batch_size": 1, "executor": "jit"}, "tokens_per_batch=6; raise it"),
    ],
)
def test_impossible_options_of_sentiment_are_named(reviews, changes, message, tmp_path):
    with pytest.raises((RunError, ValueError), match=message):
        judge(tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "make_problem", "recipes"),
    [
        ("addition", addition.Addition, addition.RECIPES),
        ("sentiment", sentiment.Sentiment, sentiment.RECIPES),
    ],
)
def test_an_unknown_model_ends_with_code_2(name, make_problem, recipes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--model", "oracle"])
    with pytest.raises(SystemExit) as stopped:
        main(name, make_problem, recipes)
    assert stopped.value.code == 2
    assert "invalid choice" in "".join(capsys.readouterr())
