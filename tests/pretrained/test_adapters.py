"""Adapters in PEFT's layout, written and read without torch; against PEFT itself in parity."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import perturbed, shapes_of

import jaxnets as jn
from jaxnets.pretrained import PretrainedNetwork
from jaxnets.storage import write_safetensors

KEY = jax.random.key(0)
QUERY = "base_model.model.transformer.h.0.attn.c_attn"


@functools.cache
def network(scan_layers=False):
    module = jn.transformer.gpt2_small(
        num_layers=2,
        features=8,
        num_heads=2,
        vocabulary_size=11,
        max_length=6,
        scan_layers=scan_layers,
    )
    shapes, _ = shapes_of(module, jnp.zeros((1, 2), jnp.int32))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return PretrainedNetwork(module, perturbed(zeros, scale=0.3))


def adapter(own, **options):
    create = jax.jit(functools.partial(jn.lora_init, rank=2, alpha=3, **options))
    variables = create(KEY, own.variables["params"])
    random = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: leaf + random.normal(size=leaf.shape).astype(np.float32), variables["params"]
    )
    return {**variables, "params": moved}


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, dict(jn.pretrained.read_tensors(folder))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_written_is_read_back(tmp_path, scan_layers):
    own = network(scan_layers)
    variables = adapter(own, target=r"output/kernel$", full="norm", dora=True)
    jn.pretrained.save_adapter(tmp_path / "adapter", own, variables)
    again = jn.pretrained.load_adapter(tmp_path / "adapter", own)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_the_files_have_the_names_and_shapes_of_peft(tmp_path):
    own = network()
    variables = adapter(own, target=r"layer_0/attention/(query|value)/kernel$", full="^stack/norm")
    jn.pretrained.save_adapter(tmp_path / "adapter", own, variables, base_model="gpt2")
    config, tensors = read(tmp_path / "adapter")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {
        f"{QUERY}.lora_A.weight": (4, 8),
        f"{QUERY}.lora_B.weight": (24, 4),
        "base_model.model.transformer.ln_f.weight": (8,),
        "base_model.model.transformer.ln_f.bias": (8,),
    }
    assert config["target_modules"] == ["transformer.h.0.attn.c_attn"]
    assert config["modules_to_save"] == ["transformer.ln_f"]
    # Two updates of rank 2 with alpha 3 are one of rank 4 with alpha 6.
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 6, True)
    assert config["base_model_name_or_path"] == "gpt2" and config["peft_type"] == "LORA"
    # The joined tensor is the update of queries, keys (none) and values.
    params = own.variables["params"]["stack"]["layer_0"]["attention"]
    merged = jax.jit(jn.merge_lora)(own.variables["params"], variables)
    merged = merged["stack"]["layer_0"]["attention"]
    update = 6 / 4 * (tensors[f"{QUERY}.lora_B.weight"] @ tensors[f"{QUERY}.lora_A.weight"]).T
    for index, name in enumerate(("query", "key", "value")):
        expected = merged[name]["kernel"] - params[name]["kernel"]
        np.testing.assert_allclose(update[:, 8 * index : 8 * index + 8], expected, atol=1e-5)


def test_a_joined_adapter_that_was_read_keeps_its_rank(tmp_path):
    own = network()
    random = np.random.default_rng(0)
    tensors = {
        f"{QUERY}.lora_A.weight": random.normal(size=(2, 8)).astype(np.float32),
        f"{QUERY}.lora_B.weight": random.normal(size=(24, 2)).astype(np.float32),
    }
    write(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 5}, tensors)
    variables = jn.pretrained.load_adapter(tmp_path, own)
    jn.pretrained.save_adapter(tmp_path / "again", own, variables)
    config, again = read(tmp_path / "again")
    assert config["r"] == 2 and config["lora_alpha"] == 5
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_ranks_that_are_not_used_are_not_written(tmp_path):
    own = network()
    variables = adapter(own, max_rank=5, target="layer_1/feed_forward/hidden/kernel$")
    jn.pretrained.save_adapter(tmp_path / "adapter", own, variables)
    _, tensors = read(tmp_path / "adapter")
    assert [tensor.shape for tensor in tensors.values()] == [(2, 8), (32, 2)]


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter_model.safetensors", tensors)


A, B = np.ones((2, 8), np.float32), np.ones((24, 2), np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, 'peft_type, "IA3", is not supported; supported is "LORA"'),
        ({"use_qalora": True}, {}, "use_qalora, true, is not supported"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights, .* changes the weights"),
        (
            {"alpha_pattern": {"c_(": 2}},
            {f"{QUERY}.lora_A.weight": A, f"{QUERY}.lora_B.weight": B},
            r"adapter_config.json.* alpha_pattern, .*key 'c_\(', which is no regular expr",
        ),
        (
            {"alpha_pattern": {"(a*)*c": 2}},
            {f"{QUERY}.lora_A.weight": A, f"{QUERY}.lora_B.weight": B},
            "it repeats what has repetitions in itself",
        ),
        (
            {"alpha_pattern": {"c.*" * 2000: 2}},
            {f"{QUERY}.lora_A.weight": A, f"{QUERY}.lora_B.weight": B},
            "has expressions with repetitions of 6000 characters, more than 5000; write the names",
        ),
        (
            {"use_dora": True},
            {f"{QUERY}.lora_A.weight": A, f"{QUERY}.lora_B.weight": B},
            r"adapter_config.json.* use_dora, true, does not fit .*c_attn; get the adapter anew",
        ),
        (
            {},
            {f"{QUERY}.lora_A.weight": A[:0], f"{QUERY}.lora_B.weight": B[:, :0]},
            r"safetensors: .*c_attn has factors of shapes \(0, 8\) and \(24, 0\), which are no",
        ),
        (
            {},
            {f"{QUERY}.lora_A.weight": A[0], f"{QUERY}.lora_B.weight": B},
            r"safetensors: .*c_attn has factors of shapes \(8,\) and \(24, 2\), which are no",
        ),
        (
            {},
            {f"{QUERY}.lora_A.weight": A, f"{QUERY}.lora_B.weight": B[:23]},
            r"safetensors: .*c_attn: axis 1 of size 23 has no 3 equal parts; give the network",
        ),
        (
            {},
            {f"{QUERY[:-7]}.c_proj.weight": A[0]},
            r"does not fit params/stack/layer_0/attention/output/kernel of shape \(8, 8\)",
        ),
        ({}, {"other.lora_A.weight": A}, "has 1 tensors that are no update of the network"),
        ({}, {f"{QUERY}.lora_A.weight": A}, r"no update of the network, such as .*c_attn \(a\)"),
        (
            {},
            {f"{QUERY}.lora_A.weight": A[:, :4], f"{QUERY}.lora_B.weight": B},
            r"adapter_model.safetensors: the adapter of .*query/kernel has factors",
        ),
        (
            {},
            {
                "base_model.model.transformer.wte.lora_embedding_A": np.ones((2, 11), np.float32),
                "base_model.model.transformer.wte.lora_embedding_B": np.ones((8, 2), np.float32),
            },
            "wte is tied to the output layer",
        ),
        (
            {},
            {"base_model.model.transformer.ln_f.weight": np.ones(9, np.float32)},
            r"ln_f.weight does not fit params/stack/norm/scale of shape \(8,\)",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, config, tensors, message):
    write(tmp_path, {"peft_type": "LORA", "r": 2, **config}, tensors or {"x": A})
    with pytest.raises(ValueError, match=message):
        jn.pretrained.load_adapter(tmp_path, network())


def vision_transformer():
    config = jn.transformer.BlockConfig(features=8, num_heads=2, key_bias=True)
    module = jn.VisionTransformer(num_outputs=3, patch_size=2, num_layers=1, config=config)
    variables = jn.initialize(module, KEY, jnp.zeros((1, 4, 4, 1)))
    return PretrainedNetwork(module, variables, config={"model_type": "vit"})


def test_layers_that_transformers_5_renames_are_read_by_both_names(tmp_path):
    own = vision_transformer()
    variables = adapter(own, target="(query|hidden|d/output|patch)/kernel$", full="^head/")
    jn.pretrained.save_adapter(tmp_path / "adapter", own, variables)
    config, tensors = read(tmp_path / "adapter")
    names = ["attention.q_proj", "mlp.fc1", "mlp.fc2"]
    assert config["target_modules"][1:] == [f"vit.layers.0.{name}" for name in names]
    assert "base_model.model.vit.layers.0.mlp.fc1.lora_A.weight" in tensors
    patches = "base_model.model.vit.embeddings.patch_embeddings.projection"
    shapes = [tensors[f"{patches}.lora_{name}.weight"].shape for name in "AB"]
    assert shapes == [(2, 1, 2, 2), (8, 2, 1, 1)]
    older = {
        "attention.q_proj": "attention.attention.query",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in older.items():
            name = name.replace(f"layers.0.{new}", f"encoder.layer.0.{old}")
        renamed[name] = tensor
    write(tmp_path / "older", config, renamed)
    for folder in ("adapter", "older"):
        again = jn.pretrained.load_adapter(tmp_path / folder, own)
        jax.tree.map(np.testing.assert_array_equal, again, variables)
    # Patterns are those of the names in the file.
    config["alpha_pattern"] = {"q_proj": 2 * config["lora_alpha"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    again = jn.pretrained.load_adapter(tmp_path / "adapter", own)["lora"]["stack"]["layer_0"]
    before = variables["lora"]["stack"]["layer_0"]
    query = ("attention", "query", "kernel", "scale")
    np.testing.assert_array_equal(at(again, query), 2 * at(before, query))
    hidden = ("feed_forward", "hidden", "kernel", "scale")
    np.testing.assert_array_equal(at(again, hidden), at(before, hidden))


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_norms_of_an_adapter_of_gemma_fit_a_network_of_a_gguf_file(tmp_path):
    module = jn.transformer.gemma2_2b(
        num_layers=1, features=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, norm="rms"
    )
    module = module.clone(vocabulary_size=11)
    variables = jn.initialize(module, KEY, jnp.zeros((1, 2), jnp.int32))
    own = PretrainedNetwork(module, variables, config={"model_type": "gemma2"})
    scale = np.linspace(-0.1, 0.1, 8, dtype=np.float32)
    name = "base_model.model.model.norm.weight"
    write(tmp_path / "adapter", {"peft_type": "LORA", "modules_to_save": ["norm"]}, {name: scale})
    loaded = jn.pretrained.load_adapter(tmp_path / "adapter", own)
    found = loaded["params"]["stack"]["norm"]["scale"]
    np.testing.assert_allclose(found, 1 + scale, rtol=1e-6)
    jn.pretrained.save_adapter(tmp_path / "again", own, loaded)
    np.testing.assert_allclose(read(tmp_path / "again")[1][name], scale, atol=1e-6)


def test_adapters_that_peft_cannot_express_are_refused(tmp_path):
    own = network()
    both = adapter(own, target="layer_0/attention/query/kernel$", full="layer_0/attention/key/bias")
    with pytest.raises(ValueError, match="c_attn has a leaf that is trained as a whole and an"):
        jn.pretrained.save_adapter(tmp_path / "adapter", own, both)
    tied = adapter(own, target="token/embedding$")
    with pytest.raises(ValueError, match="wte is tied to the output layer"):
        jn.pretrained.save_adapter(tmp_path / "adapter", own, tied)
    plain = adapter(own, target="layer_0/feed_forward/hidden/kernel$")
    dora = adapter(own, target="layer_1/feed_forward/hidden/kernel$", dora=True)
    mixed = {
        "params": {"stack": {**plain["params"]["stack"], **dora["params"]["stack"]}},
        "lora": {"stack": {**plain["lora"]["stack"], **dora["lora"]["stack"]}},
    }
    with pytest.raises(ValueError, match="some targets of the adapter use DoRA"):
        jn.pretrained.save_adapter(tmp_path / "adapter", own, mixed)
    with pytest.raises(FileExistsError, match="exists; give another folder"):
        jn.pretrained.save_adapter(tmp_path, own, plain)
    positions = vision_transformer()
    variables = adapter(positions, target="positions?/embedding$")
    with pytest.raises(ValueError, match="position_embeddings is no layer with a weight, so it"):
        jn.pretrained.save_adapter(tmp_path / "adapter", positions, variables)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("options", [{"target": "^extra/"}, {"target": None, "full": "^extra/"}])
def test_leaves_without_a_tensor_in_the_file_are_refused(tmp_path, options):
    own = network()
    params = {**own.variables["params"], "extra": {"kernel": jnp.ones((8, 3))}}
    own = dataclasses.replace(own, variables={"params": params}, config={"model_type": "gpt2"})
    message = "extra/kernel has no tensor in a file of 'gpt2', so PEFT cannot express its update"
    with pytest.raises(ValueError, match=message):
        jn.pretrained.save_adapter(tmp_path / "adapter", own, adapter(own, **options))
    assert not (tmp_path / "adapter").exists()
