#!/usr/bin/env bash
# One matrix product on a mesh of three axes: "data", "fsdp" and "tensor", two devices each.
#
# Guess: shardings decide where numbers are, never which: x @ k.T is that of one device within 1e-6,
# whatever is split over which axis.
# Behavior (jax 0.10.1 and 0.12.0, Shardy, CPU): with rows of x split over ("data", "fsdp"), its columns and
# those of the result over "tensor", and k over ("fsdp", "tensor"), the usual layout of fully sharded data
# and tensor parallelism, the second and the third quarter of the rows of the result are exchanged.
# Nothing warns. The program moves the rows of x between devices, so that "fsdp" comes first, and does not
# move the result back. With the rows over ("fsdp", "data") the same product is right. In training it is
# the gradient of the inputs of a layer that is wrong, so losses are right and learn from wrong gradients.
# Output seen (jax 0.10.1): "rows over ('data', 'fsdp'): largest difference 44.97, rows that differ 16 to
# 47 of 64" and "rows over ('fsdp', 'data'): largest difference 0.00, rows that differ none".
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==${JAX_VERSION:-0.10.1}"
cat > "$folder/product.py" <<'PYTHON'
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
x = jax.random.normal(jax.random.key(0), (64, 64))
k = jax.random.normal(jax.random.key(1), (64, 64))
expected = np.asarray(x) @ np.asarray(k).T


def differences(rows):
    split = NamedSharding(mesh, PartitionSpec(rows, "tensor"))
    kernel = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    product = jax.jit(
        lambda x, k: x @ k.T, in_shardings=(split, kernel), out_shardings=split
    )
    difference = np.abs(np.asarray(product(x, k)) - expected)
    wrong = np.flatnonzero(difference.max(axis=1) > 1e-3)
    named = f"{wrong[0]} to {wrong[-1]} of {len(x)}" if len(wrong) else "none"
    if len(wrong):
        order = np.r_[0:16, 32:48, 16:32, 48:64]
        assert np.allclose(np.asarray(product(x, k))[order], expected, atol=1e-3)
    print(
        f"rows over {rows}: largest difference {difference.max():.2f}, rows that differ {named}"
    )
    return len(wrong)


assert differences(("data", "fsdp")) == 32, "this has changed"
assert differences(("fsdp", "data")) == 0, "this has changed"
PYTHON
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 "$folder/env/bin/python" "$folder/product.py"
