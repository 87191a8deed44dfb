"""The car equals gymnasium's, the expert is good, and a fleet equals its cars one by one."""

import multiprocessing
import os
import sys
import threading
import types
from multiprocessing.connection import Connection

import numpy as np
import pytest

from jaxnets.data import driving
from jaxnets.data.driving import fleet
from jaxnets.data.driving.car import CarView, _environment_class

pytest.importorskip("Box2D")
pytest.importorskip("gymnasium")
pytest.importorskip("pygame")


def wavy(index):
    return np.array([0.1 * np.sin(index / 5), 0.3, 0.0])


@pytest.mark.filterwarnings("ignore")  # of the packages that gymnasium imports
def test_every_pixel_and_every_point_equals_gymnasium():
    car = driving.RacingCar(frames_per_decision=3)
    car.reset(seed=5)
    import gymnasium

    environment = gymnasium.make("CarRacing-v3")
    frame, _ = environment.reset(seed=5)
    np.testing.assert_array_equal(car.frame, frame)
    points = 0.0
    for index in range(25):  # the camera zooms in: at first the edge of the field is in view
        car.step(wavy(index))
        for _ in range(3):
            frame, reward, *_ = environment.step(wavy(index))
            points += reward
        np.testing.assert_array_equal(car.frame, frame)
    assert car.score.points == pytest.approx(points)
    assert car.score.frames == 75 and not car.over


def test_leaving_the_field_costs_100_points_and_ends_the_drive():
    car = driving.RacingCar()
    car.reset(seed=0, look=False)
    outwards = car.view().position + np.outer(np.arange(150), car.view().forward) * 3.5
    expert = driving.Expert(outwards, driving.ExpertStyle(top_speed=40.0))
    points = 0.0
    while not car.over:
        points = car.score.points
        car.step(expert.controls(car.view()), look=False)
    assert car.score.frames < driving.MAX_FRAMES
    assert -100.5 <= car.score.points - points <= -99 and not car.score.finished
    assert car.score.frames_off_road > 50
    with pytest.raises(ValueError, match="over; start another one"):
        car.step(np.zeros(3))


def test_rendering_does_not_change_the_simulation():
    rendered, blind = driving.RacingCar(), driving.RacingCar()
    rendered.reset(seed=1)
    blind.reset(seed=1, look=False)
    for index in range(8):
        rendered.step(wavy(index))
        blind.step(wavy(index), look=False)
    assert rendered.score == blind.score
    np.testing.assert_array_equal(rendered.view().position, blind.view().position)
    assert not blind.frame.any() and rendered.frame.any()


def test_the_last_decision_is_cut_at_max_frames():
    car = driving.RacingCar(frames_per_decision=4, max_frames=10)
    car.reset(seed=0, look=False)
    lengths = []
    while not car.over:
        before = car.score.frames
        car.step(wavy(0), look=False)
        lengths.append(car.score.frames - before)
    assert lengths == [4, 4, 2]


@pytest.mark.parametrize(
    ("controls", "message"),
    [([0.0, 1.0], "three finite numbers"), ([np.nan, 0, 0], "three finite numbers")],
)
def test_invalid_controls_are_refused(controls, message):
    car = driving.RacingCar()
    car.reset(seed=0, look=False)
    with pytest.raises(ValueError, match=message):
        car.step(np.array(controls))


def test_a_missing_package_names_the_extra(monkeypatch):
    _environment_class.cache_clear()
    for name in [name for name in sys.modules if name.startswith("gymnasium")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxnets\[driving\]'"):
        driving.RacingCar()
    _environment_class.cache_clear()


def test_tracks_for_training_tuning_and_testing_are_disjoint():
    parts = [driving.TRAINING_SEEDS, driving.TUNING_SEEDS, driving.TEST_SEEDS]
    assert len(driving.TEST_SEEDS) == 50
    assert len(set().union(*parts)) == sum(map(len, parts))


STRAIGHT = np.stack([np.zeros(400), 3.5 * np.arange(400)], axis=1)


def view(*, left=0.0, turn=0.0, speed=50.0, along=300.0):
    forward = np.array([-np.sin(turn), np.cos(turn)])
    return CarView(np.array([-left, along]), forward, speed, 0.0)


def test_the_expert_steers_back_to_the_line():
    expert = driving.Expert(STRAIGHT)
    assert expert.controls(view())[0] == pytest.approx(0, abs=1e-6)
    assert expert.controls(view(left=2.0))[0] > 0.05
    assert expert.controls(view(left=-2.0))[0] < -0.05
    assert expert.controls(view(turn=0.2))[0] > 0.05
    left, right = (expert.controls(view(left=side, turn=side / 10)) for side in (-1, 1))
    np.testing.assert_allclose(left, right * [-1, 1, 1], rtol=1e-5)


def test_the_speed_profile_respects_lateral_acceleration_and_braking():
    turns = np.linspace(0, np.pi, 40)
    bend = np.stack([30 * np.cos(turns) - 30, 30 * np.sin(turns)], axis=1)
    straight = np.stack([np.zeros(100), np.linspace(-300, -3, 100)], axis=1)
    back = np.stack([np.full(100, -60.0), np.linspace(-3, -300, 100)], axis=1)
    style = driving.ExpertStyle(lateral=30.0, braking=20.0, top_speed=60.0)
    expert = driving.Expert(np.concatenate([straight, bend, back]), style)
    speeds = expert.speeds
    assert speeds[110:130] == pytest.approx(np.full(20, 30.0), rel=0.02)  # sqrt(30 * 30)
    assert speeds.max() == 60
    slowing = (speeds[:-1] ** 2 - speeds[1:] ** 2) / (2 * 3.0)
    assert slowing[:99].max() == pytest.approx(20, rel=0.01)
    assert expert.controls(view(speed=60.0, along=-5.0))[2] > 0.1


def drives(seeds, **config):
    return list(driving.drive(driving.ExpertDriver(), seeds, driving.FleetConfig(**config)))


def test_the_expert_reaches_850_points_on_tracks_it_was_not_tuned_on():
    points = [drive.score.points for drive in drives(driving.TEST_SEEDS[:4], look=False)]
    assert np.mean(points) >= 850


@pytest.mark.slow
def test_the_expert_reaches_850_points_on_average_over_the_50_test_tracks():
    found = drives(driving.TEST_SEEDS, look=False, num_workers=2)
    assert np.mean([drive.score.points for drive in found]) >= 850
    assert np.mean([drive.score.finished for drive in found]) >= 0.95


def test_a_fleet_equals_its_cars_one_by_one_in_any_number_of_processes():
    seeds = [3, 1, 2]
    short = {"max_frames": 60}
    singles = [drives([seed], **short)[0] for seed in seeds]
    for config in ({"num_cars": 2}, {"num_cars": 3, "num_workers": 2, "look": False}):
        found = drives(seeds, **config, **short)
        assert [drive.seed for drive in found] == seeds
        for one, other in zip(singles, found, strict=True):
            assert one.score == other.score
            for name, array in other.arrays.items():
                np.testing.assert_array_equal(array, one.arrays[name], err_msg=name)
    arrays = singles[0].arrays
    assert arrays["frames"].shape == (15, 96, 96, 3) and arrays["frames"].dtype == np.uint8
    assert arrays["decisions"].tolist() == list(range(15)) and set(arrays["seeds"]) == {3}
    np.testing.assert_array_equal(arrays["labels"], arrays["controls"])


def test_an_expert_with_noise_deviates_from_its_labels_reproducibly():
    config = driving.FleetConfig(look=False, max_frames=80)
    first, again = (
        next(iter(driving.drive(driving.ExpertDriver(0.1), [4], config))).arrays for _ in range(2)
    )
    np.testing.assert_array_equal(first["controls"], again["controls"])
    noise = first["controls"] - first["labels"]
    assert 0.01 < np.abs(noise[:, 0]).mean() < 0.2
    assert not noise[:, 2].any()


class Straight:
    """A driver that soon leaves the road."""

    def start(self, num_cars):
        return None

    def decide(self, memory, observation):
        return memory, np.tile([0.0, 0.1, 0.0], (len(observation.speeds), 1))


def test_a_drive_far_off_the_road_ends_early_with_give_up():
    lengths = []
    for give_up in (False, True):
        config = driving.FleetConfig(look=False, give_up=give_up)
        (drive,) = driving.drive(Straight(), [0], config)
        lengths.append(drive.score.frames)
    assert lengths[1] < lengths[0]


def test_errors_of_a_worker_reach_the_caller(monkeypatch):
    def start_thread(target, args, daemon):
        connection, config = args  # the caller closes its copy
        copy = Connection(os.dup(connection.fileno()))
        return threading.Thread(target=target, args=(copy, config), daemon=daemon)

    context = types.SimpleNamespace(Pipe=multiprocessing.Pipe, Process=start_thread)
    monkeypatch.setattr(fleet.multiprocessing, "get_context", lambda method: context)
    config = driving.FleetConfig(look=False, num_workers=1)
    with pytest.raises(ValueError, match="three finite numbers"):
        list(driving.drive(Confused(), [0], config))


class Confused(Straight):
    """A driver whose controls are not finite."""

    def decide(self, memory, observation):
        return memory, np.full((len(observation.speeds), 3), np.nan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: driving.RacingCar(frames_per_decision=0), "frames_per_decision 0"),
        (lambda: driving.FleetConfig(num_cars=0), "num_cars 0"),
        (lambda: driving.Expert(np.zeros((3, 2))), r"shape \(3, 2\) is not a line"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
