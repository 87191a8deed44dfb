"""Text datasets: tiny Shakespeare, the topics of Python's help, Multi30k, SST-2."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TypeAlias

import numpy as np

from jaxnets.data.files import DataFile, fetch, read_verified

#: A sentence and its translation.
SentencePair: TypeAlias = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """One continuous text.

    Attributes:
        name: for titles and reports.
        train: the first 90% of the characters, rounded down.
        validation: the remaining characters.
    """

    name: str
    train: str
    validation: str


@dataclasses.dataclass(frozen=True)
class TranslationDataset:
    """Sentences in two languages, exactly as in the files.

    Attributes:
        name: for titles and reports.
        train: (source, target) sentences.
        validation: the same, for tuning.
        test: the same, for the final result.
        source_language: ISO 639-1 code.
        target_language: ISO 639-1 code.
    """

    name: str
    train: tuple[SentencePair, ...]
    validation: tuple[SentencePair, ...]
    test: tuple[SentencePair, ...]
    source_language: str
    target_language: str


@dataclasses.dataclass(frozen=True, eq=False)
class Sentences:
    """Labeled sentences.

    Attributes:
        texts: the sentences.
        labels: int32 [sentences].
    """

    texts: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceDataset:
    """Sentences for classification.

    Attributes:
        name: for titles and reports.
        train: sentences and labels.
        validation: the same, for tuning.
        test: the same, for the final result.
        class_names: name of each label.
    """

    name: str
    train: Sentences
    validation: Sentences
    test: Sentences
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)


_RAW = "https://raw.githubusercontent.com"

TINY_SHAKESPEARE_FILE = DataFile(
    "input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    1_115_394,
    folders=("tinyshakespeare",),
    url=(
        f"{_RAW}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
        "/data/tinyshakespeare/input.txt"
    ),
)

# Sha256 and sizes of the decompressed files.
_MULTI30K = {
    "train.de.gz": ("2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72", 2_110_398),
    "train.en.gz": ("460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6", 1_801_238),
    "val.de.gz": ("660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660", 75_981),
    "val.en.gz": ("1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227", 63_297),
    "test_2016_flickr.de.gz": (
        "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
        70_649,
    ),
    "test_2016_flickr.en.gz": (
        "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
        62_076,
    ),
}
MULTI30K_FILES = tuple(
    DataFile(
        name,
        sha256,
        max_bytes,
        folders=("multi30k",),
        url=(
            f"{_RAW}/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a"
            f"/data/task1/raw/{name}"
        ),
    )
    for name, (sha256, max_bytes) in _MULTI30K.items()
)

_SST2 = {
    "train.tsv": ("ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920", 720_259),
    "dev.tsv": ("eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359", 92_057),
    "test.tsv": ("831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7", 188_749),
}
SST2_FILES = tuple(
    DataFile(
        name,
        sha256,
        max_bytes,
        folders=("sst2",),
        url=(
            f"{_RAW}/clairett/pytorch-sentiment-classification"
            f"/457ffd83de90a9d6d472d8ffc31bbffe40a8b236/data/SST2/{name}"
        ),
    )
    for name, (sha256, max_bytes) in _SST2.items()
)


def tiny_shakespeare(
    directory: str | os.PathLike[str] | None = None, *, download: bool = True
) -> TextDataset:
    """Load tiny Shakespeare: 1,115,394 characters of plays, 65 of them distinct.

    Args:
        directory: the folder to search first for `input.txt`, directly or in a subfolder
            `tinyshakespeare`; then the search order of `jaxnets.data.files`.
        download: whether to download files that are not found.

    Returns:
        1,003,854 characters for training and the following 111,540 for validation.

    Raises:
        FileNotFoundError: the file is not found and `download` is False.
        ValueError: the file is truncated or not the published one.
        OSError: the download failed.

    References:
        Karpathy (2015), The Unreasonable Effectiveness of Recurrent Neural Networks.
    """
    path = fetch(TINY_SHAKESPEARE_FILE, directory, download=download)
    return _split_text("tiny Shakespeare", read_verified(path, TINY_SHAKESPEARE_FILE).decode())


def python_topics() -> TextDataset:
    """Load the topics of Python's help system, which need no download.

    The text belongs to the running Python and differs between versions (465,048 characters in one
    3.11, 510,664 in one 3.13), so results are comparable within one version only.

    Returns:
        The topics in alphabetical order, 90% of the characters for training.

    Example:
        >>> python_topics().train.splitlines()[0]
        'The "assert" statement'
    """
    from pydoc_data.topics import topics  # half a megabyte of strings

    version = ".".join(str(number) for number in sys.version_info[:3])
    text = "\n".join(topics[name] for name in sorted(topics))
    return _split_text(f"Python topics ({version})", text)


def multi30k(
    directory: str | os.PathLike[str] | None = None,
    *,
    source_language: str = "en",
    target_language: str = "de",
    download: bool = True,
) -> TranslationDataset:
    """Load Multi30k task 1: captions of Flickr images in English and German.

    29,000 pairs for training, 1,014 for validation, and the 1,000 of test_2016_flickr. The
    sentences are raw: not tokenized, not lower-cased, not stripped.

    Args:
        directory: the folder to search first for `train.en.gz` etc., gzipped or not, directly or
            in a subfolder `multi30k`; then the search order of `jaxnets.data.files`.
        source_language: "en" or "de".
        target_language: the other one.
        download: whether to download files that are not found.

    Returns:
        Pairs (source, target).

    Raises:
        FileNotFoundError: a file is not found and `download` is False.
        ValueError: other languages, or a file that is truncated or not the published one.
        OSError: the download failed.

    References:
        Elliott, Frank, Sima'an and Specia (2016), Multi30K: Multilingual English-German Image
        Descriptions, arXiv 1605.00459.
    """
    languages = (source_language, target_language)
    if sorted(languages) != ["de", "en"]:
        raise ValueError(
            f"languages {languages} are not those of the files; "
            "translate between 'en' and 'de', in one direction or the other"
        )
    files = {file.name: file for file in MULTI30K_FILES}
    parts = []
    for part in ("train", "val", "test_2016_flickr"):
        names = [f"{part}.{language}.gz" for language in languages]
        paths = [fetch(files[name], directory, download=download) for name in names]
        contents = [
            read_verified(path, files[name]) for path, name in zip(paths, names, strict=True)
        ]
        parts.append(decode_pairs(*contents, names=(str(paths[0]), str(paths[1]))))
    return TranslationDataset("Multi30k", parts[0], parts[1], parts[2], *languages)


def sst2(
    directory: str | os.PathLike[str] | None = None, *, download: bool = True
) -> SentenceDataset:
    """Load SST-2, the sentences of the Stanford Sentiment Treebank with binary labels.

    6,920 sentences for training, 872 for validation, 1,821 for testing, lower-cased, with spaces
    between the tokens. They are as published: two test sentences ("no" and "what 's next ?") are
    also in the training part, with the same label, and nine training sentences are duplicates.

    Args:
        directory: the folder to search first for `train.tsv`, `dev.tsv` and `test.tsv`, directly
            or in a subfolder `sst2`; then the search order of `jaxnets.data.files`.
        download: whether to download files that are not found.

    Returns:
        Sentences of the classes "negative" (0) and "positive" (1).

    Raises:
        FileNotFoundError: a file is not found and `download` is False.
        ValueError: a file is truncated or not the published one.
        OSError: the download failed.

    References:
        Socher et al. (2013), Recursive Deep Models for Semantic Compositionality Over a Sentiment
        Treebank, EMNLP, section 5.1 (binary task).
    """
    class_names = ("negative", "positive")
    parts = []
    for file in SST2_FILES:
        path = fetch(file, directory, download=download)
        content = read_verified(path, file)
        parts.append(decode_labeled(content, num_classes=len(class_names), name=str(path)))
    return SentenceDataset("SST-2", parts[0], parts[1], parts[2], class_names)


def decode_pairs(
    source: bytes, target: bytes, *, names: tuple[str, str] = ("source", "target")
) -> tuple[SentencePair, ...]:
    """Decode a parallel text: line i of one file is the translation of line i of the other.

    Args:
        source: UTF-8, one sentence per line.
        target: likewise, with the same number of lines.
        names: of the two files, for errors.

    Returns:
        (source, target) sentences, without line ends.

    Raises:
        ValueError: unequal numbers of lines, an empty line, or not UTF-8.

    Example:
        >>> decode_pairs(b"A dog.\\nTwo dogs.\\n", b"Ein Hund.\\nZwei Hunde.\\n")
        (('A dog.', 'Ein Hund.'), ('Two dogs.', 'Zwei Hunde.'))
    """
    lines = [_lines(content, name) for content, name in zip((source, target), names, strict=True)]
    if len(lines[0]) != len(lines[1]):
        raise ValueError(
            f"{names[0]} has {len(lines[0])} lines and {names[1]} has {len(lines[1])}; "
            "translations need one line for each line"
        )
    return tuple(zip(*lines, strict=True))


def decode_labeled(content: bytes, *, num_classes: int, name: str = "file") -> Sentences:
    """Decode lines with a sentence, a tab and an integer label.

    Args:
        content: UTF-8, `text<TAB>label` per line.
        num_classes: labels are in [0, num_classes).
        name: of the file, for errors.

    Returns:
        The sentences and labels in order.

    Raises:
        ValueError: a line that is empty, has no text or not exactly one tab, a label out of range,
            or not UTF-8. The message gives the line number.

    Example:
        >>> decode_labeled(b"so good\\t1\\nso bad\\t0\\n", num_classes=2).labels.tolist()
        [1, 0]
    """
    classes = {str(label): label for label in range(num_classes)}
    texts, labels = [], []
    for number, line in enumerate(_lines(content, name), start=1):
        text, *rest = line.split("\t")
        if len(rest) != 1 or not text.strip():
            raise ValueError(
                f"line {number} of {name} is {line[:80]!r}; make it a sentence, a tab and a label"
            )
        if rest[0] not in classes:
            raise ValueError(
                f"line {number} of {name} has the label {rest[0]!r}; "
                f"give an integer in [0, {num_classes})"
            )
        texts.append(text)
        labels.append(classes[rest[0]])
    return Sentences(tuple(texts), np.array(labels, np.int32))


def _split_text(name: str, text: str) -> TextDataset:
    num_train = len(text) * 9 // 10
    return TextDataset(name, text[:num_train], text[num_train:])


def _lines(content: bytes, name: str) -> list[str]:
    """Split at line ends only; `str.splitlines` splits at rarer separators too."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); convert it to UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"line {number} of {name} is empty; give a sentence on every line")
    return lines
