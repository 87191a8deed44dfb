"""The vision transformer."""

import functools

import jax
import numpy as np
import pytest
from checks import check_module, check_preset
from transformer_problem import (
    BLOCK,
    DROPPING,
    NORM,
    close,
    config,
    floats,
    forward,
    made,
)

from jaxnets import transformer
from jaxnets.core import capture
from jaxnets.models.transformer import PatchEncoder, VisionTransformer

IMAGES = floats(2, 4, 6, 3)
TOKEN = VisionTransformer(3, patch_size=2, num_layers=1, config=config(**DROPPING))
DISTILLED = VisionTransformer(3, 2, num_layers=1, config=config(), distillation="head")
POOLED = VisionTransformer(None, 2, num_layers=1, config=config(), pooler_dim=5)
MEAN = VisionTransformer(3, 2, num_layers=1, config=config(positions=None), pool="mean")


@functools.partial(jax.jit, static_argnums=0)
def encode(module, variables, images):
    return module.apply(variables, images, method="encode")


@pytest.mark.slow  # of the default group is the masked autoencoder, with the same encoder
def test_a_vision_transformer_passes_every_check():
    num_parameters = 12 * 8 + 8 + 8 + 7 * 8 + BLOCK + NORM + 27
    check_module(TOKEN, IMAGES, num_parameters=num_parameters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "more"), [(DISTILLED, 8 + 8 + 27), (POOLED, 8 * 5 + 5 - 27)], ids=["two", "pooler"]
)
def test_a_network_with_two_heads_or_a_pooler_passes_every_check(module, more):
    check_module(module, IMAGES, num_parameters=12 * 8 + 8 + 8 + 7 * 8 + BLOCK + NORM + 27 + more)


def test_two_heads_are_averaged_over_the_class_and_the_distillation_token():
    variables = made(DISTILLED, IMAGES)
    tokens = encode(DISTILLED, variables, IMAGES)
    assert tokens.shape == (2, 2 + 6, 8)
    heads = variables["params"]["head"], variables["params"]["distillation_head"]
    logits = [tokens[:, i] @ head["kernel"] + head["bias"][None] for i, head in enumerate(heads)]
    close(forward(DISTILLED, variables, IMAGES), (logits[0] + logits[1]) / 2)


def test_a_distillation_token_alone_leaves_the_head_on_the_class_token():
    module = DISTILLED.clone(distillation="token")
    variables = made(DISTILLED, IMAGES)
    params = {k: v for k, v in variables["params"].items() if k != "distillation_head"}
    head = params["head"]
    tokens = encode(DISTILLED, variables, IMAGES)
    expected = tokens[:, 0] @ head["kernel"] + head["bias"][None]
    close(forward(module, {"params": params}, IMAGES), expected)


def test_a_pooler_is_a_dense_layer_and_tanh_on_the_token():
    variables = made(POOLED, IMAGES)
    tokens, pooler = encode(POOLED, variables, IMAGES), variables["params"]["pooler"]
    expected = np.tanh(tokens[:, 0] @ pooler["kernel"] + pooler["bias"][None])
    output, recorded = capture(POOLED, variables, IMAGES)
    assert output.shape == (2, 5)
    close(output, expected)
    close(recorded["features"], expected)


def test_distillation_tokens_stay_where_only_some_patches_are_visible():
    module = PatchEncoder(2, 1, config(), use_distillation_token=True)
    variables = made(module, IMAGES)
    everything = np.tile(np.arange(6)[None], (2, 1))
    close(forward(module, variables, IMAGES, everything), forward(module, variables, IMAGES))
    assert forward(module, variables, IMAGES, everything[:, :2]).shape == (2, 4, 8)


def test_a_patch_holds_the_pixels_of_one_square():
    """Without positions the mean over patches depends on their pixels, but not on their order."""
    variables = made(MEAN, IMAGES)
    plain = forward(MEAN, variables, IMAGES)
    swapped, mixed = IMAGES.copy(), IMAGES.copy()
    swapped[:, :2, :2], swapped[:, 2:, 4:] = IMAGES[:, 2:, 4:], IMAGES[:, :2, :2]
    close(forward(MEAN, variables, swapped), plain)
    mixed[:, 0, 1], mixed[:, 0, 2] = IMAGES[:, 0, 2], IMAGES[:, 0, 1]
    assert np.abs(forward(MEAN, variables, mixed) - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("vit_tiny16", 5_717_416),
        ("vit_small16", 22_050_664),
        ("vit_base16", 86_567_656),
        ("vit_large16", 304_326_632),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name, num_parameters):
    module = getattr(transformer, name)(scan_layers=True)
    check_preset(module, (1, 224, 224, 3), num_parameters=num_parameters, output_shape=(1, 1000))


@pytest.mark.parametrize(
    ("name", "num_parameters"), [("vit_tiny16", 5_910_800), ("vit_base16", 87_338_192)]
)
def test_a_distilled_preset_has_the_published_number_of_parameters(name, num_parameters):
    """Those of DeiT-Ti and DeiT-B with distillation, as their authors published them."""
    module = getattr(transformer, name)(scan_layers=True, distillation="head")
    check_preset(module, (1, 224, 224, 3), num_parameters=num_parameters, output_shape=(1, 1000))


def apply(images):
    return TOKEN.apply(made(TOKEN, IMAGES), images)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionTransformer(pool="max"), "'max'"),
        (lambda: VisionTransformer(pooler_dim=0), "pooler_dim=0"),
        (lambda: VisionTransformer(distillation="soft"), "'soft'; choose 'token', 'head' or None"),
        (lambda: VisionTransformer(distillation="head", pool="mean"), "needs pool='token'"),
        (lambda: VisionTransformer(None, distillation="head"), "num_outputs=None"),
        (lambda: apply(floats(2, 5, 6, 3)), "5 x 6 .* 2 x 2"),
        (lambda: apply(floats(4, 6, 3)), r"\(4, 6, 3\).*inputs\[None\]"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_visible_patches_out_of_range_are_refused_or_nan():
    module = PatchEncoder(4, 1, config(), use_token=False)
    images = np.ones((1, 8, 8, 1), np.float32)
    variables = made(module, images)
    with pytest.raises(ValueError, match=r"visible holds 4; give indices in \[0, 4\)"):
        module.apply(variables, images, np.array([[0, 4]]))
    with pytest.raises(ValueError, match="give integers"):
        module.apply(variables, images, np.array([[0.0, 1.0]]))
    chosen = forward(module, variables, images, np.array([[3, 0]], np.uint8))
    assert np.isfinite(chosen).all()
    assert np.isnan(forward(module, variables, images, np.array([[-1, 0]], np.int8))).all()
