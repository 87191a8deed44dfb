"""Adapters of PEFT, read and written. Optional: run with `-m parity`."""

import jax
import numpy as np
import pytest

import jaxnets as jn

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [
    pytest.mark.parity,
    *(  # of peft itself
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")
    ),
]

TOKENS = np.random.default_rng(0).integers(0, 40, (3, 9))
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


def base(folder):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def moved(model):
    """Give every trained parameter a random value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def theirs(model):
    return model(torch.tensor(TOKENS)).logits.detach().numpy()


OPTIONS = {
    "plain": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "rslora": {"target_modules": ["c_attn"], "use_rslora": True},
    "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["c_attn", "c_fc"],
        "rank_pattern": {"h.1.attn.c_attn": 3},
        "alpha_pattern": {"c_fc": 1},
    },
    "whole": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "ln_2"]},
    "biases": {"target_modules": ["c_attn"], "bias": "all"},
    "positions": {"target_modules": ["wpe"]},
}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_of_peft_computes_here_what_it_does_there(tmp_path, name, scan_layers):
    config = peft.LoraConfig(r=4, lora_alpha=6, fan_in_fan_out=True, **OPTIONS[name])
    model = moved(peft.get_peft_model(base(tmp_path / "base"), config))
    model.save_pretrained(tmp_path / "adapter")
    network = jn.pretrained.load(tmp_path / "base", scan_layers=scan_layers)
    variables = jn.pretrained.load_adapter(tmp_path / "adapter", network)
    params = network.variables["params"]
    merged = jn.merge_lora(params, variables)
    logits = network.module.apply({"params": merged}, TOKENS)
    np.testing.assert_allclose(logits, theirs(model), atol=1e-4)
    assert np.abs(logits - network.module.apply(network.variables, TOKENS)).max() > 1e-2


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": r"(query|value|hidden|feed_forward/output)/kernel$", "full": "norm"},
        {"target": r"attention/\w+/kernel$", "dora": True, "rank_stabilized": True},
    ],
)
def test_peft_reads_an_adapter_that_was_made_here(tmp_path, options, scan_layers):
    model = base(tmp_path / "base")
    network = jn.pretrained.load(tmp_path / "base", scan_layers=scan_layers)
    params = network.variables["params"]
    variables = jn.lora_init(jax.random.key(0), params, rank=3, max_rank=5, alpha=6, **options)
    random = np.random.default_rng(0)
    variables["params"] = jax.tree.map(
        lambda leaf: leaf + 0.2 * random.normal(size=leaf.shape).astype(np.float32),
        variables["params"],
    )
    jn.pretrained.save_adapter(tmp_path / "adapter", network, variables)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    merged = jn.merge_lora(params, variables)
    expected = network.module.apply({"params": merged}, TOKENS)
    np.testing.assert_allclose(theirs(adapted), expected, atol=1e-4)
    assert np.abs(expected - network.module.apply(network.variables, TOKENS)).max() > 1e-2
    again = jn.pretrained.load_adapter(tmp_path / "adapter", network)
    logits = network.module.apply({"params": jn.merge_lora(params, again)}, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_adapters_that_change_the_frozen_weights_are_refused(tmp_path):
    model = base(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="pissa")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    network = jn.pretrained.load(tmp_path / "base")
    with pytest.raises(ValueError, match=r"init_lora_weights, .* changes the weights"):
        jn.pretrained.load_adapter(tmp_path / "adapter", network)


def check_other(tmp_path, model, config, inputs, call):
    """Compare an adapter of PEFT with the network here, and with itself written and read again."""
    model.eval().save_pretrained(tmp_path / "base")
    adapted = moved(peft.get_peft_model(model, config))
    adapted.save_pretrained(tmp_path / "adapter")
    network = jn.pretrained.load(tmp_path / "base")
    variables = jn.pretrained.load_adapter(tmp_path / "adapter", network)
    params = jn.merge_lora(network.variables["params"], variables)
    outputs = network.module.apply({**network.variables, "params": params}, inputs)
    with torch.no_grad():
        expected = call(adapted).logits.numpy()
    np.testing.assert_allclose(outputs, expected, atol=1e-4)
    jn.pretrained.save_adapter(tmp_path / "again", network, variables)
    adapted = peft.PeftModel.from_pretrained(adapted.unload(), tmp_path / "again").eval()
    with torch.no_grad():
        np.testing.assert_allclose(call(adapted).logits.numpy(), expected, atol=1e-5)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_bert(tmp_path, use_dora):
    config = transformers.BertConfig(vocab_size=40, intermediate_size=24, num_labels=3, **SIZES)
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["query", "value", "dense", "word_embeddings"][: 3 if use_dora else 4],
        modules_to_save=["classifier", "LayerNorm"],
        use_dora=use_dora,
    )
    model = transformers.BertForSequenceClassification(config)
    check_other(tmp_path, model, lora, TOKENS, lambda model: model(torch.tensor(TOKENS)))


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_vit(tmp_path, use_dora):
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_labels=3, intermediate_size=24, **SIZES
    )
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["q_proj", "o_proj", "fc1", "fc2", "projection"],
        alpha_pattern={"layers.1.mlp.fc1": 3},
        rank_pattern={"q_proj": 3},
        modules_to_save=["classifier", "layernorm_before"],
        use_dora=use_dora,
    )
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    model = transformers.ViTForImageClassification(config)
    check_other(tmp_path, model, lora, images, lambda model: model(pixels))


def test_an_adapter_of_deit_with_two_heads(tmp_path):
    config = transformers.DeiTConfig(
        image_size=8, patch_size=4, num_labels=3, intermediate_size=24, **SIZES
    )
    lora = peft.LoraConfig(r=2, target_modules=["v_proj", "cls_classifier"])
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    check_other(tmp_path, model, lora, images, lambda model: model(pixels))


def test_an_adapter_with_norms_of_a_gemma_in_a_gguf_file(tmp_path):
    gguf_networks = pytest.importorskip("gguf_networks", reason="gguf is not installed")
    config = transformers.Gemma2Config(
        vocab_size=40,
        intermediate_size=24,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        max_position_embeddings=64,
        **SIZES,
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    jn.pretrained.save(tmp_path / "ours", jn.pretrained.load(tmp_path / "base"), layout="torch")
    gguf_networks.convert(tmp_path / "ours", tmp_path / "model.gguf")
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["input_layernorm", "norm"]
    )
    adapted = moved(peft.get_peft_model(model, lora))
    adapted.save_pretrained(tmp_path / "adapter")
    network = jn.pretrained.load(tmp_path / "model.gguf")
    variables = jn.pretrained.load_adapter(tmp_path / "adapter", network)
    params = jn.merge_lora(network.variables["params"], variables)
    logits = network.module.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, theirs(adapted), atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_llama(tmp_path, use_dora):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=40, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head"]
    lora = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, use_dora=use_dora)
    check_other(
        *(tmp_path, transformers.LlamaForCausalLM(config), lora, TOKENS),
        lambda model: model(torch.tensor(TOKENS)),
    )
