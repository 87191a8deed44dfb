"""Datasets, each verified by its digest."""

from jaxnets.data.datasets.catalog import locate
from jaxnets.data.datasets.cifar import cifar10
from jaxnets.data.datasets.digit_strings import digit_string_batches, digit_strings
from jaxnets.data.datasets.images import ImageDataset, digits, fashion_mnist, mnist
from jaxnets.data.datasets.speech import SpeechDataset, spoken_digits, tone_words
from jaxnets.data.datasets.text import (
    SentenceDataset,
    TextDataset,
    TranslationDataset,
    multi30k,
    python_topics,
    sst2,
    tiny_shakespeare,
)

__all__ = [
    "ImageDataset",
    "SentenceDataset",
    "SpeechDataset",
    "TextDataset",
    "TranslationDataset",
    "cifar10",
    "digit_string_batches",
    "digit_strings",
    "digits",
    "fashion_mnist",
    "locate",
    "mnist",
    "multi30k",
    "python_topics",
    "spoken_digits",
    "sst2",
    "tiny_shakespeare",
    "tone_words",
]
