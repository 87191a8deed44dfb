"""The CarRacing-v3 environment: car, camera, score and privileged state."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import numpy as np

# Tracks are pure functions of a seed.
TRAINING_SEEDS = range(0, 50_000)
TUNING_SEEDS = range(50_000, 60_000)
TEST_SEEDS = range(100_000, 100_050)

#: Shape of a camera frame: height, width, channels.
FRAME_SHAPE = (96, 96, 3)
#: Frame rows that show the world; below is a panel with instruments and score.
NUM_WORLD_ROWS = 84
#: Half the width of the road in meters.
HALF_ROAD = 40 / 6
#: Frames per episode, as in the registered environment.
MAX_FRAMES = 1000
FRAMES_PER_SECOND = 50

# Pixels by which antialiased edges may exceed their polygon.
_DRAWING_MARGIN = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class CarView:
    """Pose and motion of the car: privileged state, not observable from the frames.

    Attributes:
        position: float64 [2], in meters.
        forward: unit vector, float64 [2].
        speed: in meters per second.
        yaw_rate: in radians per second, positive to the left.
    """

    position: np.ndarray
    forward: np.ndarray
    speed: float
    yaw_rate: float


@dataclasses.dataclass
class Score:
    """Score of a drive so far.

    Attributes:
        points: the return: 1000 for all tiles of the track, minus 0.1 per frame, minus 100 for
            leaving the field.
        frames: simulated frames.
        frames_off_road: frames with the center of the car off the road.
        share_visited: fraction of tiles visited, in [0, 1].
        finished: whether 95% of the tiles were visited, gymnasium's threshold for a complete lap.
            (Gymnasium ends an episode only when all tiles were visited, or the first one after
            these, which a car that has missed a tile never does.)
    """

    points: float = 0.0
    frames: int = 0
    frames_off_road: int = 0
    share_visited: float = 0.0
    finished: bool = False


class RacingCar:
    """Headless CarRacing-v3 of gymnasium with frame skip.

    Physics, scores and every pixel equal gymnasium's. It is faster because skipped frames are not
    rendered, nor polygons outside the frame.

    Args:
        frames_per_decision: frame skip: each decision is applied for so many of the 50 frames per
            second.
        max_frames: frames per episode.

    Attributes:
        frame: the last rendered camera frame, uint8 [96, 96, 3].
        score: of this episode.
        track: center line of the track in driving direction, [points, 2].
        over: whether the episode has ended: the lap is complete, the car has left the field, or
            `max_frames` is reached.

    Raises:
        ImportError: gymnasium, Box2D or pygame is missing; names the extra to install.
        ValueError: an argument below 1.

    Example:
        >>> car = RacingCar(frames_per_decision=4)  # doctest: +SKIP
        >>> car.reset(seed=7)  # doctest: +SKIP
        >>> while not car.over:  # doctest: +SKIP
        ...     car.step(np.array([0.0, 0.1, 0.0]))  # steering, gas, brake
    """

    def __init__(self, *, frames_per_decision: int = 4, max_frames: int = MAX_FRAMES) -> None:
        if min(frames_per_decision, max_frames) < 1:
            raise ValueError(
                f"frames_per_decision {frames_per_decision} and max_frames {max_frames}: give 1 "
                "or more for each"
            )
        self._environment = _environment_class()()
        self._frames_per_decision, self._max_frames = frames_per_decision, max_frames
        self.frame = np.zeros(FRAME_SHAPE, np.uint8)
        self.score, self.over = Score(), True
        self.track = np.zeros((0, 2))

    def reset(self, seed: int, *, look: bool = True) -> None:
        """Start an episode on the track of a seed.

        Args:
            seed: non-negative; the track is a pure function of it.
            look: render a frame.
        """
        self._environment.render_frames = look
        frame, _ = self._environment.reset(seed=seed)
        if look:
            self.frame = frame
        self.track = np.array([tile[2:] for tile in self._environment.track])
        self.score, self.over = Score(), False

    def step(self, controls: np.ndarray, *, look: bool = True) -> None:
        """Apply the controls for `frames_per_decision` frames, or until the episode ends.

        Args:
            controls: steering in [-1, 1], positive to the right; gas and brake in [0, 1].
            look: render the last frame.

        Raises:
            ValueError: controls that are not three finite numbers, or an episode that is over.
        """
        controls = np.asarray(controls, np.float64)
        if controls.shape != (3,) or not np.isfinite(controls).all():
            raise ValueError(
                f"controls are {controls}; give three finite numbers: steering, gas and brake"
            )
        if self.over:
            raise ValueError("the drive is over; start another one with reset(seed)")
        controls = np.clip(controls, (-1, 0, 0), 1)
        environment, score = self._environment, self.score
        for frame in range(1, self._frames_per_decision + 1):
            last = frame == self._frames_per_decision or score.frames + 1 == self._max_frames
            environment.render_frames = look and last
            rendered, reward, ended, _, _ = environment.step(controls)
            score.points += float(reward)
            score.frames += 1
            score.frames_off_road += int(self.distance_to_center() > HALF_ROAD)
            score.share_visited = environment.tile_visited_count / len(environment.track)
            score.finished = score.share_visited >= environment.lap_complete_percent
            self.over = bool(ended) or score.frames == self._max_frames
            if self.over or last:
                break
        if rendered is not None:
            self.frame = rendered

    def view(self) -> CarView:
        """Return the privileged state for the expert."""
        hull = self._environment.car.hull
        forward = np.array(hull.GetWorldVector((0, 1)))
        return CarView(np.array(hull.position), forward, self.speed, float(hull.angularVelocity))

    @property
    def speed(self) -> float:
        """Speed in meters per second."""
        velocity = self._environment.car.hull.linearVelocity
        return float(np.hypot(velocity[0], velocity[1]))

    def distance_to_center(self) -> float:
        """Return the distance in meters to the nearest point of the center line."""
        x, y = self._environment.car.hull.position
        return float(np.sqrt(((self.track - np.array([[x, y]])) ** 2).sum(axis=1).min()))


@functools.cache
def _environment_class() -> Any:
    """Subclass gymnasium's environment, which is imported only here."""
    # No window, no sound, no banner: for headless machines.
    for name, value in (
        ("SDL_VIDEODRIVER", "dummy"),
        ("SDL_AUDIODRIVER", "dummy"),
        ("PYGAME_HIDE_SUPPORT_PROMPT", "1"),
    ):
        os.environ.setdefault(name, value)
    try:
        import warnings

        with warnings.catch_warnings():  # pygame imports pkg_resources, Box2D is wrapped by SWIG
            warnings.simplefilter("ignore")
            from gymnasium.envs.box2d import car_racing
    except Exception as error:  # gymnasium has its own exception for missing Box2D and pygame
        if not isinstance(error, ImportError) and "gymnasium" not in type(error).__module__:
            raise
        raise ImportError(
            f"driving needs gymnasium, Box2D and pygame ({error}); pip install 'jaxnets[driving]'"
        ) from error

    base: Any = car_racing.CarRacing

    class Environment(base):
        render_frames = True
        cached_road: Any = None

        def _render(self, mode: str) -> Any:
            return super()._render(mode) if self.render_frames else None

        def _render_road(self, zoom: float, translation: Any, angle: float) -> None:
            def draw(polygon: Any, color: Any) -> None:
                self._draw_colored_polygon(self.surf, polygon, color, zoom, translation, angle)

            visible = functools.partial(
                _visible,
                zoom=zoom,
                translation=translation,
                angle=angle,
                size=(car_racing.WINDOW_W, car_racing.WINDOW_H),
            )
            side = car_racing.PLAYFIELD
            field = [(side, side), (side, -side), (-side, -side), (-side, side)]
            # No edge of the field is in view: filling the frame is cheaper than a polygon.
            view_radius = np.hypot(car_racing.WINDOW_W, car_racing.WINDOW_H) / zoom
            if max(map(abs, self.car.hull.position)) + view_radius < side:
                self.surf.fill(self.bg_color)
            else:
                self._draw_colored_polygon(
                    self.surf, field, self.bg_color, zoom, translation, angle, clip=False
                )
            grass = _grass(car_racing.GRASS_DIM)
            for index in visible(grass):
                draw(grass[index].tolist(), self.grass_color)
            if self.cached_road is not self.road_poly:  # a new list at each reset
                self.cached_road = self.road_poly
                self.road_corners = np.array([polygon for polygon, _ in self.road_poly], float)
            for index in visible(self.road_corners):
                polygon, color = self.road_poly[index]
                draw(polygon, [int(value) for value in color])

    return Environment


@functools.cache
def _grass(size: float) -> np.ndarray:
    """Return the corners of the grass patches in drawing order, [patches, 4, 2]."""
    corners = np.array([(1, 0), (0, 0), (0, 1), (1, 1)], float)
    places = np.array([(x, y) for x in range(-20, 20, 2) for y in range(-20, 20, 2)], float)
    return size * (places[:, None] + corners[None])


def _visible(
    polygons: np.ndarray,
    *,
    zoom: float,
    translation: Any,
    angle: float,
    size: tuple[int, int],
) -> np.ndarray:
    """Return the indices of the polygons [polygons, corners, 2] that may intersect the frame."""
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = polygons[..., 0], polygons[..., 1]
    columns = (x * cosine - y * sine) * zoom + translation[0]  # pixels, [polygons, corners]
    rows = (x * sine + y * cosine) * zoom + translation[1]
    inside = np.ones(len(polygons), bool)
    for values, length in ((columns, size[0]), (rows, size[1])):
        inside &= values.max(axis=1) >= -_DRAWING_MARGIN
        inside &= values.min(axis=1) <= length + _DRAWING_MARGIN
    return np.flatnonzero(inside)
