"""The generative workloads of the benchmark: equal updates on every side."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from experiments.benchmark import flax_generative, jaxnets_generative
from experiments.benchmark.competitors import COMPETITORS
from experiments.benchmark.sides import Settings
from experiments.benchmark.workloads import WORKLOADS, shrink

NAMES = ("vae", "dcgan")
SIDES = ("jaxnets", "flax", pytest.param("torch", marks=pytest.mark.parity))
# By hand. vae: both layers of 512, mean and log variance, logits. dcgan: the generator's linear map
# and three convolutions, the discriminator's three convolutions and logit, norms among them.
PARAMETERS = {
    "vae": 784 * 512 + 512 + 2 * (512 * 32 + 32) + 32 * 512 + 512 + 512 * 784 + 784,
    "dcgan": (64 * 16 * 256 + 512 + 9 * 256 * 128 + 256 + 9 * 128 * 64 + 128 + 9 * 64 + 1)
    + (16 * 64 + 64 + 16 * 64 * 128 + 256 + 16 * 128 * 256 + 512 + 16 * 256 + 1),
}


def prepare(side, name):
    if COMPETITORS[side].missing():
        pytest.skip(f"{side} is not installed")
    settings = Settings("", "", name, threads=1, tiny=True)
    return importlib.import_module(f"experiments.benchmark.{side}_side").prepare(settings)


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_flax_and_torch_compete(name):
    taking = {each.name for each in COMPETITORS.values() if each.takes_part(WORKLOADS[name])}
    others = {one for one in taking if not one.startswith("jaxnets")}
    assert others == {"flax", "torch", "torch-fused", "torch-compile"} and "jaxnets" in taking


@pytest.mark.parametrize(("name", "low", "high"), [("vae", 0, 1), ("dcgan", -1, 1)])
def test_pixels_are_in_their_range(name, low, high):
    pixels = WORKLOADS[name].inputs()
    assert pixels.dtype == np.float32 and pixels.min() >= low and pixels.max() <= high
    assert pixels.min() < low + 0.01 and pixels.max() > high - 0.01


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_full_size_have_the_parameters_counted_by_hand(name):
    workload = WORKLOADS[name]
    ours = jax.eval_shape(lambda: jaxnets_generative.create(workload)[0])
    plain = jax.eval_shape(lambda: flax_generative.create(workload)[0])
    states = plain if isinstance(plain, tuple) else (plain,)
    for params in (ours.params, [state.params for state in states]):
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_networks_of_full_size_have_the_parameters_counted_by_hand_in_torch(name):
    torch = pytest.importorskip("torch")
    from experiments.benchmark import torch_generative, torch_variants

    with torch.device("meta"):
        models = torch_generative.create(WORKLOADS[name].network, "").models
    assert torch_variants.num_parameters(*models) == PARAMETERS[name]


@pytest.mark.parametrize("side", SIDES)
def test_the_bound_gets_tighter(side):
    prepared = prepare(side, "vae")
    assert prepared.num_parameters == 8 * (16 + 1) + 2 * 3 * (8 + 1) + 8 * (3 + 1) + 16 * (8 + 1)
    first = np.mean([prepared.run(1) for _ in range(20)])
    prepared.run(400)
    assert np.mean([prepared.run(1) for _ in range(20)]) < first - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_both_adversaries_stay_finite(side):
    prepared = prepare(side, "dcgan")
    generator = 5 * 16 * 8 + 16 + 9 * 8 * 4 + 8 + 9 * 4 + 1
    discriminator = 16 * 4 + 4 + 16 * 4 * 8 + 16 + 16 * 8 + 1
    assert prepared.num_parameters == generator + discriminator
    # Discriminator 2 log 2 and generator log 2, while logits are next to 0.
    assert prepared.run(1) == pytest.approx(3 * np.log(2), rel=0.05)
    assert np.isfinite(prepared.run(100))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_plain_flax_changes_every_parameter(name):
    state, step = flax_generative.create(shrink(WORKLOADS[name]))
    images = jnp.asarray(shrink(WORKLOADS[name]).inputs())
    after, _ = jax.jit(step)(state, images)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(one, other)


def ours_of(name):
    """Our state, jitted step, and images of a small workload."""
    workload = shrink(WORKLOADS[name])
    state, step = jaxnets_generative.create(workload)
    return state, jn.jit_step(step), jnp.asarray(workload.inputs())


def noise_of(state, images):
    """The noise that our step is going to draw for its codes."""
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 0)
    return jax.random.normal(jn.rng_streams(key, "latent")["latent"], (len(images), 3))


def vae_layers(params):
    """Our dense layers in the order of the computation."""
    encoder, decoder = params["encoder"], params["decoder"]
    shared = [params["mean"], params["log_variance"]]
    return [encoder["hidden_0"], *shared, decoder["hidden_0"], decoder["head"]]


def gan_layers(params):
    """Our discriminator's and our generator's layers in the order of the computation."""
    one, other = params["discriminator"], params["generator"]
    return (
        [one["conv_1"], one["conv_2"], one["norm_2"], one["head"]["logit"]],
        [
            *(other["start"], other["start_norm"], other["double_1"]["conv"]),
            *(other["double_1_norm"], other["double_2"]["conv"]),
        ],
    )


def named(layers):
    """Name layers as a compact module of Flax does: by their kind and its count."""
    counts, renamed = {}, {}
    for layer in layers:
        kind = "BatchNorm" if "scale" in layer else ("", "Dense", "Conv")[layer["kernel"].ndim // 2]
        renamed[f"{kind}_{counts.setdefault(kind, 0)}"] = dict(layer)
        counts[kind] += 1
    return renamed


def test_the_bound_of_plain_flax_is_ours():
    ours, step, images = ours_of("vae")
    plain, _ = flax_generative.create(shrink(WORKLOADS["vae"]))
    plain = plain.replace(params=named(vae_layers(ours.params)))
    for _ in range(3):
        noise = noise_of(ours, images)
        ours, metrics = step(ours, {"inputs": images})
        plain, loss = jax.jit(flax_generative.update_autoencoder)(plain, images, noise)
        assert float(loss) == pytest.approx(float(metrics["loss"].compute()), rel=1e-5)


def compare_adversaries(update):
    """Let `update(images, latents) -> losses` and our step train on the same latents.

    Args:
        update: built by a function of our first parameters.
    """
    ours, step, images = ours_of("dcgan")
    update = update(ours.params)
    for index in range(3):
        latents = jax.random.normal(jax.random.key(index), (len(images), 5))
        ours, metrics = step(ours, {"inputs": images, "latents": latents})
        expected = [metrics[f"{name}/loss"].compute() for name in ("discriminator", "generator")]
        np.testing.assert_allclose(update(images, latents), expected, rtol=1e-5)


def test_the_adversaries_of_plain_flax_are_ours():
    def build(params):
        states, _ = flax_generative.create(shrink(WORKLOADS["dcgan"]))
        layers = gan_layers(params)
        states = [
            state.replace(params=named(each)) for state, each in zip(states, layers, strict=True)
        ]

        discriminate = jax.jit(flax_generative.update_discriminator)
        generate = jax.jit(flax_generative.update_generator)

        def update(images, latents):
            states[0], loss = discriminate(*states, images, latents)
            states[1], other_loss = generate(*states, latents)
            return loss, other_loss

        return update

    compare_adversaries(build)


def load(model, layers, maps):
    """Copy our layers into those of torch that have parameters, in order.

    Args:
        model: of torch.
        layers: ours.
        maps: shape (height, width, channels) of the maps that dense layers flatten or make.
    """
    torch = importlib.import_module("torch")
    theirs = [module for module in model.modules() if list(module.parameters(recurse=False))]
    for module, layer in zip(theirs, layers, strict=True):
        weight = np.asarray(layer["scale"] if "scale" in layer else layer["kernel"])
        if weight.ndim == 4:
            weight = weight.transpose(3, 2, 0, 1)
        elif weight.ndim == 2 and maps and weight.shape[1] == 1:
            weight = weight.reshape(*maps, 1).transpose(3, 2, 0, 1).reshape(1, -1)
        elif weight.ndim == 2 and maps:
            weight = weight.reshape(-1, *maps).transpose(3, 1, 2, 0).reshape(-1, len(weight))
        elif weight.ndim == 2:
            weight = weight.T
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(weight.copy()))
            if "bias" in layer:
                module.bias.copy_(torch.from_numpy(np.array(layer["bias"])))


@pytest.mark.parity
def test_the_bound_of_torch_is_ours():
    torch = pytest.importorskip("torch")
    from experiments.benchmark import torch_generative

    ours, step, images = ours_of("vae")
    theirs = torch_generative.create(shrink(WORKLOADS["vae"]).network, "")
    load(theirs.models[0], vae_layers(ours.params), ())
    for _ in range(3):
        noise = torch.from_numpy(np.array(noise_of(ours, images)))
        ours, metrics = step(ours, {"inputs": images})
        loss = theirs.update(torch.from_numpy(np.array(images)), noise)
        assert loss.item() == pytest.approx(float(metrics["loss"].compute()), rel=1e-5)


@pytest.mark.parity
def test_the_adversaries_of_torch_are_ours():
    torch = pytest.importorskip("torch")
    from experiments.benchmark import torch_generative

    def build(params):
        theirs = torch_generative.create(shrink(WORKLOADS["dcgan"]).network, "")
        for model, layers in zip(theirs.models, gan_layers(params), strict=True):
            load(model, layers, (4, 4, 8))

        def update(images, latents):
            images = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
            latents = torch.from_numpy(np.array(latents))
            losses = theirs.update_discriminator(images, latents), theirs.update_generator(latents)
            return [loss.item() for loss in losses]

        return update

    compare_adversaries(build)
