"""Networks for images in Hugging Face's and torchvision's layout, without either library."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checks import perturbed, shapes_of

import jaxnets as jn
from jaxnets.pretrained.architectures import ARCHITECTURES
from jaxnets.pretrained.architectures.labels import name_labels
from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors import ImageProcessor

BLOCK = jn.transformer.BlockConfig(features=8, num_heads=2, mlp_dim=12, key_bias=True)
NETWORKS = {
    "vit": (jn.VisionTransformer(3, 2, 1, BLOCK), (4, 6, 1)),
    "teacher": (jn.VisionTransformer(3, 2, 1, BLOCK, distillation="head"), (4, 4, 3)),
    "convnext": (jn.ConvNeXt((1, 1), (4, 6), 3, patch_size=2), (8, 8, 1)),
    "resnet": (jn.ResNet((1, 1), bottleneck=True, num_outputs=3, width=4), (32, 32, 1)),
}


@functools.cache
def made(module, shape):
    shapes, _ = shapes_of(module, np.zeros((1, *shape), np.float32))
    return perturbed(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes))


def network(name, **fields):
    module, shape = NETWORKS[name]
    module = module.clone(**fields)
    variables = made(module, shape)
    return jn.pretrained.PretrainedNetwork(module, variables, config={"image_size": [4, 6]})


def written(folder):
    tensors = jn.pretrained.read_tensors(folder)
    return json.loads((folder / "config.json").read_text()), dict(tensors)


def norms(*names):
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


VIT_LAYER = "vit.encoder.layer.0"
NAMES = {
    "vit": {
        *("vit.embeddings.cls_token", "vit.embeddings.position_embeddings"),
        *norms("vit.embeddings.patch_embeddings.projection", "vit.layernorm", "classifier"),
        *norms(*[f"{VIT_LAYER}.attention.attention.{name}" for name in ("query", "key", "value")]),
        *norms(f"{VIT_LAYER}.attention.output.dense", f"{VIT_LAYER}.intermediate.dense"),
        *norms(f"{VIT_LAYER}.output.dense"),
        *norms(f"{VIT_LAYER}.layernorm_before", f"{VIT_LAYER}.layernorm_after"),
    },
    "convnext": {
        *norms("convnext.embeddings.patch_embeddings", "convnext.embeddings.layernorm"),
        *norms(*[f"convnext.encoder.stages.1.downsampling_layer.{index}" for index in (0, 1)]),
        *norms(
            *[
                f"convnext.encoder.stages.{stage}.layers.0.{name}"
                for stage in (0, 1)
                for name in ("dwconv", "layernorm", "pwconv1", "pwconv2")
            ]
        ),
        *[f"convnext.encoder.stages.{stage}.layers.0.layer_scale_parameter" for stage in (0, 1)],
        *norms("convnext.layernorm", "classifier"),
    },
    "resnet": {
        *norms("classifier.1"),
        *[
            f"resnet.{layer}.{part}"
            for layer in (
                "embedder.embedder",
                *[
                    f"encoder.stages.{stage}.layers.0.{name}"
                    for stage in (0, 1)
                    for name in ("layer.0", "layer.1", "layer.2", "shortcut")
                ],
            )
            for part in (
                "convolution.weight",
                *[
                    f"normalization.{name}"
                    for name in (
                        *("weight", "bias", "running_mean", "running_var"),
                        "num_batches_tracked",  # transformers reports one that is missing
                    )
                ],
            )
        ],
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_written_under_the_names_of_hugging_face(name, tmp_path):
    jn.pretrained.save(tmp_path / "network", network(name), layout="torch")
    content, tensors = written(tmp_path / "network")
    assert content["model_type"] == name
    assert tensors.keys() == NAMES[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_written_network_is_read_again(name, tmp_path):
    one = network(name)
    jn.pretrained.save(tmp_path / "network", one, layout="torch")
    again = jn.pretrained.load(tmp_path / "network")
    assert again.module == one.module and again.processor is None
    jax.tree.map(np.testing.assert_array_equal, again.variables, one.variables)


def test_a_patch_kernel_of_the_file_is_a_convolution_of_the_patch(tmp_path):
    one = network("vit")
    jn.pretrained.save(tmp_path / "network", one, layout="torch")
    _, tensors = written(tmp_path / "network")
    kernel = tensors["vit.embeddings.patch_embeddings.projection.weight"]  # [out, in, *window]
    assert kernel.shape == (8, 1, 2, 2)
    image = np.random.default_rng(0).normal(size=(1, 2, 2, 1)).astype(np.float32)
    expected = np.einsum("oihw,bhwi->bo", kernel, image)
    patches = jn.functional.patchify(image, 2)[:, 0] @ one.variables["params"]["patch"]["kernel"]
    np.testing.assert_allclose(patches, expected, rtol=1e-5, atol=1e-5)


def test_the_sizes_of_images_come_from_the_arrays(tmp_path):
    for folder, image_size, expected in (("a", [4, 6], [4, 6]), ("b", 224, None)):
        one = network("vit")
        one.config["image_size"] = image_size
        if expected is None:  # six patches, which are no square
            with pytest.raises(ValueError, match=r"6 patches are no square.*image_size"):
                jn.pretrained.save(tmp_path / folder, one, layout="torch")
            continue
        jn.pretrained.save(tmp_path / folder, one, layout="torch")
        content, _ = written(tmp_path / folder)
        assert (content["image_size"], content["num_channels"]) == (expected, 1)
    jn.pretrained.save(tmp_path / "c", network("teacher"), layout="torch")
    content, _ = written(tmp_path / "c")
    assert content["model_type"] == "deit" and content["image_size"] == 4
    assert content["architectures"] == ["DeiTForImageClassificationWithTeacher"]


def test_a_pooler_that_the_file_lacks_is_left_out(tmp_path):
    for name, pooler_dim in (("with", 5), ("without", None)):
        one = network("vit", num_outputs=None, pooler_dim=pooler_dim)
        jn.pretrained.save(tmp_path / name, one, layout="torch")
        content, _ = written(tmp_path / name)
        content["architectures"] = ["ViTModel"]
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        assert jn.pretrained.load(tmp_path / name).module == one.module


def test_a_file_of_torchvision_is_read_by_the_name_of_its_function(tmp_path):
    module = jn.convolutional.resnet18(3, width=2)
    shapes, _ = shapes_of(module, np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params, statistics = variables["params"], variables["batch_stats"]
    tensors = {"fc.weight": params["head"]["kernel"].T, "fc.bias": params["head"]["bias"]}

    def add(conv, bn, target, stats, suffix):
        kernel = target[f"{suffix[0]}"]["kernel"]
        tensors[f"{conv}.weight"] = np.transpose(kernel, (3, 2, 0, 1))
        for name, array in (
            ("weight", target[suffix[1]]["scale"]),
            ("bias", target[suffix[1]]["bias"]),
            ("running_mean", stats[suffix[1]]["mean"]),
            ("running_var", stats[suffix[1]]["var"]),
            ("num_batches_tracked", np.array(7)),
        ):
            tensors[f"{bn}.{name}"] = array

    add("conv1", "bn1", params, statistics, ("stem_conv", "stem_norm"))
    for stage in range(1, 5):
        for block in (0, 1):
            ours, theirs = f"stage_{stage}_block_{block + 1}", f"layer{stage}.{block}"
            inside = (params[ours], statistics[ours])
            for index in (1, 2):
                names = (f"conv_{index}", f"norm_{index}")
                add(f"{theirs}.conv{index}", f"{theirs}.bn{index}", *inside, names)
            if stage > 1 and block == 0:
                names = ("shortcut_conv", "shortcut_norm")
                add(f"{theirs}.downsample.0", f"{theirs}.downsample.1", *inside, names)
    path = tmp_path / "resnet18.npz"
    np.savez(path, **tensors)
    loaded = jn.pretrained.load(path, architecture="resnet18", num_outputs=3, width=2)
    assert loaded.module == module
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    with pytest.raises(ValueError, match=r"does not say what .* resnet18, resnet34"):
        jn.pretrained.load(path)


def build(kind, name=None, **content):
    classes = ARCHITECTURES[kind].classes
    config = Config.of(Path("config.json"), {"model_type": kind, **content})
    return classes[name or next(iter(classes))](config, {})


def test_published_configurations_are_the_presets():
    vit = build("vit", id2label={str(index): "" for index in range(1000)})
    assert vit == jn.transformer.vit_base16(norm_epsilon=1e-12, mlp_dim=3072)
    deit = build("deit", "DeiTForImageClassificationWithTeacher", num_labels=1000)
    expected = jn.transformer.vit_base16(norm_epsilon=1e-12, mlp_dim=3072, distillation="head")
    assert deit == expected
    tiny = jn.convolutional.convnext_tiny(dropout_rate=0.0, pooled_norm_epsilon=1e-12)
    assert build("convnext", num_labels=1000) == tiny
    assert build("resnet", num_labels=1000) == jn.convolutional.resnet50()
    basic = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    assert build("resnet", num_labels=1000, **basic) == jn.convolutional.resnet18()


def test_options_of_a_configuration_are_options_of_the_network():
    vit = build("vit", "ViTModel", qkv_bias=False, pooler_output_size=5, num_labels=7)
    assert (vit.config.qkv_bias, vit.pooler_dim, vit.num_outputs) == (False, 5, None)
    assert build("deit").distillation == "token" and build("deit", num_labels=0).num_outputs is None
    convnext = build("convnext", layer_scale_init_value=0, hidden_act="relu", drop_path_rate=0.1)
    assert (convnext.scale_init, convnext.activation) == (None, "relu")
    assert (convnext.num_outputs, convnext.dropout_rate) == (2, 0.1)
    resnet = build("resnet", downsample_in_bottleneck=True, downsample_in_first_stage=True)
    assert (resnet.bottleneck_stride, resnet.first_stage_strides) == ("1x1", 2)
    other = build("resnet", "ResNetModel", hidden_sizes=[8, 12], depths=[1, 2], embedding_size=3)
    assert (other.stage_features, other.width, other.num_outputs) == ((2, 3), 3, None)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("vit", {"hidden_act": "quick_gelu"}, 'hidden_act, "quick_gelu", is not supported'),
        ("vit", {"patch_size": [16, 8]}, r"patch_size, \[16, 8\], .*squares"),
        ("vit", {"patch_size": [16]}, r"patch_size, \[16\], is neither"),
        ("vit", {"num_hidden_layers": 0}, "num_hidden_layers, 0, is not 1 or more"),
        ("vit", {"id2label": ["cat"]}, "id2label, .*is no object"),
        ("convnext", {"depths": [1, 2]}, "hidden_sizes, null, .*each of 2 depths"),
        ("convnext", {"depths": [1, 0, 1, 1]}, "depths, .*integers above 0"),
        ("convnext", {"depths": 3}, "depths, 3, is no list"),
        ("convnext", {"num_stages": 3}, "num_stages, 3, is not the number of depths, 4"),
        ("resnet", {"hidden_act": "gelu"}, 'hidden_act, "gelu", is not supported.*"relu"'),
        ("resnet", {"layer_type": "wide"}, 'layer_type, "wide", is not supported'),
        ("resnet", {"hidden_sizes": [8, 8, 6, 8]}, "hidden_sizes, .*multiples of 4"),
        ("resnet", {"downsample_in_bottleneck": 1}, "downsample_in_bottleneck, 1, is neither"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name_and_value(kind, content, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **content)


def test_a_pooler_with_another_activation_is_refused():
    with pytest.raises(ValueError, match='pooler_act, "relu", is not supported'):
        build("vit", "ViTModel", pooler_act="relu")


def test_the_processor_of_a_folder_is_read_and_written(tmp_path):
    one = network("resnet")
    jn.pretrained.save(tmp_path / "a", one, layout="torch")
    path = tmp_path / "a" / "preprocessor_config.json"
    path.write_text(json.dumps({"size": 224, "crop_pct": 0.875}))  # its type is the usual one
    loaded = jn.pretrained.load(tmp_path / "a")
    assert loaded.processor == ImageProcessor(256, "bicubic", (224, 224))
    jn.pretrained.save(tmp_path / "b", loaded, layout="torch")
    assert jn.pretrained.load(tmp_path / "b").processor == loaded.processor
    path.write_text(json.dumps({"size": 224, "resample": 9}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: resample is 9"):
        jn.pretrained.load(tmp_path / "a")


def test_names_of_classes_are_kept_where_there_are_as_many():
    named = {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}
    assert name_labels({**named, "num_labels": 2}) == named
    assert name_labels({"hidden_size": 4}) == {"hidden_size": 4}
    assert name_labels({"num_labels": 0}) == {"id2label": {}, "label2id": {}}
    other = name_labels({**named, "num_labels": 1})
    assert other == {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
