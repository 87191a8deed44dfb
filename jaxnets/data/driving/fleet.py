"""A vectorized environment: several cars, in worker processes, driven by one driver."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from jaxnets.data.driving.car import HALF_ROAD, MAX_FRAMES, RacingCar, Score
from jaxnets.data.driving.expert import Expert, ExpertStyle

# With `give_up` an episode ends at this distance from the center line in meters.
_LOST = 4 * HALF_ROAD


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """Batched observations of several cars, and the labels of the expert.

    Attributes:
        frames: uint8 [cars, 96, 96, 3].
        speeds: in meters per second, float32 [cars].
        labels: controls of the expert in this state, float32 [cars, 3].
        seeds: of the tracks, int32 [cars].
        decisions: index of the decision within each drive, int32 [cars]; 0 at the start.
    """

    frames: np.ndarray
    speeds: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    decisions: np.ndarray


class Driver(Protocol):
    """A policy for several cars at once; steering in [-1, 1], gas and brake in [0, 1]."""

    def start(self, num_cars: int) -> Any:
        """Return the initial state of the policy."""
        ...

    def decide(self, memory: Any, observation: Observation) -> tuple[Any, np.ndarray]:
        """Return the new state, and steering, gas and brake of each car, float [cars, 3].

        `memory` is the state after the decision before, or that of `start`. The result must not
        depend on the state of a car whose drive starts (`observation.decisions` is 0).
        """
        ...


@dataclasses.dataclass(frozen=True)
class ExpertDriver:
    """The expert, optionally with noise injection, so that recordings contain recoveries.

    The noise on steering and gas is autocorrelated (autoregressive of order 1), as the drift of a
    poor driver.

    Attributes:
        noise: standard deviation of the noise on the steering; that on the gas is twice as large.

    References:
        Laskey et al. 2017, arXiv:1703.09327 (DART: noise injected into the expert's controls).
    """

    noise: float = 0.0

    def start(self, num_cars: int) -> np.ndarray:
        """Return noise of 0, [cars, 2]."""
        return np.zeros((num_cars, 2))

    def decide(self, memory: np.ndarray, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """Return the noise, [cars, 2], and the labels of the expert plus noise, [cars, 3]."""
        controls = observation.labels.astype(np.float64)
        if not self.noise:
            return memory, controls
        correlation = 0.8  # of successive decisions
        memory = np.where(observation.decisions[:, None] == 0, 0.0, memory)
        pairs = zip(observation.seeds, observation.decisions, strict=True)
        drawn = [np.random.default_rng((int(s), int(d))).normal(size=2) for s, d in pairs]
        memory = correlation * memory + (1 - correlation**2) ** 0.5 * np.array(drawn)
        controls[:, :2] += self.noise * memory * np.array([[1.0, 2.0]])
        return memory, controls


@dataclasses.dataclass(frozen=True, eq=False)
class Drive:
    """A drive: the trajectory of one episode.

    Attributes:
        seed: of the track.
        score: at the end.
        arrays: one row per decision: "frames" uint8 [decisions, 96, 96, 3] if they were rendered,
            "speeds" float32 [decisions] in meters per second, "controls" float32 [decisions, 3]
            applied to the car, "labels" float32 [decisions, 3] of the expert, "seeds" and
            "decisions" int32 [decisions].
    """

    seed: int
    score: Score
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """Options of `drive`.

    Attributes:
        num_cars: cars simulated at the same time.
        num_workers: processes that simulate them; 0 for this process.
        frames_per_decision: as in `RacingCar`.
        max_frames: as in `RacingCar`.
        look: render frames.
        give_up: end a drive when the car is far off the road, where there is nothing to learn; not
            for evaluation.
        style: of the expert.

    Raises:
        ValueError: a number of cars below 1, or of workers below 0.
    """

    num_cars: int = 16
    num_workers: int = 0
    frames_per_decision: int = 4
    max_frames: int = MAX_FRAMES
    look: bool = True
    give_up: bool = False
    style: ExpertStyle = dataclasses.field(default_factory=ExpertStyle)

    def __post_init__(self) -> None:
        if self.num_cars < 1 or self.num_workers < 0:
            raise ValueError(
                f"num_cars {self.num_cars} and num_workers {self.num_workers}: give 1 or more, "
                "and 0 or more"
            )


def drive(driver: Driver, seeds: Sequence[int], config: FleetConfig) -> Iterator[Drive]:
    """Drive one episode per seed, several at a time; a car that is done takes the next seed.

    Corresponds to a `gymnasium.vector.AsyncVectorEnv`, with whole episodes as results.

    Args:
        driver: the policy for all cars.
        seeds: of the tracks.
        config: of the fleet.

    Yields:
        The drives in the order of the seeds. They are a pure function of the arguments and do not
        depend on the number of workers.

    Raises:
        ImportError: see `RacingCar`.
    """
    num_cars = min(config.num_cars, len(seeds))
    pending = list(reversed(list(enumerate(seeds))))
    finished: dict[int, Drive] = {}
    num_yielded = 0
    with _open_workers(config, num_cars) as execute:
        episodes: list[int | None] = [None] * num_cars  # index into seeds
        rows: list[list[tuple[Any, ...]]] = [[] for _ in range(num_cars)]
        reports: list[_Report | None] = [None] * num_cars
        memory = driver.start(num_cars)
        while True:
            idle = [car for car in range(num_cars) if episodes[car] is None][: len(pending)]
            started = {}
            for car in idle:
                episodes[car], started[car] = pending.pop()
            resets = {car: ("reset", seed) for car, seed in started.items()}
            for car, report in execute(resets).items():
                reports[car], rows[car] = report, []
            active = [car for car in range(num_cars) if episodes[car] is not None]
            if not active:
                return
            memory, controls = driver.decide(memory, _observation(reports, rows))
            for car in active:
                last = reports[car]
                assert last is not None
                rows[car].append((*last.values, np.asarray(controls[car], np.float32)))
            for car, report in execute({car: ("step", controls[car]) for car in active}).items():
                reports[car] = report
                episode = episodes[car]
                if report.score is not None and episode is not None:
                    seed = int(seeds[episode])
                    finished[episode] = Drive(seed, report.score, _arrays(seed, rows[car]))
                    episodes[car] = None
            while num_yielded in finished:
                yield finished.pop(num_yielded)
                num_yielded += 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Report:
    """State of a car: (frame, speed, label), seed of the track, and the score at the end."""

    values: tuple[np.ndarray | None, float, np.ndarray]
    seed: int
    score: Score | None


_BLANK = np.zeros((96, 96, 3), np.uint8)


def _observation(reports: Sequence[_Report | None], rows: Sequence[Sequence[Any]]) -> Observation:
    """Stack the reports; a car without a further track repeats its last report."""
    known = [report for report in reports if report is not None]
    frames, speeds, labels = zip(*(report.values for report in known), strict=True)
    return Observation(
        np.stack([_BLANK if frame is None else frame for frame in frames]),
        np.array(speeds, np.float32),
        np.stack(labels),
        np.array([report.seed for report in known], np.int32),
        np.array([len(row) for row in rows], np.int32),
    )


def _arrays(seed: int, rows: Sequence[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    frames, speeds, labels, controls = zip(*rows, strict=True)
    arrays = {
        "speeds": np.array(speeds, np.float32),
        "labels": np.stack(labels),
        "controls": np.stack(controls),
        "seeds": np.full(len(rows), seed, np.int32),
        "decisions": np.arange(len(rows), dtype=np.int32),
    }
    return arrays if frames[0] is None else {"frames": np.stack(frames), **arrays}


class _Cars:
    """The cars of one process, each with its expert."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._cars: dict[int, tuple[RacingCar, int, Expert]] = {}

    def __call__(self, commands: dict[int, tuple[str, Any]]) -> dict[int, _Report]:
        return {car: self._execute(car, *command) for car, command in commands.items()}

    def _execute(self, index: int, command: str, argument: Any) -> _Report:
        config = self._config
        if command == "reset":
            if index in self._cars:
                car = self._cars[index][0]
            else:
                car = RacingCar(
                    frames_per_decision=config.frames_per_decision, max_frames=config.max_frames
                )
            car.reset(int(argument), look=config.look)
            self._cars[index] = car, int(argument), Expert(car.track, config.style)
        else:
            self._cars[index][0].step(argument, look=config.look)
        car, seed, expert = self._cars[index]
        over = car.over or (config.give_up and car.distance_to_center() > _LOST)
        frame = car.frame if config.look else None
        return _Report(
            (frame, car.speed, expert.controls(car.view())), seed, car.score if over else None
        )


@contextlib.contextmanager
def _open_workers(
    config: FleetConfig, num_cars: int
) -> Iterator[Callable[[dict[int, tuple[str, Any]]], dict[int, _Report]]]:
    """Start the workers and yield a function that executes commands and returns the reports."""
    if not config.num_workers:
        yield _Cars(config)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads may deadlock
    connections: list[Connection] = []
    workers = []
    for _ in range(min(config.num_workers, num_cars)):
        parent, child = context.Pipe()
        worker = context.Process(target=_serve, args=(child, config), daemon=True)
        worker.start()
        child.close()
        connections.append(parent)
        workers.append(worker)

    def execute(commands: dict[int, tuple[str, Any]]) -> dict[int, _Report]:
        parts: list[dict[int, tuple[str, Any]]] = [{} for _ in connections]
        for car, command in commands.items():
            parts[car % len(connections)][car] = command
        for connection, part in zip(connections, parts, strict=True):
            connection.send(part)
        reports: dict[int, _Report] = {}
        for connection in connections:
            answer = connection.recv()
            if isinstance(answer, Exception):
                raise answer
            reports |= answer
        return dict(sorted(reports.items()))

    try:
        yield execute
    finally:
        for connection in connections:
            connection.close()  # ends the worker
        for worker in workers:
            worker.join()


def _serve(connection: Connection, config: FleetConfig) -> None:
    """Execute commands in a worker until the connection is closed."""
    cars = _Cars(config)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        while True:
            commands = connection.recv()
            try:
                answer: Any = cars(commands)
            except Exception as error:
                answer = error
            connection.send(answer)
