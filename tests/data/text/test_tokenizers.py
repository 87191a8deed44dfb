"""Tokenizers: round trips, known ids, files, argument checks."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnets.data import (
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    WordTokenizer,
    load_tokenizer,
    multi30k,
)
from jaxnets.data.datasets.text import MULTI30K_FILES
from jaxnets.data.files import find

SENTENCES = [
    "Ein Mann fährt mit dem Rad.",
    "Zwei Männer fahren mit dem Zug.",
    "Der Mann geht.",
] * 3
CHARACTER = CharacterTokenizer.from_text("".join(SENTENCES))
WORD = WordTokenizer.train(SENTENCES)
SUBWORD = SubwordTokenizer.train(SENTENCES, vocabulary_size=300)
ALL = [CHARACTER, ByteTokenizer(), WORD, SUBWORD]
NAMES = ["character", "byte", "word", "subword"]


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_a_sentence_of_the_training_text_round_trips(tokenizer):
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert ids.min() >= 0 and ids.max() < tokenizer.vocabulary_size
        assert tokenizer.decode(ids) == sentence


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_an_empty_text_has_no_tokens(tokenizer):
    ids = tokenizer.encode("")
    assert ids.shape == (0,) and ids.dtype == np.int32
    assert tokenizer.decode(ids) == tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_a_saved_tokenizer_gives_the_same_ids_after_loading(tokenizer, tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    tokenizer.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.json"]
    json.loads(path.read_text())
    loaded = load_tokenizer(path)
    assert loaded == tokenizer and type(loaded) is type(tokenizer)
    text = "Der Mann fährt mit dem Zug."
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert loaded.vocabulary_size == tokenizer.vocabulary_size


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_a_tokenizer_can_be_pickled(tokenizer):
    sent = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(sent.encode(SENTENCES[0]), tokenizer.encode(SENTENCES[0]))


@given(st.text())
def test_every_text_round_trips_through_bytes_and_subwords(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
    assert SUBWORD.decode(SUBWORD.encode(text)) == text


@given(st.text(min_size=1))
def test_every_text_round_trips_through_its_own_characters(text):
    tokenizer = CharacterTokenizer.from_text(text)
    vocabulary = sorted(set(text))
    assert tokenizer.encode(text).tolist() == [vocabulary.index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_surrogates_survive_encoding_and_saving(tmp_path):
    tokenizer = CharacterTokenizer.from_text("a\ud800\U0001f600")
    tokenizer.save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").decode([1, 0, 2]) == "\ud800a\U0001f600"


def test_invalid_utf8_is_replaced():
    assert ByteTokenizer().decode([104, 255, 105]) == "h\ufffdi"


# Words


def test_words_are_ordered_by_frequency_and_then_by_the_alphabet():
    tokenizer = WordTokenizer.train(["b a c", "c b", "c d"])
    assert tokenizer.words == ("c", "b", "a", "d")
    assert tokenizer.vocabulary_size == 8
    assert tokenizer.encode(" c  x d ").tolist() == [4, 3, 7]
    assert tokenizer.decode([1, 4, 3, 7, 2, 0, 0]) == "c <unk> d"
    assert tokenizer.encode("c", add_special=True).tolist() == [1, 4, 2]


def test_rare_words_are_unknown():
    tokenizer = WordTokenizer.train(["a a b"], min_count=2)
    assert tokenizer.words == ("a",) and tokenizer.encode("a b").tolist() == [4, 3]


# Subwords


def test_the_first_merge_is_the_most_frequent_pair():
    # "xy" occurs 6 times, every other pair at most 3 times.
    tokenizer = SubwordTokenizer.train(["xyxyz", "xyxyw", "xyxyv"], vocabulary_size=261)
    assert tokenizer.vocabulary_size == 261
    assert tokenizer.encode("xy").tolist() == [260]
    assert tokenizer.encode("xyxy").tolist() == [260, 260]


def test_more_merges_make_shorter_sequences():
    longer = SubwordTokenizer.train(SENTENCES, vocabulary_size=260)
    assert len(longer.encode(SENTENCES[0])) == len(SENTENCES[0].encode())
    assert len(SUBWORD.encode(SENTENCES[0])) < len(SENTENCES[0]) - 5


def test_few_texts_give_fewer_tokens_than_requested():
    assert SubwordTokenizer.train(["abab"], vocabulary_size=1000).vocabulary_size == 261


def test_special_ids_are_added_on_request_only_and_never_decoded():
    ids = SUBWORD.encode("Der Mann", add_special=True)
    assert (ids[0], ids[-1]) == (1, 2)
    np.testing.assert_array_equal(ids[1:-1], SUBWORD.encode("Der Mann"))
    assert SUBWORD.decode([*ids, 0, 0]) == "Der Mann"


def test_special_tokens_in_a_text_are_ordinary_characters(tmp_path):
    SUBWORD.save(tmp_path / "t.json")
    sent = pickle.loads(pickle.dumps(SUBWORD))
    for tokenizer in (SUBWORD, load_tokenizer(tmp_path / "t.json"), sent):
        ids = tokenizer.encode("a <pad></s><eos> b")
        assert ids.min() > 3 and tokenizer.decode(ids) == "a <pad></s><eos> b"


def test_training_gives_the_same_merges_in_every_process_and_order():
    texts = [f"{i * 7919 % 101} tagt {i % 13}x{i % 7}" for i in range(500)]
    code = (
        "import json, sys; from jaxnets.data import SubwordTokenizer;"
        "texts = json.loads(sys.stdin.read());"
        "sys.stdout.write(SubwordTokenizer.train(texts, vocabulary_size=400).model)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts[::-1]),
        capture_output=True,
        text=True,
        check=True,
    )
    here = [SubwordTokenizer.train(t, vocabulary_size=400).model for t in (texts, texts[::-1])]
    assert {done.stdout} == set(here) and len(done.stdout) > 1000


def test_a_missing_package_is_reported_with_the_remedy(monkeypatch, tmp_path):
    SUBWORD.save(tmp_path / "t.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        SubwordTokenizer.train(["text"], vocabulary_size=300)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.skipif(
    find(MULTI30K_FILES) is None, reason="Multi30k is not here; set JAXNETS_DATA to its folder"
)
@pytest.mark.parametrize(
    ("num_pairs", "size"), [(500, 1000), pytest.param(29_000, 4000, marks=pytest.mark.slow)]
)
def test_every_sentence_of_multi30k_round_trips_exactly(num_pairs, size):
    dataset = multi30k(download=False)
    training = [sentence for pair in dataset.train[: min(num_pairs, 5000)] for sentence in pair]
    tokenizer = SubwordTokenizer.train(training, vocabulary_size=size)
    assert tokenizer.vocabulary_size == size
    for part in (dataset.train[:num_pairs], dataset.validation, dataset.test):
        for pair in part:
            for sentence in pair:
                assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


# Argument checks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CharacterTokenizer.from_text(""), "''; give a string with at least one"),
        (lambda: CharacterTokenizer("ba"), "'ba' are not sorted and distinct; use .*from_text"),
        (lambda: CharacterTokenizer.from_text("ac").encode("ab"), "'b' at position 1 is not among"),
        (lambda: CharacterTokenizer.from_text("ac").encode("d"), "'d' at position 0"),
        (lambda: WordTokenizer.train([]), "none of the 0 words"),
        (lambda: WordTokenizer.train(["a b"], min_count=2), "none of the 2 words .* lower"),
        (lambda: WordTokenizer.train("a b"), "single string 'a b'; give a list"),
        (lambda: WordTokenizer(("a", "a")), "'a' is listed twice"),
        (lambda: WordTokenizer(("a b",)), "'a b' is not one word"),
        (lambda: SubwordTokenizer.train([], vocabulary_size=300), "the 0 texts are empty"),
        (lambda: SubwordTokenizer.train(["", ""], vocabulary_size=300), "the 2 texts are empty"),
        (lambda: SubwordTokenizer.train("ab", vocabulary_size=300), "single string 'ab'"),
        (lambda: SubwordTokenizer.train(["ab"], vocabulary_size=259), "=259 .* at least 260"),
        (
            lambda: SubwordTokenizer(SUBWORD.model.replace("<pad>", "<end>")),
            "special tokens or bytes are missing; make the tokenizer",
        ),
        (lambda: SubwordTokenizer("{}"), "'{}' is not the JSON of a byte-level tokenizer"),
    ],
)
def test_invalid_tokenizers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    size = tokenizer.vocabulary_size
    for wrong in (-1, size):
        with pytest.raises(ValueError, match=f"id {wrong} is outside the vocabulary of {size}"):
            tokenizer.decode([0, wrong])
    with pytest.raises(ValueError, match="float64 cannot be decoded"):
        tokenizer.decode([0.5])
    with pytest.raises(ValueError, match=r"\(1, 2\).*one row"):
        tokenizer.decode([[0, 1]])


@pytest.mark.parametrize(
    "content",
    [
        *("", "\0\xff", "[]", "{}", "[" * 100_000),
        '{"tokenizer": "latin"}',
        '{"tokenizer": []}',
        '{"tokenizer": "byte", "size": 1}',
        '{"tokenizer": "character"}',
        '{"tokenizer": "character", "characters": 5}',
        '{"tokenizer": "word", "words": [1]}',
        '{"tokenizer": "word", "words": "abc"}',
        '{"tokenizer": "word", "words": ["a"], "words": ["b"]}',
        '{"tokenizer": "byte"',
        '{"tokenizer": "subword", "model": "{}"}',
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(content, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json, line 1: not a saved tokenizer: .*write"):
        load_tokenizer(path)


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_a_file_that_was_changed_is_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text())
    for name in content.keys() - {"sha256"}:
        changed = json.dumps({**content, name: content[name][::-1]}, indent=2)
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"tokenizer\.json, line \d+: not a saved tokenizer: "):
            load_tokenizer(path)


def changed_models():
    """Models with one change each that the library accepts, or fails on in use."""
    model = json.loads(SUBWORD.model)
    yield {**model, "pre_tokenizer": None}
    yield {name: part for name, part in model.items() if name != "pre_tokenizer"}
    yield {**model, "decoder": None}
    yield {**model, "normalizer": {"type": "Lowercase"}}
    yield {**model, "truncation": {"max_length": 2}}
    yield {**model, "added_tokens": model["added_tokens"][:3]}
    inside, vocabulary = model["model"], dict(model["model"]["vocab"])
    yield {**model, "model": {**inside, "dropout": 0.5}}
    yield {**model, "model": {**inside, "continuing_subword_prefix": "##"}}
    yield {**model, "model": {**inside, "end_of_word_suffix": "x"}}
    yield {**model, "model": {**inside, "merges": inside["merges"][1:]}}
    yield {**model, "model": {**inside, "merges": [["a"], *inside["merges"]]}}
    yield {**model, "model": {**inside, "vocab": {**vocabulary, "b": vocabulary["a"]}}}
    yield {**model, "model": {**inside, "vocab": {**vocabulary, "xyz": len(vocabulary)}}}
    yield {**model, "model": {**inside, "vocab": {**vocabulary, "a": vocabulary["b"], "b": 5}}}
    yield {**model, "model": {**inside, "vocab": {**vocabulary, "a": "5"}}}


@pytest.mark.parametrize("model", list(changed_models()))
def test_a_subword_model_that_training_does_not_make_is_refused(model):
    with pytest.raises(ValueError, match=r"is not the JSON of a byte-level tokenizer: .*train"):
        SubwordTokenizer(json.dumps(model))


def test_a_tokenizer_without_a_digest_is_loaded(tmp_path):
    for tokenizer in ALL:
        tokenizer.save(tmp_path / "t.json")
        content = json.loads((tmp_path / "t.json").read_text())
        del content["sha256"]
        (tmp_path / "t.json").write_text(json.dumps(content))
        assert load_tokenizer(tmp_path / "t.json") == tokenizer


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_tokenizer(tmp_path / "nowhere.json")
