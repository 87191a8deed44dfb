"""Driving: imitation learning on gymnasium's CarRacing-v3: expert, recordings, augmentation.

`RacingCar` needs the extra `driving` (`pip install 'jaxnets[driving]'`); reading recordings and
augmentation work without it.

Tracks are pure functions of a seed. The seeds for training, tuning and testing are disjoint:
`TRAINING_SEEDS`, `TUNING_SEEDS` and `TEST_SEEDS`.
"""

from jaxnets.data.driving.augment import (
    CAR_PLACE,
    PIXELS_PER_METER,
    ZOOMING_DECISIONS,
    move_car,
    moved_controls,
    random_brightness,
    random_mirror,
    random_shadow,
)
from jaxnets.data.driving.car import (
    FRAME_SHAPE,
    FRAMES_PER_SECOND,
    HALF_ROAD,
    MAX_FRAMES,
    NUM_WORLD_ROWS,
    TEST_SEEDS,
    TRAINING_SEEDS,
    TUNING_SEEDS,
    CarView,
    RacingCar,
    Score,
)
from jaxnets.data.driving.expert import FULL_LOCK, Expert, ExpertStyle
from jaxnets.data.driving.fleet import (
    Drive,
    Driver,
    ExpertDriver,
    FleetConfig,
    Observation,
    drive,
)
from jaxnets.data.driving.recordings import (
    has_recordings,
    read_points,
    read_recordings,
    windows,
    write_recordings,
)

__all__ = [
    "CAR_PLACE",
    "FRAMES_PER_SECOND",
    "FRAME_SHAPE",
    "FULL_LOCK",
    "HALF_ROAD",
    "MAX_FRAMES",
    "NUM_WORLD_ROWS",
    "PIXELS_PER_METER",
    "TEST_SEEDS",
    "TRAINING_SEEDS",
    "TUNING_SEEDS",
    "ZOOMING_DECISIONS",
    "CarView",
    "Drive",
    "Driver",
    "Expert",
    "ExpertDriver",
    "ExpertStyle",
    "FleetConfig",
    "Observation",
    "RacingCar",
    "Score",
    "drive",
    "has_recordings",
    "move_car",
    "moved_controls",
    "random_brightness",
    "random_mirror",
    "random_shadow",
    "read_points",
    "read_recordings",
    "windows",
    "write_recordings",
]
