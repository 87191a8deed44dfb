"""Curves of every family on meshes of eight devices: `sharded_run.py STEPS [FAMILY ...]`.

Prints {family: {mesh: {precision: largest relative difference of a loss}}} as JSON.
"""

import itertools
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from process_run import NETWORKS, SIZE, data_of, updates_of

import jaxnets as jn

DOUBLE = jn.Precision(jnp.float64, jnp.float64, jnp.float64)
MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2}, {"fsdp": 8}]
SEQUENCE_MESHES = [{"fsdp": 2, "sequence": 2, "tensor": 2}]  # for the family with a time axis


def curve(run, state, batches, num_steps):
    """Return the losses of all networks, [steps, losses]."""
    rows = []
    for batch in itertools.islice(batches(0), num_steps):
        state, metrics = run(state, batch)
        rows.append([mean.total / mean.count for name, mean in metrics.items() if "loss" in name])
    return np.array(rows, np.float64)


def differences(name, num_steps, *, adam):
    """Return {mesh: largest relative difference of a loss from that of one device}."""
    fields = {"precision": DOUBLE} if adam else {}
    module, objective, shapes = NETWORKS[name](**fields)
    data = data_of(shapes)
    updates = updates_of(module, objective)
    if adam:
        data = {
            key: x.astype(np.float64) if x.dtype == np.float32 else x for key, x in data.items()
        }
        updates = [
            jn.Update(update.objective, optax.adam(1e-3), wrt=update.wrt)
            for update in (updates if isinstance(updates, list) else [updates])
        ]
    example = jnp.zeros((1, 4)) if name == "gan" else data["inputs"][:1]
    key = jax.random.key(0)
    variables = jax.jit(module.init)({"params": key, "latent": key}, example)
    state = jn.create_train_state(variables, updates, rng=key)
    step = jn.make_train_step(updates)
    batches = jn.data.shuffled_batches(data, SIZE, seed=0)
    expected = curve(jn.jit_step(step), state, batches, num_steps)
    assert np.all(np.isfinite(expected)) and np.all(expected[0] != expected[-1])
    found = {}
    for sizes in MESHES + (SEQUENCE_MESHES if name == "transformer" else []):
        mesh = jn.device_mesh(**{"data": 1, **sizes})
        sharding = jn.state_sharding(state, mesh, jn.sharding_rules(name))
        spec = PartitionSpec(("fsdp", "data"), "sequence") if "sequence" in sizes else None
        run = jn.sharded_step(step, mesh, sharding, batch_spec=spec)
        losses = curve(run, jax.device_put(state, sharding), batches, num_steps)
        label = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        found[label] = float(np.max(np.abs(losses - expected) / np.abs(expected)))
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    steps, result = int(sys.argv[1]), {}
    for family in sys.argv[2:] or NETWORKS:
        with jax.enable_x64(False):
            single = differences(family, steps, adam=False)
        with jax.enable_x64(True):
            double = differences(family, steps, adam=True)
        result[family] = {
            mesh: {"float32 SGD": single[mesh], "float64 Adam": double[mesh]} for mesh in single
        }
        print(family, result[family], file=sys.stderr)
    print(json.dumps(result))
