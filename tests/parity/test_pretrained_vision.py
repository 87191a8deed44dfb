"""Networks for images of transformers and torchvision, loaded here, and written back.

Optional: run with `-m parity`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import perturbed, shapes_of

import jaxnets as jn
from jaxnets.functional.patches import interpolate_positions
from jaxnets.pretrained.architectures import ARCHITECTURES
from jaxnets.pretrained.processors import ImageProcessor
from jaxnets.pretrained.rules import flatten_paths, make_plan

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "image_size": [8, 12],
    "patch_size": 4,
    "num_labels": 5,
}
CONVNEXT = {"hidden_sizes": [8, 12], "depths": [2, 1], "num_stages": 2, "num_labels": 5}
RESNET = {"hidden_sizes": [16, 32], "depths": [2, 1], "embedding_size": 8, "num_labels": 5}


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_first(x):
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def randomized(module):
    """Give every parameter and every running statistic a value that matters."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor):
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            kernel = parameter.ndim > 1 and "position" not in name and "token" not in name
            scale = (parameter[0].numel() ** -0.5) if kernel else 0.3
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + scale * noise(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + noise(buffer) ** 2)
    return module.eval()


def saved(kind, config, folder):
    theirs = randomized(kind(config))
    theirs.save_pretrained(folder)
    return theirs


def close(found, expected, tolerance=1e-4):
    found, expected = (
        array.detach().numpy() if isinstance(array, torch.Tensor) else array
        for array in (found, expected)
    )
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def check_hidden_states(network, hidden_states, x, output):
    """Compare the output of every layer of a vision transformer, or of every stage."""
    found, recorded = jn.capture(network.module, network.variables, x, capture_intermediates=True)
    close(found, output)
    if "stack" in recorded:
        layers = recorded["stack"]
        states = [layers[f"layer_{i}"]["__call__"][0][0] for i in range(len(hidden_states) - 1)]
        expected = [state.detach().numpy() for state in hidden_states[1:]]
    else:
        states = [recorded[f"stage_{i}"] for i in range(1, len(hidden_states))]
        expected = [channels_last(state) for state in hidden_states[1:]]
    for state, one in zip(states, expected, strict=True):
        close(state, one)


def check_gradients(network, theirs, x, output):
    """Compare the gradient of every parameter, brought into place by the table."""
    weights = images(*output.shape, seed=1)
    theirs.zero_grad()
    (output * torch.tensor(weights)).sum().backward()
    names = {name: parameter.grad for name, parameter in saved_names(theirs).items()}

    def loss(params):
        y = network.module.apply({**network.variables, "params": params}, x)
        return jnp.sum(y * weights)

    found = {
        f"params/{path}": leaf
        for path, leaf in flatten_paths(jax.grad(loss)(network.variables["params"])).items()
    }
    table = ARCHITECTURES[theirs.config.model_type].rules(network.module)
    plan = make_plan(table, names, found)
    assert not plan.missing and not plan.unused
    for one in plan.assignments:
        arranged = one.from_file([names[name].numpy() for name in one.names])
        for path, expected in zip(one.paths, arranged, strict=True):
            scale = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(found[path], expected, atol=1e-4 * scale, err_msg=path)


def saved_names(theirs):
    """Return the parameters under the names that `save_pretrained` gives them."""
    renames = {
        ".layers.": ".encoder.layer.",
        ".attention.q_proj": ".attention.attention.query",
        ".attention.k_proj": ".attention.attention.key",
        ".attention.v_proj": ".attention.attention.value",
        ".attention.o_proj": ".attention.output.dense",
        ".mlp.fc1": ".intermediate.dense",
        ".mlp.fc2": ".output.dense",
    }
    parameters = {}
    for name, parameter in theirs.named_parameters():
        if theirs.config.model_type in ("vit", "deit"):
            for new, old in renames.items():
                name = name.replace(new, old)
        parameters[name] = parameter
    return parameters


def check_written(network, folder, kind, pixels, expected):
    """Check that transformers computes the same from what we write, and that it has all of it."""
    jn.pretrained.save(folder, network, layout="torch")
    theirs, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    output = theirs.eval()(pixels)
    close(output.logits if hasattr(output, "logits") else output.pooler_output, expected)
    again = jn.pretrained.load(folder)
    assert again.module == network.module
    jax.tree.map(np.testing.assert_array_equal, again.variables, network.variables)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False, "layer_norm_eps": 1e-3, "hidden_act": "gelu_new", "num_channels": 1},
        {"hidden_act": "relu", "image_size": 8, "attention_probs_dropout_prob": 0.1},
    ],
    ids=["default", "no_qkv_bias", "relu"],
)
def test_vit(tmp_path, options):
    config = transformers.ViTConfig(**VIT | options)
    theirs = saved(transformers.ViTForImageClassification, config, tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs")
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    x = images(2, *size, config.num_channels)
    output = theirs(channels_first(x), output_hidden_states=True)
    check_hidden_states(network, output.hidden_states, x, output.logits)
    check_gradients(network, theirs, x, output.logits)
    kind = transformers.ViTForImageClassification
    check_written(network, tmp_path / "ours", kind, channels_first(x), output.logits)


@pytest.mark.parametrize("pooler", [True, False])
def test_vit_without_a_head_returns_what_the_pooler_or_the_token_has(tmp_path, pooler):
    config = transformers.ViTConfig(**VIT | {"pooler_output_size": 6})
    theirs = randomized(transformers.ViTModel(config, add_pooling_layer=pooler))
    theirs.save_pretrained(tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs")
    x = images(2, 8, 12, 3)
    output = theirs(channels_first(x))
    tokens = network.module.apply(network.variables, x, method="encode")
    close(tokens, output.last_hidden_state)
    expected = output.pooler_output if pooler else output.last_hidden_state[:, 0]
    close(network.module.apply(network.variables, x), expected)
    if pooler:
        kind = transformers.ViTModel
        check_written(network, tmp_path / "ours", kind, channels_first(x), expected)
    else:
        jn.pretrained.save(tmp_path / "ours", network, layout="torch")
        written = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
        close(written(channels_first(x)).logits, expected)  # without labels the logits are that


def test_vit_at_another_size_with_interpolated_positions(tmp_path):
    config = transformers.ViTConfig(**VIT | {"image_size": 12})
    theirs = saved(transformers.ViTForImageClassification, config, tmp_path)
    network = jn.pretrained.load(tmp_path)
    for height, width in ((16, 20), (8, 8), (24, 12)):
        x = images(2, height, width, 3)
        params = dict(network.variables["params"])
        table = params["position"]["embedding"]
        resized = interpolate_positions(table, (3, 3), (height // 4, width // 4))
        params["position"] = {"embedding": resized}
        expected = theirs(channels_first(x), interpolate_pos_encoding=True).logits
        close(network.module.apply({"params": params}, x), expected)


def test_interpolated_positions_are_those_of_torch():
    table = images(2 + 5 * 7, 3)
    grid = torch.tensor(table[2:].reshape(1, 5, 7, 3)).permute(0, 3, 1, 2)
    for size in ((5, 7), (9, 3), (1, 20)):
        theirs = torch.nn.functional.interpolate(grid, size=size, mode="bicubic")
        ours = interpolate_positions(jnp.asarray(table), (5, 7), size, num_tokens=2)
        close(ours[2:], theirs.permute(0, 2, 3, 1).reshape(-1, 3), 1e-5)


@pytest.mark.parametrize("head", ["", "WithTeacher"])
def test_deit(tmp_path, head):
    kind = getattr(transformers, f"DeiTForImageClassification{head}")
    theirs = saved(kind, transformers.DeiTConfig(**VIT), tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs")
    x = images(2, 8, 12, 3)
    output = theirs(channels_first(x), output_hidden_states=True)
    check_hidden_states(network, output.hidden_states, x, output.logits)
    check_gradients(network, theirs, x, output.logits)
    check_written(network, tmp_path / "ours", kind, channels_first(x), output.logits)


def test_deit_without_a_head(tmp_path):
    theirs = saved(transformers.DeiTModel, transformers.DeiTConfig(**VIT), tmp_path)
    network = jn.pretrained.load(tmp_path)
    x = images(2, 8, 12, 3)
    output = theirs(channels_first(x))
    close(network.module.apply(network.variables, x), output.pooler_output)
    tokens = network.module.apply(network.variables, x, method="encode")
    close(tokens, output.last_hidden_state)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_scale_init_value": 0.0, "hidden_act": "relu", "layer_norm_eps": 1e-2},
        {"patch_size": 2, "num_channels": 1, "drop_path_rate": 0.2},
    ],
    ids=["default", "no_scale", "small_patches"],
)
def test_convnext(tmp_path, options):
    config = transformers.ConvNextConfig(**CONVNEXT | options)
    kind = transformers.ConvNextForImageClassification
    theirs = saved(kind, config, tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs")
    x = images(2, 16, 24, config.num_channels)
    output = theirs(channels_first(x), output_hidden_states=True)
    check_hidden_states(network, output.hidden_states, x, output.logits)
    check_gradients(network, theirs, x, output.logits)
    check_written(network, tmp_path / "ours", kind, channels_first(x), output.logits)


def test_convnext_without_a_head(tmp_path):
    config = transformers.ConvNextConfig(**CONVNEXT)
    theirs = saved(transformers.ConvNextModel, config, tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs")
    x = images(2, 16, 24, 3)
    expected = theirs(channels_first(x)).pooler_output
    close(network.module.apply(network.variables, x), expected)
    kind = transformers.ConvNextModel
    check_written(network, tmp_path / "ours", kind, channels_first(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_type": "basic"},
        {"layer_type": "basic", "downsample_in_first_stage": True, "hidden_sizes": [8, 8]},
        {},
        {"downsample_in_bottleneck": True, "downsample_in_first_stage": True},
        {"hidden_sizes": [32, 64], "num_channels": 1},
    ],
    ids=["basic", "basic_early", "bottleneck", "version_1", "usual_channels"],
)
def test_resnet(tmp_path, options):
    config = transformers.ResNetConfig(**RESNET | options)
    kind = transformers.ResNetForImageClassification
    theirs = saved(kind, config, tmp_path / "theirs")
    network = jn.pretrained.load(tmp_path / "theirs")
    x = images(4, 32, 48, config.num_channels)
    output = theirs(channels_first(x), output_hidden_states=True)
    check_hidden_states(network, output.hidden_states, x, output.logits)
    check_gradients(network, theirs, x, output.logits)
    check_written(network, tmp_path / "ours", kind, channels_first(x), output.logits)
    trained, _ = network.module.apply(network.variables, x, train=True, mutable=["batch_stats"])
    close(trained, theirs.train()(channels_first(x)).logits)


def test_resnet_without_a_head(tmp_path):
    theirs = saved(transformers.ResNetModel, transformers.ResNetConfig(**RESNET), tmp_path)
    network = jn.pretrained.load(tmp_path)
    x = images(2, 32, 48, 3)
    expected = theirs(channels_first(x)).pooler_output[..., 0, 0]
    close(network.module.apply(network.variables, x), expected)


class TorchvisionBlock(torch.nn.Module):
    """A residual block under the names of torchvision."""

    def __init__(self, channels, features, stride, sizes):
        super().__init__()
        out = features * (4 if len(sizes) == 3 else 1)
        self.sizes = sizes
        for index, size in enumerate(sizes, start=1):
            width = out if index == len(sizes) else features
            strided = stride if size == 3 and (index == 1 or len(sizes) == 3) else 1
            options = {"padding": size // 2, "stride": strided, "bias": False}
            setattr(self, f"conv{index}", torch.nn.Conv2d(channels, width, size, **options))
            setattr(self, f"bn{index}", torch.nn.BatchNorm2d(width))
            channels = width
        self.out = out

    def add_shortcut(self, channels, stride):
        projection = torch.nn.Conv2d(channels, self.out, 1, stride=stride, bias=False)
        self.downsample = torch.nn.Sequential(projection, torch.nn.BatchNorm2d(self.out))

    def forward(self, x):
        y = x
        for index in range(1, len(self.sizes) + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            y = torch.relu(y) if index < len(self.sizes) else y
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class TorchvisionResNet(torch.nn.Module):
    """A residual network under the names of torchvision."""

    def __init__(self, stages, sizes, num_classes=1000, width=64):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(stages, start=1):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                block = TorchvisionBlock(channels, width * 2 ** (stage - 1), stride, sizes)
                if stride != 1 or channels != block.out:
                    block.add_shortcut(channels, stride)
                blocks.append(block)
                channels = block.out
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(channels, num_classes)
        self.num_stages = len(stages)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "stages", "sizes"),
    [("resnet18", (2, 2, 2, 2), (3, 3)), ("resnet50", (3, 4, 6, 3), (1, 3, 1))],
)
def test_a_resnet_of_torchvision(tmp_path, name, stages, sizes):
    theirs = randomized(TorchvisionResNet(stages, sizes, num_classes=7, width=8))
    path = tmp_path / f"{name}.pth"
    torch.save(theirs.state_dict(), path)
    network = jn.pretrained.load(path, architecture=name, num_outputs=7, width=8)
    x = images(2, 64, 64, 3)
    expected = theirs(channels_first(x)).detach().numpy()
    scale = np.abs(expected).max()
    close(network.module.apply(network.variables, x) / scale, expected / scale)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViT", {}),
        ("ViT", {"size": {"height": 11, "width": 7}, "resample": 3}),
        ("ViT", {"size": {"shortest_edge": 12}, "do_center_crop": True, "crop_size": 14}),
        ("ViT", {"do_rescale": False, "resample": 1}),
        ("ViT", {"do_normalize": False, "rescale_factor": 0.01, "resample": 0}),
        ("ViT", {"resample": 4}),
        ("ViT", {"resample": 5}),
        ("DeiT", {}),
        ("DeiT", {"size": 9, "crop_size": {"height": 12, "width": 5}}),
        ("DeiT", {"do_resize": False, "crop_size": 9}),
        ("ConvNext", {}),
        ("ConvNext", {"size": 16}),
        ("ConvNext", {"size": 20, "crop_pct": 0.9, "image_mean": [0.1, 0.2, 0.3]}),
    ],
)
def test_an_image_processor(tmp_path, kind, options):
    module = f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}"
    theirs = getattr(pytest.importorskip(module), f"{kind}ImageProcessorPil")(**options)
    theirs.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    sizes = [(31, 17), (8, 50), (20, 20), (5, 4)]
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    theirs_too = theirs(pictures, input_data_format="channels_last")["pixel_values"]
    expected = np.moveaxis(np.stack(theirs_too), 1, -1)
    process = ImageProcessor.from_config(content)
    np.testing.assert_array_equal(process(pictures), expected)
    process.save(tmp_path)
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = again(pictures, input_data_format="channels_last")["pixel_values"]
    np.testing.assert_array_equal(np.moveaxis(np.stack(pixels), 1, -1), expected)


def test_a_network_that_was_trained_here_is_one_of_transformers(tmp_path):
    block = {"features": 16, "num_heads": 4, "mlp_dim": 24, "key_bias": True}
    config = jn.transformer.BlockConfig(**block)
    for index, (module, kind) in enumerate(
        [
            (jn.VisionTransformer(3, 4, 2, config), transformers.ViTForImageClassification),
            (jn.ConvNeXt((1, 1), (8, 12), 3), transformers.ConvNextForImageClassification),
            (jn.ResNet((1, 1), True, 3, width=8), transformers.ResNetForImageClassification),
        ]
    ):
        x = images(2, 16, 16, 1)
        shapes, _ = shapes_of(module, x)
        variables = perturbed(jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes))
        network = jn.pretrained.PretrainedNetwork(module, variables, ImageProcessor(size=(16, 16)))
        folder = tmp_path / str(index)
        expected = np.asarray(module.apply(variables, x))
        check_written(network, folder, kind, channels_first(x), expected)
        assert jn.pretrained.load(folder).processor == network.processor
