"""Trainings of one of several processes: `process_run.py JOBS`.

JOBS is JSON, a list of the arguments of `run`. The processes are told about each other by the
environment. Each job resumes from the checkpoints in its folder, and prints a line of JSON.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jaxnets as jn

SIZE = 16  # examples of a batch: for one, two and four processes
IMAGES = {"inputs": (64, 8, 8, 1)}
BLOCK = jn.BlockConfig(features=8, num_heads=2, dropout_rate=0.1)


def classifier(module, shapes):
    return module, jn.classification(module), {**shapes, "labels": (64,)}


def autoencoder(**fields):
    config = jn.EncoderDecoderConfig((8, 8, 1), features=(8,))
    module = jn.VAE(config, latent_size=2, likelihood=jn.Gaussian(), **fields)
    return module, jn.vae(module), IMAGES


def transformer(**fields):
    module = jn.TransformerLM(4, num_layers=1, max_length=6, config=BLOCK, **fields)
    return module, jn.language_modeling(module), {"inputs": (64, 6), "labels": (64, 6)}


def gan(**fields):
    return jn.gan.dcgan((8, 8, 1), latent_size=4, width=2, **fields), None, IMAGES


def feedforward(**fields):
    module = jn.MLP((8,), 4, norm="batch", dropout_rate=0.1, **fields)
    return classifier(module, IMAGES)


def convolutional(**fields):
    module = jn.ConvNet((4,), num_outputs=4, norm="batch", **fields)
    return classifier(module, IMAGES)


def recurrent(**fields):
    return classifier(jn.SequenceClassifier(4, 4, **fields), {"inputs": (64, 6, 3)})


#: family -> (fields, such as precision) -> module, objective, shapes of the data
NETWORKS = {
    "feedforward": feedforward,
    "convolutional": convolutional,
    "recurrent": recurrent,
    "autoencoder": autoencoder,
    "gan": gan,
    "transformer": transformer,
}
#: Families, and how the batches come to the devices.
CASES = [(kind, "own") for kind in NETWORKS]
CASES += [("feedforward", layout) for layout in ("whole", "fsdp", "scan")]
CASES += [("transformer", "rules")]
#: Number of processes -> sizes of a mesh whose state is split by rules.
RULES_MESH = {1: {}, 2: {"tensor": 2}, 4: {"fsdp": 2, "tensor": 2}}


def updates_of(module, objective):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02, momentum=0.9))
    if objective is not None:
        return jn.Update(objective, optimizer)
    objectives = jn.adversarial(module, "non_saturating")
    parts = {"discriminator": objectives.discriminator, "generator": objectives.generator}
    return [jn.Update(part, optimizer, wrt=name) for name, part in parts.items()]


def data_of(shapes):
    """Floats, or tokens and labels below 4."""
    rng = np.random.default_rng(0)
    integers = {"labels"} | ({"inputs"} if len(shapes["inputs"]) == 2 else set())
    return {
        name: rng.integers(0, 4, shape).astype(np.int32)
        if name in integers
        else rng.uniform(0, 1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def digest(state, mesh):
    """Return that of what a state has learned, wherever its parts are."""
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return jn.parameters_sha256(whole((state.params, state.model_state)))


def run(folder, num_steps, kind="feedforward", layout="own", pause=0.0, own_data=False):
    """Return the losses and a digest of the state, after a resume from `folder`."""
    folder = Path(folder)
    module, objective, shapes = NETWORKS[kind]()
    updates, data = updates_of(module, objective), data_of(shapes)
    if own_data:
        data["inputs"] += jax.process_index()
    example = jnp.zeros((1, 4)) if kind == "gan" else data["inputs"][:1]
    key = jax.random.key(0)
    variables = jax.jit(module.init)({"params": key, "latent": key}, example)
    state = jn.create_train_state(variables, updates, rng=key)
    step = jn.make_train_step(updates)
    mesh = jn.data_mesh()
    if layout == "rules":
        mesh = jn.device_mesh(**{"data": 1, **RULES_MESH[jax.process_count()]})
    batches = jn.data.shuffled_batches(data, SIZE, seed=0)
    sharding = jn.fsdp_sharding(state, mesh, min_bytes=64) if layout == "fsdp" else None
    if layout == "rules":
        sharding = jn.state_sharding(state, mesh, jn.sharding_rules(kind))
    spec = None
    if layout == "scan":
        step, spec = jn.scan_steps(step), PartitionSpec(None, "data")
        batches = jn.data.chunked(batches, 4)
    if layout != "whole":
        batches = jn.data.sharded_batches(batches, mesh, batch_spec=spec)
    if layout == "fsdp":
        batches = jn.data.prefetch(batches, device_put=lambda batch: batch)
    executor = jn.sharded_step(step, mesh, sharding, batch_spec=spec)
    hooks = [lambda *_: time.sleep(pause)] if pause else []
    state = jn.replicate(state, mesh) if sharding is None else state
    state, history = jn.resume(folder, state)
    restored = digest(state, mesh)
    state, history = jn.fit(
        executor,
        state,
        batches,
        num_steps=num_steps,
        hooks=[*hooks, jn.Checkpointing(folder, every=num_steps)],
        writers=[jn.jsonl_writer(folder / "metrics.jsonl")],
        log_every=4,
        history=history,
        progress=False,
    )
    losses = [row["loss" if objective is not None else "generator/loss"] for row in history.rows]
    return {
        "losses": losses,
        "step": int(state.step),
        "stopped": history.stopped,
        "restored": restored,
        "digest": digest(state, mesh),
        "evaluated": evaluate(objective, state, data, mesh) if kind == "feedforward" else None,
    }


def evaluate(objective, state, data, mesh):
    """Return the metrics of examples whose number is no multiple of anything."""
    some = {name: array[:61] for name, array in data.items()}
    batches = jn.data.sharded_batches(jn.data.sequential_batches(some, SIZE), mesh)
    return jn.evaluate(jn.jit_step(jn.make_eval_step(objective)), state, batches)


def main(jobs):
    jn.init_distributed(timeout_seconds=60, silence_seconds=10, verbose=False)
    for job in jobs:
        print(json.dumps(run(**job)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
