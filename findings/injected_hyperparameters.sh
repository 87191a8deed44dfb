#!/usr/bin/env bash
# optax.inject_hyperparams with bfloat16 parameters.
#
# Guess: injecting the learning rate changes nothing but where it is stored.
# Behavior (optax 0.2.8, jax 0.10.1): every number of the optimizer is rounded to the dtype of the
# parameters. Adam's b2 = 0.999 is 1 in bfloat16, its bias correction divides by 1 - 1 = 0, and the
# first update is NaN; without injection it is the learning rate. hyperparam_dtype=float32 helps.
# Output seen: "plain -0.000999451, injected nan, injected in float32 -0.001".
#
# Fails when that changes. jaxnets.find_learning_rate gives hyperparam_dtype.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}" "optax==0.2.8"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax.numpy as jnp
import optax

params = jnp.ones((), jnp.bfloat16)


def first_update(optimizer):
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    return float(updates)


plain = first_update(optax.adam(1e-3))
injected = first_update(optax.inject_hyperparams(optax.adam)(1e-3))
wide = first_update(optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(1e-3))
print(f"plain {plain:g}, injected {injected:g}, injected in float32 {wide:g}")
assert abs(plain + 1e-3) < 1e-4 and abs(wide + 1e-3) < 1e-4, "this has changed"
assert not abs(injected + 1e-3) < 1e-4, "this has changed"
PY
