"""GGUF files of transformers' networks: read here and by transformers. Run with `-m parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_networks import convert

import jaxnets as jn

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(3, 40, (3, 9))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, **GEMMA),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **GEMMA),
    "gpt2": transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_is_the_network_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    model.save_pretrained(tmp_path / "hf")
    # The entries of config.json as the converter expects them are those that we write.
    jn.pretrained.save(tmp_path / "ours", jn.pretrained.load(tmp_path / "hf"), layout="torch")
    convert(tmp_path / "ours", tmp_path / "model.gguf")
    network = jn.pretrained.load(tmp_path / "model.gguf")
    logits = jax.jit(network.module.apply)(network.variables, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    if name not in ("llama", "qwen2"):  # transformers 5.24 reads the others otherwise
        return
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    with torch.no_grad():
        theirs = read.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-4)
