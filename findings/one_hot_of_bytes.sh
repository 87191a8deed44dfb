#!/usr/bin/env bash
# jax.nn.one_hot of labels whose integer type holds fewer values than there are classes.
#
# Guess: a row has one 1, at the label, whatever the integer type of the labels is.
# Behavior (jax 0.10.1 and 0.12.0.1): the classes are counted in the type of the labels, in which they
# wrap. A uint8 label of 255 with 300 classes gives a row with one 1; a label of 5 gives a row with two,
# at 5 and at 261. An int8 label does so from 256 classes on too. Nothing is raised, and a loss on such
# rows trains two classes for one. Labels of bytes are what image files and tokenizers of bytes give.
# Output seen (jax 0.10.1): "uint8 label 5 of 300 classes: ones at [5, 261]".
#
# Fails when that changes. jaxnets widens integers to int32 before it compares or counts them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

print(f"jax {jax.__version__}")
for name, label, classes, expected in (
    ("uint8", 5, 300, [5, 261]),
    ("uint8", 255, 300, [255]),
    ("int8", 5, 300, [5, 261]),
):
    row = jax.nn.one_hot(jnp.array([label], name), classes)[0]
    ones = np.flatnonzero(np.asarray(row)).tolist()
    print(f"{name} label {label} of {classes} classes: ones at {ones}")
    assert ones == expected, "this has changed"
PY
