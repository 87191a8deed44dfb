"""Options of the experiments on sound, and log-mel features computed inside the step."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

import jaxnets as jn
from experiments.harness.options import Options

#: Fraction of the recordings of a word by a speaker on which --held-out evaluates: of the spoken
#: digits numbers 5 to 9 of 5 to 49.
HELD_OUT = 1 / 9


@dataclasses.dataclass(frozen=True)
class SoundOptions(Options):
    """Options of an experiment on sound; augmentation applies to training only."""

    held_out: bool = False
    """Hold out a ninth of the training recordings and evaluate on it, to choose options."""
    mels: int = 40
    """Mel bands per frame; frames are 25 ms long and 10 ms apart."""
    shift: float = 0.0
    """Maximum shift in time, in seconds; samples shifted beyond an end are lost."""
    speed: float = 0.0
    """Maximum change of the speed, as a fraction."""
    noise: float = 0.0
    """Minimum signal-to-noise ratio of added noise, in decibels (maximum 40); 0 disables this."""
    gain: float = 0.0
    """Maximum change of the level, in decibels."""
    time_mask: int = 0
    """Maximum width of each of two masks of frames."""
    frequency_mask: int = 0
    """Maximum width of each of two masks of mel bands."""


_MAX_NOISE_RATIO = 40.0


@dataclasses.dataclass(frozen=True)
class SoundTransform:
    """Map recordings to standardized log-mel features, with random augmentation in training.

    Attributes:
        options: of the augmentation.
        sample_rate: of the recordings, in hertz.
        keep_time: truncate slowed-down recordings to the length of the array, so that training has
            as many frames as evaluation; otherwise the array grows.
    """

    options: SoundOptions
    sample_rate: int
    keep_time: bool

    @property
    def log_mel(self) -> jn.data.LogMel:
        """The features before standardization."""
        return jn.data.LogMel(self.sample_rate, num_mels=self.options.mels)

    def __call__(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        """Map "inputs", int16 [batch, time], to [batch, frames, mels], and "lengths" to frames."""
        options, data = self.options, jn.data
        samples, lengths = data.to_waveform(batch["inputs"]), batch["lengths"]
        keys = jax.random.split(rng, 5)
        if train and options.shift:
            most = round(options.shift * self.sample_rate)
            samples = data.time_shift(keys[0], samples, lengths, max_shift=most)
        if train and options.speed:
            samples, lengths = data.change_speed(
                keys[1],
                samples,
                lengths,
                min_speed=1 - options.speed,
                max_speed=1 + options.speed,
                output_time=samples.shape[1] if self.keep_time else None,
            )
        if train and options.noise:
            ratios = {"min_snr": options.noise, "max_snr": _MAX_NOISE_RATIO}
            samples = data.add_noise(keys[2], samples, lengths, **ratios)
        if train and options.gain:
            decibels = {"min_decibels": -options.gain, "max_decibels": options.gain}
            samples = data.random_gain(keys[3], samples, **decibels)
        features, lengths = self.log_mel(samples, lengths), self.log_mel.frames(lengths)
        # One mean and variance over all bands of a recording: it removes the loudness and keeps the
        # mean spectrum, which is informative for words as short as these.
        flat = features.reshape(len(features), -1, 1)  # [batch, frames * mels, 1]
        features = data.standardize(flat, lengths * options.mels).reshape(features.shape)
        if train and (options.time_mask or options.frequency_mask):
            features = data.spec_augment(
                keys[4],
                features,
                lengths,
                max_time_mask=options.time_mask,
                max_frequency_mask=options.frequency_mask,
                max_time_fraction=0.2,  # short recordings stay recognizable
            )
        return {**batch, "inputs": features, "lengths": lengths}


def choose_parts(
    dataset: jn.data.SpeechDataset, options: SoundOptions
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str]:
    """Choose the recordings for training and for evaluation.

    Args:
        dataset: recordings.
        options: of the run.

    Returns:
        The recordings for training, those for evaluation, and the name of the latter: "test", or
        "held-out" with --held-out: the first training recordings of each word by each speaker.
    """
    if not options.held_out:
        return dict(dataset.train), dict(dataset.test), "test"
    train = dataset.train
    groups = train["labels"] * len(dataset.speaker_names) + train["speakers"]
    held_out = np.zeros(len(groups), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        held_out[members[: round(HELD_OUT * len(members))]] = True
    parts = ({name: array[rows] for name, array in train.items()} for rows in (~held_out, held_out))
    return (*parts, "held-out")
