"""Driving from the camera: networks imitate an expert on gymnasium's CarRacing-v3.

    python -m experiments.driving
    python -m experiments.driving --model resnet
    python -m experiments.driving --model lstm
    python -m experiments.driving --model gru
    python -m experiments.driving --head discretized
    python -m experiments.driving --model gru --no-speedometer

An expert that sees the track drives and is recorded; the network learns its controls from the
camera and the speed (behavior cloning). Then, round by round, the network drives on new tracks
and the expert says what it would have done (DAgger: Ross, Gordon and Bagnell 2011,
arXiv:1011.0686, algorithm 3.1, with the expert driving in the first round only). The result is
the mean score in closed loop on 50 tracks that nothing was trained or tuned on; --held-out
measures on tracks of `TUNING_SEEDS` instead, for choosing recipes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

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
from experiments.pictures import driving_pictures, figures
from jaxnets.data import driving
from jaxnets.data.files import cache_folder


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of the driving experiment."""

    model: ModelName = "pilotnet"
    """Network; lstm and gru are recurrent layers behind --encoder."""
    encoder: EncoderName = "pilotnet"
    """What sees the frames in front of a recurrent layer."""
    head: HeadName = "gaussian"
    """How controls are regressed: normal distributions, or probabilities of 21 values each."""
    hidden: int = 64
    """Size of the recurrent layer, or of the dense layer in its place."""
    speedometer: bool = True
    """Give the speed to the network; without it, only a memory of the frames can tell it."""
    window: int = 1
    """Consecutive decisions in a training example, of which --batch-size counts each; recurrent
    networks need more than one."""
    tracks: int = 40
    """Tracks on which the expert is recorded at first."""
    noise: float = 0.08
    """What jostles the expert while it is recorded, see ExpertDriver."""
    rounds: int = 0
    """Rounds in which the network drives and the expert labels."""
    round_tracks: int = 20
    """Tracks of each round."""
    frames_per_decision: int = 4
    """Frames, of 50 a second, for which controls are held."""
    max_frames: int = driving.MAX_FRAMES
    """Frames after which a drive ends."""
    test_tracks: int = 50
    """Tracks for the result."""
    held_out: bool = False
    """Measure on tracks for tuning instead of the test tracks."""
    shift: float = 1.0
    """Pictures are moved by up to this many meters to either side, with corrected controls."""
    turn: float = 0.1
    """Pictures are turned by up to this many radians."""
    mirror: bool = True
    """Mirror half of the pictures, and their steering."""
    shadow: float = 0.4
    """Darkest shadow on a picture, as a share of the light."""
    brightness: float = 0.2
    """Change of brightness, as a share."""
    workers: int = 0
    """Processes that hold the cars; 0 is this one."""


class Driving(Problem):
    """An expert, a network that imitates it, and the tracks for both."""

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
        self.eval_batches = list(self._validation(self._world(held)))
        objective = jn.head_regression(
            self.module,
            self.head,
            inputs=("frames", "speeds"),
            value_names=CONTROL_NAMES,
            apply=_outputs_alone,
        )
        self.objective = jn.with_batch_transform(objective, self._transform)

    @property
    def stages(self) -> Sequence[int]:
        """Steps on the expert's drives alone, and then as many behind each round of driving."""
        parts = self.config.rounds + 1
        return [round(self.num_steps * part / parts) for part in range(1, parts + 1)]

    def prepare(self, folder: RunFolder, stage: int, states: jn.TrainState) -> str | None:
        """Let each network drive on new tracks, and add what the expert says to its data."""
        if not stage:
            return None
        config, began = self.config, time.perf_counter()
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
        self.seconds["rounds_seconds"] += time.perf_counter() - began
        return f"round {stage}: the networks reached {np.mean(points):.0f} points"

    def example(self) -> tuple[Any, ...]:
        shape = (driving.NUM_WORLD_ROWS, *driving.FRAME_SHAPE[1:])
        window = self.config.window
        return jnp.zeros((1, window, *shape)), jnp.zeros((1, window))

    def member_source(self, seed: int) -> jn.BatchSource:
        config, pool = self.config, self.pools[seed]
        order = jn.data.index_batches(len(pool), config.batch_size // config.window, seed=seed)

        def source(first_step: int) -> Iterator[jn.Batch]:
            for batch in order(first_step):
                rows = pool[batch["indices"]]  # [batch, window]
                if config.executor == "scan":  # the frames are on the device
                    yield {"indices": rows}
                else:
                    yield {name: array[rows] for name, array in self.resident.items()}

        return source

    def driver(self, states: jn.TrainState, index: int) -> NetworkDriver:
        """Return one network of the population as a driver."""
        state = member(self.evaluated(states), index)
        return NetworkDriver(self.module, self.head, state.variables)

    def measure(self, states: jn.TrainState) -> Measured:
        """Drive the test tracks, by each network and by the expert."""
        config, began = self.config, time.perf_counter()
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
        self.seconds["test_seconds"] = time.perf_counter() - began
        frames = sum(score.frames for score in everyone)
        off_road = sum(score.frames_off_road for score in everyone)
        return Measured(
            f"{'tuning' if config.held_out else 'test'} score, mean over {len(tracks)} tracks",
            points.mean(axis=1),
            unit="points",
            details={
                "score_ci95_over_tracks": None if half_width is None else round(half_width, 2),
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
    ) -> None:
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

    def _recordings(self, name: str, seeds: Sequence[int], noise: float) -> dict[str, np.ndarray]:
        """Read the drives of the expert, or record them first."""
        began = time.perf_counter()
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
            return driving.read_recordings(folder, settings)
        drives = driving.drive(driving.ExpertDriver(noise), seeds, self._fleet())
        arrays = driving.write_recordings(folder, drives, settings)
        self.seconds["recording_seconds"] += time.perf_counter() - began
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
        """Keep what is trained on, and of the frames the rows that show the world."""
        kept = {name: arrays[name] for name in ("speeds", "labels", "decisions")}
        return {"frames": arrays["frames"][:, : driving.NUM_WORLD_ROWS], **kept}

    def _validation(self, arrays: dict[str, np.ndarray]) -> Iterator[jn.Batch]:
        window = self.config.window
        rows = driving.windows(arrays["decisions"], window)[::window]
        data = {name: array[rows] for name, array in arrays.items()}
        for batch in jn.data.sequential_batches(data, max(64 // window, 1))(0):
            weights = np.repeat(batch["weights"][:, None], window, axis=1)
            yield jax.device_put({**batch, "weights": weights})

    def _transform(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        """Scale the frames, and change them while training; a window is changed as a whole."""
        if not train:
            return {**batch, "frames": to_inputs(batch["frames"])}
        config = self.config
        frames, labels = batch["frames"], batch["labels"]
        examples, window = frames.shape[:2]
        keys = jax.random.split(rng, 5)
        if config.shift or config.turn:

            def draw(key: jax.Array, limit: float) -> jax.Array:
                drawn = jax.random.uniform(key, (examples, 1), minval=-limit, maxval=limit)
                # At the start of a drive the scale of the pictures is another one.
                return jnp.where(batch["decisions"] < driving.ZOOMING_DECISIONS, 0.0, drawn)

            place = [draw(keys[0], config.shift).ravel(), draw(keys[1], config.turn).ravel()]
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
    """Refuse what would stop the run only later.

    Raises:
        RunError: naming the option, or the package that is missing.
    """
    if config.batch_size < config.window:
        raise RunError(
            f"--batch-size {config.batch_size} decisions hold no --window of {config.window}; "
            "give a larger batch or a smaller window"
        )
    if config.model in ("lstm", "gru") and config.window < 2:
        raise RunError(f"--window is {config.window}; give 2 or more for --model {config.model}")
    for name in ("shadow", "brightness"):
        if getattr(config, name) > 1:
            raise RunError(f"--{name} is {getattr(config, name)}; give a share in [0, 1]")
    try:
        driving.RacingCar()
    except ImportError as error:
        raise RunError(str(error)) from error


def _outputs_alone(*arguments: Any, **keywords: Any) -> tuple[jax.Array, jn.ModelState]:
    """Call a network, and leave its memory aside."""
    (outputs, _), model_state = jn.apply_module(*arguments, **keywords)
    return outputs, model_state


ALONE = Config(
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
RECURRENT = dataclasses.replace(ALONE, window=8, clip=1.0)
RECIPES = {
    "pilotnet": ALONE,
    "resnet": dataclasses.replace(ALONE, model="resnet"),
    "lstm": dataclasses.replace(RECURRENT, model="lstm"),
    "gru": dataclasses.replace(RECURRENT, model="gru"),
}

if __name__ == "__main__":
    training.main("driving", Driving, RECIPES)
