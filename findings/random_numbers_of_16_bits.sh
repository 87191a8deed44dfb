#!/usr/bin/env bash
# Random numbers that jax.random draws in bfloat16.
#
# Guess: the numbers of float32, rounded: a normal distribution with tails to about 4.8 in a million
# numbers, and choices with the probabilities that the logits say, to a percent.
# Behavior (jax 0.10.1 and 0.12.0.1): a bfloat16 number is made from 7 random bits. A million normal
# numbers take 128 values, the largest of them 2.516, with a mean of -0.012, twelve standard errors from
# 0. `categorical` of 1000 equal bfloat16 logits prefers the first ones, because the
# Gumbel noise has many ties, which argmax breaks towards the front: the mean index is 127, not 499.5. A
# class of probability 0.001 beside three others is chosen in 0.00006 of all cases. `bernoulli` with a
# bfloat16 probability of 0.001 is true in 0.0077.
# Initializers called with a bfloat16 dtype, latents and noise in the dtype of the activations, and
# sampling from the logits of a bfloat16 network are affected, in silence.
# Output seen (jax 0.10.1): "normal: 128 values, largest 2.516, mean -0.0121", "categorical: mean index
# 126.7 of 1000 equal logits, 0.000059 for a class of 0.001", "bernoulli of 0.001: 0.00771".
#
# Fails when that changes. jaxnets draws in float32 and rounds (`core.drawn_in_float32`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

key, million = jax.random.key(0), (1_000_000,)
print(f"jax {jax.__version__}")

numbers = np.asarray(jax.random.normal(key, million, jnp.bfloat16), np.float64)
values = len(np.unique(numbers))
print(f"normal: {values} values, largest {numbers.max():.3f}, mean {numbers.mean():.4f}")
assert values <= 256 and numbers.max() < 3 and abs(numbers.mean()) > 0.005, "this has changed"

equal = jax.random.categorical(key, jnp.zeros(1000, jnp.bfloat16), shape=(200_000,))
logits = jnp.log(jnp.array([0.9, 0.09, 0.009, 0.001]))
rare = float(jnp.mean(jax.random.categorical(key, logits.astype(jnp.bfloat16), shape=million) == 3))
index = float(jnp.mean(equal.astype(jnp.float32)))
print(f"categorical: mean index {index:.1f} of 1000 equal logits, {rare:.6f} for a class of 0.001")
assert index < 250 and rare < 0.0003, "this has changed"

true = float(jnp.mean(jax.random.bernoulli(key, jnp.bfloat16(0.001), million)))
print(f"bernoulli of 0.001: {true:.5f}")
assert true > 0.005, "this has changed"
PY
