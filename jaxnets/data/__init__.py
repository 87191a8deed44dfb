"""Data: deterministic sources of batches, images, text, speech, files with pinned digests."""

from jaxnets.data import driving
from jaxnets.data.arrays import check_arrays, pad_batch, split
from jaxnets.data.audio_augment import (
    add_noise,
    change_speed,
    random_gain,
    spec_augment,
    time_shift,
)
from jaxnets.data.augment import (
    alternating_flip,
    cutout,
    mixup,
    normalize,
    random_crop,
    random_flip,
    random_shift,
)
from jaxnets.data.bucketing import bucketed_batches, bucketed_pass
from jaxnets.data.catalog import locate
from jaxnets.data.cifar import cifar10
from jaxnets.data.corpora import (
    SentenceDataset,
    TextDataset,
    TranslationDataset,
    multi30k,
    python_topics,
    sst2,
    tiny_shakespeare,
)
from jaxnets.data.digit_strings import digit_string_batches, digit_strings
from jaxnets.data.files import safe_extract
from jaxnets.data.images import ImageDataset, digits, fashion_mnist, mnist
from jaxnets.data.padding import pad_sequences
from jaxnets.data.pipeline import grain_batches
from jaxnets.data.prefetching import prefetch
from jaxnets.data.resampling import resample
from jaxnets.data.sources import (
    chunked,
    index_batches,
    member_batches,
    sequential_batches,
    shuffled_batches,
    with_epochs,
)
from jaxnets.data.spectrogram import LogMel, mel_filterbank, mfcc, standardize, stft
from jaxnets.data.speech import SpeechDataset, spoken_digits, tone_words
from jaxnets.data.subwords import SubwordTokenizer
from jaxnets.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    WordTokenizer,
    load_tokenizer,
)
from jaxnets.data.vocabulary import BEGIN, END, PAD, UNKNOWN, Tokenizer
from jaxnets.data.wav import read_wav, write_wav
from jaxnets.data.waveform import to_waveform
from jaxnets.data.windows import sequential_windows, token_streams, token_windows

__all__ = [
    "BEGIN",
    "END",
    "PAD",
    "UNKNOWN",
    "ByteTokenizer",
    "CharacterTokenizer",
    "ImageDataset",
    "LogMel",
    "SentenceDataset",
    "SpeechDataset",
    "SubwordTokenizer",
    "TextDataset",
    "Tokenizer",
    "TranslationDataset",
    "WordTokenizer",
    "add_noise",
    "alternating_flip",
    "bucketed_batches",
    "bucketed_pass",
    "change_speed",
    "check_arrays",
    "chunked",
    "cifar10",
    "cutout",
    "digit_string_batches",
    "digit_strings",
    "digits",
    "driving",
    "fashion_mnist",
    "grain_batches",
    "index_batches",
    "load_tokenizer",
    "locate",
    "mel_filterbank",
    "member_batches",
    "mfcc",
    "mixup",
    "mnist",
    "multi30k",
    "normalize",
    "pad_batch",
    "pad_sequences",
    "prefetch",
    "python_topics",
    "random_crop",
    "random_flip",
    "random_gain",
    "random_shift",
    "read_wav",
    "resample",
    "safe_extract",
    "sequential_batches",
    "sequential_windows",
    "shuffled_batches",
    "spec_augment",
    "split",
    "spoken_digits",
    "sst2",
    "standardize",
    "stft",
    "time_shift",
    "tiny_shakespeare",
    "to_waveform",
    "token_streams",
    "token_windows",
    "tone_words",
    "with_epochs",
    "write_wav",
]
