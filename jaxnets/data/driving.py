"""Driving: gymnasium's CarRacing-v3 as car and camera, an expert, recordings, augmentation.

Needs the extra `driving` (`pip install 'jaxnets[driving]'`) once a car is made; what only reads
recordings or changes pictures works without it.

Tracks are pure functions of a seed. Those for training, tuning and testing are apart:
`TRAINING_SEEDS`, `TUNING_SEEDS` and `TEST_SEEDS`.
"""

from jaxnets.data.driving_augment import (
    CAR_PLACE,
    PIXELS_PER_METRE,
    ZOOMING_DECISIONS,
    move_car,
    moved_controls,
    random_brightness,
    random_mirror,
    random_shadow,
)
from jaxnets.data.driving_car import (
    FRAME_SHAPE,
    FRAMES_PER_SECOND,
    HALF_ROAD,
    MAX_FRAMES,
    NUM_WORLD_ROWS,
    CarView,
    RacingCar,
    Score,
)
from jaxnets.data.driving_expert import FULL_LOCK, Expert, ExpertStyle
from jaxnets.data.driving_fleet import (
    Drive,
    Driver,
    ExpertDriver,
    FleetConfig,
    Observation,
    drive,
)
from jaxnets.data.driving_recordings import (
    has_recordings,
    read_points,
    read_recordings,
    windows,
    write_recordings,
)

TRAINING_SEEDS = range(0, 50_000)
TUNING_SEEDS = range(50_000, 60_000)
TEST_SEEDS = range(100_000, 100_050)

__all__ = [
    "CAR_PLACE",
    "FRAMES_PER_SECOND",
    "FRAME_SHAPE",
    "FULL_LOCK",
    "HALF_ROAD",
    "MAX_FRAMES",
    "NUM_WORLD_ROWS",
    "PIXELS_PER_METRE",
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
