"""Audio: WAV files, resampling, spectrograms, augmentation."""

from jaxnets.data.audio.augment import (
    add_noise,
    change_speed,
    random_gain,
    spec_augment,
    time_shift,
)
from jaxnets.data.audio.resampling import resample
from jaxnets.data.audio.spectrogram import LogMel, mel_filterbank, mfcc, standardize, stft
from jaxnets.data.audio.wav import read_wav, write_wav
from jaxnets.data.audio.waveform import to_waveform
from jaxnets.data.audio.whisper import WhisperFeatures

__all__ = [
    "LogMel",
    "WhisperFeatures",
    "add_noise",
    "change_speed",
    "mel_filterbank",
    "mfcc",
    "random_gain",
    "read_wav",
    "resample",
    "spec_augment",
    "standardize",
    "stft",
    "time_shift",
    "to_waveform",
    "write_wav",
]
