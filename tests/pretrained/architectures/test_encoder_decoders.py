"""T5 and Whisper: tables and configurations, written and read here."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import shapes_of
from safetensors.numpy import load_file, save_file

import jaxnets as jn
from jaxnets.data import WhisperFeatures
from jaxnets.models.transformer import flan_t5_small, t5_small, whisper_tiny
from jaxnets.pretrained import PretrainedNetwork, SoundProcessor

TOKENS = jax.ShapeDtypeStruct((1, 3), jnp.int32)
FRAMES = jax.ShapeDtypeStruct((1, 8, 80), jnp.float32)
SIZES = {"num_layers": 2, "features": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 12}
T5S = {
    "t5": t5_small(11, **SIZES, output_scale=8**-0.5, num_relative_buckets=6),
    "own_head": t5_small(11, **SIZES, tied=False, output_scale=8**-0.5),
    "not_scaled": t5_small(11, **SIZES, output_scale=1.0, num_decoder_layers=1),
    "flan": flan_t5_small(11, **SIZES, norm_epsilon=1e-5),
    "scanned": flan_t5_small(11, **SIZES, scan_layers=True),
}
WHISPER = whisper_tiny(
    11, num_layers=2, num_decoder_layers=1, features=8, num_heads=2, mlp_dim=12, max_source_length=5
)


@functools.cache
def variables_of(module, *inputs):
    rng = np.random.default_rng(0)
    shapes, _ = shapes_of(module, *inputs)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", T5S)
def test_t5_is_read_as_it_was_written(tmp_path, name):
    module, folder = T5S[name], tmp_path / name
    variables = variables_of(module, TOKENS, TOKENS)
    jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not module.tied)
    network = jn.pretrained.load(folder, scan_layers=module.config.scan_layers)
    assert_equal(network.variables, variables)
    assert network.module == module


def test_whisper_is_read_as_it_was_written_with_its_processor(tmp_path):
    variables = variables_of(WHISPER, FRAMES, TOKENS)
    processor = SoundProcessor(WhisperFeatures(hop=320))
    network = PretrainedNetwork(WHISPER, variables, processor)
    jn.pretrained.save(tmp_path / "whisper", network, layout="torch")
    again = jn.pretrained.load(tmp_path / "whisper")
    assert_equal(again.variables, variables)
    assert again.module == WHISPER and again.processor == processor
    jn.pretrained.save(tmp_path / "own", network)
    again = jn.pretrained.load(tmp_path / "own")
    assert_equal(again.variables, variables)
    assert again.module == WHISPER and again.processor == processor


def test_the_number_of_mel_bands_is_that_of_the_arrays(tmp_path):
    variables = variables_of(WHISPER, jax.ShapeDtypeStruct((1, 8, 12), jnp.float32), TOKENS)
    stale = {"model_type": "whisper", "num_mel_bins": 128}
    for index, config in enumerate(({}, stale)):
        network = PretrainedNetwork(WHISPER, variables, config=config)
        jn.pretrained.save(tmp_path / str(index), network, layout="torch")
        again = jn.pretrained.load(tmp_path / str(index))
        assert_equal(again.variables, variables)
        assert again.config["num_mel_bins"] == 12


@pytest.mark.parametrize("layout", ["torch", "jaxnets"])
def test_how_a_network_generates_is_kept(tmp_path, layout):
    module, generation = T5S["t5"], {"eos_token_id": 1, "suppress_tokens": [3, 4]}
    variables = variables_of(module, TOKENS, TOKENS)
    network = PretrainedNetwork(module, variables, generation=generation)
    jn.pretrained.save(tmp_path / "t5", network, layout=layout)
    assert jn.pretrained.load(tmp_path / "t5").generation == generation
    file = tmp_path / "t5" / "generation_config.json"
    file.write_text("[")
    with pytest.raises(ValueError, match=str(file)):
        jn.pretrained.load(tmp_path / "t5")
    file.unlink()
    assert jn.pretrained.load(tmp_path / "t5").generation == {}


@pytest.mark.parametrize("own", [False, True], ids=["copy", "own_head"])
def test_an_output_layer_counts_where_it_differs_from_the_embedding(tmp_path, own):
    module, folder = T5S["t5"], tmp_path / "t5"
    variables = variables_of(module, TOKENS, TOKENS)
    jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["shared.weight"].copy()
    head[-1, -1] += own
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder",)}
    save_file(tensors | copies | {"lm_head.weight": head}, folder / "model.safetensors")
    network = jn.pretrained.load(folder)
    assert network.module.tied != own
    if own:
        np.testing.assert_array_equal(network.variables["params"]["head"]["kernel"], head.T)
        del network.variables["params"]["head"]
    assert_equal(network.variables, variables)


@pytest.mark.parametrize(
    ("entries", "scale"),
    [
        ({}, 8**-0.5),
        ({"tie_word_embeddings": True}, 8**-0.5),
        ({"tie_word_embeddings": False}, 1.0),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, 1.0),
        ({"tie_word_embeddings": True, "model_type": "mt5"}, 1.0),
    ],
)
def test_the_scale_of_the_outputs_is_what_each_version_means(tmp_path, entries, scale):
    module, folder = T5S["t5"], tmp_path / "t5"
    network = PretrainedNetwork(module, variables_of(module, TOKENS, TOKENS))
    jn.pretrained.save(folder, network, layout="torch")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"], config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(config | entries))
    kind = "MT5Model" if "model_type" in entries else "T5Model"
    assert jn.pretrained.load(folder, architecture=kind).module.output_scale == scale


def test_the_encoder_is_read_alone(tmp_path):
    module, folder = T5S["flan"], tmp_path / "t5"
    variables = variables_of(module, TOKENS, TOKENS)
    jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
    network = jn.pretrained.load(folder, architecture="T5EncoderModel")
    params = variables["params"]
    expected = {"embedding": params["embedding"], "stack": params["encoder"]}
    assert_equal(network.variables, {"params": expected})


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("t5", {"feed_forward_proj": "gated-relu"}, 'feed_forward_proj, "gated-relu"'),
        ("t5", {"is_decoder": True}, "is_decoder, true"),
        ("t5", {"d_kv": 5}, r"does not fit params/.*query/kernel"),
        ("t5", {"num_decoder_layers": 3}, "arrays of the network have no tensor"),
        ("whisper", {"scale_embedding": True}, "scale_embedding, true"),
        ("whisper", {"activation_function": "mish"}, 'activation_function, "mish"'),
        ("whisper", {"decoder_ffn_dim": 99}, "decoder_ffn_dim, 99"),
        ("whisper", {"decoder_attention_heads": 4}, "decoder_attention_heads, 4"),
        ("whisper", {"encoder_layerdrop": 0.1}, "encoder_layerdrop, 0.1"),
        ("whisper", {"num_mel_bins": 128}, "num_mel_bins, 128, is not the 80 features"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, kind, entries, message):
    folder = tmp_path / kind
    if kind == "t5":
        module, inputs, processor = T5S["t5"], (TOKENS, TOKENS), None
    else:
        module, inputs, processor = WHISPER, (FRAMES, TOKENS), SoundProcessor(WhisperFeatures())
    network = PretrainedNetwork(module, variables_of(module, *inputs), processor)
    jn.pretrained.save(folder, network, layout="torch")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(ValueError, match=message) as error:
        jn.pretrained.load(folder)
    assert str(folder) in str(error.value)
