"""Rules of torch's layers, against the equations that torch documents, in NumPy."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.pretrained import from_torch, torch_layers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def torch_step(kind, x, state, weights):
    """Return the next (hidden, memory) by the equations of torch."""
    hidden, memory = state
    w, u, b, c = weights
    inputs, recurrent = w @ x + b, u @ hidden + c
    if kind == "rnn":
        return np.tanh(inputs + recurrent), memory
    if kind == "gru":
        (r, z, n), (rr, rz, rn) = np.split(inputs, 3), np.split(recurrent, 3)
        update = sigmoid(z + rz)
        return (1 - update) * np.tanh(n + sigmoid(r + rr) * rn) + update * hidden, memory
    i, f, g, o = np.split(inputs + recurrent, 4)
    memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(memory), memory


@pytest.mark.parametrize(("kind", "gates"), [("rnn", 1), ("lstm", 4), ("gru", 3)])
def test_recurrent_layers_follow_torchs_equations_in_both_directions(kind, gates):
    rng, size, time = np.random.default_rng(0), 4, 5
    module = jn.Recurrent(size, cell=kind, num_layers=2, bidirectional=True)
    x = rng.normal(size=(1, time, 3)).astype(np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    state, y = {}, x[0]
    for layer in range(2):
        outputs = []
        for suffix, order in (("", 1), ("_reverse", -1)):
            width = y.shape[1]
            shapes = [(gates * size, width), (gates * size, size), (gates * size,), (gates * size,)]
            weights = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            for name, value in zip(names, weights, strict=True):
                state[f"rnn.{name}_l{layer}{suffix}"] = value
            carry, steps = (np.zeros(size), np.zeros(size)), []
            for one in y[::order]:
                carry = torch_step(kind, one, carry, weights)
                steps.append(carry[0])
            outputs.append(np.stack(steps)[::order])
        y = np.concatenate(outputs, axis=1)
    network = from_torch(state, module, variables, rules=torch_layers.recurrent("rnn", "params"))
    result = jax.tree.leaves(module.apply(network.variables, x))[0]
    np.testing.assert_allclose(result[0], y, atol=1e-5)


def test_a_flatten_and_batch_norm_counters_are_known_and_leftovers_are_listed():
    module, rng = nn.Dense(2), np.random.default_rng(0)
    image = rng.normal(size=(3, 4, 5)).astype(np.float32)  # [channels, height, width]
    kernel = rng.normal(size=(2, 60)).astype(np.float32)
    here = image.transpose(1, 2, 0).reshape(1, 60)
    variables = jax.eval_shape(module.init, jax.random.key(0), here)
    state = {"fc.weight": kernel, "fc.bias": np.ones(2, np.float32), "n.num_batches_tracked": 3}
    rules = torch_layers.flattened_dense("fc", "params", (4, 5, 3))
    network = from_torch(state, module, variables, rules=rules)
    result = module.apply(network.variables, here)[0]
    np.testing.assert_allclose(result, kernel @ image.reshape(-1) + 1, atol=1e-4)
    with pytest.raises(ValueError, match="no array: other"):
        from_torch({**state, "other": kernel}, module, variables, rules=rules)
    with pytest.raises(ValueError, match="params/bias"):
        from_torch({"fc.weight": kernel}, module, variables, rules=rules)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("a.bias_k", "add_bias_kv of torch.nn.MultiheadAttention"),
        ("lstm.weight_hr_l0_reverse", "proj_size of torch.nn.LSTM"),
    ],
)
def test_options_of_torch_without_a_counterpart_are_refused_by_name(name, option):
    module = nn.Dense(2)
    variables = jax.eval_shape(module.init, jax.random.key(0), np.ones((1, 3), np.float32))
    state = {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2), name: np.ones((1, 1, 3))}
    with pytest.raises(ValueError, match=f"{name} is .*{option}.* train the network without it"):
        from_torch(state, module, variables, rules=torch_layers.dense("fc", "params"))


def test_a_transposed_convolution_puts_its_kernel_around_every_input():
    rng, strides = np.random.default_rng(0), 3
    weight = rng.normal(size=(2, 4, 5)).astype(np.float32)  # [in, out, window]
    x = rng.normal(size=(6, 2)).astype(np.float32)
    expected = np.zeros((5 * strides + 5, 4), np.float32)
    for time, row in enumerate(x):
        expected[time * strides : time * strides + 5] += np.einsum("i,iok->ko", row, weight)
    module = nn.ConvTranspose(4, (5,), (strides,), padding=[(4, 4)], use_bias=False)
    variables = jax.eval_shape(module.init, jax.random.key(0), x[None])
    rules = torch_layers.transposed_convolution("up", "params")
    network = from_torch({"up.weight": weight}, module, variables, rules=rules)
    np.testing.assert_allclose(module.apply(network.variables, x[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("flax", [False, True])
def test_attention_follows_torchs_equations(flax, separate):
    """softmax(q k^T / sqrt(head_dim)) v head by head; projections joined in the file or not."""
    rng, names = np.random.default_rng(0), ("query", "key", "value")
    x = rng.normal(size=(5, 4)).astype(np.float32)
    weights, biases = rng.normal(size=(4, 4, 4)), rng.normal(size=(4, 4))
    q, k, v = ((x @ w.T + b).reshape(5, 2, 2) for w, b in zip(weights[:3], biases, strict=False))
    scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / 2**0.5)
    mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(5, 4)
    expected = mixed @ weights[3].T + biases[3]
    state = {"a.in_proj_bias": biases[:3].ravel(), "a.in_proj_weight": weights[:3].reshape(12, 4)}
    if separate:
        del state["a.in_proj_weight"]
        state |= {f"a.{n[0]}_proj_weight": w for n, w in zip(names, weights, strict=False)}
    state |= {"a.out_proj.weight": weights[3], "a.out_proj.bias": biases[3]}
    if flax:
        module, options = nn.MultiHeadDotProductAttention(2), {}
        rules = torch_layers.flax_attention("a", "params", 2)
    else:
        config = jn.BlockConfig(features=4, num_heads=2, key_bias=True, positions=None)
        module = jn.transformer.Attention(config)
        options = {"method": lambda module, x: module(x, module.keys_values(x))}
        rules = torch_layers.attention("a", "params")
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x[None], **options))
    network = from_torch(state, module, variables, rules=rules)
    outputs = module.apply(network.variables, x[None], **options)
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)
