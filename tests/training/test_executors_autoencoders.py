"""One definition, every executor, for autoencoders: equal to rounding, resumed bit for bit.

In the default group only what no other network has: a collective inside of a module.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_problem import assert_bitwise_equal
from checks import slow_or_exhaustive

import jaxnets as jn
from jaxnets import autoencoder
from jaxnets.core import Precision

DOUBLE = Precision(jnp.float64, jnp.float64, jnp.float64)
RANDOM = np.random.default_rng(0)
WEIGHTS = np.array([1, 1, 0.5, 1, 0, 1, 2, 1])
BATCH = {
    "inputs": RANDOM.uniform(size=(8, 4, 4, 1)),
    "labels": RANDOM.integers(0, 3, 8).astype(np.int32),
    "weights": WEIGHTS,
}
DENSE = autoencoder.EncoderDecoderConfig((4, 4, 1), features=(6,), activation="tanh")
CONVOLUTIONAL = autoencoder.EncoderDecoderConfig((4, 4, 1), "convolutional", (3,), "tanh")
BLOCK = jn.BlockConfig(features=4, num_heads=1, mlp_dim=4)
# name -> (constructor of the module, constructor of the objective)
NETWORKS = {
    "dense": (lambda p: jn.Autoencoder(DENSE, latent_size=2, precision=p), jn.reconstruction),
    "convolutional": (
        lambda p: jn.Autoencoder(CONVOLUTIONAL, latent_size=2, precision=p),
        jn.reconstruction,
    ),
    "denoising": (
        lambda p: jn.Autoencoder(DENSE, latent_size=2, precision=p),
        lambda module: jn.denoising(jn.reconstruction(module)),
    ),
    "sparse": (
        lambda p: jn.Autoencoder(DENSE, latent_size=6, tied=True, num_active=3, precision=p),
        lambda module: jn.sparse_reconstruction(module, weight=0.1),
    ),
    "contractive": (
        lambda p: jn.Autoencoder(DENSE, latent_size=2, precision=p),
        lambda module: jn.contractive(module, weight=0.1),
    ),
    "vae": (
        lambda p: jn.VAE(CONVOLUTIONAL, latent_size=2, precision=p),
        lambda module: jn.vae(module, beta=0.5, free_bits=0.01),
    ),
    "conditional": (
        lambda p: jn.VAE(DENSE, latent_size=2, num_classes=3, precision=p),
        jn.vae,
    ),
    "quantized": (
        # Without restarts, which draw different vectors on each device.
        lambda p: jn.VQVAE(
            CONVOLUTIONAL, codebook_size=4, embedding_size=2, restart_below=0.0, precision=p
        ),
        jn.vq_vae,
    ),
    "masked": (
        lambda p: jn.MaskedAutoencoder(
            1, 1, BLOCK, decoder_num_layers=1, decoder_config=BLOCK, precision=p
        ),
        jn.masked_reconstruction,
    ),
}
# Restarts draw different vectors on each device, so executors that split a batch differ.
ALL = {
    **NETWORKS,
    "restarted": (
        lambda p: jn.VQVAE(
            CONVOLUTIONAL, codebook_size=4, embedding_size=2, restart_below=0.9, precision=p
        ),
        jn.vq_vae,
    ),
}


@pytest.fixture
def one_noise(monkeypatch):
    """Give all images the same noise, because executors that split a batch draw different noise."""

    def noise(key, num_images, module):
        row = jnp.sin(1.0 + jnp.arange(module.latent_size, dtype=module.precision.output))
        return jnp.broadcast_to(row[None], (num_images, module.latent_size))

    def order(key, num_images, num_patches):
        return jnp.broadcast_to(jnp.sin(jnp.arange(num_patches))[None], (num_images, num_patches))

    def corrupted(images, rng, noise, amount, image_range):
        pixels = jnp.sin(jnp.arange(images[0].size, dtype=images.dtype)).reshape(images[:1].shape)
        return jnp.clip(images + amount * pixels, *image_range)

    # `jaxnets.objectives.reconstruction` is the function of that name, not the module.
    module = importlib.import_module("jaxnets.objectives.reconstruction")
    monkeypatch.setattr(module, "corrupted", corrupted)
    monkeypatch.setattr(module, "patch_noise", order)
    monkeypatch.setattr("jaxnets.objectives.latent.latent_noise", noise)


def per_pixel(objective):
    """Divide a loss by the 16 pixels of an image, so that rounding differences are below 1e-6."""

    def divided(*arguments, **keywords):
        output = objective(*arguments, **keywords)
        loss = jn.Mean(output.loss.total / 16, output.loss.count)
        metrics = {name: jn.Mean(m.total / 16, m.count) for name, m in output.metrics.items()}
        return dataclasses.replace(output, loss=loss, metrics=metrics)

    return divided


def problem(name, optimizer, precision=Precision()):
    make_module, make_objective = ALL[name]
    module = make_module(precision)
    batch = {
        key: array.astype(precision.parameter) if array.dtype.kind == "f" else array
        for key, array in BATCH.items()
    }
    labels = [batch["labels"]] if name == "conditional" else []
    variables = jax.jit(module.init)(jax.random.key(0), batch["inputs"], *labels)
    update = jn.Update(per_pixel(make_objective(module)), optimizer)
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    return update, state, batch


def check_executors(update, state, batch, *, tolerance):
    # check_module shows for each network that jit = eager.
    step = jn.make_train_step(update)
    report = jn.check_equivalence(step, state, batch, num_steps=3, reference="jit")
    if "codebook" in state.model_state:  # updated after each microbatch
        report.differences.pop("microbatched")
    expected = {"scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert set(report.differences) >= expected - {"microbatched"}, report.skipped
    assert report.num_devices == jax.device_count()
    assert report.largest < tolerance, report.table()


@pytest.mark.parametrize("name", slow_or_exhaustive(NETWORKS, ["vae"]))
def test_executors_agree_in_float32_under_momentum(name, one_noise):
    check_executors(*problem(name, optax.sgd(0.1, momentum=0.9)), tolerance=1e-6)


@pytest.mark.parametrize("name", slow_or_exhaustive(NETWORKS, ["vae", "quantized"]))
def test_executors_agree_in_float64_under_adam(name, one_noise, enable_x64):
    update, state, batch = problem(name, optax.adam(1e-2), DOUBLE)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float64")}
    check_executors(update, state, batch, tolerance=1e-10)


@pytest.mark.slow
def test_executors_that_keep_a_batch_whole_draw_the_same_noise():
    update, state, batch = problem("vae", optax.sgd(0.01))
    step = jn.make_train_step(update)
    report = jn.check_equivalence(step, state, batch, num_steps=2, reference="jit")
    for name in ("scan", "replicated", "fsdp"):
        assert max(report.differences[name].values()) < 1e-6, report.table()
    # Devices and microbatches draw noise of their own, as for dropout.
    assert min(max(report.differences[name].values()) for name in ("pmap", "microbatched")) > 1e-4


def test_a_restarted_code_is_the_same_on_every_device():
    module = jn.VQVAE(CONVOLUTIONAL, codebook_size=4, embedding_size=2)
    update, state, batch = problem("restarted", optax.sgd(0.01))
    shares = state.model_state["codebook"]["quantizer"]["shares"]
    far = {"shares": shares, "sums": 50 * shares[:, None] * jnp.ones((1, 2))}
    state = dataclasses.replace(state, model_state={"codebook": {"quantizer": far}})
    after, _ = jn.pmap_step(jn.make_train_step(update))(state, batch)
    for leaf in jax.tree.leaves(after.model_state):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, leaf.addressable_shards[0].data)
    quantizer = after.model_state["codebook"]["quantizer"]
    codes = np.asarray(quantizer["sums"]) / np.asarray(quantizer["shares"])[:, None]
    restarted = np.isclose(quantizer["shares"], 1 / 4)
    assert restarted.sum() >= 3
    encode = jax.jit(functools.partial(module.apply, method="encode"))
    vectors = encode(state.variables, batch["inputs"])
    encoded = np.asarray(vectors)[WEIGHTS > 0].reshape(-1, 2)  # [vectors, embedding]
    for code in codes[restarted]:  # a vector of the batch, not a mixture of those of the devices
        assert np.min(np.abs(encoded - code[None]).max(axis=1)) < 1e-5


STRATEGIES = [*((name, "vmap") for name in ALL), ("quantized", "map")]


@pytest.mark.parametrize(
    ("name", "strategy"), slow_or_exhaustive(STRATEGIES, [("vae", "vmap"), ("quantized", "vmap")])
)
def test_each_member_of_a_population_equals_its_solo_run(name, strategy):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    update, state, batch = problem(name, optimizer)

    def create(rate):
        opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
        key = jax.random.fold_in(state.rng, jnp.int32(1000 * rate))
        return dataclasses.replace(state, opt_state=opt_state, rng=key)

    rates = jnp.array([0.01, 0.1])
    step = jn.jit_step(jn.population_step(jn.make_train_step(update), strategy=strategy))
    states, solo = jax.vmap(create)(rates), jn.jit_step(jn.make_train_step(update))
    for _ in range(2):
        states, _ = step(states, batch)
    for member, rate in enumerate(rates):
        alone = create(rate)
        for _ in range(2):
            alone, _ = solo(alone, batch)
        one = (alone.params, alone.model_state)
        all_of_them = (states.params, states.model_state)
        for single, several in zip(jax.tree.leaves(one), jax.tree.leaves(all_of_them), strict=True):
            np.testing.assert_allclose(several[member], single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", slow_or_exhaustive(ALL, ["vae", "quantized"]))
def test_a_resumed_run_ends_bitwise_as_one_that_was_not(name, tmp_path):
    update, state, batch = problem(name, optax.adam(1e-2))
    step = jn.jit_step(jn.make_train_step(update))

    def source(first):
        while True:
            first += 1
            yield {**batch, "inputs": batch["inputs"] * np.float32(1 / (1 + first % 3))}

    whole, _ = jn.fit(step, state, source, num_steps=6, log_every=2)
    hooks = [jn.Checkpointing(tmp_path, every=2)]
    jn.fit(step, state, source, num_steps=4, log_every=2, hooks=hooks)
    resumed, history = jn.resume(tmp_path, state)
    assert int(resumed.step) == 4
    resumed, _ = jn.fit(step, resumed, source, num_steps=6, log_every=2, history=history)
    assert_bitwise_equal(resumed, whole)
