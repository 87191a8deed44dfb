#!/usr/bin/env bash
# Files that torch.save writes and torch.load of the same version refuses.
#
# Guess: whatever torch.save writes without an error, torch.load reads, with weights_only=False at least.
# Behavior (torch 2.13.0): a tensor of uint16, uint32 or uint64 in the legacy layout
# (`_use_new_zipfile_serialization=False`) is written, and reading it is an AttributeError, under either
# `weights_only`. A file of `pickle_protocol=4` is written in both layouts, and read only with
# `weights_only=False`: the default refuses the instructions of that protocol, not an object.
# Output seen: "legacy uint16: written, AttributeError, AttributeError"; "legacy float32: written, read,
# read"; "protocol 4: written, UnpicklingError, read" (weights_only=True, then False).
#
# Fails when that changes. jn.pretrained.read_tensors reads all of them. It installs torch, which takes
# gigabytes where no build for CPUs is at hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "torch==${TORCH_VERSION:-2.13.0}" numpy
"$folder/venv/bin/python" - "$folder" <<'PY'
import pathlib
import sys
import warnings

import torch

warnings.simplefilter("ignore")
path = pathlib.Path(sys.argv[1]) / "tensor.pt"
print(f"torch {torch.__version__}")


def outcome(weights_only):
    try:
        torch.load(path, weights_only=weights_only)
    except Exception as error:
        return type(error).__name__
    return "read"


cases = (
    ("legacy uint16", torch.uint16, {"_use_new_zipfile_serialization": False}, ["AttributeError"] * 2),
    ("legacy float32", torch.float32, {"_use_new_zipfile_serialization": False}, ["read"] * 2),
    ("protocol 4", torch.float32, {"pickle_protocol": 4}, ["UnpicklingError", "read"]),
)
for name, dtype, options, expected in cases:
    torch.save(torch.ones(2, dtype=dtype), path, **options)
    found = [outcome(weights_only) for weights_only in (True, False)]
    print(f"{name}: written, {', '.join(found)}")
    assert found == expected, "this has changed"
PY
