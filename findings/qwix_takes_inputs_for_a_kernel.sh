#!/usr/bin/env bash
# Quantized training by qwix of a Linen network: a batch as large as a layer is wide, and a layer that
# calls a jitted function.
#
# Guess: which batch size is used, and what was called before, make no difference.
# Behavior (qwix 0.1.8, jax 0.10.1, flax 0.12.8): an array that is not traced back to a parameter is taken
# for one if it has its shape. Inputs [64, 64] of a Dense layer of 64 features are so, and the call ends in
# AssertionError "lhs and rhs cannot be both weights."; 48 rows work. A matmul inside a function that is
# compiled by jax.jit is quantized if the function was not called with these shapes before. If it was, by
# the network without quantization for example, JAX has its program, and the outputs are those of floats,
# without a word. QtProvider(rules, disable_jit=True) quantizes it, and unrolls loops.
# Output seen: "48 rows: runs", "64 rows: AssertionError: lhs and rhs cannot be both weights.", "jitted
# matmul, called before: quantized False".
#
# Fails when that changes. docs/fine_tuning.md says why jaxnets has no quantized training by qwix.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}" flax==0.12.8 qwix==0.1.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix

matmul = jax.jit(jnp.matmul)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], 10))
        return matmul(x, kernel)


def quantized(module, **options):
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    return qwix.quantize_model(module, qwix.QtProvider([rule], **options))


for rows, expected in ((48, "runs"), (64, "AssertionError: lhs and rhs cannot be both weights.")):
    module, x = nn.Dense(64), jax.random.normal(jax.random.key(0), (rows, 64))
    variables = module.init(jax.random.key(1), x)
    try:
        quantized(module).apply(variables, x)
        found = "runs"
    except AssertionError as error:
        found = f"AssertionError: {error}"
    print(f"{rows} rows: {found}")
    assert found == expected, "this has changed"

module, x = Layer(), jax.random.normal(jax.random.key(0), (5, 8))
variables = module.init(jax.random.key(1), x)
exact = module.apply(variables, x)
for options, expected in (({}, False), ({"disable_jit": True}, True)):
    outputs = quantized(module, **options).apply(variables, x)
    differs = not np.array_equal(outputs, exact)
    print(f"jitted matmul, called before, {options}: quantized {differs}")
    assert differs == expected, "this has changed"
PY
