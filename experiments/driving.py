"""Driving from the camera: networks imitate an expert on gymnasium's CarRacing-v3.

    python -m experiments.driving
    python -m experiments.driving --model resnet
    python -m experiments.driving --model lstm
    python -m experiments.driving --model gru
    python -m experiments.driving --head discretized
    python -m experiments.driving --model gru --no-speedometer

Drives of an expert that reads the track are recorded, and the network learns its controls from the
camera and the speed (behavior cloning). Then, in each round, the network drives new tracks and the
expert labels them with its own controls (DAgger: Ross, Gordon and Bagnell 2011, arXiv:1011.0686,
algorithm 3.1, with the expert driving in the first round only). The result is the mean score in
closed loop on 50 tracks that were used neither for training nor for tuning. --held-out evaluates
on tracks of `TUNING_SEEDS` instead, to choose recipes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from experiments.driving_networks import (
    CONTROL_NAMES,
    EncoderName,
    HeadName,
    ModelName,
    NetworkDriver,
    make_head,
    make_network,
    measure_latency,
    to_inputs,
)
from experiments.harness import training
from experiments.harness.options import Options
from experiments.harness.problem import Measured, Problem, member
from experiments.harness.run_folder import RunError, RunFolder
from experiments.pictures import driving_pictures
from jaxnets.data import driving
from jaxnets.data.batches.sources import IndexBatches
from jaxnets.data.files import cache_folder
from jaxnets.tools.pictures import figures


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the driving experiment."""

    model: ModelName = "pilotnet"
    """Network; lstm and gru are recurrent layers after --encoder."""
    encoder: EncoderName = "pilotnet"
    """Convolutional network before a recurrent layer."""
    head: HeadName = "gaussian"
    """Output head: normal distributions, or probabilities of 21 bins per control."""
    hidden: int = 64
    """Size of the recurrent layer, or of the dense layer that replaces it."""
    speedometer: bool = True
    """Use the speed as an input; without it, only recurrent networks can infer it."""
    window: int = 1
    """Decisions of a training example; 2 or more if recurrent. --batch-size counts decisions."""
    tracks: int = 40
    """Tracks of the initial recordings of the expert."""
    noise: float = 0.08
    """Standard deviation of the noise on the recorded expert's steering."""
    rounds: int = 0
    """Rounds of DAgger: the network drives, the expert labels."""
    round_tracks: int = 20
    """Tracks per round."""
    frames_per_decision: int = 4
    """Frames (50 per second) for which the controls of a decision are held."""
    max_frames: int = driving.MAX_FRAMES
    """Maximum frames of a drive."""
    test_tracks: int = 50
    """Tracks of the final evaluation."""
    held_out: bool = False
    """Evaluate on tracks for tuning instead of the test tracks."""
    shift: float = 1.0
    """Shift the camera by up to this many meters to either side, and correct the controls."""
    turn: float = 0.1
    """Rotate the camera by up to this many radians."""
    mirror: bool = True
    """Mirror half of the frames, and their steering."""
    shadow: float = 0.4
    """Strongest random shadow, as a fraction of the light."""
    brightness: float = 0.2
    """Maximum change of brightness, as a fraction."""
    workers: int = 0
    """Processes that simulate the cars; 0 uses this process."""


@dataclasses.dataclass(frozen=True, eq=False)
class WindowBatches:
    """Batches of windows of recordings.

    Attributes:
        order: of the windows.
        pool: decisions of each window, [windows, window].
        arrays: {name: array [decisions, ...]}; None: the batches are {"indices": decisions}.
    """

    endless: ClassVar[bool] = True

    order: IndexBatches
    pool: np.ndarray
    arrays: Mapping[str, np.ndarray] | None

    def __call__(self, first_step: int) -> Iterator[jn.Batch]:
        for batch in self.order(first_step):
            rows = self.pool[batch["indices"]]  # [batch, window]
            if self.arrays is None:
                yield {"indices": rows}
            else:
                yield {name: array[rows] for name, array in self.arrays.items()}

    def part(self, index: int, count: int) -> WindowBatches:
        """Return the source of one of `count` equal parts of every batch."""
        return dataclasses.replace(self, order=self.order.part(index, count))


class Driving(Problem):
    """An expert, a network that imitates it, and the tracks of both."""

    dataset_name = "CarRacing-v3"
    population_strategy = "map"
    eval_name = "validation"

    def __init__(self, config: Config) -> None:
        self.options = self.config = config
        check_options(config)
        self.head = make_head(config.head)
        self.module = make_network(
            config.model,
            self.head.num_outputs,
            encoder=config.encoder,
            hidden_size=config.hidden,
            speedometer=config.speedometer,
            precision=config.precision,
        )
        self.style = driving.ExpertStyle()
        self.seconds = {"recording_seconds": 0.0, "rounds_seconds": 0.0, "test_seconds": 0.0}
        self.resident = self._world(
            self._recordings("expert", driving.TRAINING_SEEDS[: config.tracks], config.noise)
        )
        pool = driving.windows(self.resident["decisions"], config.window)
        self.pools = {int(seed): pool for seed in self.seeds}
        self.steps_per_epoch = max(len(pool) // config.batch_size, 1)
        held = self._recordings("validation", driving.TUNING_SEEDS[-4:], config.noise)
        self.dataset = (self.resident, held)
        self.eval_batches = list(self._validation(self._world(held)))
        objective = jn.head_regression(
            self.module,
            self.head,
            inputs=("frames", "speeds"),
            value_names=CONTROL_NAMES,
            apply=_outputs_only,
        )
        self.objective = jn.with_batch_transform(objective, self._transform)

    @property
    def stages(self) -> Sequence[int]:
        """Equally many steps on the expert's drives and after each round."""
        parts = self.config.rounds + 1
        return [round(self.num_steps * part / parts) for part in range(1, parts + 1)]

    def prepare(self, folder: RunFolder, stage: int, states: jn.TrainState) -> str | None:
        """Let each network drive new tracks, and add these drives with the expert's labels."""
        if not stage:
            return None
        config, started = self.config, time.perf_counter()
        first = config.tracks + (stage - 1) * config.round_tracks
        tracks = driving.TRAINING_SEEDS[first : first + config.round_tracks]
        parts, points = [self.resident], []
        for index, seed in enumerate(self.seeds):
            place = folder.path / "rounds" / f"round_{stage}_seed_{seed}"
            if not driving.has_recordings(place):
                driver = self.driver(states, index)
                drives = driving.drive(driver, tracks, self._fleet(give_up=True))
                driving.write_recordings(place, drives, {"round": stage, "seed": int(seed)})
            arrays = self._world(driving.read_recordings(place))
            offset = sum(len(part["speeds"]) for part in parts)
            pool = driving.windows(arrays["decisions"], config.window) + offset
            self.pools[int(seed)] = np.concatenate([self.pools[int(seed)], pool])
            parts.append(arrays)
            points += driving.read_points(place)
        self.resident = {
            name: np.concatenate([part[name] for part in parts]) for name in self.resident
        }
        self.seconds["rounds_seconds"] += time.perf_counter() - started
        return f"round {stage}: the networks scored {np.mean(points):.0f} points"

    def example(self) -> tuple[Any, ...]:
        shape = (driving.NUM_WORLD_ROWS, *driving.FRAME_SHAPE[1:])
        window = self.config.window
        return jnp.zeros((1, window, *shape)), jnp.zeros((1, window))

    def member_source(self, seed: int) -> jn.BatchSource:
        config, pool = self.config, self.pools[seed]
        order = jn.data.index_batches(len(pool), config.batch_size // config.window, seed=seed)
        # The frames of the scan executor are on the device: transfer indices only.
        return WindowBatches(order, pool, None if config.executor == "scan" else self.resident)

    def driver(self, states: jn.TrainState, index: int) -> NetworkDriver:
        """Return one network of the population as a driver."""
        state = member(self.evaluated(states), index)
        return NetworkDriver(self.module, self.head, state.variables)

    def measure(self, states: jn.TrainState) -> Measured:
        """Drive the test tracks with each network and with the expert."""
        config, started = self.config, time.perf_counter()
        tracks = driving.TUNING_SEEDS if config.held_out else driving.TEST_SEEDS
        tracks = tracks[: config.test_tracks]
        expert = driving.drive(driving.ExpertDriver(), tracks, self._fleet(look=False))
        self.expert_scores = [drive.score for drive in expert]
        self.scores = []
        for index in range(config.seeds):
            drives = driving.drive(self.driver(states, index), tracks, self._fleet())
            self.scores.append([drive.score for drive in drives])
        points = np.array([[score.points for score in scores] for scores in self.scores])
        everyone = [score for scores in self.scores for score in scores]
        expert_points = float(np.mean([score.points for score in self.expert_scores]))
        _, half_width = jn.metrics.confidence_interval(points.mean(axis=0))
        self.seconds["test_seconds"] = time.perf_counter() - started
        frames = sum(score.frames for score in everyone)
        off_road = sum(score.frames_off_road for score in everyone)
        return Measured(
            f"{'tuning' if config.held_out else 'test'} score, mean over {len(tracks)} tracks",
            points.mean(axis=1),
            unit="points",
            details={
                "score_ci95_over_tracks": round(half_width, 2) if np.isfinite(half_width) else None,
                "worst_track": round(float(points.min()), 1),
                "expert_score": round(expert_points, 2),
                "share_of_expert": round(float(points.mean()) / expert_points, 4),
                "tracks_finished": round(float(np.mean([s.finished for s in everyone])), 4),
                "expert_tracks_finished": round(
                    float(np.mean([score.finished for score in self.expert_scores])), 4
                ),
                "frames_off_road": round(off_road / frames, 5),
                **measure_latency(self.driver(states, 0)),
                "decisions_recorded": len(self.resident["speeds"]),
                **{name: round(value, 1) for name, value in self.seconds.items()},
            },
        )

    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> dict[str, str]:
        panels = {"loss": ("loss", "validation/loss")}
        panels |= {name: (f"{name}_error", f"validation/{name}_error") for name in CONTROL_NAMES}
        figures.curves(history, panels, folder.path / "curves.png")
        driving_pictures.scores(self.scores, self.expert_scores, folder.path / "scores.png")
        driver = self.driver(states, 0)
        track = (driving.TUNING_SEEDS if self.config.held_out else driving.TEST_SEEDS)[0]
        (lap,) = driving.drive(driver, [track], self._fleet())
        driving_pictures.saliency(driver, lap, folder.path / "saliency.png")
        seconds = self.config.frames_per_decision / driving.FRAMES_PER_SECOND
        driving_pictures.film(driver, lap, folder.path / "lap.gif", seconds=seconds)
        return {
            "scores": "Points on each track, sorted; a full lap has about 900.",
            "saliency": "What the camera sees; below, in pink, the pixels that the steering of the "
            "first network depends on.",
            "lap": "A drive of the first network, with the pixels that its steering depends on.",
        }

    def _recordings(self, name: str, seeds: Sequence[int], noise: float) -> dict[str, np.ndarray]:
        """Read the drives of the expert; record them if they do not exist or are damaged."""
        started = time.perf_counter()
        settings = {
            "seeds": [int(seeds[0]), len(seeds)],
            "noise": noise,
            "frames_per_decision": self.config.frames_per_decision,
            "max_frames": self.config.max_frames,
            "style": dataclasses.asdict(self.style),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        base = cache_folder() if self.config.data is None else self.config.data
        folder = base / "driving" / f"{name}_{digest}"
        if driving.has_recordings(folder):
            try:
                return driving.read_recordings(folder, settings)
            except (ValueError, FileNotFoundError) as error:
                print(f"{error}: this is done now", file=sys.stderr)
        drives = driving.drive(driving.ExpertDriver(noise), seeds, self._fleet())
        arrays = driving.write_recordings(folder, drives, settings)
        self.seconds["recording_seconds"] += time.perf_counter() - started
        points = np.mean(driving.read_points(folder))
        print(
            f"recorded {len(seeds)} drives of the expert, {len(arrays['speeds'])} decisions, "
            f"{points:.0f} points: {folder}",
            file=sys.stderr,
        )
        return arrays

    def _fleet(self, **changes: Any) -> driving.FleetConfig:
        config = self.config
        return driving.FleetConfig(
            num_workers=config.workers,
            frames_per_decision=config.frames_per_decision,
            max_frames=config.max_frames,
            style=self.style,
            **changes,
        )

    def _world(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Select the arrays for training, and crop the frames to the rows that show the world."""
        others = {name: arrays[name] for name in ("speeds", "labels", "decisions")}
        return {"frames": arrays["frames"][:, : driving.NUM_WORLD_ROWS], **others}

    def _validation(self, arrays: dict[str, np.ndarray]) -> Iterator[jn.Batch]:
        window = self.config.window
        rows = driving.windows(arrays["decisions"], window)[::window]
        data = {name: array[rows] for name, array in arrays.items()}
        for batch in jn.data.sequential_batches(data, max(64 // window, 1))(0):
            weights = np.repeat(batch["weights"][:, None], window, axis=1)
            yield jax.device_put({**batch, "weights": weights})

    def _transform(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        """Scale the frames; in training also augment them, each window as a whole."""
        if not train:
            return {**batch, "frames": to_inputs(batch["frames"])}
        config = self.config
        frames, labels = batch["frames"], batch["labels"]  # [examples, window, ...]
        examples, window = frames.shape[:2]
        keys = jax.random.split(rng, 5)
        if config.shift or config.turn:

            def draw(key: jax.Array, limit: float) -> jax.Array:
                drawn = jax.random.uniform(key, (examples, 1), minval=-limit, maxval=limit)
                # The camera zooms at the start of a drive, so `move_car` has no fixed scale there.
                return jnp.where(batch["decisions"] < driving.ZOOMING_DECISIONS, 0.0, drawn)

            place = [draw(keys[0], config.shift).ravel(), draw(keys[1], config.turn).ravel()]
            # [examples * window, height, width, channels]
            flat = frames.reshape(examples * window, *frames.shape[2:])
            frames = driving.move_car(flat, *place).reshape(frames.shape)
            moved = driving.moved_controls(
                labels.reshape(-1, 3), batch["speeds"].ravel(), *place, self.style
            )
            labels = moved.reshape(labels.shape)
        if config.mirror:
            frames, labels = driving.random_mirror(keys[2], frames, labels)
        light = frames.astype(jnp.float32) / 255
        light = driving.random_shadow(keys[3], light, config.shadow)
        light = driving.random_brightness(keys[4], light, config.brightness)
        return {**batch, "frames": 2 * light - 1, "labels": labels}


def check_options(config: Config) -> None:
    """Check the options and the simulator before anything is recorded.

    Raises:
        RunError: an option is out of range, or a package is missing.
    """
    if config.batch_size < config.window:
        raise RunError(
            f"--batch-size {config.batch_size} decisions contain no --window of {config.window}; "
            "give a larger batch or a smaller window"
        )
    if config.model in ("lstm", "gru") and config.window < 2:
        raise RunError(f"--window is {config.window}; give 2 or more for --model {config.model}")
    for name in ("shadow", "brightness"):
        if getattr(config, name) > 1:
            raise RunError(f"--{name} is {getattr(config, name)}; give a fraction in [0, 1]")
    try:
        driving.RacingCar()
    except ImportError as error:
        raise RunError(str(error)) from error


def _outputs_only(*arguments: Any, **keywords: Any) -> tuple[jax.Array, jn.ModelState]:
    """Apply a network and drop its recurrent state."""
    (outputs, _), model_state = jn.apply_module(*arguments, **keywords)
    return outputs, model_state


FEEDFORWARD = Config(
    steps=1200,
    rounds=2,
    workers=2,
    batch_size=64,
    learning_rate=1e-3,
    weight_decay=1e-2,
    warmup=0.03,
    average_decay=0.99,
    steps_per_dispatch=20,
)
RECURRENT = dataclasses.replace(FEEDFORWARD, window=8, clip=1.0)
RECIPES = {
    "pilotnet": FEEDFORWARD,
    "resnet": dataclasses.replace(FEEDFORWARD, model="resnet"),
    "lstm": dataclasses.replace(RECURRENT, model="lstm"),
    "gru": dataclasses.replace(RECURRENT, model="gru"),
}

if __name__ == "__main__":
    training.main("driving", Driving, RECIPES)
