"""Images of few channels, computed with the batch innermost: layouts, shardings, numbers."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxnets as jn
from jaxnets.functional.lowering import layout
from jaxnets.layers import BatchNorm, Convolution

BATCH, SIDE = 12, 8


def training_step(module):
    batch = {"inputs": jnp.ones((BATCH, SIDE, SIDE, 1)), "labels": jnp.zeros(BATCH, int)}
    update = jn.Update(jn.classification(module), optax.sgd(0.1))
    variables = module.init(jax.random.key(0), batch["inputs"])
    state = jn.create_train_state(variables, update, rng=jax.random.key(1))
    return jax.jit(jn.make_train_step(update)), state, batch


def test_no_map_is_copied_between_the_layers_of_a_network(on_cpu):
    module = jn.ConvNet(num_outputs=3, features=(4, 5), hidden_features=())
    step, state, batch = training_step(module)
    text = step.lower(state, batch).compile().as_text()
    maps = [(BATCH, 8, 8, 4), (BATCH, 4, 4, 4), (BATCH, 4, 4, 5)]
    shapes = [",".join(map(str, shape)) for m in maps for shape in (m, m[::-1])]
    assert re.search(rf"f32\[({'|'.join(shapes)})\]", text)
    assert not re.findall(rf"f32\[(?:{'|'.join(shapes)})\]\S* (?:transpose|copy)\(", text)


@pytest.mark.four_devices
def test_a_batch_over_several_devices_stays_where_it_is(on_cpu):
    module = jn.ConvNet(num_outputs=3, features=(4, 5), hidden_features=())
    step, state, batch = training_step(module)
    mesh = jn.data_mesh(jax.devices()[:4])
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    text = step.lower(state, batch).compile().as_text()
    assert "all-reduce" in text
    assert not re.search("all-gather|all-to-all|collective-permute", text)


class Network(nn.Module):
    """Everything that treats few channels in a way of its own, and strides."""

    @nn.compact
    def __call__(self, x, *, train):
        double = jn.Precision(jnp.float64, jnp.float64, jnp.float64)
        x = Convolution(6, strides=2, precision=double)(x)
        x = nn.tanh(BatchNorm(precision=double)(x, train=train))
        x = jn.functional.max_pool(x, 2)
        x = Convolution(16, use_bias=False, precision=double)(x)
        return Convolution(17, kernel_size=(3, 1), precision=double)(jnp.sin(x))


def test_a_network_computes_what_it_does_with_the_channels_innermost(monkeypatch, forget_traces):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 13, 11, 2)))
        network = Network()
        variables = network.init(jax.random.key(0), x, train=True)

        @jax.jit
        def measure(variables, x):
            def loss(variables, x):
                y, updated = network.apply(variables, x, train=True, mutable=["batch_stats"])
                return jnp.sum(y**3), updated

            return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)

        found = measure(variables, x)
        monkeypatch.setattr(layout, "_FEW", 0)
        forget_traces()
        expected = measure(variables, x)
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-10)
