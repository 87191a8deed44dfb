"""Images of few channels, computed with the batch innermost: layouts, shardings, values."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import DOUBLE
from jax.sharding import NamedSharding, PartitionSpec

import jaxnets as jn
from jaxnets.functional.lowering import layout
from jaxnets.layers import BatchNorm, Convolution

BATCH, SIZE = 12, 8


def compiled_step(**sharding):
    """Return the text of a compiled training step of a small convolutional network.

    Args:
        sharding: of the arrays of `state` and of `batch`; by default on one device.
    """
    module = jn.ConvNet(num_outputs=3, features=(4, 5), hidden_features=())
    update = jn.Update(jn.classification(module), optax.sgd(0.1))

    def start(key, inputs):
        return jn.create_train_state(module.init(key, inputs), update, rng=key)

    batch = {
        "inputs": jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 1), jnp.float32),
        "labels": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    state = jax.eval_shape(start, jax.random.key(0), batch["inputs"])
    arguments = {"state": state, "batch": batch}
    for name, each in sharding.items():
        arguments[name] = jax.tree.map(
            lambda s, each=each: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=each),
            arguments[name],
        )
    step = jax.jit(jn.make_train_step(update))
    return step.lower(arguments["state"], arguments["batch"]).compile().as_text()


@pytest.mark.lowering
def test_no_map_is_copied_between_the_layers_of_a_network(on_cpu):
    text = compiled_step()
    maps = [(BATCH, 8, 8, 4), (BATCH, 4, 4, 4), (BATCH, 4, 4, 5)]
    shapes = [",".join(map(str, shape)) for m in maps for shape in (m, m[::-1])]
    assert re.search(rf"f32\[({'|'.join(shapes)})\]", text)
    assert not re.findall(rf"f32\[(?:{'|'.join(shapes)})\]\S* (?:transpose|copy)\(", text)


@pytest.mark.lowering
@pytest.mark.four_devices
def test_a_sharded_batch_stays_on_its_devices(on_cpu):
    mesh = jn.data_mesh(jax.devices()[:4])
    text = compiled_step(
        state=NamedSharding(mesh, PartitionSpec()), batch=NamedSharding(mesh, PartitionSpec("data"))
    )
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)


class Network(nn.Module):
    """Every layer that treats few channels differently, and strides."""

    @nn.compact
    def __call__(self, x, *, train):
        x = Convolution(6, strides=2, precision=DOUBLE)(x)
        x = nn.tanh(BatchNorm(precision=DOUBLE)(x, train=train))
        x = jn.functional.max_pool(x, 2)
        x = Convolution(16, use_bias=False, precision=DOUBLE)(x)
        return Convolution(17, kernel_size=(3, 1), precision=DOUBLE)(jnp.sin(x))


def test_a_network_computes_the_same_as_with_channels_innermost(monkeypatch, forget_traces):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 13, 11, 2)))
        network = Network()
        shapes = jax.eval_shape(
            lambda key, x: network.init(key, x, train=True), jax.random.key(0), x
        )
        leaves, structure = jax.tree.flatten(shapes)
        random = np.random.default_rng(1)
        variables = structure.unflatten(
            [random.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
        )

        def loss(variables, x):
            y, updated = network.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.sum(y**3), updated

        gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        found = gradients(variables, x)
        monkeypatch.setattr(layout, "_FEW", 0)
        forget_traces()
        expected = gradients(variables, x)
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-10)
