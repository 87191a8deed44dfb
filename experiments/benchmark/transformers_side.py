"""Hugging Face transformers: `generate` of GPT-2 and LLaMA, with its cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from experiments.benchmark.architectures import LanguageTransformer, Llama
from experiments.benchmark.sides import Prepared, Settings, ready
from experiments.benchmark.torch_variants import begin

LIBRARIES = ("transformers", "torch")


def prepare(settings: Settings) -> Prepared:
    """Continue prompts greedily, prefill included."""
    device = begin(settings)
    workload = settings.workload
    model = _model(settings).to(device).eval()
    prompts = torch.from_numpy(workload.prompts()).long().to(device)
    (length,) = workload.new_tokens

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            written = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            assert written.shape[1] == workload.prompt + length

    return ready(workload, run, sum(weight.numel() for weight in model.parameters()))


def _model(settings: Settings) -> Any:
    network = settings.workload.network
    if isinstance(network, Llama):
        return LlamaForCausalLM.from_pretrained(settings.pretrained, dtype=torch.float32)
    assert isinstance(network, LanguageTransformer)
    config = GPT2Config(
        vocab_size=network.num_outputs,
        n_positions=network.context,
        n_embd=network.width,
        n_layer=network.num_layers,
        n_head=network.num_heads,
        bos_token_id=0,
        eos_token_id=None,  # no stop token: every call generates all tokens
    )
    return GPT2LMHeadModel(config)
