"""The privileged expert: pure pursuit of the center line with a planned speed profile."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxnets.data.driving.car import HALF_ROAD, CarView

#: Meters between the front and rear axles of gymnasium's car.
WHEELBASE = 3.24
#: Steering commands the angle of the front wheels in radians; this is its limit.
FULL_LOCK = 0.4
# Weaker braking is rounded to none.
_LEAST_BRAKE = 0.02


@dataclasses.dataclass(frozen=True)
class ExpertStyle:
    """Parameters of the expert.

    They were tuned on the tracks of `TUNING_SEEDS`. Then speed and lateral acceleration were
    lowered, at a cost of less than 1% of the points, so that a bend is always in the frame before
    the car has to brake for it, and so that a disturbance costs little.

    Attributes:
        lateral: maximum lateral acceleration in bends, in meters per second squared.
        braking: deceleration that the speed profile assumes, in meters per second squared.
        top_speed: in meters per second.
        reach: lookahead distance of pure pursuit at rest, in meters.
        reach_seconds: increase of the lookahead distance per meter per second.
        steering: gain on the angle of pure pursuit, which does not model slip.
        damping: seconds; yaw damping, this times the yaw rate is subtracted from the angle.
        preview: seconds; the target speed is that planned for the position at this time ahead.
        gas: pedal per meter per second below the target speed (proportional control).
        brake: pedal per meter per second above it.
        ease: fraction of the gas that is released at full lock, against oversteer.
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
    """A privileged controller for one track.

    Steering is pure pursuit: the angle of the front wheels for the circle through a lookahead
    point on the center line, `atan(2 wheelbase sin(bearing) / distance)`. The speed profile is the
    minimum of the top speed, of `sqrt(lateral / curvature)`, and of the speed from which the car
    can still brake for the bends ahead.

    Args:
        track: center line, closed, in driving direction, [points, 2], in meters.
        style: parameters of the controller.

    Attributes:
        speeds: planned at each point of the track, in meters per second.

    Raises:
        ValueError: a track that is not a line of at least 8 points.

    References:
        Coulter 1992, CMU-RI-TR-92-01 (pure pursuit).

    Example:
        On a circle of radius 100 the lateral acceleration limits the speed:

        >>> turns = np.linspace(0, 2 * np.pi, 200, endpoint=False)
        >>> circle = 100 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        >>> Expert(circle, ExpertStyle(lateral=25.0)).speeds.round(1)[:3].tolist()
        [50.0, 50.0, 50.0]
    """

    def __init__(self, track: np.ndarray, style: ExpertStyle | None = None) -> None:
        track = np.asarray(track, np.float64)
        if track.ndim != 2 or track.shape[1] != 2 or len(track) < 8:
            raise ValueError(
                f"a track of shape {track.shape} is not a line; give at least 8 points [points, 2]"
            )
        self.track, self.style = track, ExpertStyle() if style is None else style
        segments = np.roll(track, -1, axis=0) - track
        self._steps = np.linalg.norm(segments, axis=1)
        self._directions = segments / np.maximum(self._steps, 1e-9)[:, None]
        self.speeds = self._plan_speeds()

    def _plan_speeds(self) -> np.ndarray:
        """Compute the speed profile: from the curvature, then a backward pass over two laps."""
        style = self.style
        # Curvature over a few points: the line is slightly uneven where its ends were joined.
        ahead = np.roll(self.track, -3, axis=0) - self.track
        behind = self.track - np.roll(self.track, 3, axis=0)
        turn = np.arctan2(ahead[:, 1], ahead[:, 0]) - np.arctan2(behind[:, 1], behind[:, 0])
        turn = np.abs((turn + np.pi) % (2 * np.pi) - np.pi)
        length = (np.linalg.norm(ahead, axis=1) + np.linalg.norm(behind, axis=1)) / 2
        speeds = np.sqrt(style.lateral / np.maximum(turn / length, 1e-9))
        speeds = np.minimum(speeds, style.top_speed)
        for index in reversed(range(2 * len(speeds))):
            here, following = index % len(speeds), (index + 1) % len(speeds)
            fastest = math.sqrt(speeds[following] ** 2 + 2 * style.braking * self._steps[here])
            speeds[here] = min(speeds[here], fastest)
        return speeds

    def controls(self, view: CarView) -> np.ndarray:
        """Compute the controls from the state of the car.

        Args:
            view: of the car, which may be anywhere: the expert also labels the drives of others.

        Returns:
            Steering in [-1, 1], gas and brake in [0, 1], float32 [3].
        """
        style = self.style
        nearest = self._nearest(view)
        target = self.track[self._ahead(nearest, style.reach + style.reach_seconds * view.speed)]
        offset = target - view.position
        forward = view.forward
        bearing = math.atan2(
            forward[0] * offset[1] - forward[1] * offset[0],
            forward[0] * offset[0] + forward[1] * offset[1],
        )
        distance = max(float(np.hypot(*offset)), 1e-6)
        angle = style.steering * pursuit_angle(bearing, distance) - style.damping * view.yaw_rate
        steering = -min(max(angle, -FULL_LOCK), FULL_LOCK)
        planned = self.speeds[self._ahead(nearest, style.preview * view.speed)]
        error = float(planned) - view.speed
        gas = min(max(style.gas * error, 0.0), 1.0) * (1 - style.ease * abs(steering) / FULL_LOCK)
        brake = min(max(-style.brake * error, 0.0), 0.8)
        return np.array([steering, gas, brake if brake > _LEAST_BRAKE else 0.0], np.float32)

    def _nearest(self, view: CarView) -> int:
        """Return the index of the nearest point, preferring road in the heading of the car."""
        distances = np.linalg.norm(self.track - view.position[None], axis=1)
        return int((distances - HALF_ROAD * (self._directions @ view.forward)).argmin())

    def _ahead(self, start: int, meters: float) -> int:
        """Return the index of the first point at least `meters` further along the track."""
        index, distance = start, 0.0
        while distance < meters:
            distance += self._steps[index]
            index = (index + 1) % len(self.track)
        return index


def pursuit_angle(bearing: float, distance: float) -> float:
    """Return the pure-pursuit angle of the front wheels for the circle through a point.

    Args:
        bearing: of the point, in radians to the left of the heading.
        distance: to the point, in meters.

    Returns:
        Radians to the left.
    """
    return math.atan(2 * WHEELBASE * math.sin(bearing) / distance)
