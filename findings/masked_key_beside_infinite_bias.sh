#!/usr/bin/env bash
# A boolean mask beside a bias of minus infinity in jax.nn.dot_product_attention.
#
# Guess: a key that the mask hides never contributes; where mask and bias together hide every key, the
# output is 0, NaN or a mean of all values.
# Behavior (jax 0.10.1 and 0.12.0.1, XLA implementation): the mask writes a large finite number, which is
# above minus infinity. With two keys, the first hidden by the mask and the second by the bias, the output
# is the value of the first key, whole: what the mask was to hide. With a bias of -1e30 in its place the
# masked key stays hidden. Padding given by a mask, and causality by a bias of minus infinity, meet in the
# first positions of a sequence that is padded on the left.
# Output seen: "bias -1e+30: value [5.0, 5.0]", "bias -inf: value [1.0, 1.0]", where the masked key has the
# value 1.
#
# Fails when that changes. jaxnets gives 0 where every key is hidden, by mask or by bias.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

print(f"jax {jax.__version__}")
query, key = jnp.ones((1, 1, 1, 2)), jnp.ones((1, 2, 1, 2))
value = jnp.array([[1.0, 1.0], [5.0, 5.0]]).reshape(1, 2, 1, 2)
mask = jnp.array([False, True]).reshape(1, 1, 1, 2)
for number, expected in ((-1e30, 5.0), (-jnp.inf, 1.0)):
    bias = jnp.array([0.0, number]).reshape(1, 1, 1, 2)
    output = jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask)
    print(f"bias {number:g}: value {output.ravel().tolist()}")
    assert bool(jnp.all(output == expected)), "this has changed"
PY
