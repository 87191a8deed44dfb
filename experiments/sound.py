"""What the experiments on sound share: their options, and log-mel features inside the step."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

import jaxnets as jn
from experiments.harness.options import Options

#: Of the recordings of a word by a speaker, the share that --held-out measures on: with the spoken
#: digits those numbered 5 to 9 of 5 to 49.
HELD_OUT = 1 / 9


@dataclasses.dataclass(frozen=True)
class SoundOptions(Options):
    """Options of an experiment on sound; how sound is changed, it is changed in training only."""

    held_out: bool = False
    """Measure on a ninth of the training recordings, kept out of training, to choose options by."""
    mels: int = 40
    """Features per frame; frames are 25 ms long and 10 ms apart."""
    shift: float = 0.0
    """Greatest shift in time, in seconds; what is moved over an end is lost."""
    speed: float = 0.0
    """Greatest change of the speed, as a share."""
    noise: float = 0.0
    """Least signal-to-noise ratio of added noise, in decibels (the greatest is 40); 0 is none."""
    gain: float = 0.0
    """Greatest change of the level, in decibels."""
    time_mask: int = 0
    """Greatest width of each of two masks of frames."""
    frequency_mask: int = 0
    """Greatest width of each of two masks of features."""


_MAX_NOISE_RATIO = 40.0


@dataclasses.dataclass(frozen=True)
class SoundTransform:
    """Turn recordings into standardized log-mel features, changed at random in training.

    Attributes:
        options: what is changed, and by how much.
        sample_rate: of the recordings, in hertz.
        keep_time: cut what a slower speed moves beyond the end of the array, so that the number of
            frames is that of evaluation; otherwise the array grows.
    """

    options: SoundOptions
    sample_rate: int
    keep_time: bool

    @property
    def log_mel(self) -> jn.data.LogMel:
        """The features before they are standardized."""
        return jn.data.LogMel(self.sample_rate, num_mels=self.options.mels)

    def __call__(self, batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        """Replace "inputs", int16 [batch, time], by features, and "lengths" by those in frames."""
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
        # One mean and variance for all features together: that takes out the loudness of a word and
        # leaves the mean spectrum, which tells much about one as short as these.
        flat = features.reshape(len(features), -1, 1)
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
    """Choose what a run trains on and what it measures on.

    Args:
        dataset: recordings.
        options: of the run.

    Returns:
        The recordings to train on, those to measure on, and what to call the latter: "test", or
        with --held-out "held-out", a part of the training recordings: the first ones of each word
        by each speaker.
    """
    if not options.held_out:
        return dict(dataset.train), dict(dataset.test), "test"
    train = dataset.train
    groups = train["labels"] * len(dataset.speaker_names) + train["speakers"]
    kept = np.ones(len(groups), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        kept[members[: round(HELD_OUT * len(members))]] = False
    parts = ({name: array[chosen] for name, array in train.items()} for chosen in (kept, ~kept))
    return (*parts, "held-out")
