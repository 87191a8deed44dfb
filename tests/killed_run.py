"""A small training run in a process of its own: `killed_run.py FOLDER NUM_STEPS KIND`.

It is killed. Each run resumes from the checkpoints in FOLDER, and saves at every second step.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets as jn
from jaxnets.core import Mean, TrainState

IMAGES = {"inputs": (8, 8, 8, 1)}
TOKENS = {"inputs": (8, 6), "labels": (8, 6)}


def functions():
    """A step and a state of plain functions, which compile in a moment."""
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

    rng = jax.random.key(0)
    params = {"first": jax.random.normal(rng, (16, 32)), "second": jnp.ones((32, 4))}
    state = TrainState(jnp.int32(0), rng, params, {}, optimizer.init(params))
    return step, state, {"inputs": (8, 16)}


def network(module, objective, shapes, num_members=None):
    """A step with a parameter average, of a population if there are members."""
    optimizer = jn.with_parameter_average(optax.adam(0.01), decay=0.9)
    update = jn.Update(objective, optimizer)
    example = batch_of(shapes, 0)["inputs"]

    def create(key):
        variables = module.init({"params": key, "latent": key}, example)
        return jn.create_train_state(variables, update, rng=key)

    step, key = jn.make_train_step(update), jax.random.key(0)
    if num_members is None:
        return jn.jit_step(step), jax.jit(create)(key), shapes
    keys = jax.random.split(key, num_members)
    step = jn.population_step(step, on_non_finite="freeze")
    return jn.jit_step(step), jax.jit(jax.vmap(create))(keys), shapes


def adversarial():
    """Two optimizers on one state."""
    module = jn.gan.dcgan((8, 8, 1), latent_size=4, width=2)
    objectives = jn.adversarial(module, "non_saturating")
    updates = [
        jn.Update(objectives.discriminator, optax.adam(1e-3, b1=0.5), wrt="discriminator"),
        jn.Update(objectives.generator, optax.adam(1e-3, b1=0.5), wrt="generator"),
    ]
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4)))
    state = jn.create_train_state(variables, updates, rng=jax.random.key(1))
    return jn.jit_step(jn.make_train_step(updates)), state, IMAGES


def classifier(module, shapes, num_members=None):
    return network(module, jn.classification(module), {**shapes, "labels": (8,)}, num_members)


def autoencoder():
    config = jn.EncoderDecoderConfig((8, 8, 1), features=(8,))
    module = jn.VAE(config, latent_size=2, likelihood=jn.Gaussian())
    return network(module, jn.vae(module), IMAGES)


def transformer():
    block = jn.BlockConfig(features=8, num_heads=2, dropout_rate=0.1)
    module = jn.TransformerLM(4, num_layers=1, max_length=6, config=block)
    return network(module, jn.language_modeling(module), TOKENS)


#: kind -> step, state, shapes of a batch
KINDS = {
    "functions": functions,
    "feedforward": lambda: classifier(jn.MLP((8,), 4, norm="batch", dropout_rate=0.1), IMAGES),
    "convolutional": lambda: classifier(jn.ConvNet((4,), num_outputs=4, norm="batch"), IMAGES),
    "recurrent": lambda: classifier(jn.SequenceClassifier(4, 4), {"inputs": (8, 6, 3)}),
    "autoencoder": autoencoder,
    "gan": adversarial,
    "transformer": transformer,
    "population": lambda: classifier(jn.MLP((8,), 4), IMAGES, num_members=3),
}


def batch_of(shapes, step):
    """Floats, or tokens and labels below 4."""
    rng = np.random.default_rng(step)
    integers = {"labels"} | ({"inputs"} if shapes == TOKENS else set())
    return {
        name: rng.integers(0, 4, shape).astype(np.int32)
        if name in integers
        else rng.uniform(0, 1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def main(folder: Path, num_steps: int, kind: str) -> None:
    step, state, shapes = KINDS[kind]()

    def batches(first):
        while True:
            yield batch_of(shapes, first)
            first += 1

    state, history = jn.resume(folder / "checkpoints", state)
    state, history = jn.fit(
        step,
        state,
        batches,
        num_steps=num_steps,
        hooks=[jn.Checkpointing(folder / "checkpoints", every=2)],
        writers=[jn.jsonl_writer(folder / "metrics.jsonl")],
        log_every=7,
        history=history,
    )
    print(jn.parameters_sha256((state.params, state.model_state, state.opt_state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
