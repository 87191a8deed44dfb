"""Layers of one shape are traced once, so that a deep network starts as fast as a shallow one."""

import jax
import jax.numpy as jnp
import pytest

from jaxnets.functional import convolution, max_pool
from jaxnets.functional.attention.dot_product import dot_product_attention
from jaxnets.functional.channels import along_channels, channel_sum
from jaxnets.functional.matmul import linear
from jaxnets.functional.normalization import layer_norm
from jaxnets.models.transformer import block, stack


def programs(jaxpr, name):
    """Return the compiled functions of a name that a program calls, each time it calls them."""
    found = []
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if inner is not None and equation.params.get("name") == name:
            found.append(inner)
        elif inner is not None:
            found += programs(getattr(inner, "jaxpr", inner), name)
    return found


def three_times(layer):
    def loss(x):
        for _ in range(3):
            x = layer(x)
        return jnp.sum(jnp.sin(x))

    return loss


KERNEL = jnp.ones((3, 3, 4, 4))
MATRIX = jnp.ones((4, 4))
SCALE = jnp.arange(1.0, 5.0)
LAYERS = {
    "_convolution": lambda x: convolution(x, KERNEL),
    "_matmul": lambda x: linear(x, MATRIX),
    "_few_features_matmul": lambda x: jnp.tile(linear(x, MATRIX[:, :2]), 2),
    "_bf16_matmul": lambda x: linear(x, MATRIX.astype(x.dtype)),
    "_normalized": lambda x: layer_norm(x, SCALE),
    "_repeat": lambda x: x + along_channels(x[0, 0, 0], x),
    "_sum_positions": lambda x: x * channel_sum(x)[None, None, None],
    "_attention": lambda x: dot_product_attention(x, x, x),
    "_tile_max": lambda x: jnp.repeat(jnp.repeat(max_pool(x, 2), 2, 1), 2, 2),
}


DTYPES = {"_bf16_matmul": jnp.bfloat16}


@pytest.mark.parametrize("name", LAYERS)
def test_three_layers_share_one_program_forward(name):
    x = jnp.ones((2, 4, 4, 4), DTYPES.get(name, jnp.float32))
    found = programs(jax.make_jaxpr(three_times(LAYERS[name]))(x).jaxpr, name)
    assert len(found) == 3
    assert len({id(program) for program in found}) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_three_layers_share_the_programs_of_their_gradient(name):
    x = jnp.ones((2, 4, 4, 4), DTYPES.get(name, jnp.float32))
    found = programs(jax.make_jaxpr(jax.grad(three_times(LAYERS[name])))(x).jaxpr, name)
    assert len(found) == 6  # forward and back
    assert len({id(program) for program in found}) <= 3  # the outermost gradient is another one


def test_layers_in_a_loop_are_traced_once(monkeypatch):
    traced = []
    real = block.Block.__call__
    monkeypatch.setattr(
        block.Block, "__call__", lambda *args, **options: traced.append(1) or real(*args, **options)
    )
    config = block.BlockConfig(features=8, num_heads=2, scan_layers=True)
    layers = stack.Stack(config, num_layers=5)
    x = jnp.ones((1, 3, 8))
    variables = jax.eval_shape(layers.init, jax.random.key(0), x)
    assert len(traced) == 1
    jax.eval_shape(layers.apply, variables, x)
    assert len(traced) == 2
