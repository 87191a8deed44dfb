"""Decoder-only networks of transformers, loaded here. Optional: run with `-m parity`."""

import numpy as np
import pytest

import jaxnets as jn

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(0, 40, (3, 9))


def test_gpt2(tmp_path):
    check_decoder(tmp_path, transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))


def check_decoder(folder, config):
    """Compare logits, hidden states and gradients of a random network."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    network = jn.pretrained.load(folder)
    logits = network.module.apply(network.variables, TOKENS)
    expected = theirs(torch.tensor(TOKENS)).logits
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
