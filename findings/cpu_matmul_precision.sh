#!/usr/bin/env bash
# Named algorithms of jax.default_matmul_precision on CPU.
#
# Guess: an algorithm that the CPU does not have is refused; one that is accepted is used.
# Behavior (jax 0.10.1 and 0.12.0.1): "TF32_TF32_F32" is refused with a ValueError. "BF16_BF16_F32" and
# "BF16_BF16_F32_X3" are accepted, and the product is that of plain float32, bit for bit: the operands
# are never rounded to bfloat16. A test of such precision on a CPU passes whatever it would do on an
# accelerator.
#
# Fails when that changes. jaxnets computes "BF16_BF16_F32_X3" itself on CPU; see
# docs/performance/matmul.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

left, right = (jax.random.normal(jax.random.key(seed), (256, 256)) for seed in (0, 1))


def product():
    return jax.jit(lambda left, right: left @ right)(left, right)


plain = product()
rounded = left.astype(jnp.bfloat16).astype(jnp.float32) @ right
print(f"jax {jax.__version__}; one bfloat16 operand would differ by {jnp.abs(rounded - plain).max():.2g}")
for name in ("BF16_BF16_F32", "BF16_BF16_F32_X3"):
    with jax.default_matmul_precision(name):
        difference = float(jnp.abs(product() - plain).max())
    print(f"{name}: accepted, differs from float32 by {difference}")
    assert difference == 0, "this has changed"
try:
    with jax.default_matmul_precision("TF32_TF32_F32"):
        product()
except ValueError as error:
    print(f"TF32_TF32_F32: {error}")
else:
    raise AssertionError("this has changed: TF32_TF32_F32 is accepted")
PY
