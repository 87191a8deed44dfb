"""Every convolutional network: parameter counts, shapes at any size, and the shared checks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import (
    check_gradients,
    check_module,
    check_precision,
    check_preset,
    count_parameters,
    mostly_slow,
    perturbed,
    shapes_of,
)
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


RESNETS = {  # He et al. 2016, Table 1
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}
CONVNEXTS = {  # Liu et al. 2022, section 3; stochastic depth: appendix A.1
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 0.1),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768), 0.4),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024), 0.5),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536), 0.5),
}
WIDE_RESNETS = {
    "wide_resnet16_4": (16, 4),
    "wide_resnet40_4": (40, 4),
    "wide_resnet28_10": (28, 10),
}


def test_presets_have_the_sizes_of_the_papers():
    for name, sizes in RESNETS.items():
        module = getattr(convolutional, name)()
        assert (module.stage_sizes, module.bottleneck, module.num_outputs) == (*sizes, 1000), name
    for name, sizes in CONVNEXTS.items():
        module = getattr(convolutional, name)(100)
        assert (module.stage_sizes, module.stage_features, module.dropout_rate) == sizes, name
        assert module.num_outputs == 100
    for name, sizes in WIDE_RESNETS.items():
        module = getattr(convolutional, name)(dropout_rate=0.3)
        assert (module.depth, module.widen_factor, module.dropout_rate) == (*sizes, 0.3), name


@pytest.mark.parametrize(
    ("name", "parameters"),
    mostly_slow(
        PUBLISHED.items(),
        [(name, PUBLISHED[name]) for name in ("resnet18", "resnet50", "convnext_tiny")],
    ),
)
def test_an_imagenet_preset_has_the_published_number_of_parameters(name, parameters):
    module = getattr(convolutional, name)()
    shape = (2, 224, 224, 3)
    check_preset(module, shape, num_parameters=parameters, output_shape=(2, 1000))


@pytest.mark.parametrize(
    ("name", "parameters"),
    mostly_slow(
        PUBLISHED_FOR_CIFAR.items(),
        [(name, PUBLISHED_FOR_CIFAR[name]) for name in ("resnet9",)],
    ),
)
def test_a_cifar_preset_has_the_published_number_of_parameters(name, parameters):
    module = getattr(convolutional, name)()
    check_preset(module, (2, 32, 32, 3), num_parameters=parameters, output_shape=(2, 10))


@pytest.mark.parametrize("side", [28, 32])
def test_lenet_has_the_published_number_of_parameters_for_padded_and_full_images(side):
    check_preset(LeNet5(), (2, side, side, 1), num_parameters=61_706, output_shape=(2, 10))


def test_pilotnet_has_the_published_number_of_parameters_at_its_own_size():
    check_preset(
        convolutional.pilotnet(), (2, 66, 200, 3), num_parameters=252_219, output_shape=(2, 1)
    )


NETWORKS = {
    "lenet": (LeNet5(), (3, 28, 28, 1), 61_706),
    "pilotnet": (
        PilotNet(num_outputs=2, hidden_features=(4,), activation="elu"),
        (4, 61, 63, 1),
        624 + 21_636 + 43_248 + 27_712 + 36_928 + (64 * 4 + 4) + 10,
    ),
    "plain": (
        ConvNet(features=(4,), hidden_features=(5,), num_outputs=3, dropout_rate=0.1),
        (4, 8, 8, 1),
        (36 + 4) + (64 * 5 + 5) + 18,
    ),
    "audio": (
        ConvNet(features=(4,), hidden_features=(5,), num_outputs=3, norm="batch", global_pool=True),
        (6, 12, 2),
        (24 + 8) + (20 + 10) + 18,
    ),
    "resnet": (
        ResNet(stage_sizes=(1, 1), width=4, num_outputs=3, stem="cifar"),
        (6, 8, 8, 1),
        44 + 2 * 152 + (288 + 16 + 576 + 16 + 32 + 16) + 27,
    ),
    "bottleneck": (
        ResNet(stage_sizes=(1,), bottleneck=True, width=4, num_outputs=3),
        (6, 16, 1),
        28 + 8 + (16 + 8 + 48 + 8 + 64 + 32 + 64 + 32) + 51,
    ),
    "wide": (
        WideResNet(depth=10, widen_factor=1, num_outputs=3, dropout_rate=0.1),
        (4, 8, 8, 1),
        144 + 4_672 + 14_432 + 57_536 + 128 + 195,
    ),
    "resnet9": (
        ResNet9(num_outputs=3, width=2),
        (6, 8, 8, 1),
        22 + 80 + 2 * 152 + 304 + 1_184 + 2 * 2_336 + 48,
    ),
    "convnext": (
        ConvNeXt(
            stage_sizes=(1, 1),
            stage_features=(4, 6),
            patch_size=2,
            num_outputs=3,
            dropout_rate=0.2,
        ),
        (8, 8, 8, 1),
        (20 + 8) + (200 + 8 + 80 + 68 + 4) + (8 + 102) + (300 + 12 + 168 + 150 + 6) + 12 + 21,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_convolutional_network_has_the_parameters_of_its_layers(name):
    module, shape, parameters = NETWORKS[name]
    variables, _ = shapes_of(module, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert count_parameters(variables) == parameters


def test_every_parameter_of_a_resnet_has_a_gradient_and_the_dtype_of_the_precision():
    module, shape, _ = NETWORKS["bottleneck"]
    inputs = (images(*shape),)
    shapes, _ = shapes_of(module, *inputs)
    variables = perturbed(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    check_gradients(module, variables, inputs, ())
    check_precision(module, inputs, ())


@pytest.mark.parametrize("name", mostly_slow(NETWORKS, ["plain"]))
def test_a_convolutional_network_passes_every_check(name):
    module, shape, parameters = NETWORKS[name]
    check_module(module, images(*shape), num_parameters=parameters)


FOUR_STAGES = (1, 1, 1, 1)


@pytest.mark.parametrize(
    "shape",
    mostly_slow(
        [((2, 28, 28, 1),), ((2, 32, 32, 3),), ((2, 8, 8, 1),), ((2, 400, 40),)],
        [((2, 8, 8, 1),), ((2, 400, 40),)],
    ),
)
@pytest.mark.parametrize(
    "module",
    [
        ConvNet(),
        ConvNet(norm="batch", pool=1, global_pool=True),
        ResNet(stage_sizes=FOUR_STAGES),
        ResNet(stage_sizes=FOUR_STAGES, bottleneck=True, stem="cifar"),
        WideResNet(depth=10),
        ResNet9(),
        ConvNeXt(stage_sizes=FOUR_STAGES, patch_size=1),
        pytest.param(convolutional.resnet18(10), marks=pytest.mark.slow),
        pytest.param(convolutional.resnet50(10, stem="cifar"), marks=pytest.mark.slow),
        pytest.param(convolutional.convnext_tiny(10, patch_size=1), marks=pytest.mark.slow),
    ],
    ids=[
        "plain",
        "normed",
        "basic",
        "bottleneck",
        "wide",
        "resnet9",
        "convnext",
        "resnet18",
        "resnet50",
        "convnext_tiny",
    ],
)
def test_one_definition_accepts_small_and_large_images_and_audio(module, shape):
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
            ResNet(stage_sizes=FOUR_STAGES, stem="cifar"),
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
            WideResNet(depth=10),
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
            ConvNeXt(stage_sizes=FOUR_STAGES),
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


def test_the_imagenet_stem_reduces_the_resolution_to_a_quarter():
    module = ResNet(stage_sizes=FOUR_STAGES, bottleneck=True)
    inputs = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables, _ = shapes_of(module, inputs)
    _, recorded = jax.eval_shape(lambda v, x: capture(module, v, x), variables, inputs)
    assert recorded["stage_1"].shape == (1, 56, 56, 256)
    assert recorded["stage_4"].shape == (1, 7, 7, 2048)


@pytest.mark.lowering
@pytest.mark.parametrize("size", ["3x3", "1x1"])
def test_the_stride_of_a_bottleneck_is_in_the_convolution_that_is_asked_for(size):
    module = ResNet((1, 1), bottleneck=True, width=2, stem="cifar", bottleneck_stride=size)
    variables, _ = shapes_of(module, images(1, 8, 8, 1))
    traced = jax.jit(module.apply).trace(variables, images(1, 8, 8, 1))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    strided = re.findall(
        r"stablehlo\.convolution.*stride = \[2, 2\].*tensor<(\dx\d)x[^>]*>\) ->", text
    )
    assert sorted(strided) == sorted(["1x1", size])  # the shortcut has the other


def recorded_shapes(module, *shape):
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables, _ = shapes_of(module, inputs)
    output, recorded = jax.eval_shape(lambda v, x: capture(module, v, x), variables, inputs)
    return output.shape, {name: value.shape for name, value in recorded.items()}


def test_a_resnet_may_have_any_channels_and_a_stride_in_its_first_stage():
    module = ResNet((1, 2), num_outputs=None, width=4, stage_features=(6, 5), first_stage_strides=2)
    output, recorded = recorded_shapes(module, 2, 32, 32, 3)
    assert recorded == {"stage_1": (2, 4, 4, 6), "stage_2": (2, 2, 2, 5), "features": (2, 5)}
    assert output == (2, 5)
    plain, doubled = ResNet((1, 1), width=4), ResNet((1, 1), width=4, stage_features=(4, 8))
    assert recorded_shapes(plain, 2, 32, 32, 3) == recorded_shapes(doubled, 2, 32, 32, 3)


def test_the_shortcut_of_a_strided_block_does_not_depend_on_the_size_of_the_image():
    module = ResNet((1,), width=4, first_stage_strides=2)
    names = [
        shapes_of(module, images(1, side, side, 3))[0]["params"]["stage_1_block_1"].keys()
        for side in (4, 32)
    ]
    assert "shortcut_conv" in names[0] and names[0] == names[1]


def test_a_convnext_without_layer_scale_is_one_whose_scales_are_one():
    module = NETWORKS["convnext"][0].clone(scale_init=None)
    scaled, x = module.clone(scale_init=1.0), images(2, 8, 8, 1)
    variables = perturbed(jax.tree.map(jnp.zeros_like, shapes_of(module, x)[0]))
    params = {
        name: layer | {"scale": jnp.ones(layer["reduce"]["bias"].shape)}
        if "reduce" in layer
        else layer
        for name, layer in variables["params"].items()
    }
    plain, with_ones = jax.jit(module.apply)(variables, x), scaled.apply({"params": params}, x)
    np.testing.assert_allclose(plain, with_ones, rtol=1e-5, atol=1e-5)


def test_the_activation_and_the_last_epsilon_of_a_convnext_are_used():
    module = NETWORKS["convnext"][0].clone(num_outputs=None, activation="relu")
    x = images(2, 8, 8, 1)
    variables = perturbed(jax.tree.map(jnp.zeros_like, shapes_of(module, x)[0]))
    scale, bias = (np.asarray(variables["params"]["norm"][name]) for name in ("scale", "bias"))
    for epsilon in (1e-6, 0.5):
        output, recorded = capture(module.clone(pooled_norm_epsilon=epsilon), variables, x)
        pooled = np.asarray(recorded["stage_2"]).mean(axis=(1, 2))
        centered = pooled - pooled.mean(axis=1, keepdims=True)
        variance = pooled.var(axis=1, keepdims=True)
        expected = centered / np.sqrt(variance + epsilon) * scale + bias
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    gelu = module.clone(activation="gelu").apply(variables, x)
    assert np.abs(gelu - module.apply(variables, x)).max() > 1e-3


def test_the_blocks_of_a_new_resnet_are_the_identity():
    x = images(2, 8, 8, 1)
    module = ResNet(stage_sizes=(2,), width=4, stem="cifar")
    one_block = ResNet(stage_sizes=(1,), width=4, stem="cifar")

    @jax.jit
    def run(key):
        variables = module.init(key, x)
        return module.apply(variables, x), one_block.apply(variables, x)

    two, one = run(jax.random.key(0))
    np.testing.assert_allclose(two, one, rtol=1e-6, atol=1e-6)


SMALL = [
    ConvNet(norm="batch", dropout_rate=0.1),
    ResNet(stage_sizes=(1, 1), width=4),
    ResNet(stage_sizes=(1, 1), width=4, bottleneck=True),
    ResNet9(width=4),
]


def test_convolutions_before_a_batch_norm_have_no_bias():
    for module in SMALL:
        params = shapes_of(module, images(2, 32, 32, 3))[0]["params"]
        names = [
            path
            for path in flatten(params)
            if path[-1] == "bias" and "conv" in path[-2].split("_")[-2:]
        ]
        assert names == []


def flatten(params):
    """Return the path of every parameter."""
    return [
        tuple(key.key for key in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def test_every_layer_is_named_explicitly():
    """Names that Linen makes up, such as Dense_0, have capitals."""
    for module in (
        *SMALL,
        WideResNet(depth=10, widen_factor=1),
        ConvNeXt(stage_sizes=(1, 1), stage_features=(4, 8)),
    ):
        for path in flatten(shapes_of(module, images(2, 32, 32, 3))[0]["params"]):
            assert all(name == name.lower() for name in path), path


def test_a_convnet_of_audio_equals_one_of_images_of_one_row():
    audio = images(2, 16, 3)
    module = ConvNet(features=(4,), hidden_features=(), pool=1, global_pool=True)
    flat = ConvNet(features=(4,), kernel_size=(1, 3), hidden_features=(), pool=1, global_pool=True)

    @jax.jit
    def run(key):
        params = module.init(key, audio)["params"]
        kernel = params["conv_0"]["kernel"][None]  # [1, 3, channels, features]
        as_image = {**params, "conv_0": {**params["conv_0"], "kernel": kernel}}
        return (
            module.apply({"params": params}, audio),
            flat.apply({"params": as_image}, audio[:, None]),
        )

    of_audio, of_images = run(jax.random.key(0))
    np.testing.assert_allclose(of_audio, of_images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvNet(features=(8, 0)), r"features=\(8, 0\)"),
        (lambda: ConvNet(norm="group"), "'group'"),
        (lambda: ResNet(stem="tiny"), "'tiny'.*'cifar'"),
        (lambda: ResNet(bottleneck_stride="2x2"), "'2x2'; choose '3x3' or '1x1'"),
        (lambda: ResNet((1, 1), stage_features=(8,)), "one entry per stage"),
        (lambda: ResNet(first_stage_strides=0), "first_stage_strides=0"),
        (lambda: ConvNeXt(activation="tan"), "'tan'"),
        (lambda: ConvNeXt(pooled_norm_epsilon=0.0), "pooled_norm_epsilon is 0.0"),
        (lambda: WideResNet(depth=27), r"depth=27 must be 6 n \+ 4"),
        (lambda: ConvNeXt(stage_sizes=(1, 2)), "one entry per stage"),
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
