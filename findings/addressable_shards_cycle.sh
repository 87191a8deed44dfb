#!/usr/bin/env bash
# Reading addressable_shards of a jax.Array on one device.
#
# Guess: it is a property, which changes nothing: an array that goes out of scope is freed at once, by
# its reference count, as when nothing was read.
# Behavior (jax 0.10.1; 0.12.0.1 frees it at once, so the script fails there): reading it ties an array on one device into a reference cycle, so
# it and its buffer stay alive until Python's cyclic garbage collector runs, which counts objects and
# not bytes. np.asarray, jax.device_get, sharding and is_fully_addressable tie nothing, and neither
# does addressable_shards of an array on several devices. Whoever saves states by their shards, as
# Orbax does, keeps every saved state alive for a while; on an accelerator that is device memory.
# Output seen (jax 0.10.1): "addressable_shards on 1 device: 20 MiB of 5 arrays stay alive, 0 MiB after
# gc.collect()"; 0 MiB in the other two cases.
#
# Fails when that changes. jaxnets gives Orbax the arrays of one device as NumPy arrays; see
# jaxnets/training/checkpoint.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import gc

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_num_cpu_devices", 2)
gc.disable()


def live():
    return sum(array.nbytes for array in jax.live_arrays()) / 2**20


def left_alive(read, num_devices):
    """Return the MiB of five arrays that are alive after the last name of each is gone."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:num_devices]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    gc.collect()
    before = live()
    for value in range(5):
        array = jax.device_put(jnp.full((1024, 1024), float(value)), sharding)
        read(array)
        del array
    kept = live() - before
    gc.collect()
    return kept, live() - before


print(f"jax {jax.__version__}")
readers = {"addressable_shards": lambda array: array.addressable_shards, "np.asarray": np.asarray}
measured = {}
for name, num_devices in (("addressable_shards", 1), ("addressable_shards", 2), ("np.asarray", 1)):
    kept, collected = left_alive(readers[name], num_devices)
    print(
        f"{name} on {num_devices} device{'s'[: num_devices - 1]}: {kept:.0f} MiB of 5 arrays stay "
        f"alive, {collected:.0f} MiB after gc.collect()"
    )
    measured[name, num_devices] = kept, collected
assert measured["addressable_shards", 1] == (20, 0), "this has changed"
assert measured["addressable_shards", 2] == (0, 0), "this has changed"
assert measured["np.asarray", 1] == (0, 0), "this has changed"
PY
