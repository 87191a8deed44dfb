"""Text processors: tokenizers of folders, batches, truncation, what is refused."""

import json
import pickle

import numpy as np
import pytest

from jaxnets.pretrained.processors import TextProcessor, read_text_processor

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "good", "film", "##s"]
PAD, UNKNOWN, CLS, SEP, MASK, A, B, C, GOOD, FILM, S = range(len(WORDS))
BERT = {"vocab": "\n".join(WORDS)}
TEXTS = ["the quick brown fox", "jumps over", "the lazy dog's 3 bones", "über alles"]


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        suffix = ".txt" if name in ("vocab", "merges") and isinstance(content, str) else ".json"
        (folder / f"{name}{suffix}").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def bert(tmp_path):
    return write(tmp_path / "bert", **BERT)


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    """Return {name: text} of vocab.json and merges.txt with RoBERTa's special tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pieces
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pieces.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    return vocabulary, (folder / "merges.txt").read_text(encoding="utf-8")


def rows(batch):
    return [row[:n].tolist() for row, n in zip(batch["tokens"], batch["lengths"], strict=True)]


def test_words_are_split_into_pieces_between_the_special_tokens(bert):
    processor = TextProcessor.from_folder(bert)
    batch = processor(["Good films", "a zebra", ""])
    assert rows(batch) == [[CLS, GOOD, FILM, S, SEP], [CLS, A, UNKNOWN, SEP], [CLS, SEP]]
    assert batch["tokens"].dtype == batch["lengths"].dtype == np.int32
    assert (batch["tokens"][2, 2:] == PAD).all()
    assert processor.encode("a b", add_special=False).tolist() == [A, B]
    assert processor.vocabulary_size == len(WORDS)
    assert processor.special_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert processor.stop_tokens == ()


def test_the_second_text_of_a_pair_has_segment_1(bert):
    batch = TextProcessor.from_folder(bert)(["a b", "c"], ["c", "good film"])
    assert rows(batch) == [[CLS, A, B, SEP, C, SEP], [CLS, C, SEP, GOOD, FILM, SEP]]
    assert batch["segments"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_the_longer_text_of_a_pair_is_cut_first(bert):
    processor = TextProcessor.from_folder(bert)
    cut = processor(["a b c a b"], ["c good"], max_length=7, truncate=True)
    assert rows(cut) == [[CLS, A, B, SEP, C, GOOD, SEP]]
    assert cut["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_a_text_is_cut_at_the_side_that_the_folder_names(bert):
    write(bert, tokenizer_config={"truncation_side": "left", "model_max_length": 4})
    processor = TextProcessor.from_folder(bert)
    assert processor.encode("a b c", truncate=True).tolist() == [CLS, B, C, SEP]
    assert processor.encode("a b c", truncate=True, max_length=3).tolist() == [CLS, C, SEP]


def test_a_truncated_call_leaves_the_next_one_whole(bert):
    processor = TextProcessor.from_folder(bert)
    processor(["a b c"], max_length=3, truncate=True)
    assert processor.encode("a b c").size == 5


def test_rows_are_padded_to_a_multiple_or_a_bucket(bert):
    processor = TextProcessor.from_folder(bert)
    assert processor(["a b c"], multiple=4)["tokens"].shape == (1, 8)
    assert processor(["a b c"], buckets=(16, 5, 6))["tokens"].shape == (1, 5)
    assert processor(["a b c d"], buckets=(16, 5, 6))["segments"].shape == (1, 6)
    with pytest.raises(ValueError, match="6 tokens is longer than the buckets"):
        processor(["a b c d"], buckets=[4, 5])


def test_decoding_leaves_special_tokens_out(bert):
    processor = TextProcessor.from_folder(bert)
    ids = processor.encode("Good films, a")
    assert processor.decode(ids) == "good films a"  # the comma is unknown
    assert processor.decode(ids, keep_special=True) == "[CLS] good films [UNK] a [SEP]"
    with pytest.raises(ValueError, match="token id 11 is outside"):
        processor.decode([11])


def test_many_texts_are_encoded_as_one(bert):
    processor = TextProcessor.from_folder(bert)
    texts = ["a", "good films", "b c"]
    assert [row.tolist() for row in processor.encode_batch(texts)] == [
        processor.encode(text).tolist() for text in texts
    ]


@pytest.mark.parametrize("layout", ["saved", "pickled"])
def test_a_processor_round_trips(bert, tmp_path, layout):
    write(bert, tokenizer_config={"model_max_length": 7, "truncation_side": "left"})
    processor = TextProcessor.from_folder(bert)
    processor.save(tmp_path / "saved")
    loaded = (
        TextProcessor.from_folder(tmp_path / "saved")
        if layout == "saved"
        else pickle.loads(pickle.dumps(processor))
    )
    assert loaded == processor
    assert rows(loaded(["a good film"])) == rows(processor(["a good film"]))


def test_padding_and_truncation_of_the_file_have_no_influence(bert, tmp_path):
    TextProcessor.from_folder(bert).save(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))
    assert rows(TextProcessor.from_folder(path.parent)(["a b c"])) == [[CLS, A, B, C, SEP]]


@pytest.mark.parametrize("lower", [True, False])
def test_options_of_the_configuration_change_the_tokenizer(bert, tmp_path, lower):
    TextProcessor.from_folder(bert).save(tmp_path / "saved")
    for folder in (bert, tmp_path / "saved"):
        write(folder, tokenizer_config={"do_lower_case": lower})
        ids = TextProcessor.from_folder(folder).encode("Good", add_special=False)
        assert ids.tolist() == [GOOD if lower else UNKNOWN]


def test_segments_are_those_of_the_network(bert):
    for names, expected in ((["input_ids"], False), (["input_ids", "token_type_ids"], True)):
        write(bert, tokenizer_config={"model_input_names": names})
        assert TextProcessor.from_folder(bert).segments == expected
    write(bert, tokenizer_config={"tokenizer_class": "DistilBertTokenizerFast"})
    assert set(TextProcessor.from_folder(bert)(["a"])) == {"tokens", "lengths"}


def test_byte_pairs_of_roberta(byte_pairs, tmp_path):
    vocabulary, merges = byte_pairs
    processor = TextProcessor.from_folder(write(tmp_path, vocab=vocabulary, merges=merges))
    assert processor.stop_tokens == (vocabulary["</s>"],)
    batch = processor(TEXTS, [TEXTS[0], *TEXTS[:-1]])
    assert set(batch) == {"tokens", "lengths"}
    first = batch["tokens"][0].tolist()
    assert first[0] == vocabulary["<s>"]
    assert first.count(vocabulary["</s>"]) == 3  # <s> A </s></s> B </s>
    beyond = np.arange(batch["tokens"].shape[1]) >= batch["lengths"][:, None]
    assert beyond.any()
    np.testing.assert_array_equal(batch["tokens"] == vocabulary["<pad>"], beyond)
    for text in TEXTS:
        assert processor.decode(processor.encode(text)) == text
    # The mask takes the space before it, as in training.
    masked = processor.encode("the <mask> dog").tolist()
    assert masked.index(vocabulary["<mask>"]) == processor.encode("the").size - 1


def test_byte_pairs_of_gpt2_have_no_special_tokens_around_a_text(byte_pairs, tmp_path):
    vocabulary, merges = byte_pairs
    names = {"<s>": "<|endoftext|>"}
    kept = {
        names.get(token, token): index
        for token, index in vocabulary.items()
        if token not in ("</s>", "<pad>", "<unk>", "<mask>")
    }
    processor = TextProcessor.from_folder(write(tmp_path, vocab=kept, merges=merges))
    assert processor.stop_tokens == (0,)
    assert processor.decode(processor.encode(TEXTS[0])) == TEXTS[0]
    assert 0 not in processor.encode(TEXTS[0])
    assert processor.encode("a<|endoftext|>")[-1] == 0
    assert processor.vocabulary_size == 1 + max(kept.values())
    with pytest.raises(ValueError, match="sequence 0 has shape"):
        processor([""])


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_begin_and_end_are_added_as_the_folder_says(byte_pairs, tmp_path, begin, end):
    vocabulary, merges = byte_pairs
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    config |= {"add_bos_token": begin, "add_eos_token": end}
    folder = write(tmp_path, vocab=vocabulary, merges=merges, tokenizer_config=config)
    processor = TextProcessor.from_folder(folder)
    plain = processor.encode("the dog", add_special=False).tolist()
    expected = [0] * begin + plain + [2] * end
    assert processor.encode("the dog").tolist() == expected
    assert processor.encode("the dog", "the dog").tolist() == expected * 2


def test_tokens_that_the_vocabulary_lacks_are_added_at_its_end(bert):
    write(bert, added_tokens={"<x>": 12, "<y>": 11})
    write(
        bert, special_tokens_map={"pad_token": "[PAD]", "eos_token": "<end>", "cls_token": "[CLS]"}
    )
    processor = TextProcessor.from_folder(bert)
    assert processor.encode("a<x><y><end>", add_special=False).tolist() == [A, 12, 11, 13]
    assert processor.stop_tokens == (13,)
    write(bert, added_tokens={"<x>": 20})
    with pytest.raises(ValueError, match="'<x>' has the id 20, but the next one is 11"):
        TextProcessor.from_folder(bert)


def test_a_folder_without_a_tokenizer(tmp_path):
    assert read_text_processor(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        TextProcessor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": "{"}, "tokenizer.json is no tokenizer"),
        ({"tokenizer": {"model": {"type": "WordPiece"}}}, "tokenizer.json is no tokenizer"),
        ({"vocab": "a\nb"}, r"vocab.txt has no token '\[UNK\]'"),
        ({"vocab": {"a": 0}, "merges": "x y"}, "vocab.json and .*merges.txt is no tokenizer"),
        ({"vocab": "a", "tokenizer_config": "{"}, "tokenizer_config.json, line 1: not options"),
        ({"vocab": "a", "tokenizer_config": {"pad_token": 3}}, "pad_token is 3"),
        ({"tokenizer_config": {"tokenizer_class": "T5Tokenizer"}}, "the T5Tokenizer that it has"),
        ({"tokenizer_config": {"split_special_tokens": True}}, "not supported"),
        ({**BERT, "tokenizer_config": {"model_max_length": -1}}, "model_max_length is -1"),
        ({**BERT, "added_tokens": {"\ud800": 11}}, "added_tokens.json.* surrogate pair"),
        ({**BERT, "tokenizer_config": {"pad_token": ""}}, "bert.* pad token '' is not in"),
        ({"vocab": {"a": 10**9}, "merges": ""}, "bert.* 'a' has the id 1000000000"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        TextProcessor.from_folder(write(tmp_path / "bert", **files))


def test_a_sentencepiece_model_alone_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\n\x0b")
    with pytest.raises(ValueError, match=r"spiece.model.*AutoTokenizer.from_pretrained"):
        TextProcessor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "a b"}, "single string"),
        ({"texts": []}, "empty"),
        ({"texts": ["a", 3]}, "text 1 is 3, not a string"),
        ({"texts": ["a", "x\ud800"]}, "text 1 has half a surrogate pair at character 1"),
        ({"texts": ["a"], "pairs": ["a", "b"]}, "1 texts and 2 pairs"),
        ({"texts": ["a", "a b c"], "max_length": 4}, "text 1 has 5 tokens, more than max_length=4"),
        ({"texts": ["a"], "max_length": 2, "truncate": True}, "give at least 3"),
    ],
)
def test_bad_texts_are_refused(bert, arguments, message):
    with pytest.raises(ValueError, match=message):
        TextProcessor.from_folder(bert)(**arguments)


def test_bad_fields_are_refused(bert):
    model = TextProcessor.from_folder(bert).model
    for fields, message in (
        (
            {"special_tokens": {"eos": "</s>"}},
            "the eos token '</s>' is not in the vocabulary of 11",
        ),
        ({"truncation_side": "top"}, "truncation_side is 'top'"),
        ({"max_length": 0}, "max_length"),
        ({"model": "[]"}, "model is no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            TextProcessor(**{"model": model, **fields})


def test_a_part_that_fails_only_in_use_is_refused_when_it_is_read(bert):
    content = json.loads(TextProcessor.from_folder(bert).model)
    content["post_processor"]["special_tokens"].pop("[SEP]")
    with pytest.raises(ValueError, match="model is no tokenizer"):
        TextProcessor(json.dumps(content))
