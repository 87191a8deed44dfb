#!/usr/bin/env bash
# np.mean of a bfloat16 array.
#
# Guess: as for float16, which np.mean accumulates in float32: the mean of ones is 1.
# Behavior (numpy 2.4.6, ml_dtypes 0.6.0): the sum is accumulated in bfloat16, one element after the
# other, and stops at 256, because 256 + 1 is 256 there. The mean of 1,000 ones is 0.256.
# Output seen: "bfloat16: sum 256, mean 0.255859; float16: sum 1000, mean 1".
#
# Fails when that changes. jaxnets adds narrow values in float32 or float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "numpy==2.4.6" "ml_dtypes==0.6.0"
"$folder/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np

found = {}
for dtype in (ml_dtypes.bfloat16, np.float16):
    ones = np.ones(1000, dtype)
    found[np.dtype(dtype).name] = float(np.sum(ones)), float(np.mean(ones))
print("; ".join(f"{name}: sum {total:g}, mean {mean:g}" for name, (total, mean) in found.items()))
assert found["float16"] == (1000, 1), "this has changed"
assert found["bfloat16"][0] == 256 and found["bfloat16"][1] < 0.26, "this has changed"
PY
