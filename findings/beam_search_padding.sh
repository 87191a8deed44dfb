#!/usr/bin/env bash
# Padding after the end token in beam search, where the padding token is number 0.
#
# Guess: as in greedy search, a finished sequence is filled with pad_token_id.
# Behavior (transformers 5.24.0): number 0 counts as not given, and beam search fills with the end token.
# Any other number is used. A mask of `tokens != pad_token_id` then takes the filling for text.
# Output seen: "padding 0: greedy [3, 2, 0, 0, 0], beams [3, 2, 2, 2, 2]";
# "padding 7: greedy [3, 2, 7, 7, 7], beams [3, 2, 7, 7, 7]".
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "torch==2.13.0" "transformers==${TRANSFORMERS_VERSION:-5.24.0}"
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

print(f"transformers {transformers.__version__}")
torch.manual_seed(0)
prompts = torch.tensor([[3], [4]])


def allowed(row, _):
    return [2] if row == 0 else [5, 6]  # the first sequence ends at once, the second never


def first_row(padding, beams):
    sizes = {"vocab_size": 12, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=padding)
    return (
        GPT2LMHeadModel(config)
        .generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_beams=beams,
            max_new_tokens=4,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
        )[0]
        .tolist()
    )


found = {}
for padding in (0, 7):
    found[padding] = first_row(padding, beams=1), first_row(padding, beams=2)
    print(f"padding {padding}: greedy {found[padding][0]}, beams {found[padding][1]}")
assert found[0] == ([3, 2, 0, 0, 0], [3, 2, 2, 2, 2]), "this has changed"
assert found[7] == ([3, 2, 7, 7, 7], [3, 2, 7, 7, 7]), "this has changed"
PY
