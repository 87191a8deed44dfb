"""Changed pictures, and controls that match them: against the expert in the moved car."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import driving
from jaxnets.data.driving.car import CarView

STYLE = driving.ExpertStyle()
ROW, COLUMN = (round(place) for place in driving.CAR_PLACE)


def road(edge):
    """A road to the left of a column, without a car."""
    frame = np.zeros((84, 96, 3), np.uint8)
    frame[:, :edge] = 200
    return frame


def test_a_car_that_is_not_moved_sees_the_same():
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 84, 96, 3), np.uint8))
    found = driving.move_car(frames, jnp.zeros(2), jnp.zeros(2))
    np.testing.assert_array_equal(found, frames)


def test_a_car_further_left_sees_the_road_further_right_and_each_by_its_own():
    frames = jnp.asarray(np.stack([road(70)] * 2))
    found = np.asarray(driving.move_car(frames, jnp.array([4.0, -4.0]), jnp.zeros(2)))
    pixels = 4 * driving.PIXELS_PER_METER[1]  # 6.2
    edges = (found[:, 10, :, 0] > 100).sum(axis=1)
    np.testing.assert_allclose(edges, [70 + pixels, 70 - pixels], atol=0.6)


def test_a_car_turned_left_sees_what_was_ahead_to_its_right():
    frame = np.zeros((84, 96, 3), np.uint8)
    frame[20:23, 47:50] = 255  # 52 pixels, 26 meters, straight ahead
    (found,) = driving.move_car(jnp.asarray(frame[None]), jnp.zeros(1), jnp.full(1, 0.2))
    rows, columns = np.nonzero(np.asarray(found)[..., 0])
    meters = (ROW - 21) / driving.PIXELS_PER_METER[0]
    right = meters * np.sin(0.2) * driving.PIXELS_PER_METER[1]
    ahead = meters * np.cos(0.2) * driving.PIXELS_PER_METER[0]
    assert columns.mean() == pytest.approx(COLUMN + right, abs=1)
    assert rows.mean() == pytest.approx(ROW - ahead, abs=1)


def test_the_car_itself_stays_where_it_is_and_leaves_no_ghost():
    frame = road(96)
    frame[ROW - 5 : ROW + 6, COLUMN - 2 : COLUMN + 3] = [255, 0, 0]
    (found,) = driving.move_car(jnp.asarray(frame[None]), jnp.full(1, 3.0), jnp.full(1, 0.1))
    np.testing.assert_array_equal(found, frame)


def expert_controls(*, left, turn, speed):
    track = np.stack([np.zeros(4000), 0.35 * np.arange(4000)], axis=1)
    forward = np.array([-np.sin(turn), np.cos(turn)])
    view = CarView(np.array([-left, 700.0]), forward, speed, 0.0)
    return driving.Expert(track, STYLE).controls(view)


@pytest.mark.parametrize("place", [(1.0, 0.0), (-1.5, 0.0), (0.0, 0.1), (0.8, -0.2), (1.0, 0.1)])
@pytest.mark.parametrize("speed", [30.0, 60.0])
def test_moved_controls_are_what_the_expert_does_from_there(place, speed):
    left, turn = place
    before = expert_controls(left=0.0, turn=0.0, speed=speed)
    found = driving.moved_controls(
        jnp.asarray(before)[None],
        jnp.full(1, speed),
        jnp.full(1, left),
        jnp.full(1, turn),
        STYLE,
    )
    expected = expert_controls(left=left, turn=turn, speed=speed)
    np.testing.assert_allclose(found[0], expected, atol=0.01)
    assert abs(expected[0]) > 0.03


def test_controls_are_kept_where_the_car_is():
    random = np.random.default_rng(0)
    controls = random.uniform([-0.35, 0, 0], [0.35, 0.3, 0.8], (20, 3)).astype(np.float32)
    zeros, speeds = jnp.zeros(20), jnp.asarray(random.uniform(5, 70, 20), jnp.float32)
    found = driving.moved_controls(jnp.asarray(controls), speeds, zeros, zeros, STYLE)
    np.testing.assert_allclose(found, controls, atol=1e-5)


def test_half_of_the_examples_are_mirrored_with_their_steering():
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 256, (200, 1, 4, 6, 3), np.uint8))
    controls = jnp.tile(jnp.array([[[0.3, 0.5, 0.1]]]), (200, 1, 1))
    moved, changed = driving.random_mirror(jax.random.key(0), frames, controls)
    mirrored = np.asarray(changed)[:, 0, 0] < 0
    assert 70 < mirrored.sum() < 130
    np.testing.assert_array_equal(moved[mirrored], frames[mirrored][..., ::-1, :])
    np.testing.assert_array_equal(moved[~mirrored], frames[~mirrored])
    np.testing.assert_array_equal(changed[..., 1:], controls[..., 1:])


def test_a_shadow_darkens_one_side_of_a_line_by_one_factor():
    frames = jnp.ones((50, 2, 20, 30, 3))  # windows of two: the same shadow on both
    found = np.asarray(driving.random_shadow(jax.random.key(0), frames, 0.6))
    assert found.min() > 0.39 and found.max() == 1
    shaded = 0
    for example in found:
        values = np.unique(example)
        assert len(values) <= 2
        np.testing.assert_array_equal(example[0], example[1])
        shaded += len(values) == 2
    assert shaded > 25


def test_brightness_is_one_factor_for_each_example():
    frames = jnp.ones((50, 4, 5, 3))
    found = np.asarray(driving.random_brightness(jax.random.key(0), frames, 0.2))
    assert (found.reshape(50, -1).std(axis=1) < 1e-6).all()
    factors = found[:, 0, 0, 0]
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2


@pytest.mark.parametrize("change", [driving.random_shadow, driving.random_brightness])
def test_a_strength_out_of_range_is_named(change):
    with pytest.raises(ValueError, match=r"strength is 1.5; give a number in \[0, 1\]"):
        change(jax.random.key(0), jnp.ones((1, 4, 4, 3)), 1.5)
