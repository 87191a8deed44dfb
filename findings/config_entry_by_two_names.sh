#!/usr/bin/env bash
# An entry of config.json under the other name that transformers accepts for it.
#
# Guess: both names of an entry mean the same; where both stand there, the architecture's own counts.
# Behavior (transformers 5.24.0): the other name always counts, also a null, which leaves GPT-2 without a
# number of layers. T5's decoder takes its number of layers from the own name before the other one is set:
# num_layers 3 gives 3 and 3 layers, num_hidden_layers 3 gives 3 and 6.
# Output seen: "both: 3, null: None; num_layers: (3, 3), num_hidden_layers: (3, 6)".
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "transformers==${TRANSFORMERS_VERSION:-5.24.0}"
cd "$folder"
venv/bin/python - 2> /dev/null <<'PY'
import json

import transformers


def load(**entries):
    with open("config.json", "w") as file:
        json.dump(entries, file)
    return transformers.AutoConfig.from_pretrained(".")


both = load(model_type="gpt2", n_layer=5, num_hidden_layers=3).n_layer
null = load(model_type="gpt2", n_layer=5, num_hidden_layers=None).n_layer
found = {}
for name in ("num_layers", "num_hidden_layers"):
    config = load(model_type="t5", **{name: 3})
    found[name] = (config.num_layers, config.num_decoder_layers)
print(
    f"transformers {transformers.__version__}; both: {both}, null: {null}; "
    + ", ".join(f"{name}: {layers}" for name, layers in found.items())
)
assert (both, null) == (3, None), "this has changed"
assert found == {"num_layers": (3, 3), "num_hidden_layers": (3, 6)}, "this has changed"
PY
