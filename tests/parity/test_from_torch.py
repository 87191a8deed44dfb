"""Layers of torch with random sizes and options, in a network here. Run with `-m parity`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.models.transformer.block import Attention
from jaxnets.pretrained import from_torch
from jaxnets.pretrained import torch_layers as rules_of

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
pytestmark = pytest.mark.parity
KEY = jax.random.key(0)


def check(theirs, module, rules, *inputs, channels_first=(), their_index=None, index=None):
    """Compare a torch network with a module here, whose arrays it gives.

    Inputs are those of the module; those of torch have their channels first where told.
    """
    theirs = theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        given = [
            torch.tensor(np.moveaxis(x, -1, 1) if place in channels_first else x)
            for place, x in enumerate(inputs)
        ]
        expected = theirs(*given)
        expected = (expected if their_index is None else expected[their_index]).numpy()
    if channels_first and expected.ndim > 2:
        expected = np.moveaxis(expected, 1, -1)
    variables = jax.eval_shape(module.init, KEY, *inputs)
    network = from_torch(theirs.state_dict(), module, variables, rules=rules)
    outputs = module.apply(network.variables, *map(jnp.asarray, inputs))
    outputs = outputs if index is None else outputs[index]
    np.testing.assert_allclose(outputs, expected, atol=1e-5, rtol=1e-5)


def draw(seed):
    """Return random numbers, of which torch's are seeded alike."""
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def normal(random, *shape):
    return random.normal(size=shape).astype(np.float32)


def integers(random, low, high, count):
    return tuple(int(one) for one in random.integers(low, high, count))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    random = draw(bias)
    channels, features = integers(random, 1, 9, 2)
    theirs = torch.nn.Linear(channels, features, bias=bias)
    module = jn.layers.Dense(features, use_bias=bias)
    check(
        torch.nn.Sequential(theirs),
        module,
        rules_of.dense("0", "params"),
        normal(random, 3, channels),
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions(rank, seed):
    random = draw(seed)
    groups, bias = int(random.integers(1, 4)), bool(random.integers(2))
    inputs, features = (groups * one for one in integers(random, 1, 4, 2))
    kernel, strides, dilation, padding = (integers(random, 1, 4, rank) for _ in range(4))
    kind = torch.nn.Conv1d if rank == 1 else torch.nn.Conv2d
    theirs = kind(inputs, features, kernel, strides, padding, dilation, groups, bias=bias)
    module = jn.layers.Convolution(
        features,
        kernel,
        strides,
        [(one, one) for one in padding],
        dilation,
        groups,
        use_bias=bias,
    )
    x = normal(random, 2, *integers(random, 9, 13, rank), inputs)
    rules = rules_of.convolution("0", "params")
    check(torch.nn.Sequential(theirs), module, rules, x, channels_first=[0])


class GroupedTranspose(nn.Module):
    """A transposed convolution of JAX with groups, which Flax's layer does not have."""

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.normal(), shape)
        axes = "HW"[: x.ndim - 2]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1,) * (x.ndim - 2),
            self.padding,
            lhs_dilation=self.strides,
            rhs_dilation=self.dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=self.groups,
        )


@pytest.mark.parametrize("layer", ["flax", "transposed kernel", "groups"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rank", [1, 2])
def test_transposed_convolutions(rank, seed, layer):
    random = draw(seed)
    groups = int(random.integers(2, 4)) if layer == "groups" else 1
    inputs, features = (groups * one for one in integers(random, 1, 4, 2))
    kernel, strides, dilation = (integers(random, 1, 5, rank) for _ in range(3))
    padding = tuple(
        int(random.integers(d * (k - 1) + 1)) for k, d in zip(kernel, dilation, strict=True)
    )
    extra = tuple(int(random.integers(max(s, d))) for s, d in zip(strides, dilation, strict=True))
    kind = torch.nn.ConvTranspose1d if rank == 1 else torch.nn.ConvTranspose2d
    bias = layer != "groups"
    theirs = kind(inputs, features, kernel, strides, padding, extra, groups, bias, dilation)
    low = [d * (k - 1) - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    pairs = tuple((one, one + more) for one, more in zip(low, extra, strict=True))
    if layer == "groups":
        module = GroupedTranspose(features, kernel, strides, pairs, dilation, groups)
    else:
        module = nn.ConvTranspose(
            features,
            kernel,
            strides,
            pairs,
            dilation,
            transpose_kernel=layer == "transposed kernel",
        )
    rules = rules_of.transposed_convolution("0", "params", groups=groups)
    if layer == "transposed kernel":
        rules = rules_of.convolution("0", "params")
    x = normal(random, 2, *integers(random, 4, 7, rank), inputs)
    check(torch.nn.Sequential(theirs), module, rules, x, channels_first=[0])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "torch_padding", "output_padding"),
    [
        (4, 2, "SAME", 1, 0),
        (5, 3, "SAME", 1, 0),
        (3, 3, "SAME", 0, 0),
        (3, 2, "VALID", 0, 0),
        (2, 4, "VALID", 0, 2),
    ],
)
def test_padding_by_name_of_transposed_convolutions(
    kernel, stride, padding, torch_padding, output_padding
):
    random = draw(0)
    theirs = torch.nn.ConvTranspose1d(2, 3, kernel, stride, torch_padding, output_padding)
    module = nn.ConvTranspose(3, (kernel,), (stride,), padding)
    rules = rules_of.transposed_convolution("0", "params")
    check(torch.nn.Sequential(theirs), module, rules, normal(random, 1, 5, 2), channels_first=[0])


def test_the_transposed_convolution_of_this_library():
    theirs = torch.nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1)
    module = jn.layers.TransposedConvolution(4)
    rules = rules_of.transposed_convolution("0", "params", flip=False)
    x = normal(draw(0), 2, 5, 3, 3)
    check(torch.nn.Sequential(theirs), module, rules, x, channels_first=[0])


class ImageNetwork(nn.Module):
    """Convolution, batch norm, group norm, flatten, dense layer, layer norm."""

    @nn.compact
    def __call__(self, x):
        x = jn.layers.Convolution(6, 3, 2, [(1, 1), (1, 1)], name="conv")(x)
        x = nn.relu(jn.layers.BatchNorm(name="batch_norm")(x, train=False))
        x = nn.GroupNorm(num_groups=3, epsilon=1e-5, name="group_norm")(x)
        x = jn.layers.Dense(5, name="dense")(x.reshape(x.shape[0], -1))
        return jn.layers.LayerNorm(epsilon=1e-5, name="layer_norm")(x)


def test_a_network_of_images_with_norms_and_a_flatten():
    random = draw(0)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, 2, 1),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.GroupNorm(3, 6),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 4 * 3, 5),
        torch.nn.LayerNorm(5),
    )
    x = normal(random, 4, 8, 6, 3)
    for _ in range(3):  # running statistics other than 0 and 1, and a counter
        theirs.train()(torch.tensor(np.moveaxis(3 * x + 1, -1, 1)))
    rules = [
        *rules_of.convolution("0", "params/conv"),
        *rules_of.batch_norm("1", "batch_norm"),
        *rules_of.norm("3", "params/group_norm"),
        *rules_of.flattened_dense("5", "params/dense", (4, 3, 6)),
        *rules_of.norm("6", "params/layer_norm"),
    ]
    check(theirs, ImageNetwork(), rules, x, channels_first=[0])


def test_an_rms_norm():
    theirs, module = torch.nn.RMSNorm(7, eps=1e-3), jn.layers.RMSNorm(1e-3)
    rules = rules_of.norm("0", "params")
    check(torch.nn.Sequential(theirs), module, rules, normal(draw(0), 4, 7))


def test_an_embedding_with_padding():
    random = draw(0)
    theirs, module = torch.nn.Embedding(9, 4, padding_idx=0), jn.layers.Embedding(9, 4)
    rules = rules_of.embedding("0", "params")
    tokens = random.integers(0, 9, (2, 5))
    check(torch.nn.Sequential(theirs), module, rules, tokens)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_recurrent_layers(kind, bidirectional):
    random = draw(bidirectional)
    channels, size, layers = integers(random, 1, 6, 3)
    options = {"batch_first": True, "bidirectional": bidirectional}
    theirs = getattr(torch.nn, kind)(channels, size, layers, **options)
    module = jn.Recurrent(size, cell=kind.lower(), num_layers=layers, bidirectional=bidirectional)
    network = torch.nn.Module()
    network.cell, network.forward = theirs, theirs.forward
    rules = rules_of.recurrent("cell", "params")
    check(network, module, rules, normal(random, 2, 6, channels), their_index=0, index=0)


def test_a_projection_of_an_lstm_is_refused():
    state = torch.nn.LSTM(3, 4, proj_size=2).state_dict()
    module = jn.Recurrent(4)
    variables = jax.eval_shape(module.init, KEY, np.ones((1, 2, 3), np.float32))
    state = {f"lstm.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"lstm.weight_hr_l0 is .*proj_size"):
        from_torch(state, module, variables, rules=rules_of.recurrent("lstm", "params"))


class BlockAttention(nn.Module):
    """The attention of a block here, of queries and of keys and values."""

    config: jn.transformer.BlockConfig

    @nn.compact
    def __call__(self, x, kv, _):
        attention = Attention(self.config, name="attention")
        return attention(x, attention.keys_values(kv))


class FlaxAttention(nn.Module):
    heads: int
    features: int
    bias: bool

    @nn.compact
    def __call__(self, x, key, value):
        layer = nn.MultiHeadAttention(
            num_heads=self.heads,
            qkv_features=self.features,
            out_features=self.features,
            use_bias=self.bias,
            name="attention",
        )
        return layer(x, key, value)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_attention(separate, bias, ours):
    random = draw(2 * separate + bias)
    heads, size = integers(random, 1, 5, 2)
    features = heads * size
    kdim, vdim = (features + 1, features + (1 if ours else 2)) if separate else (features, features)
    theirs = torch.nn.MultiheadAttention(
        features, heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=True
    )
    network = torch.nn.Module()
    network.attention, network.forward = theirs, theirs.forward
    # Flax warns of values whose last two axes are equal.
    x, key, value = (
        normal(random, 2, time, n) for time, n in ((4, features), (19, kdim), (19, vdim))
    )
    if ours:
        config = jn.transformer.BlockConfig(
            features=features, num_heads=heads, use_bias=bias, key_bias=bias, positions=None
        )
        value, module = key, BlockAttention(config)
        rules = rules_of.attention("attention", "params/attention")
    else:
        module = FlaxAttention(heads, features, bias)
        rules = rules_of.flax_attention("attention", "params/attention", heads)
    check(network, module, rules, x, key, value, their_index=0)


def test_learned_keys_of_attention_are_refused():
    theirs = torch.nn.MultiheadAttention(4, 2, add_bias_kv=True)
    state = {f"attention.{name}": tensor for name, tensor in theirs.state_dict().items()}
    module, x = FlaxAttention(2, 4, True), np.ones((1, 3, 4), np.float32)
    variables = jax.eval_shape(module.init, KEY, x, x, x)
    rules = rules_of.flax_attention("attention", "params/attention", 2)
    with pytest.raises(ValueError, match=r"attention.bias_k is .*add_bias_kv"):
        from_torch(state, module, variables, rules=rules)
