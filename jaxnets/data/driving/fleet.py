"""Several cars that are driven side by side by one driver, in processes of their own."""

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

# A recording ends when the car is so far from the center line: there is nothing to learn there.
_LOST = 4 * HALF_ROAD


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What the drivers of several cars see at the time of a decision.

    Attributes:
        frames: uint8 [cars, 96, 96, 3].
        speeds: in meters per second, float32 [cars].
        labels: what the expert would do, float32 [cars, 3].
        seeds: of the tracks, int32 [cars].
        decisions: number of earlier decisions of each drive, int32 [cars]; 0 starts one.
    """

    frames: np.ndarray
    speeds: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    decisions: np.ndarray


class Driver(Protocol):
    """Whoever decides for several cars at once; steering in [-1, 1], gas and brake in [0, 1]."""

    def start(self, num_cars: int) -> Any:
        """Return what the driver remembers in front of the first decision."""
        ...

    def decide(self, memory: Any, observation: Observation) -> tuple[Any, np.ndarray]:
        """Return the new memory, and steering, gas and brake of each car, float [cars, 3].

        The memory of a car whose drive begins (`observation.decisions` is 0) must not matter.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ExpertDriver:
    """The expert, who may be jostled, so that recordings show how to recover.

    The noise on steering and gas is the average of the last few random numbers, as slow as the
    wandering of a poor driver.

    Attributes:
        noise: standard deviation of what is added to the steering, and twice of what to the gas.

    References:
        Laskey et al. 2017, arXiv:1703.09327 (noise injected into the expert's controls).
    """

    noise: float = 0.0

    def start(self, num_cars: int) -> np.ndarray:
        """Return noise of zero."""
        return np.zeros((num_cars, 2))

    def decide(self, memory: np.ndarray, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        """Do what the expert says, jostled."""
        controls = observation.labels.astype(np.float64)
        if not self.noise:
            return memory, controls
        kept = 0.8
        memory = np.where(observation.decisions[:, None] == 0, 0.0, memory)
        pairs = zip(observation.seeds, observation.decisions, strict=True)
        drawn = [np.random.default_rng((int(s), int(d))).normal(size=2) for s, d in pairs]
        memory = kept * memory + (1 - kept**2) ** 0.5 * np.array(drawn)
        controls[:, :2] += self.noise * memory * np.array([[1.0, 2.0]])
        return memory, controls


@dataclasses.dataclass(frozen=True, eq=False)
class Drive:
    """A drive on one track.

    Attributes:
        seed: of the track.
        score: what it came to.
        arrays: one row a decision: "frames" uint8 [decisions, 96, 96, 3] if they were looked at,
            "speeds" float32 [decisions] in meters per second, "controls" float32 [decisions, 3]
            that drove the car, "labels" float32 [decisions, 3] of the expert, "seeds" and
            "decisions" int32 [decisions].
    """

    seed: int
    score: Score
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """How a fleet drives.

    Attributes:
        num_cars: driven side by side.
        num_workers: processes that hold them; 0 is this one.
        frames_per_decision: as in `RacingCar`.
        max_frames: as in `RacingCar`.
        look: take pictures.
        give_up: end a drive where the car is far off the road, where there is nothing to learn;
            not for measuring.
        style: of the expert.
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
    """Drive a track for each seed, several at a time; a car that is done takes the next one.

    Args:
        driver: decides for all cars at once.
        seeds: of the tracks.
        config: how.

    Yields:
        The drives in the order of the seeds. They are a pure function of the arguments; the number
        of workers does not matter.

    Raises:
        ImportError: see `RacingCar`.
    """
    num_cars = min(config.num_cars, len(seeds))
    waiting = list(reversed(list(enumerate(seeds))))
    done: dict[int, Drive] = {}
    given = 0
    with _garages(config, num_cars) as ask:
        places: list[int | None] = [None] * num_cars
        rows: list[list[tuple[Any, ...]]] = [[] for _ in range(num_cars)]
        seen: list[_Seen | None] = [None] * num_cars
        memory = driver.start(num_cars)
        while True:
            free = [car for car in range(num_cars) if places[car] is None][: len(waiting)]
            fresh = {}
            for car in free:
                places[car], fresh[car] = waiting.pop()
            for car, first in ask({car: ("reset", seed) for car, seed in fresh.items()}).items():
                seen[car], rows[car] = first, []
            active = [car for car in range(num_cars) if places[car] is not None]
            if not active:
                return
            memory, controls = driver.decide(memory, _observation(seen, rows))
            for car in active:
                now = seen[car]
                assert now is not None
                rows[car].append((*now.values, np.asarray(controls[car], np.float32)))
            answers = ask({car: ("step", controls[car]) for car in active})
            for car, now in answers.items():
                seen[car] = now
                place = places[car]
                if now.score is not None and place is not None:
                    seed = int(seeds[place])
                    done[place] = Drive(seed, now.score, _arrays(seed, rows[car]))
                    places[car] = None
            while given in done:
                yield done.pop(given)
                given += 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    """What a car reports: frame, speed and label, the seed of its track, its score at the end."""

    values: tuple[np.ndarray | None, float, np.ndarray]
    seed: int
    score: Score | None


_BLANK = np.zeros((96, 96, 3), np.uint8)


def _observation(seen: Sequence[_Seen | None], rows: Sequence[Sequence[Any]]) -> Observation:
    """Stack what the cars report; a car that has no track left repeats its last report."""
    known = [now for now in seen if now is not None]
    frames, speeds, labels = zip(*(now.values for now in known), strict=True)
    return Observation(
        np.stack([_BLANK if frame is None else frame for frame in frames]),
        np.array(speeds, np.float32),
        np.stack(labels),
        np.array([now.seed for now in known], np.int32),
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


class _Garage:
    """Some of the cars, with an expert in each."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._cars: dict[int, tuple[RacingCar, int, Expert]] = {}

    def __call__(self, orders: dict[int, tuple[str, Any]]) -> dict[int, _Seen]:
        return {car: self._follow(car, *order) for car, order in orders.items()}

    def _follow(self, number: int, order: str, argument: Any) -> _Seen:
        config = self._config
        if order == "reset":
            if number in self._cars:
                car = self._cars[number][0]
            else:
                car = RacingCar(
                    frames_per_decision=config.frames_per_decision, max_frames=config.max_frames
                )
            car.reset(int(argument), look=config.look)
            self._cars[number] = car, int(argument), Expert(car.track, config.style)
        else:
            self._cars[number][0].step(argument, look=config.look)
        car, seed, expert = self._cars[number]
        over = car.over or (config.give_up and car.distance_to_center() > _LOST)
        frame = car.frame if config.look else None
        return _Seen(
            (frame, car.speed, expert.controls(car.view())), seed, car.score if over else None
        )


@contextlib.contextmanager
def _garages(
    config: FleetConfig, num_cars: int
) -> Iterator[Callable[[dict[int, tuple[str, Any]]], dict[int, _Seen]]]:
    """Open the garages; what is yielded passes orders on to them and collects the answers."""
    if not config.num_workers:
        yield _Garage(config)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    links: list[Connection] = []
    workers = []
    for _ in range(min(config.num_workers, num_cars)):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(theirs, config), daemon=True)
        worker.start()
        theirs.close()
        links.append(ours)
        workers.append(worker)

    def ask(orders: dict[int, tuple[str, Any]]) -> dict[int, _Seen]:
        shares: list[dict[int, tuple[str, Any]]] = [{} for _ in links]
        for car, order in orders.items():
            shares[car % len(links)][car] = order
        for link, share in zip(links, shares, strict=True):
            link.send(share)
        answers: dict[int, _Seen] = {}
        for link in links:
            answer = link.recv()
            if isinstance(answer, Exception):
                raise answer
            answers |= answer
        return dict(sorted(answers.items()))

    try:
        yield ask
    finally:
        for link in links:
            link.close()  # at which the worker ends
        for worker in workers:
            worker.join()


def _serve(link: Connection, config: FleetConfig) -> None:
    """Answer orders until the other side hangs up."""
    garage = _Garage(config)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        while True:
            orders = link.recv()
            try:
                answer: Any = garage(orders)
            except Exception as error:
                answer = error
            link.send(answer)
