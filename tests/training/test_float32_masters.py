"""Parameters of 16 bits with masters in float32: families, executors, checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal
from checks import mostly_exhaustive, mostly_slow

import jaxnets as jn
from jaxnets.core import Precision, Update
from jaxnets.training.checkpoint import restore, save

NARROW = {"precision": Precision(parameter=jnp.bfloat16, compute=jnp.bfloat16)}
BLOCK = jn.BlockConfig(features=8, num_heads=2, mlp_dim=12)
CODER = jn.EncoderDecoderConfig((4, 4, 1), "convolutional", (3,), "tanh")
RANDOM = np.random.default_rng(0)
LENGTHS = np.array([5, 3, 1, 5, 4, 2, 4, 5], np.int32)
CLASSES = RANDOM.integers(0, 3, 8).astype(np.int32)
TOKENS = RANDOM.integers(0, 11, (8, 6)).astype(np.int32)
IMAGES = {"inputs": RANDOM.uniform(size=(8, 4, 4, 1)).astype(np.float32), "labels": CLASSES}
FRAMES = RANDOM.normal(size=(8, 9, 3)).astype(np.float32)
SOUND = {"inputs": FRAMES, "lengths": LENGTHS + 4, "labels": CLASSES}
SPEECH = {
    **{"inputs": FRAMES, "lengths": LENGTHS + 4},
    **{"labels": np.tile([[1, 1], [3, 2]], (4, 1)), "label_lengths": np.array([2, 1] * 4)},
}
TEXT = {"inputs": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "lengths": LENGTHS}
WEIGHTS = np.array([1, 1, 0.5, 1, 0, 1, 2, 1], np.float32)

# name -> (objective, network, batch)
FAMILIES = {
    "vision_transformer": (
        jn.classification,
        lambda: jn.VisionTransformer(3, patch_size=2, num_layers=1, config=BLOCK, **NARROW),
        IMAGES,
    ),
    "audio_transformer": (
        jn.classification,
        lambda: jn.AudioTransformer(3, num_layers=1, config=BLOCK, **NARROW),
        SOUND,
    ),
    "language_model": (
        jn.language_modeling,
        lambda: jn.TransformerLM(11, num_layers=1, config=BLOCK, max_length=8, **NARROW),
        TEXT,
    ),
    "recurrent_encoder": (
        jn.classification,
        lambda: jn.recurrent.SequenceClassifier(3, 4, bidirectional=True, **NARROW),
        SOUND,
    ),
    "ctc": (
        jn.ctc,
        lambda: jn.SpeechRecognizer(
            4, features=4, strides=(1,), hidden_size=4, num_layers=1, **NARROW
        ),
        SPEECH,
    ),
    "translator": (
        jn.sequence_to_sequence,
        lambda: jn.recurrent.RecurrentTranslator(11, 11, 4, 4, **NARROW),
        {**TEXT, "decoder_inputs": TOKENS[:, 1:], "labels": TOKENS[:, :-1]},
    ),
    "batch_norm": (
        jn.classification,
        lambda: jn.ConvNet((4,), hidden_features=(), norm="batch", num_outputs=3, **NARROW),
        IMAGES,
    ),
    "autoencoder": (
        jn.reconstruction,
        lambda: jn.Autoencoder(CODER, latent_size=2, **NARROW),
        IMAGES,
    ),
    "masked_autoencoder": (
        jn.masked_reconstruction,
        lambda: jn.MaskedAutoencoder(
            2, 1, BLOCK, decoder_num_layers=1, decoder_config=BLOCK, **NARROW
        ),
        IMAGES,
    ),
    "vae": (jn.vae, lambda: jn.VAE(CODER, latent_size=2, **NARROW), IMAGES),
    "vq_vae": (
        jn.vq_vae,
        lambda: jn.VQVAE(CODER, codebook_size=4, embedding_size=2, **NARROW),
        IMAGES,
    ),
    "gan": (
        lambda module: jn.adversarial(module, "non_saturating", r1=1.0),
        lambda: jn.dcgan((8, 8, 1), width=2, latent_size=5, **NARROW),
        {"inputs": RANDOM.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)},
    ),
}


def problem(name):
    """Return the update, or both updates of a GAN, a state and a batch."""
    make_objective, make_module, batch = FAMILIES[name]
    module, optimizer = make_module(), optax.sgd(0.1, momentum=0.9)
    objective = make_objective(module)
    inputs = [batch[key] for key in ("inputs", "decoder_inputs") if key in batch]
    if name == "gan":
        update = [
            Update(objective.discriminator, optimizer, "discriminator", float32_masters=True),
            Update(objective.generator, optimizer, "generator", float32_masters=True),
        ]
        inputs = [np.zeros((1, 5), np.float32)]
    else:
        update = Update(objective, optimizer, float32_masters=True)
    variables = jax.jit(module.init)(jax.random.key(0), *inputs)
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    return update, state, {"weights": WEIGHTS, **batch}


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def moved(before, after):
    """Return the change of masters and momentum as one vector."""
    pairs = zip(jax.tree.leaves(before.opt_state), jax.tree.leaves(after.opt_state), strict=True)
    return np.concatenate([np.ravel(np.asarray(b) - np.asarray(a)) for a, b in pairs])


# Their parts are in other families: blocks in the masked autoencoder, cells in the encoder.
EXHAUSTIVE = ["vision_transformer", "translator"]


@pytest.mark.parametrize(
    "name",
    mostly_slow([name for name in FAMILIES if name not in EXHAUSTIVE], ["ctc"])
    + mostly_exhaustive(EXHAUSTIVE, []),
)
def test_narrow_networks_with_masters_train_under_every_executor_and_resume(name, tmp_path):
    update, state, batch = problem(name)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {jnp.dtype("float32")}
    step, mesh = jn.make_train_step(update), jn.data_mesh()
    once = jn.jit_step(step)
    after, _ = once(once(state, batch)[0], batch)
    assert dtypes(after) == dtypes(state)
    change = moved(state, after)
    assert np.all(np.isfinite(change)) and np.max(np.abs(change)) > 1e-3

    scanned = jn.jit_step(jn.scan_steps(jn.population_step(step, on_non_finite="freeze")))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    both, _ = scanned(both, jax.tree.map(lambda array: np.stack([array] * 2), batch))
    assert dtypes(both) == dtypes(state) and both.step.tolist() == [2, 2]
    one = jax.tree.map(lambda leaf: leaf[1], both)
    # Rounding of bfloat16 in another program.
    assert np.linalg.norm(moved(state, one) - change) < 0.1 * np.linalg.norm(change)

    sharding = jn.fsdp_sharding(state, mesh, min_bytes=0)
    split = jn.sharded_step(jn.make_train_step(update, num_microbatches=2), mesh, sharding)
    first, _ = split(state, batch)
    second, _ = split(first, batch)
    assert dtypes(second) == dtypes(state) and np.all(np.isfinite(moved(state, second)))
    save(tmp_path, first)
    restored, _ = restore(tmp_path, jax.device_put(state, sharding))
    assert_bitwise_equal(restored, first)
    assert_bitwise_equal(split(restored, batch)[0], second)
