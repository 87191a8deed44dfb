"""Folders of sentence-transformers: what is read from them, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.models.transformer import SentenceEncoder
from jaxnets.pretrained import PretrainedNetwork
from jaxnets.pretrained.sentence_folders import read_sentence_folder

KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]


def write(folder, *, kinds=KINDS, pooling=None, **files):
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    files = {"modules": modules, "1_Pooling/config": pooling or {"pooling_mode": "mean"}} | files
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    config = jn.BlockConfig(8, 2, mlp_dim=8, norm_first=False, key_bias=True, norm_epsilon=1e-12)
    module = SentenceEncoder(8, 1, config, 16, num_segments=2, embedding_norm=True)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    folder = tmp_path_factory.mktemp("encoder") / "network"
    jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder, module, variables


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_folder_is_a_sentence_encoder_with_its_pooling_and_length(encoder, tmp_path, inner):
    folder, module, variables = encoder
    (tmp_path / inner).mkdir(exist_ok=True)
    for file in folder.iterdir():
        (tmp_path / inner / file.name).write_bytes(file.read_bytes())
    kinds = {inner: "Transformer", "1_Pooling": "Pooling"}
    write(tmp_path, kinds=kinds, pooling={"pooling_mode_max_tokens": True})
    (tmp_path / inner / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    network = jn.pretrained.load(tmp_path)
    assert network.module == module.clone(pool="max", normalize=False)
    assert network.processor.max_length == 5
    batch = network.processor(["a b c a b c", "b"], truncate=True)
    assert batch["tokens"].shape == (2, 5)
    np.testing.assert_array_equal(
        network.module.apply(network.variables, **batch),
        module.clone(pool="max", normalize=False).apply(variables, **batch),
    )


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
    with pytest.raises(ValueError, match=message):
        read_sentence_folder(write(tmp_path, **files))


def test_modules_that_are_no_json_are_refused(tmp_path):
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules\.json, line 1.*no JSON"):
        read_sentence_folder(tmp_path)
