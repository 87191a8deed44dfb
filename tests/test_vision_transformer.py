"""Transformers over the patches of an image and over the frames of a sound."""

import jax
import numpy as np
import pytest
from checks import check_module, check_preset
from transformer_problem import (
    BLOCK,
    DROPPING,
    NORM,
    check_padding,
    check_wrong_lengths,
    close,
    config,
    floats,
    made,
)

from jaxnets import transformer
from jaxnets.transformer import AudioTransformer, VisionTransformer

IMAGES, FRAMES = floats(2, 4, 6, 3), floats(3, 13, 5)
LENGTHS = np.array([13, 6, 0], np.int32)
TOKEN = VisionTransformer(3, patch_size=2, num_layers=1, config=config(**DROPPING))
MEAN = VisionTransformer(3, 2, num_layers=1, config=config(positions=None), pool="mean")
AUDIO = AudioTransformer(3, num_layers=1, config=config(positions="sinusoidal", **DROPPING))


@pytest.mark.parametrize(
    ("module", "inputs", "num_parameters"),
    [
        (TOKEN, (IMAGES,), 12 * 8 + 8 + 8 + 7 * 8 + BLOCK + NORM + 27),
        (AUDIO, (FRAMES, LENGTHS), 3 * 5 * 8 + 8 + 3 * 64 + 8 + BLOCK + NORM + 27),
    ],
    ids=["vision", "audio"],
)
def test_a_model_passes_every_check(module, inputs, num_parameters):
    check_module(module, *inputs, num_parameters=num_parameters)


def test_a_patch_holds_the_pixels_of_one_square():
    """Without positions the mean over the patches does not see their order, but their pixels."""
    variables, run = made(MEAN, IMAGES), jax.jit(MEAN.apply)
    swapped, mixed = IMAGES.copy(), IMAGES.copy()
    swapped[:, :2, :2], swapped[:, 2:, 4:] = IMAGES[:, 2:, 4:], IMAGES[:, :2, :2]
    close(run(variables, swapped), run(variables, IMAGES))
    mixed[:, 0, 1], mixed[:, 0, 2] = IMAGES[:, 0, 2], IMAGES[:, 0, 1]
    assert np.abs(run(variables, mixed) - run(variables, IMAGES)).max() > 1e-3


@pytest.mark.parametrize("more", [1, 2])
def test_padding_of_a_sound_changes_neither_output_nor_gradients(more):
    """Also where it makes an odd number of frames even."""
    check_padding(AUDIO, FRAMES, LENGTHS, more=more)


def test_a_sound_alone_and_cut_to_its_length_gives_its_answer_in_the_batch():
    variables = made(AUDIO, FRAMES)
    batched = AUDIO.apply(variables, FRAMES, LENGTHS)
    close(AUDIO.apply(variables, FRAMES[1:2, :6]), batched[1:2])


def test_a_wrong_length_in_a_compiled_program_gives_nan_for_its_sound_alone():
    check_wrong_lengths(AUDIO, FRAMES)


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


def apply(module, usual, *inputs):
    return module.apply(made(module, usual), *inputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionTransformer(pool="max"), "'max'"),
        (lambda: AudioTransformer(strides=(2, 0)), "strides="),
        (lambda: apply(TOKEN, IMAGES, floats(2, 5, 6, 3)), "5 x 6 .* 2 x 2"),
        (lambda: apply(TOKEN, IMAGES, floats(4, 6, 3)), r"\(4, 6, 3\).*inputs\[None\]"),
        (lambda: apply(AUDIO, FRAMES, floats(2, 0, 5)), "no frame"),
        (lambda: apply(AUDIO, FRAMES, FRAMES, LENGTHS + 1), r"length 14 is not in \[0, 13\]"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
