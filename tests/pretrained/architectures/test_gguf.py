"""One GGUF file is a network: written as llama.cpp converts it, read here."""

import jax
import numpy as np
import pytest
from checks import perturbed, shapes_of
from gguf_networks import convert

import jaxnets as jn
from jaxnets import transformer
from jaxnets.pretrained.architectures.gguf import read_gguf_config

SMALL = {
    "vocabulary_size": 11,
    "num_layers": 2,
    "features": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 64,
}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 7))
GPT2 = {key: value for key, value in SMALL.items() if key != "num_kv_heads"}
PRESETS = {
    "llama": transformer.llama2_7b(**SMALL, norm_epsilon=1e-6),
    "llama_tied_biases": transformer.llama2_7b(**SMALL, use_bias=True, key_bias=True, tied=True),
    "llama_heads": transformer.llama2_7b(**SMALL | {"head_dim": 6}),
    "llama3": transformer.llama3_8b(**SMALL, rope_scaling=transformer.Llama3Scaling(32.0)),
    "qwen2": transformer.qwen2_0_5b(**SMALL),
    "qwen3_yarn": transformer.qwen3_0_6b(
        **SMALL | {"rope_scaling": transformer.YarnScaling(4.0, 32)}
    ),
    "gemma2": transformer.gemma2_2b(**SMALL, window=3),
    "gemma3_linear": transformer.gemma3_1b(
        **SMALL | {"head_dim": 6}, window=3, rope_scaling=transformer.LinearScaling(8.0)
    ),
    "gpt2": transformer.gpt2_small(**GPT2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return what writes a small network as a folder of Hugging Face, once."""
    root, networks = tmp_path_factory.mktemp("folders"), {}

    def folder(name):
        if name not in networks:
            module = PRESETS[name]
            shapes, _ = shapes_of(module, TOKENS)
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            networks[name] = jn.pretrained.PretrainedNetwork(module, perturbed(zeros, scale=0.3))
            jn.pretrained.save(root / name, networks[name], layout="torch")
        return root / name, networks[name]

    return folder


def flat(variables):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(variables)}


def test_a_folder_of_a_gguf_file_names_the_call_that_reads_it(folders, tmp_path):
    folder, _ = folders("llama")
    convert(folder, tmp_path / "a.gguf")
    message = f"{tmp_path} has no config.json; .*: load\\('{tmp_path / 'a.gguf'}'\\)"
    with pytest.raises(FileNotFoundError, match=message):
        jn.pretrained.load(tmp_path)


def expected_arrays(name, network):
    """Return the arrays; the norms of Gemma with the 1 that the file has added."""
    gemma = name.startswith("gemma")
    return {
        key: value + 1 if gemma and "scale" in key else value
        for key, value in flat(network.variables).items()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_arrays_have_their_bits_and_the_network_its_options(name, folders, tmp_path):
    folder, network = folders(name)
    convert(folder, tmp_path / "model.gguf")
    again = jn.pretrained.load(tmp_path / "model.gguf")
    arrays, expected = flat(again.variables), expected_arrays(name, network)
    assert arrays.keys() == expected.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
    assert again.processor is None and again.module.tied == network.module.tied
    found, other = again.module, jn.pretrained.load(folder).module  # sizes by number, not None
    norm = "rms" if name.startswith("gemma") else other.config.norm
    for field in other.config.__dataclass_fields__:
        value = norm if field == "norm" else getattr(other.config, field)
        assert getattr(found.config, field) == value, field
    for field in ("num_layers", "vocabulary_size", "max_length", "logit_softcap"):
        assert getattr(found, field) == getattr(other, field), field


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2"])
def test_logits_are_those_of_the_network(name, folders, tmp_path):
    folder, network = folders(name)
    convert(folder, tmp_path / "model.gguf")
    again = jn.pretrained.load(tmp_path / "model.gguf")
    found, expected = (jax.jit(one.module.apply)(one.variables, TOKENS) for one in (again, network))
    np.testing.assert_array_equal(found, expected)


PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab", "1", "2"]
TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 8],
    "tokenizer.ggml.scores": [0.0] * 6 + [-1.0, -2.0, -3.0, -4.0, -5.0],
}


def test_the_tokenizer_of_the_file_is_the_processor(folders, tmp_path):
    folder, network = folders("llama")
    convert(folder, tmp_path / "model.gguf", tokens=PIECES, entries=TOKENIZER)
    found = jn.pretrained.load(tmp_path / "model.gguf")
    assert found.processor.max_length == network.module.max_length
    batch = found.processor(["ab a", "b12"])
    np.testing.assert_array_equal(batch["tokens"], [[1, 8, 6, 0, 0], [1, 3, 5, 9, 10]])
    assert found.processor.stop_tokens == (2,)
    logits = found.module.apply(found.variables, **batch)
    jn.pretrained.save(tmp_path / "own", found)
    jn.pretrained.save(tmp_path / "torch", found, layout="torch")
    for layout in ("own", "torch"):
        again = jn.pretrained.load(tmp_path / layout)
        np.testing.assert_array_equal(again.processor(["ab a", "b12"])["tokens"], batch["tokens"])
        np.testing.assert_array_equal(again.module.apply(again.variables, **batch), logits)


def test_a_tokenizer_that_is_not_supported_is_left_out_only_by_request(folders, tmp_path):
    folder, _ = folders("llama")
    unknown = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o"}
    convert(folder, tmp_path / "model.gguf", tokens=PIECES, entries=unknown)
    with pytest.raises(ValueError, match=r'model\.gguf.*pre, "gpt-4o", is not .*strict=False'):
        jn.pretrained.load(tmp_path / "model.gguf")
    assert jn.pretrained.load(tmp_path / "model.gguf", strict=False).processor is None


@pytest.mark.parametrize(("stored", "bits"), [("F16", 11), ("Q8_0", 7)])
def test_smaller_types_are_within_their_rounding(stored, bits, folders, tmp_path):
    folder, network = folders("llama")
    convert(folder, tmp_path / "model.gguf", stored=stored)
    arrays = flat(jn.pretrained.load(tmp_path / "model.gguf").variables)
    differ = False
    for key, value in flat(network.variables).items():
        if stored == "F16" and value.ndim == 2:
            np.testing.assert_array_equal(arrays[key], value.astype(np.float16), err_msg=key)
        bound = float(abs(value).max()) * 2.0**-bits * (value.ndim == 2)
        np.testing.assert_allclose(arrays[key], value, atol=bound, rtol=0, err_msg=key)
        differ |= bool((arrays[key] != value).any())
    assert differ


def test_fields_override_and_the_vocabulary_is_that_of_the_tokens(folders, tmp_path):
    folder, network = folders("llama")
    tokens = [f"token{index}" for index in range(11)]
    convert(folder, tmp_path / "a.gguf", tokens=tokens, entries={"llama.vocab_size": None})
    again = jn.pretrained.load(tmp_path / "a.gguf", scan_layers=True)
    assert again.module.vocabulary_size == 11 and again.module.config.scan_layers
    kernel = again.variables["params"]["stack"]["layers"]["attention"]["query"]["kernel"]
    own = network.variables["params"]["stack"]["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel[1], own)
    convert(folder, tmp_path / "b.gguf", tokens=tokens[:9])
    with pytest.raises(ValueError, match=r"token_embd.weight of shape \(11, 32\) does not fit"):
        jn.pretrained.load(tmp_path / "b.gguf")


def test_a_llama_file_is_saved_for_transformers(folders, tmp_path):
    folder, network = folders("llama3")
    convert(folder, tmp_path / "model.gguf")
    again = jn.pretrained.load(tmp_path / "model.gguf")
    jn.pretrained.save(tmp_path / "folder", again, layout="torch")
    arrays = flat(jn.pretrained.load(tmp_path / "folder").variables)
    for key, value in flat(network.variables).items():
        np.testing.assert_array_equal(arrays[key], value)


def test_gemma_without_windows_and_of_27b(folders, tmp_path):
    folder, _ = folders("gemma3_linear")
    convert(folder, tmp_path / "a.gguf", entries={"gemma3.attention.sliding_window": None})
    config = jn.pretrained.load(tmp_path / "a.gguf").module.config
    assert (config.window, config.attention_scale) == (None, None)
    with pytest.raises(ValueError, match="norm is 'zero_centered_rms', and a GGUF file of Gemma"):
        jn.pretrained.load(tmp_path / "a.gguf", norm="zero_centered_rms")
    convert(folder, tmp_path / "b.gguf", entries={"gemma3.block_count": 62})
    read = read_gguf_config(tmp_path / "b.gguf", jn.pretrained.read_tensors(tmp_path / "b.gguf"))
    assert read.content["query_pre_attn_scalar"] == 32 / 4 != read.content["head_dim"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"general.architecture": "mamba"}, '"mamba", is not supported; supported are "l'),
        ("llama", {"llama.block_count": None}, "it has no 'llama.block_count'"),
        ("llama", {"llama.attention.head_count": 0}, "head_count, 0, is not 1 or more"),
        ("llama", {"llama.attention.head_count_kv": [2, 4]}, r"key_value_heads, \[2, 4\], is no"),
        (
            "llama",
            {"llama.attention.layer_norm_rms_epsilon": None},
            "it has no 'llama.attention.layer_norm_rms_epsilon'",
        ),
        ("llama", {"llama.vocab_size": None}, "neither 'tokenizer.ggml.tokens' nor 'llama.vocab"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count, 8, is not supported"),
        ("llama", {"llama.attention.sliding_window": 8}, "sliding_window, 8, is not supported"),
        ("llama", {"llama.rope.dimension_count": 4}, "dimension_count, 4, is not supported; su"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, '"longrope", is not supported'),
        ("llama", {"llama.block_count": 3}, "arrays of the network have no tensor.*blk.2.attn"),
        ("llama", {"llama.block_count": 1}, "tensors of the file have no array.*blk.1.attn"),
        ("llama", {"llama.feed_forward_length": 65}, "ffn_gate.weight of shape .* does not fit"),
        ("llama3", {"llama.rope.freq_base": 99.0}, "rope_freqs.weight is not the scaling of Llama"),
        (
            "llama3",
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            '"linear", is not supported with rope_freqs.weight',
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, options, message, folders, tmp_path):
    folder, _ = folders(name)
    convert(folder, tmp_path / "model.gguf", entries=options)
    with pytest.raises(ValueError, match=rf"(?s)model\.gguf.*{message}"):
        jn.pretrained.load(tmp_path / "model.gguf")


def test_a_missing_tensor_is_named(folders, tmp_path):
    folder, _ = folders("gemma2")
    convert(folder, tmp_path / "a.gguf", changed={"blk.1.post_ffw_norm.weight": None})
    with pytest.raises(ValueError, match=r"in the file blk\.1\.post_ffw_norm\.weight"):
        jn.pretrained.load(tmp_path / "a.gguf")


def test_divisors_of_one_are_no_scaling(folders, tmp_path):
    folder, _ = folders("llama")
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    convert(folder, tmp_path / "a.gguf", changed=ones)
    assert jn.pretrained.load(tmp_path / "a.gguf").module.config.rope_scaling is None
