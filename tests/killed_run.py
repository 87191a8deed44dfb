"""A small training run in a process of its own, to be killed: `killed_run.py FOLDER NUM_STEPS`.

Each run resumes from the checkpoints in FOLDER, and saves at every second step.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets.core import Mean, TrainState
from jaxnets.training import checkpoint
from jaxnets.training.hooks import Checkpointing, resume
from jaxnets.training.loop import fit
from jaxnets.training.writers import jsonl_writer


def main(folder: Path, num_steps: int) -> None:
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(state, batch):
        def loss(params):
            inputs = batch["inputs"] + 0.01 * jax.random.normal(
                jax.random.fold_in(state.rng, state.step), batch["inputs"].shape
            )
            return jnp.sum((jnp.tanh(inputs @ params["first"]) @ params["second"]) ** 2)

        total, gradients = jax.value_and_grad(loss)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": Mean(total, jnp.float32(8))}
        return TrainState(state.step + 1, state.rng, params, {}, opt_state), metrics

    def batches(first):
        while True:
            yield {"inputs": np.random.default_rng(first).normal(size=(8, 16)).astype(np.float32)}
            first += 1

    rng = jax.random.key(0)
    params = {"first": jax.random.normal(rng, (16, 32)), "second": jnp.ones((32, 4))}
    state = TrainState(jnp.int32(0), rng, params, {}, optimizer.init(params))
    state, history = resume(folder / "checkpoints", state)
    state, history = fit(
        step,
        state,
        batches,
        num_steps=num_steps,
        hooks=[Checkpointing(folder / "checkpoints", every=2)],
        writers=[jsonl_writer(folder / "metrics.jsonl")],
        log_every=7,
        history=history,
    )
    print(checkpoint.parameters_sha256((state.params, state.opt_state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
