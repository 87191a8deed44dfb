"""Every convolutional network: parameter counts, shapes at any size, and the shared checks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check_module, check_preset, shapes_of
from published_sizes import PUBLISHED, PUBLISHED_FOR_CIFAR

from jaxnets import convolutional
from jaxnets.core import capture
from jaxnets.models.convolutional import (
    ConvNet,
    ConvNeXt,
    LeNet5,
    PilotNet,
    ResNet,
    ResNet9,
    WideResNet,
)


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_an_imagenet_preset_has_the_published_number_of_parameters(name, parameters):
    module = getattr(convolutional, name)()
    shape = (2, 224, 224, 3)
    check_preset(module, shape, num_parameters=parameters, output_shape=(2, 1000))


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_FOR_CIFAR.items())
def test_a_cifar_preset_has_the_published_number_of_parameters(name, parameters):
    module = getattr(convolutional, name)()
    check_preset(module, (2, 32, 32, 3), num_parameters=parameters, output_shape=(2, 10))


@pytest.mark.parametrize("side", [28, 32])
def test_lenet_has_the_parameters_of_the_book_for_padded_and_full_images(side):
    check_preset(LeNet5(), (2, side, side, 1), num_parameters=61_706, output_shape=(2, 10))


def test_pilotnet_has_the_published_number_of_parameters_at_its_own_size():
    check_preset(
        convolutional.pilotnet(), (2, 66, 200, 3), num_parameters=252_219, output_shape=(2, 1)
    )


@pytest.mark.parametrize(
    ("module", "shape", "parameters"),
    [
        (LeNet5(), (3, 28, 28, 1), 61_706),
        (
            PilotNet(num_outputs=2, hidden_features=(4,), activation="elu"),
            (4, 61, 63, 1),
            624 + 21_636 + 43_248 + 27_712 + 36_928 + (64 * 4 + 4) + 10,
        ),
        (
            ConvNet(features=(4,), hidden_features=(5,), num_outputs=3, dropout_rate=0.1),
            (4, 8, 8, 1),
            (36 + 4) + (64 * 5 + 5) + 18,
        ),
        (
            ConvNet(
                features=(4,), hidden_features=(5,), num_outputs=3, norm="batch", global_pool=True
            ),
            (6, 12, 2),
            (24 + 8) + (20 + 10) + 18,
        ),
        (
            ResNet(stage_sizes=(1, 1), width=4, num_outputs=3, stem="cifar"),
            (6, 8, 8, 1),
            44 + 2 * 152 + (288 + 16 + 576 + 16 + 32 + 16) + 27,
        ),
        (
            ResNet(stage_sizes=(1,), bottleneck=True, width=4, num_outputs=3),
            (6, 16, 1),
            28 + 8 + (16 + 8 + 48 + 8 + 64 + 32 + 64 + 32) + 51,
        ),
        pytest.param(
            WideResNet(depth=10, widen_factor=1, num_outputs=3, dropout_rate=0.1),
            (4, 8, 8, 1),
            144 + 4_672 + 14_432 + 57_536 + 128 + 195,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ResNet9(num_outputs=3, width=2),
            (6, 8, 8, 1),
            22 + 80 + 2 * 152 + 304 + 1_184 + 2 * 2_336 + 48,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ConvNeXt(
                stage_sizes=(1, 1),
                stage_features=(4, 6),
                patch_size=2,
                num_outputs=3,
                dropout_rate=0.2,
            ),
            (8, 8, 8, 1),
            (20 + 8) + (200 + 8 + 80 + 68 + 4) + (8 + 102) + (300 + 12 + 168 + 150 + 6) + 12 + 21,
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "lenet",
        "pilotnet",
        "plain",
        "audio",
        "resnet",
        "bottleneck",
        "wide",
        "resnet9",
        "convnext",
    ],
)
def test_a_convolutional_network_passes_every_check(module, shape, parameters):
    check_module(module, images(*shape), num_parameters=parameters)


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (2, 32, 32, 3), (2, 8, 8, 1), (2, 400, 40)])
@pytest.mark.parametrize(
    "module",
    [
        ConvNet(),
        ConvNet(norm="batch", pool=1, global_pool=True),
        convolutional.resnet18(10),
        convolutional.resnet50(10, stem="cifar"),
        WideResNet(),
        ResNet9(),
        convolutional.convnext_tiny(10, patch_size=1),
    ],
    ids=["plain", "normed", "resnet18", "resnet50", "wide", "resnet9", "convnext"],
)
def test_one_definition_takes_small_and_large_images_and_audio(module, shape):
    _, output = shapes_of(module, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert output.shape == (2, 10)


@pytest.mark.parametrize(
    ("module", "shape", "stages"),
    [
        (LeNet5(), (2, 28, 28, 1), {"features": (2, 84)}),
        (
            PilotNet(),
            (2, 66, 200, 3),
            {
                "map_0": (2, 31, 98, 24),
                "map_1": (2, 14, 47, 36),
                "map_2": (2, 5, 22, 48),
                "map_3": (2, 3, 20, 64),
                "map_4": (2, 1, 18, 64),
                "features": (2, 10),
            },
        ),
        (ConvNet(), (2, 28, 28, 1), {"features": (2, 128)}),
        (
            convolutional.resnet18(10, stem="cifar"),
            (2, 32, 32, 3),
            {
                "features": (2, 512),
                "stage_1": (2, 32, 32, 64),
                "stage_2": (2, 16, 16, 128),
                "stage_3": (2, 8, 8, 256),
                "stage_4": (2, 4, 4, 512),
            },
        ),
        (
            WideResNet(),
            (2, 32, 32, 3),
            {
                "features": (2, 256),
                "stage_1": (2, 32, 32, 64),
                "stage_2": (2, 16, 16, 128),
                "stage_3": (2, 8, 8, 256),
            },
        ),
        (ResNet9(), (2, 32, 32, 3), {"features": (2, 512)}),
        (
            ConvNeXt(),
            (2, 32, 32, 3),
            {
                "features": (2, 768),
                "stage_1": (2, 8, 8, 96),
                "stage_2": (2, 4, 4, 192),
                "stage_3": (2, 2, 2, 384),
                "stage_4": (2, 1, 1, 768),
            },
        ),
    ],
    ids=["lenet", "pilotnet", "plain", "resnet", "wide", "resnet9", "convnext"],
)
def test_named_intermediates_have_the_expected_shapes(module, shape, stages):
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables, _ = shapes_of(module, inputs)
    _, recorded = jax.eval_shape(lambda v, x: capture(module, v, x), variables, inputs)
    assert {name: value.shape for name, value in recorded.items()} == stages


def test_the_imagenet_stem_leaves_a_quarter_of_the_size():
    module = convolutional.resnet50()
    inputs = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables, _ = shapes_of(module, inputs)
    _, recorded = jax.eval_shape(lambda v, x: capture(module, v, x), variables, inputs)
    assert recorded["stage_1"].shape == (1, 56, 56, 256)
    assert recorded["stage_4"].shape == (1, 7, 7, 2048)


def test_the_stride_of_a_bottleneck_is_in_its_three_by_three_convolution():
    module = ResNet(stage_sizes=(1, 1), bottleneck=True, width=2, stem="cifar")
    variables = module.init(jax.random.key(0), images(1, 8, 8, 1))
    traced = jax.jit(module.apply).trace(variables, images(1, 8, 8, 1))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    strided = re.findall(
        r"stablehlo\.convolution.*stride = \[2, 2\].*tensor<(\dx\d)x[^>]*>\) ->", text
    )
    assert sorted(strided) == ["1x1", "3x3"]  # the shortcut has the other


def test_the_blocks_of_a_new_resnet_are_the_identity():
    x = images(2, 8, 8, 1)
    module = ResNet(stage_sizes=(3,), width=4, stem="cifar")
    one_block = ResNet(stage_sizes=(1,), width=4, stem="cifar")
    variables = jax.jit(module.init)(jax.random.key(0), x)
    three, one = (jax.jit(m.apply)(variables, x) for m in (module, one_block))
    np.testing.assert_allclose(three, one, rtol=1e-6, atol=1e-6)


def test_convolutions_in_front_of_a_batch_norm_have_no_bias():
    for module in (ResNet(width=4), ResNet9(width=4), ConvNet(norm="batch")):
        params = shapes_of(module, images(2, 32, 32, 3))[0]["params"]
        names = [
            path
            for path in flatten(params)
            if path[-1] == "bias" and "conv" in path[-2].split("_")[-2:]
        ]
        assert names == []


def flatten(params):
    return [
        tuple(key.key for key in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def test_no_parameter_has_a_name_that_linen_numbered_by_itself():
    for module in (
        ConvNet(norm="layer", dropout_rate=0.1),
        ResNet(width=4, bottleneck=True),
        WideResNet(depth=10, widen_factor=1),
        ResNet9(width=4),
        ConvNeXt(stage_sizes=(1, 1), stage_features=(4, 8)),
    ):
        for path in flatten(shapes_of(module, images(2, 32, 32, 3))[0]["params"]):
            assert all(name == name.lower() for name in path), path


def test_convnet_audio_and_an_image_of_one_row_agree():
    audio = images(2, 16, 3)
    module = ConvNet(features=(4,), hidden_features=(), pool=1, global_pool=True)
    variables = module.init(jax.random.key(0), audio)
    kernel = variables["params"]["conv_0"]["kernel"]
    as_image = {
        **variables["params"],
        "conv_0": {**variables["params"]["conv_0"], "kernel": kernel[None]},
    }
    flat = ConvNet(features=(4,), kernel_size=(1, 3), hidden_features=(), pool=1, global_pool=True)
    np.testing.assert_allclose(
        module.apply(variables, audio),
        flat.apply({"params": as_image}, audio[:, None]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvNet(features=(8, 0)), r"features=\(8, 0\)"),
        (lambda: ConvNet(norm="group"), "'group'"),
        (lambda: ResNet(stem="tiny"), "'tiny'.*'cifar'"),
        (lambda: WideResNet(depth=27), r"depth=27 must be 6 n \+ 4"),
        (lambda: ConvNeXt(stage_sizes=(1, 2)), "one entry a stage"),
        (lambda: shapes_of(PilotNet(), images(1, 60, 90, 1)), r"\(60, 90\).*need 61 pixels a side"),
        (lambda: shapes_of(LeNet5(), images(1, 8, 8, 1)), r"\(8, 8\).*28x28.*ConvNet"),
        (lambda: shapes_of(ConvNet(), images(2, 28)), r"\(2, 28\).*\[\.\.\., None\]"),
        (lambda: shapes_of(ResNet(), images(2, 28)), r"ResNet got.*\(2, 28\)"),
        (
            lambda: shapes_of(ConvNet(features=(8,) * 4), images(1, 8, 8, 1)),
            "need 16 a side",
        ),
        (
            lambda: shapes_of(ConvNeXt(), images(1, 28, 28, 1)),
            "need 32 a side; choose a smaller patch_size",
        ),
        (
            lambda: shapes_of(ResNet9(), images(1, 4, 4, 1)),
            "a window of 2 does not fit",
        ),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
