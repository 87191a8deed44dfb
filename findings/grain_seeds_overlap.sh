#!/usr/bin/env bash
# The orders of Grain's shuffle under neighboring seeds.
#
# Guess: seeds 0 and 1 give unrelated orders, so runs of several seeds are independent in their batches.
# Behavior (grain 0.2.18): the number of the epoch is added to the seed of `shuffle`. Epoch 2 of seed 0 is
# epoch 1 of seed 1, element by element, epoch 3 of seed 0 is epoch 1 of seed 2, and so on. Runs with the
# seeds 0 to 4 see the same orders, one epoch apart, and the intervals over their results are too narrow
# where the order matters. The seeds of `random_map` do not overlap so.
# Output seen: "epoch 2 of seed 0 is epoch 1 of seed 1: True"; "epoch 3 of seed 0 is epoch 1 of seed 2: True".
#
# Fails when that changes. jaxnets hashes the seed before it gives it to Grain.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "grain==${GRAIN_VERSION:-0.2.18}"
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import grain

print(f"grain {importlib.metadata.version('grain')}")
examples = grain.MapDataset.range(20)
epochs = list(examples.shuffle(seed=0).repeat(3))
for epoch in (2, 3):
    other = list(examples.shuffle(seed=epoch - 1))
    same = epochs[20 * (epoch - 1) : 20 * epoch] == other
    print(f"epoch {epoch} of seed 0 is epoch 1 of seed {epoch - 1}: {same}")
    assert same, "this has changed"
PY
