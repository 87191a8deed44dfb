"""Data: deterministic batch sources, images, text, augmentation, files with pinned digests."""

from jaxnets.data.arrays import check_arrays, pad_batch, split
from jaxnets.data.augment import (
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
from jaxnets.data.files import safe_extract
from jaxnets.data.images import ImageDataset, digits, fashion_mnist, mnist
from jaxnets.data.padding import pad_sequences
from jaxnets.data.pipeline import grain_batches
from jaxnets.data.prefetching import prefetch
from jaxnets.data.sources import (
    chunked,
    index_batches,
    member_batches,
    sequential_batches,
    shuffled_batches,
)
from jaxnets.data.subwords import SubwordTokenizer
from jaxnets.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    WordTokenizer,
    load_tokenizer,
)
from jaxnets.data.vocabulary import Tokenizer
from jaxnets.data.windows import sequential_windows, token_streams, token_windows

__all__ = [
    "ByteTokenizer",
    "CharacterTokenizer",
    "ImageDataset",
    "SentenceDataset",
    "SubwordTokenizer",
    "TextDataset",
    "Tokenizer",
    "TranslationDataset",
    "WordTokenizer",
    "bucketed_batches",
    "bucketed_pass",
    "check_arrays",
    "chunked",
    "cifar10",
    "cutout",
    "digits",
    "fashion_mnist",
    "grain_batches",
    "index_batches",
    "load_tokenizer",
    "locate",
    "member_batches",
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
    "random_shift",
    "safe_extract",
    "sequential_batches",
    "sequential_windows",
    "shuffled_batches",
    "split",
    "sst2",
    "tiny_shakespeare",
    "token_streams",
    "token_windows",
]
