"""Attention and blocks against torch's, from its weights. Optional: run with `-m parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.functional.attention.dot_product import dot_product_attention
from jaxnets.functional.attention.masks import causal_mask
from jaxnets.functional.lengths import padding_mask
from jaxnets.models.transformer import Attention, BlockConfig, Stack

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
pytestmark = pytest.mark.parity

FEATURES, HEADS, HIDDEN, TIME = 12, 3, 20, 7
LENGTHS = np.array([7, 3, 1, 5], np.int32)


def config(**fields):
    return BlockConfig(
        features=FEATURES,
        num_heads=HEADS,
        mlp_dim=HIDDEN,
        norm_epsilon=1e-5,
        key_bias=True,
        positions=None,
        **fields,
    )


def array(parameter, gradients):
    return np.array((parameter.grad if gradients else parameter.detach()).numpy())


def dense(layer, gradients):
    return {"kernel": array(layer.weight, gradients).T, "bias": array(layer.bias, gradients)}


def attention_params(layer, gradients=False):
    """Return the parameters of torch's attention, or their gradients, under our names."""
    kernels = np.split(array(layer.in_proj_weight, gradients), 3)
    biases = np.split(array(layer.in_proj_bias, gradients), 3)
    named = zip(("query", "key", "value"), kernels, biases, strict=True)
    params = {name: {"kernel": kernel.T, "bias": bias} for name, kernel, bias in named}
    return params | {"output": dense(layer.out_proj, gradients)}


def norm_params(layer, gradients):
    return {"scale": array(layer.weight, gradients), "bias": array(layer.bias, gradients)}


def block_params(layer, gradients):
    """Return those of an encoder's or a decoder's layer."""
    params = {
        "attention": attention_params(layer.self_attn, gradients),
        "attention_norm": norm_params(layer.norm1, gradients),
        "feed_forward": {
            "hidden": dense(layer.linear1, gradients),
            "output": dense(layer.linear2, gradients),
        },
        "feed_forward_norm": norm_params(layer.norm2, gradients),
    }
    if hasattr(layer, "multihead_attn"):
        params["cross_attention"] = attention_params(layer.multihead_attn, gradients)
        params["cross_attention_norm"] = norm_params(layer.norm2, gradients)
        params["feed_forward_norm"] = norm_params(layer.norm3, gradients)
    return params


def stack_params(layers, norm, gradients=False):
    params = {f"layer_{i}": block_params(layer, gradients) for i, layer in enumerate(layers)}
    return params if norm is None else params | {"norm": norm_params(norm, gradients)}


def randomize(network):
    """Move the norms and biases away from their 1 and 0."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(b).max()))


def padding():
    return torch.tensor(np.arange(TIME)[None] >= LENGTHS[:, None])


def test_attention_and_its_weights_equal_torch():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(FEATURES, HEADS, batch_first=True)
    randomize(theirs)
    x, context = floats(4, 5, FEATURES), floats(4, TIME, FEATURES, seed=1)
    expected, weights = theirs(
        torch.tensor(x),
        torch.tensor(context),
        torch.tensor(context),
        key_padding_mask=padding(),
        average_attn_weights=False,
    )
    ours = Attention(config())

    def run(module, x, context):
        mask = padding_mask(LENGTHS, (4, TIME))[:, None, None]
        return module(x, module.keys_values(context), mask=mask)

    variables = {"params": attention_params(theirs)}
    found, state = ours.apply(variables, x, context, method=run, mutable=["intermediates"])
    assert_close(found, expected.detach().numpy())
    assert_close(state["intermediates"]["weights"], weights.detach().numpy())


def test_causal_attention_equals_torch():
    query, key, value = (floats(2, 6, HEADS, 4, seed=seed) for seed in range(3))
    found = dot_product_attention(query, key, value, mask=causal_mask(6))
    tensors = (torch.tensor(np.swapaxes(x, 1, 2)) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    assert_close(found, np.swapaxes(expected.numpy(), 1, 2))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["norm_last", "norm_first"])
def test_an_encoder_and_its_gradients_equal_torch(norm_first, activation):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        FEATURES, HEADS, HIDDEN, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    norm = torch.nn.LayerNorm(FEATURES) if norm_first else None
    theirs = torch.nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    randomize(theirs)
    x = floats(4, TIME, FEATURES)
    valid = np.arange(TIME)[None, :, None] < LENGTHS[:, None, None]
    noise = floats(4, TIME, FEATURES, seed=1) * valid
    tx = torch.tensor(x, requires_grad=True)
    expected = theirs(tx, src_key_padding_mask=padding())
    (expected * torch.tensor(noise)).sum().backward()

    ours = Stack(config(norm_first=norm_first, activation=activation), 2)
    params = stack_params(theirs.layers, theirs.norm)
    found, pullback = jax.vjp(
        lambda params, x: ours.apply({"params": params}, x, LENGTHS), params, jnp.asarray(x)
    )
    assert_close(found, expected.detach().numpy() * valid)
    gradients = stack_params(theirs.layers, theirs.norm, gradients=True)
    assert_close(pullback(jnp.asarray(noise)), (gradients, tx.grad.numpy()))


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm_last", "norm_first"])
def test_a_decoder_with_cross_attention_and_its_gradients_equal_torch(norm_first):
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(
        FEATURES, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first
    )
    norm = torch.nn.LayerNorm(FEATURES) if norm_first else None
    theirs = torch.nn.TransformerDecoder(layer, 2, norm)
    randomize(theirs)
    x, context = floats(4, 5, FEATURES), floats(4, TIME, FEATURES, seed=1)
    noise = floats(4, 5, FEATURES, seed=2)
    tx, tcontext = (torch.tensor(value, requires_grad=True) for value in (x, context))
    hidden = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
    expected = theirs(tx, tcontext, tgt_mask=hidden, memory_key_padding_mask=padding())
    (expected * torch.tensor(noise)).sum().backward()

    ours = Stack(config(norm_first=norm_first, activation="relu"), 2, causal=True, cross=True)

    def run(params, x, context):
        return ours.apply({"params": params}, x, context=context, context_lengths=LENGTHS)

    params = stack_params(theirs.layers, theirs.norm)
    found, pullback = jax.vjp(run, params, jnp.asarray(x), jnp.asarray(context))
    assert_close(found, expected.detach().numpy())
    gradients = stack_params(theirs.layers, theirs.norm, gradients=True)
    assert_close(pullback(jnp.asarray(noise)), (gradients, tx.grad.numpy(), tcontext.grad.numpy()))
