#!/usr/bin/env bash
# Fully sharded parameters by `in_shardings` alone: an embedding table and four dense layers on four devices.
#
# Guess: with rows of the batch and the first axis of every kernel split over one mesh axis, the compiler
# gathers parameters for use, whatever the axis of the table that is split. What travels in a step is two or
# three times the parameters, for any batch.
# Behavior (jax 0.10.1 and 0.12.0, Shardy, CPU): which axis of the TABLE is split decides about all layers.
# Split by features, its vectors come out split by features, and the compiler leaves them so: no kernel is
# gathered, every layer multiplies a part of the channels for the rows of all devices, and products are
# reduced. Traffic and memory grow with the batch, and nothing warns. Gathering the table by one
# `with_sharding_constraint` before it is read changes the plan of the whole network.
# Output seen (both): with 16 and 256 rows of 32 tokens, 2.7 and 42.7 times the bytes of the parameters travel;
# with the table gathered first, 2.0 times for both.
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "jax==${JAX_VERSION:-0.10.1}"
cat > "$folder/plan.py" <<'PYTHON'
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = PartitionSpec
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
FEATURES, VOCABULARY, TIME = 256, 512, 32
shapes = [jax.ShapeDtypeStruct((VOCABULARY, FEATURES), jnp.float32)]
shapes += [jax.ShapeDtypeStruct((FEATURES, FEATURES), jnp.float32)] * 4
parameters = sum(4 * math.prod(shape.shape) for shape in shapes)


def traffic(rows, gather):
    """Return the bytes of the results of all collectives of one gradient, on one device."""

    def loss(params, tokens):
        table, *kernels = params
        if gather:
            table = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P()))
        x = table[tokens]  # [rows, time, features]
        for kernel in kernels:
            x = x + jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    split = [NamedSharding(mesh, P(None, "fsdp"))] + [NamedSharding(mesh, P("fsdp"))] * 4
    gradient = jax.jit(
        jax.grad(loss), in_shardings=(split, NamedSharding(mesh, P("fsdp"))), out_shardings=split
    )
    tokens = jax.ShapeDtypeStruct((rows, TIME), jnp.int32)
    text = gradient.lower(shapes, tokens).compile().as_text()
    total = 0
    for types in re.findall(
        r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text
    ):
        for sizes in re.findall(r"[fs]32\[([\d,]*)\]", types):
            total += 4 * math.prod(int(size) for size in sizes.split(",") if size)
    return total / parameters


found = {(rows, gather): traffic(rows, gather) for rows in (16, 256) for gather in (False, True)}
for (rows, gather), times in found.items():
    print(f"rows {rows}, table gathered first {gather}: {times:.1f} times the parameters")
assert found[256, True] == found[16, True] < 3.1, "this has changed"
assert found[256, False] > 5 * found[256, True], "this has changed"
PYTHON
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 "$folder/env/bin/python" "$folder/plan.py"
