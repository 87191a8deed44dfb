"""Decoder-only networks of Hugging Face: what is read, what is written, what is refused by name."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import perturbed, shapes_of

import jaxnets as jn
from jaxnets import transformer

SMALL = {
    "vocabulary_size": 11,
    "num_layers": 2,
    "features": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_dim": 12,
}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 5))
PRESETS = {
    "llama2_7b": transformer.llama2_7b(**SMALL),
    "llama_biases": transformer.llama2_7b(**SMALL, use_bias=True, key_bias=True),
    "llama_linear": transformer.tinyllama(
        **SMALL, rope_scaling=transformer.LinearScaling(2.0), tied=True
    ),
    "llama3_8b": transformer.llama3_8b(**SMALL, rope_scaling=transformer.Llama3Scaling(8.0)),
    "smollm2_135m": transformer.smollm2_135m(**SMALL),
    "mistral_7b": transformer.mistral_7b(**SMALL | {"head_dim": 6}),
    "qwen2_0_5b": transformer.qwen2_0_5b(**SMALL),
    "qwen3_0_6b": transformer.qwen3_0_6b(
        **SMALL | {"rope_scaling": transformer.YarnScaling(4.0, 32, attention_scaling=1.1)}
    ),
    "qwen3_windows": transformer.qwen3_0_6b(**SMALL, window=3, global_every=2),
    "gemma2_2b": transformer.gemma2_2b(**SMALL, attention_scale=144**-0.5),
    "gemma3_1b": transformer.gemma3_1b(**SMALL, rope_scaling=transformer.LinearScaling(8.0)),
}
MODEL_TYPES = {"llama2": "llama", "llama3": "llama", "smollm2": "llama", "gemma3": "gemma3_text"}


@functools.cache
def made(module):
    shapes, _ = shapes_of(module, TOKENS)
    return perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), scale=0.3)


def write(folder, name, **entries):
    """Write a small network, with some entries of its config.json changed."""
    module = PRESETS[name]
    network = jn.pretrained.PretrainedNetwork(module, made(module))
    jn.pretrained.save(folder, network, layout="torch")
    path = folder / "config.json"
    content = json.loads(path.read_text()) | entries
    content = {key: value for key, value in content.items() if value != "MISSING"}
    path.write_text(json.dumps(content))
    return network


@pytest.mark.parametrize("name", PRESETS)
def test_a_network_is_read_as_it_was_written(name, tmp_path):
    network = write(tmp_path / "network", name)
    again = jn.pretrained.load(tmp_path / "network")
    family = name.split("_")[0]
    assert again.config["model_type"] == MODEL_TYPES.get(family, family)
    for own, other in zip(
        jax.tree.leaves(again.variables), jax.tree.leaves(network.variables), strict=True
    ):
        np.testing.assert_array_equal(own, other)
    found, expected = (
        jax.eval_shape(lambda v, m=one.module: m.apply(v, TOKENS), one.variables)
        for one in (again, network)
    )
    assert found == expected
    for field in ("window", "global_every", "rope_theta", "rope_scaling", "window_rope_theta"):
        assert getattr(again.module.config, field) == getattr(network.module.config, field)
    for field in ("attention_softcap", "qkv_bias", "qk_norm", "norm", "branch_norm", "head_dim"):
        own, other = getattr(again.module.config, field), getattr(network.module.config, field)
        assert own == other or (field == "head_dim" and other is None and own == 4)
    assert again.module.logit_softcap == network.module.logit_softcap


def test_fields_of_the_caller_override_those_of_the_file(tmp_path):
    network = write(tmp_path / "network", "llama3_8b")
    scanned = jn.pretrained.load(tmp_path / "network", scan_layers=True)
    assert "layers" in scanned.variables["params"]["stack"]
    found, expected = (
        jax.jit(one.module.apply)(one.variables, TOKENS) for one in (scanned, network)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    write(tmp_path / "gemma", "gemma2_2b")
    with pytest.raises(ValueError, match="global_every=2 they differ"):
        jn.pretrained.load(tmp_path / "gemma", scan_layers=True)


@pytest.mark.parametrize("name", ["mistral_7b", "gemma2_2b"])
def test_a_window_of_null_is_none(name, tmp_path):
    """As later versions of Mistral have it."""
    write(tmp_path / "network", name, sliding_window=None)
    config = jn.pretrained.load(tmp_path / "network").module.config
    assert config.window is None and config.global_every is None


def test_a_network_that_no_architecture_expresses_is_not_written(tmp_path):
    module = transformer.llama2_7b(**SMALL, attention_softcap=2.0)
    network = jn.pretrained.PretrainedNetwork(module, made(module))
    with pytest.raises(ValueError, match=r"as it is configured is no .*llama"):
        jn.pretrained.save(tmp_path / "network", network, layout="torch")
    assert not (tmp_path / "network").exists()


def rope(**entries):
    return {"rope_parameters": {"rope_theta": 100.0, **entries}, "rope_scaling": None}


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("llama2_7b", {"hidden_size": "MISSING"}, "it has no 'hidden_size'"),
        ("llama2_7b", {"hidden_act": "relu"}, 'hidden_act, "relu", is not supported.*"silu"'),
        ("llama2_7b", {"mlp_bias": True}, "mlp_bias, true, is not supported where attention_bias"),
        ("llama2_7b", {"attention_bias": True}, "mlp_bias, false, is not supported"),
        ("llama2_7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor, 0.5, is not"),
        ("llama2_7b", {"quantization_config": {"bits": 4}}, "quantization_config, .*bits.*4"),
        (
            "llama2_7b",
            {"num_attention_heads": 3, "head_dim": None},
            "8 features do not split into 3 heads",
        ),
        ("llama2_7b", rope(rope_type="dynamic"), 'rope_type, "dynamic", is not supported'),
        ("llama2_7b", rope(rope_type="linear"), "no 'rope_parameters.factor'"),
        ("llama2_7b", rope(rope_type="linear", factor=0.5), "do not fit: factor is 0.5"),
        ("llama2_7b", rope(rope_type="linear", factor=None), "factor, null, is no finite number"),
        ("llama2_7b", rope(factor=2.0), "rope_parameters.factor, 2.0, is no option of default"),
        ("llama2_7b", rope(mrope_section=[1, 2]), r"mrope_section, \[1, 2\], is no option"),
        ("llama2_7b", rope(partial_rotary_factor=0.5), "rope_parameters.partial_rotary_factor, 0"),
        ("llama2_7b", rope(rope_type="llama3", factor=8.0), "no 'rope_parameters.low_freq_factor'"),
        ("llama2_7b", {"rope_scaling": {"type": "su"}}, 'rope_scaling.type, "su", is not supp'),
        ("mistral_7b", {"sliding_window": 0}, "sliding_window, 0, is not 1 or more"),
        ("mistral_7b", {"layer_types": ["full_attention"] * 2}, "layer_types, .* is not supported"),
        ("qwen3_0_6b", {"attention_bias": True}, "attention_bias, true, is not supported"),
        (
            "qwen2_0_5b",
            {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
            "max_window_layers, 1, is not supported with windows",
        ),
        (
            "llama3_8b",
            {"original_max_position_embeddings": 32},
            "original_max_position_embeddings, 32, is not .*, as in the scaling",
        ),
        (
            "qwen2_0_5b",
            {"use_sliding_window": True, "max_window_layers": 1, "layer_types": "MISSING"},
            "max_window_layers, 1, is not supported with windows",
        ),
        (
            "qwen3_windows",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types, .* is not supported; global layers must be every second",
        ),
        ("gemma2_2b", {"layer_types": ["chunked_attention"] * 2}, "layer_types, .*chunked.* known"),
        ("gemma2_2b", {"layer_types": ["full_attention"]}, "is no list of 2 types"),
        ("gemma2_2b", {"attention_bias": True}, "attention_bias, true"),
        ("gemma2_2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention, true"),
        ("gemma3_1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping, 50.0, is not"),
        (
            "gemma3_1b",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            'rope_parameters.sliding_attention.rope_type, "linear", is not supported',
        ),
        (
            "gemma3_1b",
            {"rope_parameters": {"rope_theta": 10.0}},
            "rope_parameters.rope_theta, 10.0, is not supported; known are full_attention",
        ),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name_and_value(
    name, entries, message, tmp_path
):
    write(tmp_path / "network", name, **entries)
    with pytest.raises(ValueError, match=message):
        jn.pretrained.load(tmp_path / "network")


def test_a_tokenizer_in_the_folder_is_the_processor(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    write(tmp_path / "network", "smollm2_135m")
    assert jn.pretrained.load(tmp_path / "network").processor is None
    words = tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "network" / "tokenizer.json"))
    network = jn.pretrained.load(tmp_path / "network")
    batch = network.processor(["a b c"])
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 0]])
    logits = jax.eval_shape(network.module.apply, network.variables, batch["tokens"])
    assert logits.shape == (1, 3, 11)


def test_tensors_that_do_not_fit_the_configuration_are_listed(tmp_path):
    write(tmp_path / "network", "qwen2_0_5b", model_type="llama", architectures=None)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj.bias"):
        jn.pretrained.load(tmp_path / "network")


def test_a_tied_head_of_its_own_in_the_file_must_be_a_copy(tmp_path):
    network = write(tmp_path / "network", "llama2_7b", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        jn.pretrained.load(tmp_path / "network")
    params = network.variables["params"]
    params["head"]["kernel"] = jnp.asarray(params["embedding"]["token"]["embedding"]).T
    folder = tmp_path / "copy"
    jn.pretrained.save(folder, network, layout="torch")
    content = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(content))
    assert jn.pretrained.load(folder).module.tied
