"""Rules of Keras' layers, against the equations that Keras documents, in NumPy."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from checks import normal

import jaxnets as jn
from jaxnets.functional.recurrence.cells import GRUCell
from jaxnets.pretrained import from_keras, keras_layers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("reset", ["after", "before"])
def test_a_gru_has_the_gates_update_reset_candidate_and_a_bias_of_two_rows(reset):
    size, x = 4, normal((5, 3), 0, np.float32)
    w, u = normal((3, 3 * size), 1, np.float32), normal((size, 3 * size), 2, np.float32)
    bias = normal((2, 3 * size) if reset == "after" else (3 * size,), 3, np.float32)
    (wz, wr, wn), (uz, ur, un) = np.split(w, 3, axis=1), np.split(u, 3, axis=1)
    rows = bias if reset == "after" else np.stack([bias, 0 * bias])
    (bz, br, bn), (cz, cr, cn) = (np.split(row, 3) for row in rows)
    hidden, expected = np.zeros(size), []
    for one in x:
        update = sigmoid(one @ wz + bz + hidden @ uz + cz)
        gate = sigmoid(one @ wr + br + hidden @ ur + cr)
        inner = gate * (hidden @ un + cn) if reset == "after" else (gate * hidden) @ un
        hidden = update * hidden + (1 - update) * np.tanh(one @ wn + bn + inner)
        expected.append(hidden)
    file = {f"layers/gru/cell/vars/{index}": one for index, one in enumerate((w, u, bias))}
    module = jn.Recurrent(size, cell=GRUCell(reset))
    variables = jax.eval_shape(module.init, jax.random.key(0), x[None])
    rules = keras_layers.gru("layers/gru", "params/forward_0")
    network = from_keras(file, module, variables, rules=rules)
    outputs, _ = module.apply(network.variables, x[None])
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)


def test_a_depthwise_convolution_has_its_multiplier_innermost():
    x, kernel = normal((4, 3), 0, np.float32), normal((2, 3, 2), 1, np.float32)
    windows = np.stack([x[:-1], x[1:]])  # [window, time, channels]
    expected = np.einsum("ktc,kcm->tcm", windows, kernel).reshape(3, 6)
    module = jn.layers.Convolution(6, 2, padding="VALID", groups=3, use_bias=False)
    variables = jax.eval_shape(module.init, jax.random.key(0), x[None])
    rules = keras_layers.depthwise_convolution("layers/depthwise_conv1d", "params")
    file = {"layers/depthwise_conv1d/vars/0": kernel}
    network = from_keras(file, module, variables, rules=rules)
    np.testing.assert_allclose(module.apply(network.variables, x[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize("layer", ["flax", "transposed kernel"])
def test_a_transposed_convolution_puts_its_kernel_around_every_input(layer):
    x, kernel = normal((5, 2), 0, np.float32), normal((4, 3, 2), 1, np.float32)
    expected = np.zeros((4 * 3 + 4, 3))
    for index, one in enumerate(x):
        expected[3 * index : 3 * index + 4] += kernel @ one  # [window, out]
    transposed = layer == "transposed kernel"
    module = nn.ConvTranspose(3, (4,), (3,), "VALID", use_bias=False, transpose_kernel=transposed)
    variables = jax.eval_shape(module.init, jax.random.key(0), x[None])
    rules_of = keras_layers.convolution if transposed else keras_layers.transposed_convolution
    file = {"layers/conv1d_transpose/vars/0": kernel}
    rules = rules_of("layers/conv1d_transpose", "params")
    network = from_keras(file, module, variables, rules=rules)
    np.testing.assert_allclose(module.apply(network.variables, x[None])[0], expected, atol=1e-5)


def test_variables_of_the_optimizer_are_left_out_and_other_leftovers_are_listed():
    module = nn.Dense(2)
    variables = jax.eval_shape(module.init, jax.random.key(0), np.ones((1, 3), np.float32))
    file = {"layers/dense/vars/0": np.ones((3, 2)), "layers/dense/vars/1": np.ones(2)}
    file |= {"optimizer/vars/0": np.ones((), np.int32)}
    file |= {"layers/dropout/seed_generator/vars/0": np.ones(2, np.uint32)}
    rules = keras_layers.dense("layers/dense", "params")
    network = from_keras(file, module, variables, rules=rules)
    assert network.variables["params"]["kernel"].dtype == np.float32
    with pytest.raises(ValueError, match="have no array: layers/dense_1/vars/0"):
        from_keras({**file, "layers/dense_1/vars/0": np.ones(2)}, module, variables, rules=rules)
