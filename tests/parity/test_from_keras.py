"""Layers of Keras with random sizes and options, in a network here. Run with `-m parity`."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.functional.recurrence.cells import GRUCell
from jaxnets.models.transformer.block import Attention
from jaxnets.pretrained import from_keras, read_tensors
from jaxnets.pretrained import keras_layers as rules_of

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
keras = pytest.importorskip("keras", reason="keras is not installed")
pytestmark = [
    pytest.mark.parity,
    *(  # of Keras itself
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")
    ),
]
KEY = jax.random.key(0)


def normal(random, *shape):
    return random.normal(size=shape).astype(np.float32)


def integers(random, low, high, count):
    return tuple(int(one) for one in random.integers(low, high, count))


def check(folder, layers, module, rules, x, *, index=None, kind=".weights.h5"):
    """Compare a sequence of Keras' layers, read from its file, with a module here."""
    if not isinstance(layers, keras.Model):
        layers = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), *layers])
    random = np.random.default_rng(1)
    layers.set_weights(
        [
            one + (0.5 if "variance" in path else 0.1) * random.uniform(size=one.shape)
            for one, path in zip(
                layers.get_weights(), [one.path for one in layers.weights], strict=True
            )
        ]
    )
    file = folder / f"network{kind}"
    layers.save(file) if kind == ".keras" else layers.save_weights(file)
    expected = keras.ops.convert_to_numpy(layers(x, training=False))
    variables = jax.eval_shape(module.init, KEY, x)
    network = from_keras(read_tensors(file), module, variables, rules=rules)
    outputs = module.apply(network.variables, jnp.asarray(x))
    outputs = outputs if index is None else outputs[index]
    np.testing.assert_allclose(outputs, expected, atol=1e-5, rtol=1e-5)


class ImageNetwork(nn.Module):
    """Convolutions, norms, a flatten and dense layers."""

    @nn.compact
    def __call__(self, x):
        x = jn.layers.Convolution(4, 3, 2, name="conv")(x)
        x = jn.layers.BatchNorm(epsilon=1e-3, name="batch_norm")(x, train=False)
        x = jn.layers.Convolution(8, 3, groups=4, name="depthwise")(nn.relu(x))
        x = nn.GroupNorm(num_groups=2, epsilon=1e-3, name="group_norm")(x)
        x = jn.layers.Convolution(16, 3, groups=8, use_bias=False, name="separable")(x)
        x = jn.layers.Convolution(6, 1, name="pointwise")(x)
        x = jn.layers.Dense(5, name="dense")(x.reshape(x.shape[0], -1))
        x = jn.layers.LayerNorm(epsilon=1e-3, name="layer_norm")(x)
        return jn.layers.Dense(2, name="head")(x)


@pytest.mark.parametrize("kind", [".weights.h5", ".keras"])
def test_a_network_of_images(tmp_path, kind):
    layers = [
        keras.layers.Conv2D(4, 3, 2, padding="same", name="first"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
        keras.layers.GroupNormalization(2),
        keras.layers.Dropout(0.5, seed=3),
        keras.layers.SeparableConv2D(6, 3, depth_multiplier=2, padding="same"),
        keras.layers.Flatten(),
        keras.layers.Dense(5),
        keras.layers.LayerNormalization(),
        keras.layers.Dense(2, name="outputs"),
    ]
    rules = [
        *rules_of.convolution("layers/conv2d", "params/conv"),
        *rules_of.batch_norm("layers/batch_normalization", "batch_norm"),
        *rules_of.depthwise_convolution("layers/depthwise_conv2d", "params/depthwise"),
        *rules_of.norm("layers/group_normalization", "params/group_norm"),
        *rules_of.separable_convolution(
            "layers/separable_conv2d", "params/separable", "params/pointwise"
        ),
        *rules_of.dense("layers/dense", "params/dense"),
        *rules_of.norm("layers/layer_normalization", "params/layer_norm"),
        *rules_of.dense("layers/dense_1", "params/head"),
    ]
    x = normal(np.random.default_rng(0), 2, 7, 6, 3)
    check(tmp_path, layers, ImageNetwork(), rules, x, kind=kind)


def test_a_file_with_an_optimizer(tmp_path):
    x = normal(np.random.default_rng(0), 4, 3)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.1), keras.layers.Dense(2)])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(x, np.zeros((4, 2), np.float32), verbose=0)
    rules = rules_of.dense("layers/dense", "params")
    check(tmp_path, model, jn.layers.Dense(2), rules, x)
    check(tmp_path, model, jn.layers.Dense(2), rules, x, kind=".keras")


@pytest.mark.parametrize("seed", range(3))
def test_convolutions_of_time(tmp_path, seed):
    random = np.random.default_rng(seed)
    groups, bias = int(random.integers(1, 4)), bool(random.integers(2))
    features, channels = (groups * one for one in integers(random, 1, 4, 2))
    kernel, dilation = integers(random, 1, 4, 2)
    options = {"groups": groups, "use_bias": bias}
    layer = keras.layers.Conv1D(features, kernel, dilation_rate=dilation, **options)
    module = jn.layers.Convolution(features, kernel, 1, "VALID", dilation, **options)
    rules = rules_of.convolution("layers/conv1d", "params")
    check(tmp_path, [layer], module, rules, normal(random, 2, 11, channels))


@pytest.mark.parametrize("layer", ["flax", "transposed kernel"])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions(tmp_path, rank, padding, layer):
    random = np.random.default_rng(rank)
    kind = getattr(keras.layers, f"Conv{rank}DTranspose")
    transposed = layer == "transposed kernel"
    rule = rules_of.convolution if transposed else rules_of.transposed_convolution
    rules = rule(f"layers/conv{rank}d_transpose", "params")
    for seed in range(3):
        inputs, features = integers(random, 1, 4, 2)
        kernel, strides, dilation = (integers(random, 1, 5, rank) for _ in range(3))
        strides, dilation = (strides, (1,) * rank) if seed else ((1,) * rank, dilation)
        bias = bool(random.integers(2))
        options = {"strides": strides, "padding": padding, "dilation_rate": dilation}
        theirs = kind(features, kernel, use_bias=bias, **options)
        module = nn.ConvTranspose(
            features,
            kernel,
            strides,
            padding.upper(),
            dilation,
            use_bias=bias,
            transpose_kernel=transposed,
        )
        x = normal(random, 2, *integers(random, 4, 7, rank), inputs)
        check(tmp_path, [theirs], module, rules, x)


@pytest.mark.parametrize(
    ("kernel", "strides", "dilation", "padding", "extra", "pairs"),
    [
        (4, 3, 1, "valid", 2, (3, 5)),
        (3, 1, 2, "valid", 0, (4, 4)),
        (4, 3, 1, "same", 2, (2, 2)),
        (3, 2, 1, "same", 1, (2, 1)),
        (5, 2, 1, "same", 0, (2, 2)),
    ],
)
def test_output_padding_of_a_transposed_convolution(
    tmp_path, kernel, strides, dilation, padding, extra, pairs
):
    options = {"strides": strides, "dilation_rate": dilation, "output_padding": extra}
    theirs = keras.layers.Conv1DTranspose(3, kernel, padding=padding, **options)
    module = nn.ConvTranspose(3, (kernel,), (strides,), [pairs], (dilation,))
    rules = rules_of.transposed_convolution("layers/conv1d_transpose", "params")
    check(tmp_path, [theirs], module, rules, normal(np.random.default_rng(0), 1, 5, 2))


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_the_transposed_convolution_of_this_library(tmp_path, kernel):
    theirs = keras.layers.Conv2DTranspose(4, kernel, 2, padding="same")
    module = jn.layers.TransposedConvolution(4, kernel)
    rules = rules_of.transposed_convolution("layers/conv2d_transpose", "params", flip=False)
    check(tmp_path, [theirs], module, rules, normal(np.random.default_rng(0), 2, 5, 3, 3))


class Norms(nn.Module):
    @nn.compact
    def __call__(self, x):
        def norm(name, **options):
            return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=name, **options)

        x = norm("no_scale", use_scale=False)(x)
        x = norm("no_bias", use_bias=False)(x)
        x = norm("neither", use_scale=False, use_bias=False)(x)
        return jn.layers.RMSNorm(1e-6, name="rms")(x)


def test_norms_without_scale_or_center(tmp_path):
    none = ({"scale": False}, {"center": False}, {"scale": False, "center": False})
    layers = [keras.layers.BatchNormalization(**options) for options in none]
    rules = rules_of.norm("layers/rms_normalization", "params/rms", center=False)
    places = (("", "no_scale"), ("_1", "no_bias"), ("_2", "neither"))
    for (suffix, name), options in zip(places, none, strict=True):
        rules += rules_of.batch_norm(f"layers/batch_normalization{suffix}", name, **options)
    layers.append(keras.layers.RMSNormalization())
    check(tmp_path, layers, Norms(), rules, normal(np.random.default_rng(0), 3, 4))


def test_an_embedding(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 9, (2, 5))
    rules = rules_of.embedding("layers/embedding", "params")
    layers, module = [keras.layers.Embedding(9, 4)], jn.layers.Embedding(9, 4)
    check(tmp_path, layers, module, rules, tokens)


RECURRENT = {
    "SimpleRNN": ("simple_rnn", "rnn", rules_of.recurrent, {}),
    "LSTM": ("lstm", "lstm", rules_of.recurrent, {}),
    "GRU": ("gru", "gru", rules_of.gru, {}),
    "GRU before": ("gru", GRUCell("before"), rules_of.gru, {"reset_after": False}),
}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(tmp_path, name, bidirectional):
    group, cell, rules_of_cell, options = RECURRENT[name]
    random = np.random.default_rng(bidirectional)
    channels, size = integers(random, 1, 6, 2)
    module = jn.Recurrent(size, cell=cell, num_layers=2, bidirectional=bidirectional)
    layers, rules = [], []
    for index, suffix in enumerate(("", "_1")):
        kind = getattr(keras.layers, name.split()[0])
        layer = kind(size, return_sequences=True, **options)
        layers.append(keras.layers.Bidirectional(layer) if bidirectional else layer)
        if bidirectional:
            source = f"layers/bidirectional{suffix}"
            rules += rules_of.bidirectional(source, "params", rules_of_cell, layer=index)
        else:
            rules += rules_of_cell(f"layers/{group}{suffix}", f"params/forward_{index}")
    check(tmp_path, layers, module, rules, normal(random, 2, 6, channels), index=0)


class BlockAttention(nn.Module):
    config: jn.transformer.BlockConfig

    @nn.compact
    def __call__(self, x):
        attention = Attention(self.config, name="attention")
        return attention(x, attention.keys_values(x))


class FlaxAttention(nn.Module):
    heads: int
    size: int
    bias: bool

    @nn.compact
    def __call__(self, x):
        width = self.heads * self.size
        options = {"num_heads": self.heads, "qkv_features": width, "use_bias": self.bias}
        return nn.MultiHeadAttention(**options, name="attention")(x)


@pytest.mark.parametrize("layer", ["flax", "block", "grouped"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention(tmp_path, layer, bias):
    random = np.random.default_rng(bias)
    features, size, kv_heads = integers(random, 2, 6, 3)
    x, heads = normal(random, 2, 7, features), 2 * kv_heads
    config = jn.transformer.BlockConfig(
        features=features,
        num_heads=heads,
        num_kv_heads=kv_heads if layer == "grouped" else heads,
        head_dim=size,
        use_bias=bias,
        key_bias=bias,
        positions=None,
    )
    module = FlaxAttention(heads, size, bias) if layer == "flax" else BlockAttention(config)
    source, target = "layers/multi_head_attention", "params/attention"
    inputs = keras.Input(x.shape[1:])
    if layer == "grouped":
        source = "layers/grouped_query_attention"
        theirs = keras.layers.GroupQueryAttention(size, heads, kv_heads, use_bias=bias)
        rules = rules_of.attention(source, target, heads, num_kv_heads=kv_heads)
    else:
        theirs = keras.layers.MultiHeadAttention(heads, size, use_bias=bias)
        rules = rules_of.attention(source, target, heads)
        rules = rules_of.flax_attention(source, target) if layer == "flax" else rules
    model = keras.Model(inputs, theirs(inputs, inputs))
    check(tmp_path, model, module, rules, x)
