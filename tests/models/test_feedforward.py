"""The multilayer perceptron and the MLP-Mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, count_parameters, random_variables, shapes_of

from jaxnets.core import capture
from jaxnets.models import feedforward
from jaxnets.models.feedforward import MLP, MLPMixer

TINY_MIXER = {
    "patch_size": 4,
    "hidden_size": 6,
    "num_layers": 2,
    "token_width": 5,
    "channel_width": 8,
    "num_outputs": 3,
}


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        pytest.param({"features": ()}, 64 * 3 + 3, marks=pytest.mark.slow),
        pytest.param(
            {"features": (8, 8), "activation": "tanh"},
            64 * 8 + 8 + 72 + 27,
            marks=pytest.mark.slow,
        ),
        ({"features": (8, 8), "norm": "batch", "dropout_rate": 0.1}, 512 + 16 + 64 + 16 + 27),
        pytest.param(
            {"features": (8, 8), "norm": "layer", "residual": True},
            512 + 16 + 64 + 16 + 27,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["perceptron", "plain", "batch_norm", "residual"],
)
def test_an_mlp_passes_every_check(fields, parameters):
    module = MLP(num_outputs=3, **fields)
    check_module(module, images(6, 8, 8, 1), num_parameters=parameters)


def test_a_mixer_passes_every_check():
    block = (4 * 5 + 5 + 5 * 4 + 4) + (6 * 8 + 8 + 8 * 6 + 6) + 4 * 6
    parameters = 16 * 6 + 6 + 2 * block + 2 * 6 + 6 * 3 + 3
    module = MLPMixer(dropout_rate=0.2, **TINY_MIXER)
    check_module(module, images(3, 8, 8, 1), num_parameters=parameters)


def test_an_mlp_equals_its_formula():
    x = images(4, 2, 3)
    module = MLP(features=(5,), num_outputs=2, activation="tanh")
    variables = random_variables(module, x)
    params = jax.tree.map(np.asarray, variables["params"])
    hidden, head = params["hidden_0"], params["head"]
    features = np.tanh(x.reshape(4, 6) @ hidden["kernel"] + hidden["bias"])
    output, recorded = capture(module, variables, x)
    np.testing.assert_allclose(recorded["features"], features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        output, features @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-6
    )


def test_a_residual_mlp_with_zero_layers_is_the_identity():
    x = images(4, 8)
    module = MLP(features=(8, 8), residual=True)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes_of(module, x)[0])
    np.testing.assert_array_equal(capture(module, zeros, x)[1]["features"], x)


def test_layers_before_a_norm_have_no_bias():
    for norm in ("batch", "layer"):
        params = shapes_of(MLP(norm=norm), images(2, 8))[0]["params"]
        assert set(params["hidden_0"]) == {"kernel"}


@pytest.mark.parametrize(
    ("name", "table", "total"),
    [
        ("mixer_s32", 19, 19_104_624),
        ("mixer_s16", 18, 18_528_264),
        ("mixer_b32", 60, 60_293_428),
        ("mixer_b16", 59, 59_880_472),
        ("mixer_l32", 206, 206_939_264),
        ("mixer_l16", 207, 208_196_168),
        ("mixer_h14", 431, 432_350_952),
    ],
)
def test_a_mixer_preset_has_the_published_number_of_parameters(name, table, total):
    num_layers = getattr(feedforward, name)().num_layers
    module = getattr(feedforward, name)(num_layers=1)  # all blocks have the same parameters
    variables, output = shapes_of(module, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
    assert output.shape == (2, 1000)
    params = variables["params"]
    block = count_parameters({"params": params["block_0"]})
    num_parameters = count_parameters(variables) + (num_layers - 1) * block
    assert num_parameters == total
    head = count_parameters({"params": params["head"]})
    assert round((num_parameters - head) / 1e6) == table


def test_a_preset_can_be_changed():
    module = feedforward.mixer_s16(10, patch_size=4, num_layers=1)
    assert (module.num_outputs, module.patch_size, module.num_layers) == (10, 4, 1)
    assert module.hidden_size == 512


def test_a_mixer_mixes_both_patches_and_channels():
    x, block = images(1, 4, 3), feedforward.MixerBlock(token_width=5, channel_width=6)
    variables = random_variables(block, x)
    influence = jax.jit(jax.jacobian(lambda x: block.apply(variables, x)))(x)
    assert np.abs(influence).min() > 1e-6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(features=(8, 0)), r"features=\(8, 0\)"),
        (lambda: MLP(num_outputs=-1), "num_outputs=-1"),
        (lambda: MLP(dropout_rate=1.5), r"dropout rate 1.5"),
        (lambda: MLP(norm="group"), "'group'"),
        (lambda: MLP(activation="rleu"), "'rleu'"),
        (lambda: MLPMixer(num_layers=0), "num_layers=0"),
        (lambda: shapes_of(MLP(), jnp.ones(3)), r"\(3,\)"),
        (
            lambda: shapes_of(MLPMixer(), jnp.ones((2, 28, 28))),
            r"\(2, 28, 28\).*inputs\[\.\.\., None\]",
        ),
        (
            lambda: shapes_of(MLPMixer(patch_size=5), jnp.ones((1, 28, 28, 1))),
            "5x5 do not tile",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
