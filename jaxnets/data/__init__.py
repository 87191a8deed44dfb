"""Data: deterministic batch sources, images, speech, augmentation, files with pinned
digests."""

from jaxnets.data.arrays import check_arrays, pad_batch, split
from jaxnets.data.audio_augment import (
    add_noise,
    change_speed,
    random_gain,
    spec_augment,
    time_shift,
)
from jaxnets.data.augment import (
    cutout,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_shift,
)
from jaxnets.data.catalog import locate
from jaxnets.data.cifar import cifar10
from jaxnets.data.digit_strings import digit_string_batches, digit_strings
from jaxnets.data.files import safe_extract
from jaxnets.data.images import ImageDataset, digits, fashion_mnist, mnist
from jaxnets.data.pipeline import grain_batches
from jaxnets.data.prefetching import prefetch
from jaxnets.data.resampling import resample
from jaxnets.data.sources import (
    chunked,
    index_batches,
    member_batches,
    sequential_batches,
    shuffled_batches,
)
from jaxnets.data.spectrogram import LogMel, mel_filterbank, mfcc, standardize, stft
from jaxnets.data.speech import SpeechDataset, spoken_digits, tone_words
from jaxnets.data.wav import read_wav, write_wav
from jaxnets.data.waveform import to_waveform

__all__ = [
    "ImageDataset",
    "LogMel",
    "SpeechDataset",
    "add_noise",
    "change_speed",
    "check_arrays",
    "chunked",
    "cifar10",
    "cutout",
    "digit_string_batches",
    "digit_strings",
    "digits",
    "fashion_mnist",
    "grain_batches",
    "index_batches",
    "locate",
    "mel_filterbank",
    "member_batches",
    "mfcc",
    "mixup",
    "mnist",
    "normalize",
    "pad_batch",
    "prefetch",
    "random_crop",
    "random_flip",
    "random_gain",
    "random_shift",
    "read_wav",
    "resample",
    "safe_extract",
    "sequential_batches",
    "shuffled_batches",
    "spec_augment",
    "split",
    "spoken_digits",
    "standardize",
    "stft",
    "time_shift",
    "to_waveform",
    "tone_words",
    "write_wav",
]
