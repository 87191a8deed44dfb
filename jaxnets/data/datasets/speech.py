"""Speech datasets: the Free Spoken Digit Dataset, and synthetic words for quick tests."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from jaxnets.data.archives import open_archive
from jaxnets.data.arrays import Arrays, check_arrays, check_seed
from jaxnets.data.audio.wav import read_wav
from jaxnets.data.files import DataFile, download_file, fetch, find

_REPOSITORY = "https://github.com/Jakobovski/free-spoken-digit-dataset"
_COMMIT = "26eb9aaf"
_FOLDERS = ("fsdd", "free-spoken-digit-dataset")
# Of the recordings, not of an archive, so that every archive and clone passes; see
# `recordings_digest`.
_SHA256 = "1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959"
# The recordings have 21 MB; an archive of the repository has some scripts and texts beside them.
_MAX_BYTES = 1 << 26
_SAMPLE_RATE = 8000
_NUM_TEST = 5  # the first recordings of each digit by each speaker
_NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")

ARCHIVE = DataFile(
    "fsdd_recordings.tar.gz",
    _SHA256,
    _MAX_BYTES,
    folders=_FOLDERS,
    url=f"{_REPOSITORY}/archive/{_COMMIT}.tar.gz",
    hint=f"clone {_REPOSITORY} at commit {_COMMIT} into a folder fsdd",
)
RECORDINGS = dataclasses.replace(ARCHIVE, name="recordings/0_george_0.wav")
LAYOUTS = (ARCHIVE, RECORDINGS)  # one representative file each


@dataclasses.dataclass(frozen=True, eq=False)
class SpeechDataset:
    """Recordings of single words in memory.

    Attributes:
        name: for titles and reports.
        train: {"inputs": int16 [examples, time], padded with zeros, "lengths":
            int32 [examples] in samples, "labels": int32 [examples], "speakers": int32 [examples]}.
        test: the same for the held-out examples.
        class_names: name of each label.
        speaker_names: name of each speaker.
        sample_rate: in hertz.

    Raises:
        ValueError: arrays that `data.check_arrays` refuses, such as labels without a class name.
    """

    name: str
    train: Arrays
    test: Arrays
    class_names: tuple[str, ...]
    speaker_names: tuple[str, ...]
    sample_rate: int

    def __post_init__(self) -> None:
        for part in (self.train, self.test):
            check_arrays(part, num_classes=self.num_classes)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)


def spoken_digits(
    directory: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    max_seconds: float | None = None,
) -> SpeechDataset:
    """Load the Free Spoken Digit Dataset: 3,000 recordings of ten digits by six speakers.

    The split is the official one: of the 50 recordings of each digit by each speaker, numbers 0
    to 4 are the test part (300) and the others are for training (2,700).

    Recordings last 0.14 to 2.28 s: half of them at most 0.42 s, 95% at most 0.66 s, 99% at most
    0.92 s, all but three at most 1.30 s. Levels differ by a factor of 15 between speakers.
    The arrays take 110 MB; with `max_seconds=1.0` they take half and 0.8% of the recordings are
    cut.

    Two layouts are supported in every place of the search order of `jaxnets.data.files`: an archive
    `fsdd_recordings.tar.gz` with the recordings in a folder `recordings`, which is not extracted,
    and that folder itself, as in a clone of the repository.

    Args:
        directory: the folder to search first, directly or in a subfolder `fsdd`.
        download: whether to download a dataset that is not found.
        max_seconds: longer recordings are cut at this time.

    Returns:
        Recordings at 8 kHz, in the order of digit, speaker and number, padded to the longest.

    Raises:
        FileNotFoundError: not found and `download` is False.
        ValueError: a damaged or incomplete copy, or a non-positive time.
        OSError: the download failed.

    References:
        Jackson et al. 2018, Jakobovski/free-spoken-digit-dataset v1.0.8,
        doi:10.5281/zenodo.1342401; license CC BY-SA 4.0.
    """
    if max_seconds is not None and max_seconds * _SAMPLE_RATE < 1:
        raise ValueError(f"max_seconds {max_seconds} leaves no sample; give a positive time")
    found = find(LAYOUTS, directory)
    path = found[1] if found else _fetch(directory, download=download)
    recordings = read_recordings(path)
    train, test, speaker_names = decode_recordings(recordings, max_seconds=max_seconds)
    name = "Free Spoken Digit Dataset"
    return SpeechDataset(name, train, test, tuple("0123456789"), speaker_names, _SAMPLE_RATE)


def read_recordings(path: Path, *, origin: str | None = None) -> dict[str, bytes]:
    """Read all recordings and check that they are the published ones.

    Args:
        path: the archive, or one of the recordings in its folder.
        origin: its name in errors; by default its path.

    Returns:
        {name: content of the WAV file}, sorted by name.

    Raises:
        ValueError: damaged, incomplete or changed; names the remedy.
    """
    name = origin or str(path)
    if path.suffix == ".wav":
        contents = _read_folder(path.parent)
    else:
        try:
            contents = _read_archive(path, name)
        except ValueError as error:
            raise ValueError(f"{error}; replace it: {ARCHIVE.remedy}") from error
    found = recordings_digest(contents)
    if found != ARCHIVE.sha256:
        raise ValueError(
            f"the {len(contents)} recordings of {name} are not the published 3,000: "
            f"found sha256 {found}, expected {ARCHIVE.sha256}; replace them: {ARCHIVE.remedy}"
        )
    return dict(sorted(contents.items()))


def _read_folder(folder: Path) -> dict[str, bytes]:
    contents, left = {}, ARCHIVE.max_bytes
    for file in sorted(folder.glob("*.wav")):
        if file.is_file():  # a named pipe would never end
            with file.open("rb") as stream:
                contents[file.name] = stream.read(left + 1)
            left -= len(contents[file.name])
        if left < 0:
            raise ValueError(
                f"the recordings of {folder} are not the published 3,000: they have more than "
                f"{ARCHIVE.max_bytes} bytes; replace them: {ARCHIVE.remedy}"
            )
    return contents


def _read_archive(path: Path, name: str) -> dict[str, bytes]:
    contents = {}
    with (
        path.open("rb") as file,
        open_archive(file, name, max_bytes=ARCHIVE.max_bytes) as members,
    ):
        for member in members:  # nothing is written, so their names are harmless
            place = PurePosixPath(member.name)
            if place.parent.name == "recordings" and place.suffix == ".wav" and not member.refusal:
                contents[place.name] = member.read()
    return contents


def recordings_digest(contents: Mapping[str, bytes]) -> str:
    """Return a digest of files that depends only on their names and contents.

    It is the sha256 of the output of `sha256sum`, sorted by name in ASCII order:
    `LC_ALL=C; sha256sum *.wav | sha256sum`.

    Args:
        contents: {name: content of the file}.

    Returns:
        Hexadecimal sha256.
    """
    lines = [f"{hashlib.sha256(contents[n]).hexdigest()}  {n}\n" for n in sorted(contents)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def decode_recordings(
    contents: Mapping[str, bytes], *, max_seconds: float | None = None
) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Decode recordings `{digit}_{speaker}_{number}.wav` and split them by their number.

    Args:
        contents: {name: content of the WAV file}, 16 bits and one channel at 8 kHz.
        max_seconds: longer recordings are cut at this time.

    Returns:
        The training and the test part as in `SpeechDataset`, and the names of the speakers.

    Raises:
        ValueError: a name of another form, a WAV file that is damaged or has another rate.
    """
    keyed = {}
    for name, content in contents.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not the name of a recording such as 7_jackson_32.wav")
        samples, sample_rate = read_wav(content, mono=True, name=name)
        if sample_rate != _SAMPLE_RATE:
            raise ValueError(f"{name} is at {sample_rate} Hz; resample it to {_SAMPLE_RATE} Hz")
        digit, speaker, number = match.groups()
        keyed[int(digit), speaker, int(number)] = np.rint(samples * 32768).astype(np.int16)
    speaker_names = tuple(sorted({speaker for _, speaker, _ in keyed}))
    limit = None if max_seconds is None else int(max_seconds * _SAMPLE_RATE)
    order = sorted(keyed)
    inputs, lengths = pad_signals([keyed[key][:limit] for key in order])
    data = {
        "inputs": inputs,
        "lengths": lengths,
        "labels": np.array([digit for digit, _, _ in order], np.int32),
        "speakers": np.array([speaker_names.index(name) for _, name, _ in order], np.int32),
    }
    held_out = np.array([number < _NUM_TEST for _, _, number in order])
    train = {name: array[~held_out] for name, array in data.items()}
    test = {name: array[held_out] for name, array in data.items()}
    return train, test, speaker_names


def pad_signals(signals: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad signals of unequal lengths to one array.

    Args:
        signals: arrays [time] of one dtype, at least one.

    Returns:
        [signals, longest time], padded with zeros, and the lengths, int32 [signals].

    Example:
        >>> pad_signals([np.array([1, 2]), np.array([3])])
        (array([[1, 2],
               [3, 0]]), array([2, 1], dtype=int32))
    """
    lengths = np.array([len(signal) for signal in signals], np.int32)
    padded = np.zeros((len(signals), lengths.max()), signals[0].dtype)
    for row, signal in zip(padded, signals, strict=True):
        row[: len(signal)] = signal
    return padded, lengths


def tone_words(*, num_train: int = 200, num_test: int = 50, seed: int = 0) -> SpeechDataset:
    """Synthesize ten words of two tones each, for quick tests without a download.

    Each word is one of the ten pairs of five tones, the lower one first, spoken by one of two
    speakers of different pitch in 0.1 to 0.2 s with a little noise. Any reasonable network
    classifies all of them correctly.

    Args:
        num_train: training examples.
        num_test: held-out examples.
        seed: non-negative; the dataset is a pure function of the arguments.

    Returns:
        Recordings at 8 kHz of 10 classes.

    Raises:
        ValueError: no examples in a part, or a negative seed.

    Example:
        >>> dataset = tone_words(num_train=20, num_test=10)
        >>> dataset.train["inputs"].shape, dataset.num_classes
        ((20, 1600), 10)
    """
    check_seed(seed)
    tones = (300.0, 500.0, 800.0, 1300.0, 2100.0)
    pairs = [(low, high) for i, low in enumerate(tones) for high in tones[i + 1 :]]
    parts: list[Arrays] = []
    for part, num_examples in enumerate((num_train, num_test)):
        random = np.random.default_rng((seed, part))
        lengths = random.integers(800, 1601, num_examples)
        speakers = random.integers(0, 2, num_examples)
        labels = np.arange(num_examples) % len(pairs)
        inputs = np.zeros((num_examples, 1600), np.int16)
        for row, length, speaker, label in zip(inputs, lengths, speakers, labels, strict=True):
            pitch = np.where(np.arange(length) < length // 2, *pairs[label]) * (1 + 0.1 * speaker)
            signal = np.sin(2 * np.pi * np.cumsum(pitch) / _SAMPLE_RATE)
            row[:length] = 8000 * signal + random.normal(scale=100, size=length)
        integers = {"lengths": lengths, "labels": labels, "speakers": speakers}
        arrays = {name: array.astype(np.int32) for name, array in integers.items()}
        parts.append({"inputs": inputs, **arrays})
    names = tuple(f"{low:.0f} {high:.0f}" for low, high in pairs)
    train, test = parts
    return SpeechDataset("tone words", train, test, names, ("low", "high"), _SAMPLE_RATE)


def _fetch(directory: str | os.PathLike[str] | None, *, download: bool) -> Path:
    """Download the archive and check its contents; the digest of the archive is not stable."""
    if not download or ARCHIVE.url is None:
        return fetch(ARCHIVE, directory, download=False)  # raises and names the places
    return download_file(ARCHIVE, lambda path: read_recordings(path, origin=ARCHIVE.url))
