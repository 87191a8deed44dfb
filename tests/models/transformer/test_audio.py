"""The transformer over audio frames."""

import numpy as np
import pytest
from checks import check_module, count_parameters, mostly_slow, shapes_of
from transformer_problem import (
    BLOCK,
    DROPPING,
    NORM,
    check_padding,
    check_wrong_lengths,
    close,
    config,
    floats,
    forward,
    made,
)

from jaxnets.models.transformer import AudioTransformer

FRAMES, LENGTHS = floats(3, 13, 5), np.array([13, 6, 0], np.int32)
AUDIO = AudioTransformer(3, num_layers=1, config=config(positions="sinusoidal", **DROPPING))


NUM_PARAMETERS = 3 * 5 * 8 + 8 + 3 * 64 + 8 + BLOCK + NORM + 27


@pytest.mark.slow  # the default group has its padding and gradients below
def test_an_audio_transformer_passes_every_check():
    check_module(AUDIO, FRAMES, LENGTHS, num_parameters=NUM_PARAMETERS)


def test_an_audio_transformer_has_the_parameters_of_its_parts():
    variables, output = shapes_of(AUDIO, FRAMES, LENGTHS)
    assert count_parameters(variables) == NUM_PARAMETERS
    assert output.shape == (3, 3)


@pytest.mark.parametrize("more", mostly_slow([1, 2], [1]))
def test_padding_of_a_sound_changes_neither_output_nor_gradients(more):
    """Also if it makes an odd number of frames even."""
    check_padding(AUDIO, FRAMES, LENGTHS, more=more)


def test_a_single_unpadded_sound_gives_its_output_in_the_batch():
    variables = made(AUDIO, FRAMES)
    batched = forward(AUDIO, variables, FRAMES, LENGTHS)
    close(forward(AUDIO, variables, FRAMES[1:2, :6]), batched[1:2])


def test_a_wrong_length_in_a_compiled_program_gives_nan_in_its_row_only():
    check_wrong_lengths(AUDIO, FRAMES)


def apply(*inputs):
    return AUDIO.apply(made(AUDIO, FRAMES), *inputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AudioTransformer(strides=(2, 0)), "strides="),
        (lambda: apply(floats(2, 0, 5)), "no frame"),
        (lambda: apply(FRAMES[0]), r"\(13, 5\)"),
        (lambda: apply(FRAMES, LENGTHS + 1), r"length 14 is not in \[0, 13\]"),
    ],
)
def test_a_wrong_field_or_input_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
