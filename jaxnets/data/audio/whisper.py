"""The log-mel features of Whisper."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.data.audio.spectrogram import LogMel
from jaxnets.data.audio.waveform import to_waveform
from jaxnets.functional.lengths import clear_padding


@dataclasses.dataclass(frozen=True)
class WhisperFeatures:
    """Log-mel features of a fixed duration, scaled as Whisper's: most are in [-1, 1].

    A sound is padded with silence to `seconds`. Its features are
    x = log10 max(1e-10, filters^T |stft|^2), then (max(x, max(x) - 8) + 4) / 4, where max(x) is the
    largest one of the sound.

    Call it inside the compiled step; it is hashable and compares by value. Corresponds to
    `WhisperFeatureExtractor` of transformers, whose options are `feature_size`, `sampling_rate`,
    `hop_length`, `n_fft` and `chunk_length`. Differs from it: features are [frames, mels], and a
    longer sound is refused, not cut.

    Attributes:
        num_mels: number of features: 80, or 128 for the third version of the large model.
        sample_rate: in hertz.
        hop: samples from one frame to the next.
        fft_length: samples per frame.
        seconds: duration to which a sound is padded.

    Raises:
        ValueError: a number out of range; see `LogMel`.

    Example:
        >>> features = WhisperFeatures(seconds=1)
        >>> samples, lengths = jnp.zeros((2, 8000), jnp.int16), jnp.array([8000, 4000])
        >>> features(samples, lengths).shape
        (2, 100, 80)

    References:
        Radford et al. 2022, arXiv:2212.04356, section 2.2, and their published code.
    """

    num_mels: int = 80
    sample_rate: int = 16_000
    hop: int = 160
    fft_length: int = 400
    seconds: int = 30

    def __post_init__(self) -> None:
        check_sizes(seconds=self.seconds, sample_rate=self.sample_rate)
        _ = self.log_mel  # checks its numbers

    def __call__(self, samples: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Map int16 or floating [batch, time] to [batch, frames, num_mels].

        Args:
            samples: at most `seconds` of sound.
            lengths: integer [batch], samples of each sound; by default all count.

        Raises:
            ValueError: samples or lengths that do not fit, or a sound that is too long.
        """
        samples = to_waveform(samples)
        if samples.ndim != 2:
            raise ValueError(f"samples have shape {samples.shape}; give [batch, time]")
        size, time = self.seconds * self.sample_rate, samples.shape[1]
        if time > size:
            raise ValueError(
                f"{time} samples are {time / self.sample_rate:.2f} s of sound at "
                f"{self.sample_rate} Hz, more than the {self.seconds} s of the features; cut the "
                "sound into windows"
            )
        samples, _ = clear_padding(samples, lengths)
        mels = self.log_mel(jnp.pad(samples, [(0, 0), (0, size - time)]))[:, : size // self.hop]
        decades = mels / math.log(10)  # [batch, frames, num_mels]
        decades = jnp.maximum(decades, jnp.max(decades, axis=(1, 2), keepdims=True) - 8)
        return (decades + 4) / 4

    @functools.cached_property
    def log_mel(self) -> LogMel:
        """The features before they are scaled, in nats."""
        return LogMel(
            self.sample_rate,
            frame_length=self.fft_length,
            hop=self.hop,
            fft_length=self.fft_length,
            num_mels=self.num_mels,
            high=8000.0,
            floor=1e-10,
            pad_mode="reflect",
        )
