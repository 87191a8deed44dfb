#!/usr/bin/env bash
# Options of a configuration that the model of that name takes and does not use.
#
# Guess: an option means what it means in the models that the code was derived from. scale_embedding
# multiplies the embeddings of Whisper as those of BART, attn_logit_softcapping caps the scores of Gemma 3
# as those of Gemma 2, and hidden_act is the activation of ResNet.
# Behavior (transformers 5.24.0): the first two are stored and never read: no output changes, and there is
# no warning. hidden_act reaches the stem and the ends of the blocks; inside them ReLU stays.
# Output seen: "scale_embedding: BART changes True, Whisper changes False"; "attn_logit_softcapping: Gemma 2
# changes True, Gemma 3 changes False"; "hidden_act='gelu': GELUActivation 2, ReLU 2".
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "torch==2.13.0" "transformers==${TRANSFORMERS_VERSION:-5.24.0}"
"$folder/venv/bin/python" - <<'PY'
from collections import Counter

import torch
import transformers as hf

print(f"transformers {hf.__version__}")
torch.set_grad_enabled(False)
numbers = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
pair = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "decoder_start_token_id": 1,
}
whisper = {"num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 10}
gemma = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "attn_implementation": "eager",
}
tokens = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
speech = {"input_features": torch.ones(1, 4, 20), "decoder_input_ids": torch.tensor([[3, 4]])}


def changes(model, config, inputs, name, values, **sizes):
    outputs = []
    for value in values:
        torch.manual_seed(0)
        built = model(config(**numbers, **sizes, **{name: value})).eval()
        outputs.append(built(**inputs).last_hidden_state)
    return not torch.equal(*outputs)


name, values = "scale_embedding", (False, True)
bart = changes(hf.BartModel, hf.BartConfig, tokens, name, values, **pair)
same = changes(hf.WhisperModel, hf.WhisperConfig, speech, name, values, **pair, **whisper)
print(f"{name}: BART changes {bart}, Whisper changes {same}")
assert bart and not same, "this has changed"

name, values = "attn_logit_softcapping", (50.0, 1e-4)
second = changes(hf.Gemma2Model, hf.Gemma2Config, tokens, name, values, **gemma)
third = changes(hf.Gemma3TextModel, hf.Gemma3TextConfig, tokens, name, values, **gemma)
print(f"{name}: Gemma 2 changes {second}, Gemma 3 changes {third}")
assert second and not third, "this has changed"

config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], hidden_act="gelu")
kinds = Counter(type(module).__name__ for module in hf.ResNetModel(config).modules())
print("hidden_act='gelu': " + ", ".join(f"{k} {v}" for k, v in sorted(kinds.items()) if "LU" in k))
assert any("GELU" in kind for kind in kinds) and kinds["ReLU"], "this has changed"
PY
