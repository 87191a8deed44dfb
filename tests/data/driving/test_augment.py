"""Driving augmentation: shifted views, and controls against the expert in the shifted car."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import driving
from jaxnets.data.driving.car import CarView

STYLE = driving.ExpertStyle()
ROW, COLUMN = (round(place) for place in driving.CAR_PLACE)


compiled_move = jax.jit(driving.move_car)
compiled_controls = jax.jit(functools.partial(driving.moved_controls, style=STYLE))


def move_one(frame, shift, turn):
    """Return one frame of the shifted and turned car; one program serves all tests."""
    pair = np.stack([frame, frame])
    return np.asarray(compiled_move(pair, np.float32([shift, 0]), np.float32([turn, 0])))[0]


def road(edge):
    """Draw a road to the left of a column, without a car."""
    frame = np.zeros((84, 96, 3), np.uint8)
    frame[:, :edge] = 200
    return frame


def test_the_view_of_a_car_that_is_not_moved_is_unchanged():
    frames = np.random.default_rng(0).integers(0, 256, (2, 84, 96, 3), np.uint8)
    found = compiled_move(frames, np.zeros(2, np.float32), np.zeros(2, np.float32))
    np.testing.assert_array_equal(found, frames)


def test_a_shift_of_the_car_to_the_left_moves_the_road_to_the_right_in_each_example():
    frames = np.stack([road(70)] * 2)
    found = np.asarray(compiled_move(frames, np.float32([4.0, -4.0]), np.zeros(2, np.float32)))
    pixels = 4 * driving.PIXELS_PER_METER[1]  # 6.2
    edges = (found[:, 10, :, 0] > 100).sum(axis=1)
    np.testing.assert_allclose(edges, [70 + pixels, 70 - pixels], atol=0.6)


def test_a_turn_of_the_car_to_the_left_moves_what_is_ahead_to_the_right():
    frame = np.zeros((84, 96, 3), np.uint8)
    frame[20:23, 47:50] = 255  # 52 pixels, 26 meters, straight ahead
    found = move_one(frame, 0.0, 0.2)
    rows, columns = np.nonzero(found[..., 0])
    meters = (ROW - 21) / driving.PIXELS_PER_METER[0]
    right = meters * np.sin(0.2) * driving.PIXELS_PER_METER[1]
    ahead = meters * np.cos(0.2) * driving.PIXELS_PER_METER[0]
    assert columns.mean() == pytest.approx(COLUMN + right, abs=1)
    assert rows.mean() == pytest.approx(ROW - ahead, abs=1)


def test_the_car_itself_stays_in_place_without_a_second_image():
    frame = road(96)
    frame[ROW - 5 : ROW + 6, COLUMN - 2 : COLUMN + 3] = [255, 0, 0]
    np.testing.assert_array_equal(move_one(frame, 3.0, 0.1), frame)


def expert_controls(*, left, turn, speed):
    track = np.stack([np.zeros(4000), 0.35 * np.arange(4000)], axis=1)
    forward = np.array([-np.sin(turn), np.cos(turn)])
    view = CarView(np.array([-left, 700.0]), forward, speed, 0.0)
    return driving.Expert(track, STYLE).controls(view)


@pytest.mark.parametrize("pose", [(1.0, 0.0), (-1.5, 0.0), (0.0, 0.1), (0.8, -0.2), (1.0, 0.1)])
@pytest.mark.parametrize("speed", [30.0, 60.0])
def test_moved_controls_are_those_of_the_expert_in_the_new_pose(pose, speed):
    left, turn = pose
    before = expert_controls(left=0.0, turn=0.0, speed=speed)
    columns = [np.full(20, value, np.float32) for value in (speed, left, turn)]
    found = np.asarray(compiled_controls(np.tile(before, (20, 1)), *columns))
    expected = expert_controls(left=left, turn=turn, speed=speed)
    np.testing.assert_allclose(found, np.tile(expected, (20, 1)), atol=0.01)
    assert abs(expected[0]) > 0.03


def test_the_controls_of_a_car_that_is_not_moved_are_unchanged():
    random = np.random.default_rng(0)
    controls = random.uniform([-0.35, 0, 0], [0.35, 0.3, 0.8], (20, 3)).astype(np.float32)
    zeros, speeds = np.zeros(20, np.float32), random.uniform(5, 70, 20).astype(np.float32)
    found = compiled_controls(controls, speeds, zeros, zeros)
    np.testing.assert_allclose(found, controls, atol=1e-5)


def test_half_of_the_examples_are_mirrored_with_their_steering():
    frames = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 6, 3), np.uint8)
    controls = np.tile(np.float32([[[0.3, 0.5, 0.1]]]), (200, 1, 1))
    changed = jax.jit(driving.random_mirror)(jax.random.key(0), frames, controls)
    new_frames, new_controls = map(np.asarray, changed)
    mirrored = new_controls[:, 0, 0] < 0
    assert 70 < mirrored.sum() < 130
    np.testing.assert_array_equal(new_frames[mirrored], frames[mirrored][..., ::-1, :])
    np.testing.assert_array_equal(new_frames[~mirrored], frames[~mirrored])
    np.testing.assert_array_equal(new_controls[..., 1:], controls[..., 1:])


def test_a_shadow_darkens_one_side_of_a_line_by_one_factor():
    frames = np.ones((50, 2, 20, 30, 3), np.float32)  # windows of two: the same shadow on both
    shadow = jax.jit(lambda key, x: driving.random_shadow(key, x, 0.6))
    found = np.asarray(shadow(jax.random.key(0), frames))
    assert found.min() > 0.39 and found.max() == 1
    shaded = 0
    for example in found:
        values = np.unique(example)
        assert len(values) <= 2
        np.testing.assert_array_equal(example[0], example[1])
        shaded += len(values) == 2
    assert shaded > 25


def test_brightness_is_one_factor_for_each_example():
    frames = np.ones((50, 4, 5, 3), np.float32)
    brightness = jax.jit(lambda key, x: driving.random_brightness(key, x, 0.2))
    found = np.asarray(brightness(jax.random.key(0), frames))
    assert (found.reshape(50, -1).std(axis=1) < 1e-6).all()
    factors = found[:, 0, 0, 0]
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2


@pytest.mark.parametrize("change", [driving.random_shadow, driving.random_brightness])
def test_a_strength_out_of_range_is_named(change):
    with pytest.raises(ValueError, match=r"strength is 1.5; give a number in \[0, 1\]"):
        change(jax.random.key(0), jnp.ones((1, 4, 4, 3)), 1.5)
