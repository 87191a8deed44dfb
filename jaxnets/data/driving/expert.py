"""A driver that sees the whole track: it follows the center line and brakes for the bends."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxnets.data.driving.car import HALF_ROAD, CarView

#: Metres from the front to the rear axle of gymnasium's car.
WHEELBASE = 3.24
#: Steering is the angle of the front wheels that is asked for, in radians; they turn so far.
FULL_LOCK = 0.4
# Less brake than this only heats it.
_LEAST_BRAKE = 0.02


@dataclasses.dataclass(frozen=True)
class ExpertStyle:
    """How an expert drives.

    The numbers were searched for on the tracks of `TUNING_SEEDS`, and then speed and sideways
    acceleration lowered, for less than 1% of the points, so that a bend is always in the picture
    before the car has to brake for it, and so that a push costs little.

    Attributes:
        lateral: sideways acceleration allowed in bends, in meters per second squared.
        braking: deceleration that the plan counts on, in meters per second squared.
        top_speed: in meters per second.
        reach: meters from the car to the point it steers for, at rest.
        reach_seconds: what a meter per second adds to the reach.
        steering: factor on the angle of pure pursuit, which knows of no slip.
        damping: seconds; the turning of the car is held against by this times its yaw rate.
        preview: seconds; the speed is that planned for where the car will be then.
        gas: pedal per meter per second that the car is too slow.
        brake: pedal per meter per second that it is too fast.
        ease: share of the gas that is taken back at full lock, lest the rear slides.
    """

    lateral: float = 95.0
    braking: float = 85.0
    top_speed: float = 75.0
    reach: float = 8.5
    reach_seconds: float = 0.18
    steering: float = 2.8
    damping: float = 0.01
    preview: float = 0.024
    gas: float = 0.1
    brake: float = 0.05
    ease: float = 0.7


class Expert:
    """A driver of one track.

    It steers by pure pursuit: the front wheels are turned so that a circle through the point of
    the center line some meters ahead would be driven, `atan(2 wheelbase sin(bearing) / distance)`.
    Its speed at each point is the least of the top speed, of `sqrt(lateral / curvature)`, and of
    that from which the bends behind can still be braked for.

    Args:
        track: center line, a closed line in the direction of driving, [points, 2], in meters.
        style: how to drive.

    Attributes:
        speeds: planned for each point of the track, in meters per second.

    Raises:
        ValueError: a track that is no line of points.

    References:
        Coulter 1992, CMU-RI-TR-92-01 (pure pursuit).

    Example:
        On a circle of radius 100 the speed is that of the allowed sideways acceleration:

        >>> turns = np.linspace(0, 2 * np.pi, 200, endpoint=False)
        >>> circle = 100 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        >>> Expert(circle, ExpertStyle(lateral=25.0)).speeds.round(1)[:3].tolist()
        [50.0, 50.0, 50.0]
    """

    def __init__(self, track: np.ndarray, style: ExpertStyle | None = None) -> None:
        track = np.asarray(track, np.float64)
        if track.ndim != 2 or track.shape[1] != 2 or len(track) < 8:
            raise ValueError(
                f"a track of shape {track.shape} is no line; give at least 8 points [points, 2]"
            )
        self.track, self.style = track, ExpertStyle() if style is None else style
        ways = np.roll(track, -1, axis=0) - track
        self._steps = np.linalg.norm(ways, axis=1)
        self._directions = ways / np.maximum(self._steps, 1e-9)[:, None]
        self.speeds = self._plan()

    def _plan(self) -> np.ndarray:
        """Plan the speeds: by curvature, then backwards twice round for the braking."""
        style = self.style
        # Over a few points, as the line is a little uneven where its ends were joined.
        ahead = np.roll(self.track, -3, axis=0) - self.track
        behind = self.track - np.roll(self.track, 3, axis=0)
        turn = np.arctan2(ahead[:, 1], ahead[:, 0]) - np.arctan2(behind[:, 1], behind[:, 0])
        turn = np.abs((turn + np.pi) % (2 * np.pi) - np.pi)
        length = (np.linalg.norm(ahead, axis=1) + np.linalg.norm(behind, axis=1)) / 2
        speeds = np.sqrt(style.lateral / np.maximum(turn / length, 1e-9))
        speeds = np.minimum(speeds, style.top_speed)
        for index in reversed(range(2 * len(speeds))):
            here, then = index % len(speeds), (index + 1) % len(speeds)
            braked = math.sqrt(speeds[then] ** 2 + 2 * style.braking * self._steps[here])
            speeds[here] = min(speeds[here], braked)
        return speeds

    def controls(self, view: CarView) -> np.ndarray:
        """Decide from where the car is and how it moves.

        Args:
            view: of the car, which may be anywhere, as this is also asked while others drive.

        Returns:
            Steering in [-1, 1], gas and brake in [0, 1], float32 [3].
        """
        style = self.style
        nearest = self._nearest(view)
        target = self.track[self._ahead(nearest, style.reach + style.reach_seconds * view.speed)]
        way = target - view.position
        forward = view.forward
        bearing = math.atan2(
            forward[0] * way[1] - forward[1] * way[0], forward[0] * way[0] + forward[1] * way[1]
        )
        distance = max(float(np.hypot(*way)), 1e-6)
        angle = style.steering * pursuit_angle(bearing, distance) - style.damping * view.yaw_rate
        steering = -min(max(angle, -FULL_LOCK), FULL_LOCK)
        planned = self.speeds[self._ahead(nearest, style.preview * view.speed)]
        lack = float(planned) - view.speed
        gas = min(max(style.gas * lack, 0.0), 1.0) * (1 - style.ease * abs(steering) / FULL_LOCK)
        brake = min(max(-style.brake * lack, 0.0), 0.8)
        return np.array([steering, gas, brake if brake > _LEAST_BRAKE else 0.0], np.float32)

    def _nearest(self, view: CarView) -> int:
        """Return the nearest point, rather of a piece of road that leads where the car points."""
        distances = np.linalg.norm(self.track - view.position[None], axis=1)
        return int((distances - HALF_ROAD * (self._directions @ view.forward)).argmin())

    def _ahead(self, start: int, meters: float) -> int:
        """Return the first point at least so far along the line from another one."""
        index, gone = start, 0.0
        while gone < meters:
            gone += self._steps[index]
            index = (index + 1) % len(self.track)
        return index


def pursuit_angle(bearing: float, distance: float) -> float:
    """Return the angle of the front wheels on the circle through a point.

    Args:
        bearing: of the point, in radians to the left of where the car points.
        distance: to it, in meters.

    Returns:
        Radians to the left.
    """
    return math.atan(2 * WHEELBASE * math.sin(bearing) / distance)
