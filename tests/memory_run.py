"""Memory of a step as the compiler states it, and as the process takes it.

`memory_run.py MODEL BATCH` prints JSON, both in bytes beyond the state. Linux only: it reads the
peak of the resident memory.
"""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from jaxnets.models.registry import MODELS
from jaxnets.training.optimizers import OPTIMIZERS


def resident(entry):
    """Return bytes of the resident memory: "VmRSS" now, "VmHWM" at its peak."""
    return int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(name, batch_size):
    """Return {"stated": bytes, "measured": bytes} of one step after the first one."""
    model, mesh = MODELS[name], jn.device_mesh(devices=jax.devices()[:1])
    fit = jn.fit_memory(name, mesh, batch_size=batch_size)
    rng, module = np.random.default_rng(0), model.network()
    batch = {
        key: rng.uniform(0, 1, shape.shape).astype(shape.dtype)
        if shape.dtype == jnp.float32
        else rng.integers(0, 5, shape.shape).astype(shape.dtype)
        for key, shape in model.task.batch(batch_size, model.input_shape).items()
    }
    update = jn.Update(model.task.objective(module), OPTIMIZERS["adamw"](1e-3))
    key, inputs = jax.random.key(0), [batch[entry] for entry in model.task.inputs]
    state = jn.create_train_state(jn.initialize(module, key, *inputs), update, rng=key)
    run = jn.sharded_step(jn.make_train_step(update), mesh, donate=True)
    state = jax.block_until_ready(run(jn.replicate(state, mesh), batch)[0])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the compiler has freed counts otherwise
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    jax.block_until_ready(run(state, batch))
    return {"stated": fit.step.temporary_bytes, "measured": resident("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
