"""Folders of sentence-transformers: what is read from them, what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from sentence_networks import save_encoder, write_modules

import jaxnets as jn
from jaxnets.pretrained import PretrainedNetwork
from jaxnets.pretrained.sentence_folders import read_sentence_folder

KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "network"
    module, variables = save_encoder(folder, WORDS, max_length=16)
    return folder, module, variables


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_folder_is_a_sentence_encoder_with_its_pooling_and_length(encoder, tmp_path, inner):
    folder, module, variables = encoder
    shutil.copytree(folder, tmp_path / inner, dirs_exist_ok=True)
    kinds = {inner: "Transformer", "1_Pooling": "Pooling"}
    write_modules(tmp_path, kinds, pooling={"pooling_mode_max_tokens": True})
    (tmp_path / inner / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    network = jn.pretrained.load(tmp_path)
    assert network.module == module.clone(pool="max", normalize=False)
    assert network.processor.max_length == 5
    batch = network.processor(["a b c a b c", "b"], truncate=True)
    assert batch["tokens"].shape == (2, 5)
    apply = jax.jit(network.module.apply)
    np.testing.assert_array_equal(apply(network.variables, **batch), apply(variables, **batch))


def test_a_folder_without_modules_is_none(tmp_path):
    assert read_sentence_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"kinds": {**KINDS, "3_Dense": "Dense"}},
            "Transformer, Pooling, Normalize, Dense are not",
        ),
        ({"kinds": {"": "Transformer", "../x": "Pooling"}}, "'../x' is no folder in it"),
        ({"pooling": {"pooling_mode": ["cls", "mean"]}}, "pooling cls and mean is not supported"),
        ({"pooling": {"pooling_mode_lasttoken": True}}, "pooling lasttoken is not supported"),
        ({"pooling": {"x": 1}}, "pooling without a mode is not supported"),
        ({"sentence_bert_config": {"do_lower_case": True}}, "lower case of all texts"),
        (
            {"sentence_bert_config": {"max_seq_length": "5"}},
            'max_seq_length is "5", not an integer',
        ),
        ({"config_sentence_transformers": {"default_prompt_name": "q"}}, "a default prompt"),
        ({"modules": {"a": 1}}, "modules is"),
        ({"modules": [{"type": "Pooling"}]}, "modules"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, files, message):
    write_modules(tmp_path, **{"kinds": KINDS, **files})
    with pytest.raises(ValueError, match=message):
        read_sentence_folder(tmp_path)


def test_modules_that_are_no_json_are_refused(tmp_path):
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules\.json, line 1.*no JSON"):
        read_sentence_folder(tmp_path)


@pytest.mark.parametrize("pool", ["mean", "first", "max", "mean_sqrt_length"])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_written_is_a_sentence_folder(encoder, tmp_path, pool, normalize):
    folder, module, variables = encoder
    module = module.clone(pool=pool, normalize=normalize)
    processor = jn.pretrained.load(folder, architecture="SentenceTransformer").processor
    processor = dataclasses.replace(processor, max_length=7)
    network = PretrainedNetwork(module, variables, processor)
    jn.pretrained.save(tmp_path / "sentences", network, layout="torch")
    found = jn.pretrained.load(tmp_path / "sentences")
    assert found.module == module and found.processor == processor
    assert found.config["architectures"] == ["BertModel"]
    sentences = read_sentence_folder(tmp_path / "sentences")
    assert sentences.fields == {"pool": pool, "normalize": normalize}
    assert sentences.max_length == 7


def test_the_limit_is_that_of_the_folder_but_not_more_than_the_positions(encoder, tmp_path):
    folder, module, _ = encoder
    shutil.copytree(folder, tmp_path / "x")
    write_modules(tmp_path / "x", KINDS)
    (tmp_path / "x" / "tokenizer_config.json").write_text('{"model_max_length": 6}')
    for length, expected in ((None, 6), (4, 4), (9, 9), (99, module.max_length)):
        file = tmp_path / "x" / "sentence_bert_config.json"
        file.write_text(json.dumps({"max_seq_length": length}))
        assert jn.pretrained.load(tmp_path / "x").processor.max_length == expected
    file.write_text('{"max_seq_length": 0}')
    with pytest.raises(ValueError, match=r"bert_config\.json, line 1: .*max_seq_length is 0"):
        jn.pretrained.load(tmp_path / "x")
