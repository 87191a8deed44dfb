#!/usr/bin/env bash
# Division of float32 by a number on CPU.
#
# Guess: outside of jax.jit, x / d is the correctly rounded quotient of IEEE 754, as in NumPy; the
# quotient of an exact multiple is exact.
# Behavior (jax 0.10.1 and 0.12.0.1): a divisor that is broadcast, a scalar or a column, is replaced by its
# rounded reciprocal, without jax.jit too. 390 of the first 1,000 multiples of 41 do not come back, and
# floor makes each of them one too low. A divisor of the full shape is exact.
# Output seen: "divided by 41: scalar 390 wrong, column 390 wrong, full shape 0 wrong, NumPy 0 wrong".
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

whole = np.arange(1000, dtype=np.float32).reshape(10, 100)
products = whole * np.float32(41)  # exact: below 2**24
dividend = jnp.asarray(products)
quotients = {
    "scalar": dividend / 41,
    "column": dividend / jnp.full((10, 1), 41.0),
    "full shape": dividend / jnp.full((10, 100), 41.0),
    "NumPy": products / np.float32(41),
}
wrong = {name: int((np.asarray(value) != whole).sum()) for name, value in quotients.items()}
below = int((np.floor(np.asarray(quotients["scalar"])) < whole).sum())
print(f"jax {jax.__version__}; divided by 41: " + ", ".join(f"{k} {v} wrong" for k, v in wrong.items()))
print(f"floor of the scalar quotient is one too low for {below}")
assert wrong["scalar"] > 0 and wrong["column"] > 0, "this has changed"
assert wrong["full shape"] == wrong["NumPy"] == 0, "this has changed"
PY
