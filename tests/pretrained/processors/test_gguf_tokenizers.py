"""Tokenizers of GGUF files: both models, special tokens, what is refused."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets.pretrained.processors import read_gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
PATH = Path("network.gguf")
KEYS = "tokenizer.ggml"


def keys(**entries):
    return {f"{KEYS}.{name}": value for name, value in entries.items() if value is not None}


def pieces(words, **entries):
    """Return the metadata of a SentencePiece model; scores fall by one from word to word."""
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words)
    scores = [0.0] * 259 + [-float(index) for index in range(len(words))]
    lists = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    return keys(**(lists | entries))


def byte_pairs(merges=(), *, extra=(), **entries):
    """Return the metadata of a BPE model of bytes; `extra` are tokens and their types."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *["".join(pair.split(" ")) for pair in merges]]
    types = [NORMAL] * len(tokens) + [kind for _, kind in extra]
    tokens += [token for token, _ in extra]
    lists = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": types}
    return keys(**(lists | {"merges": list(merges)} | entries))


def spelled(metadata, text, **options):
    """Return the tokens of a text."""
    processor = read_gguf_tokenizer(PATH, metadata)
    return [metadata[f"{KEYS}.tokens"][index] for index in processor.encode(text, **options)]


def by_scores(metadata, text):
    """Return the ids of a text as SentencePiece's BPE has them: the best pair, then the next."""
    tokens, scores = metadata[f"{KEYS}.tokens"], metadata[f"{KEYS}.scores"]
    ids = {token: index for index, token in enumerate(tokens)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (scores[ids[left + right]], -index)
            for index, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            break
        index = -max(pairs)[1]
        symbols[index : index + 2] = ["".join(symbols[index : index + 2])]
    result = []
    for symbol in symbols:
        known = symbol in ids
        result += [ids[symbol]] if known else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result


WORDS = ["ab", "▁a", "ba", "▁ab", "▁▁", "aba", "bb", "▁bab", "1", "11", "\n", "é", "▁", "a", "b"]


@given(st.text(st.sampled_from("ab 1\nécé€\U0001f642"), max_size=12))
@settings(deadline=None, max_examples=200)
def test_pieces_merge_by_their_scores(text):
    metadata = pieces(WORDS, add_bos_token=False)
    if not text:
        return
    processor = read_gguf_tokenizer(PATH, metadata)
    assert processor.encode(text).tolist() == by_scores(metadata, text)
    assert processor.decode(processor.encode(text)) == text


def test_a_text_begins_with_a_space_and_the_token_of_the_beginning():
    assert spelled(pieces(WORDS), "ab") == ["<s>", "▁ab"]
    assert spelled(pieces(WORDS), " ab") == ["<s>", "▁", "▁ab"]
    assert spelled(pieces(WORDS), "ab", add_special=False) == ["▁ab"]
    assert spelled(pieces(WORDS, add_space_prefix=False), "ab") == ["<s>", "ab"]
    both = pieces(WORDS, add_bos_token=False, add_eos_token=True)
    assert spelled(both, "ab") == ["▁ab", "</s>"]
    assert spelled(pieces(WORDS, add_eos_token=True), "a", pair="b") == [
        *("<s>", "▁a", "</s>", "<s>", "▁", "b", "</s>"),
    ]
    assert spelled(pieces(WORDS), "ab</s>ab") == ["<s>", "▁ab", "</s>", "▁ab"]


def test_tokens_of_the_user_are_taken_out_first():
    metadata = pieces([*WORDS, "  ", "<x>"], add_bos_token=False, add_space_prefix=False)
    metadata[f"{KEYS}.token_type"][-2:] = [USER, USER]
    assert spelled(metadata, "a  b<x>a") == ["a", "  ", "b", "<x>", "a"]
    processor = read_gguf_tokenizer(PATH, metadata)
    assert processor.decode(processor.encode("a  b<x></s>")) == "a  b<x>"
    assert processor.special_ids == {"bos": 1, "eos": 2, "unk": 0}


def test_without_tokens_of_bytes_there_is_an_unknown_one():
    tokens = ["<unk>", "<s>", "</s>", "▁", "a"]
    metadata = keys(model="llama", tokens=tokens, token_type=[2, 3, 3, 1, 1], scores=[0.0] * 5)
    assert spelled(metadata, "aça") == ["<s>", "▁", "a", "<unk>", "a"]


TEXT = "I'll PAY'S 12345 €, naïve\n\n  x"
#: Pieces of the text with spaces as they are.
SPLIT = {
    "gpt-2": ["I", "'ll", " PAY", "'", "S", " 12345", " €,", " naïve", "\n\n ", " x"],
    "smollm": [
        *("I", "'ll", " PAY", "'", "S", " ", "1", "2", "3", "4", "5"),
        *(" €,", " naïve", "\n\n ", " x"),
    ],
    "llama-bpe": [
        *("I", "'ll", " PAY", "'S", " ", "123", "45", " €,", " naïve", "\n\n", " ", " x"),
    ],
    "qwen2": [
        *("I", "'ll", " PAY", "'S", " ", "1", "2", "3", "4", "5"),
        *(" €,", " naïve", "\n\n", " ", " x"),
    ],
    "tekken": [
        *("I", "'ll", " PAY", "'S", " ", "1", "2", "3", "4", "5"),
        *(" €,", " naïve", "\n\n", " ", " x"),
    ],
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_text_is_split_as_its_name_says(name):
    processor = read_gguf_tokenizer(PATH, byte_pairs(pre=name, add_bos_token=False))
    splitter = tokenizers.Tokenizer.from_str(processor.model).pre_tokenizer
    decoder = tokenizers.decoders.ByteLevel()
    parts = [decoder.decode([part]) for part, _ in splitter.pre_tokenize_str(TEXT)]
    assert parts == SPLIT[name]
    assert processor.decode(processor.encode(TEXT)) == TEXT


def test_bytes_are_merged_in_the_order_of_the_file():
    assert spelled(byte_pairs(["a b", "b c", "ab c"]), "abc bc") == ["abc", "Ġ", "bc"]
    assert spelled(byte_pairs(["b c", "a b", "a bc"]), "abc") == ["abc"]
    assert spelled(byte_pairs(["b c", "a b"]), "abc") == ["a", "bc"]
    assert spelled(byte_pairs(), "é€") == ["Ã", "©", "â", "Ĥ", "¬"]


def test_llama_3_takes_a_whole_piece_that_is_a_token():
    extra = [("abc", NORMAL), ("<s>", CONTROL)]
    entries = {"extra": extra, "bos_token_id": 256 + 1 + 1}
    assert spelled(byte_pairs(["a b"], **entries, pre="llama-bpe"), "abc") == ["<s>", "abc"]
    assert spelled(byte_pairs(["a b"], **entries, pre="qwen2"), "abc") == ["ab", "c"]


def test_qwen_composes_characters():
    assert spelled(byte_pairs(pre="qwen2"), "e\u0301") == spelled(byte_pairs(), "é")
    assert spelled(byte_pairs(), "e\u0301") != spelled(byte_pairs(), "é")


def test_special_tokens_and_limits():
    extra = [("<|end|>", CONTROL), ("<think>", USER), ("   ", USER)]
    metadata = byte_pairs(extra=extra, eos_token_id=256, padding_token_id=256)
    assert spelled(metadata, "a<|end|><think>   ") == ["a", "<|end|>", "<think>", "   "]
    processor = read_gguf_tokenizer(PATH, metadata, max_length=3)
    assert processor.stop_tokens == (256,) and processor.special_ids == {"eos": 256, "pad": 256}
    assert processor.decode(processor.encode("a<|end|>   ")) == "a   "
    batch = processor(["ab", "abcd"], truncate=True)
    np.testing.assert_array_equal(batch["tokens"], [[66 - 2, 67 - 2, 256], [64, 65, 66]])
    with pytest.raises(ValueError, match="more than max_length=3"):
        processor.encode("abcd")


def test_a_file_without_a_tokenizer_has_none():
    assert read_gguf_tokenizer(PATH, {"general.architecture": "llama"}) is None


def test_files_of_gpt2_need_no_name_of_a_splitting():
    metadata = byte_pairs(pre=None) | {"general.architecture": "gpt2"}
    assert spelled(metadata, "a") == ["a"]


SHORT = {"model": "llama", "tokens": ["a", "b"], "scores": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_pairs(pre="gpt-4o"), r'tokenizer\.ggml\.pre, "gpt-4o", is not supported; .*"smollm"'),
        (byte_pairs(pre="default"), '"default", is not supported'),
        (byte_pairs(pre=None), r"it has no 'tokenizer\.ggml\.pre'"),
        (byte_pairs(model="t5"), 'model, "t5", is not supported; supported are "gpt2", "llama"'),
        (byte_pairs(["a b c"]), "merges has 'a b c', no pair of tokens"),
        (
            byte_pairs(["a b"], tokens=["a", "b"], token_type=None),
            "merges has 'a b', no pair of tokens",
        ),
        (byte_pairs(tokens=[], token_type=None), r"it has no tokenizer\.ggml\.tokens"),
        (byte_pairs(tokens=None, token_type=None), r"it has no tokenizer\.ggml\.tokens"),
        (byte_pairs(tokens=[1, 2]), "tokens is no list of str"),
        (byte_pairs(token_type=[1]), "token_type has 1 values for 256 tokens"),
        (byte_pairs(eos_token_id=256), r"eos_token_id, 256, is none of 256 tokens"),
        (byte_pairs(eos_token_id="</s>"), "is no integer"),
        (byte_pairs(add_bos_token=True), r"add_bos_token, true, needs tokenizer\.ggml\.bos_token"),
        (byte_pairs(add_eos_token=1), "add_eos_token, 1, is neither true nor false"),
        (keys(**SHORT | {"scores": [0.0, np.nan]}), "scores are not all finite"),
        (keys(**SHORT | {"tokens": ["a", "\udcff"]}), "the token 1 of .* is no UTF-8"),
        (keys(**SHORT | {"tokens": ["a", "b" * 513]}), "has 513 characters, more than 512"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(metadata, message):
    with pytest.raises(ValueError, match=message) as error:
        read_gguf_tokenizer(PATH, metadata)
    assert str(error.value).startswith("network.gguf")


def test_what_is_read_is_written_for_transformers(tmp_path):
    processor = read_gguf_tokenizer(PATH, pieces(WORDS), max_length=9)
    processor.save(tmp_path)
    again = type(processor).from_folder(tmp_path)
    assert again.special_tokens == processor.special_tokens and again.max_length == 9
    np.testing.assert_array_equal(again.encode("aba  11ç"), processor.encode("aba  11ç"))
    assert re.search('"type": ?"BPE"', json.dumps(json.loads(again.model)))
