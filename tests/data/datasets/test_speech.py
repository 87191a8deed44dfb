"""Spoken digits: layouts, damage, the split; digit strings, traced to their recordings."""

import dataclasses
import gzip
import io
import itertools
import os
import struct
import tarfile
import urllib.error
from unittest.mock import Mock

import numpy as np
import pytest

from jaxnets.data import (
    SpeechDataset,
    digit_string_batches,
    digit_strings,
    spoken_digits,
    tone_words,
)
from jaxnets.data.datasets import speech
from jaxnets.data.files import find

needs_recordings = pytest.mark.skipif(
    find(speech.LAYOUTS) is None, reason="no spoken digits here; set JAXNETS_DATA to their folder"
)


def wav(samples, rate=8000):
    data = np.asarray(samples, "<i2").tobytes()
    fmt = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


# Two digits by two speakers, six recordings each; each has its own length and level.
CONTENTS = {
    f"{digit}_{speaker}_{number}.wav": wav(
        np.full(10 + 12 * digit + 6 * s + number, 1000 * digit + 100 * s + number - 5000)
    )
    for digit, (s, speaker), number in itertools.product(
        (0, 7), enumerate(("amy", "bob")), (0, 3, 4, 5, 10, 49)
    )
}


def archive(contents, folder="recordings"):
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Pin the digest of the tiny recordings and empty all places; return a folder to use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXNETS_DATA", raising=False)
    monkeypatch.setattr("jaxnets.data.files.SYSTEM_FOLDERS", ())
    pin_digest(monkeypatch)
    (tmp_path / "data/fsdd").mkdir(parents=True)
    return tmp_path / "data"


def pin_digest(monkeypatch, **changes):
    digest = speech.recordings_digest(CONTENTS)
    pinned = [dataclasses.replace(file, sha256=digest, **changes) for file in speech.LAYOUTS]
    pinned[1] = dataclasses.replace(pinned[1], name="recordings/0_amy_0.wav")
    monkeypatch.setattr(speech, "ARCHIVE", pinned[0])
    monkeypatch.setattr(speech, "LAYOUTS", tuple(pinned))


def assert_holds_the_recordings(dataset):
    train, test = dataset.train, dataset.test
    assert dataset.speaker_names == ("amy", "bob")
    assert (len(train["labels"]), len(test["labels"])) == (12, 12)
    found = set()
    for part, numbers in ((train, (5, 10, 49)), (test, (0, 3, 4))):
        assert part["inputs"].dtype == np.int16
        for row, length, label, speaker in zip(
            *(part[name] for name in ("inputs", "lengths", "labels", "speakers")), strict=True
        ):
            number = length - 10 - 12 * label - 6 * speaker
            assert number in numbers
            assert (row[:length] == 1000 * label + 100 * speaker + number - 5000).all()
            assert not row[length:].any()
            found.add((label, speaker, number))
    assert len(found) == 24


def test_an_archive_is_read_with_any_root_folder_and_is_not_extracted(published):
    for content in (
        archive(CONTENTS),
        archive(dict(reversed(CONTENTS.items()))),
        archive({**CONTENTS, "notes.txt": b"other"}, "free-spoken-digit-dataset-1a2b/recordings"),
    ):
        (published / "fsdd/fsdd_recordings.tar.gz").write_bytes(content)
        assert_holds_the_recordings(spoken_digits(published, download=False))
    assert [path.name for path in (published / "fsdd").iterdir()] == ["fsdd_recordings.tar.gz"]


def test_a_clone_of_the_repository_is_read(published):
    folder = published / "free-spoken-digit-dataset/recordings"
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    assert_holds_the_recordings(spoken_digits(published, download=False))


def test_examples_are_in_the_order_of_digit_speaker_and_number(published):
    (published / "fsdd/fsdd_recordings.tar.gz").write_bytes(archive(CONTENTS))
    train = spoken_digits(published).train
    assert train["labels"].tolist() == [0] * 6 + [7] * 6
    assert train["speakers"].tolist() == ([0] * 3 + [1] * 3) * 2
    assert train["lengths"][:3].tolist() == [15, 20, 59]


def test_recordings_are_cut_on_request_only(published):
    (published / "fsdd/fsdd_recordings.tar.gz").write_bytes(archive(CONTENTS))
    full, cut = spoken_digits(published), spoken_digits(published, max_seconds=0.01)
    assert cut.train["inputs"].shape == (12, 80)
    np.testing.assert_array_equal(cut.train["inputs"], full.train["inputs"][:, :80])
    np.testing.assert_array_equal(cut.test["lengths"], np.minimum(full.test["lengths"], 80))
    with pytest.raises(ValueError, match="max_seconds 0 leaves no sample"):
        spoken_digits(published, max_seconds=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(CONTENTS)[:-200], "is damaged or not a tar or zip archive"),
        (gzip.compress(b"no archive" * 100, mtime=0), "is damaged or not a tar or zip archive"),
        (b"no archive", "is damaged or not a tar or zip archive"),
        (archive(dict(list(CONTENTS.items())[1:])), "the 23 recordings of .* found sha256"),
        (archive({**CONTENTS, "0_amy_0.wav": wav([1])}), "the 24 recordings of .* found sha256"),
        (archive({**CONTENTS, "0_eve_0.wav": wav([1])}), "the 25 recordings"),
        (archive(CONTENTS, "other"), "the 0 recordings"),
    ],
)
def test_a_damaged_or_changed_copy_is_refused_with_the_remedy(published, content, message):
    (published / "fsdd/fsdd_recordings.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}.*clone https://github.com") as caught:
        spoken_digits(published, download=False)
    assert "fsdd/fsdd_recordings.tar.gz" in str(caught.value)


def test_more_bytes_than_the_published_ones_are_not_read(published, monkeypatch):
    pin_digest(monkeypatch, max_bytes=200_000)
    path = published / "fsdd/fsdd_recordings.tar.gz"
    path.write_bytes(archive(CONTENTS))
    assert_holds_the_recordings(spoken_digits(published, download=False))
    path.write_bytes(archive({**CONTENTS, "notes.txt": bytes(1 << 20)}))
    with pytest.raises(ValueError, match=r"fsdd_recordings\.tar\.gz unpacks to more than 200000"):
        spoken_digits(published, download=False)
    path.unlink()
    (published / "fsdd/recordings").mkdir()
    for name in ("0_amy_0.wav", "0_amy_3.wav"):
        (published / "fsdd/recordings" / name).write_bytes(bytes(1 << 17))
    with pytest.raises(ValueError, match=r"recordings are not .* more than 200000 bytes"):
        spoken_digits(published, download=False)


def test_a_named_pipe_among_the_recordings_is_not_opened(published):
    folder = published / "fsdd/recordings"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "9_eve_0.wav")  # reading it would wait for ever
    assert_holds_the_recordings(spoken_digits(published, download=False))


def test_an_archive_writes_nothing_and_its_links_are_not_followed(published, tmp_path):
    with tarfile.open(published / "fsdd/fsdd_recordings.tar.gz", "w:gz") as tar:
        for name, content in CONTENTS.items():
            info = tarfile.TarInfo(f"../../recordings/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("recordings/9_eve_0.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    assert_holds_the_recordings(spoken_digits(published, download=False))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_dataset_is_an_error_with_the_places_and_the_remedy(published):
    with pytest.raises(FileNotFoundError, match=r"(?s)fsdd_recordings.*data/fsdd.*or clone https"):
        spoken_digits(published, download=False)


def test_a_download_is_checked_and_cached(published, monkeypatch, tmp_path):
    (tmp_path / "source.tar.gz").write_bytes(archive(CONTENTS, "repository-1a2b/recordings"))
    pin_digest(monkeypatch, url=(tmp_path / "source.tar.gz").as_uri())
    assert_holds_the_recordings(spoken_digits(published))
    (tmp_path / "source.tar.gz").unlink()
    assert_holds_the_recordings(spoken_digits())


def test_a_failed_or_wrong_download_leaves_nothing_behind(published, monkeypatch, tmp_path):
    source = tmp_path / "source.tar.gz"
    pin_digest(monkeypatch, url=source.as_uri())
    with pytest.raises(OSError, match=r"(?s)cannot download file://.*check the connection"):
        spoken_digits(published)
    not_found = urllib.error.HTTPError("file://", 404, "Not Found", {}, io.BytesIO())
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"HTTP Error 404"):
        patch.setattr("urllib.request.OpenerDirector.open", Mock(side_effect=not_found))
        spoken_digits(published)
    source.write_bytes(archive({"0_amy_0.wav": wav([1])}))
    with pytest.raises(ValueError, match="the 1 recordings of file://"):
        spoken_digits(published)
    assert not list((tmp_path / "cache/jaxnets/fsdd").iterdir())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"x.wav": wav([1])}, "'x.wav' is not the name"),
        ({"0_amy_0.wav": wav([1], rate=16000)}, "0_amy_0.wav is at 16000 Hz"),
        ({"0_amy_0.wav": wav([1])[:-1]}, "0_amy_0.wav is cut short"),
    ],
)
def test_an_invalid_recording_is_named(contents, message):
    with pytest.raises(ValueError, match=message):
        speech.decode_recordings(contents)


@needs_recordings
def test_the_published_recordings_have_the_official_split_and_the_stated_lengths():
    dataset = spoken_digits(download=False)
    assert (len(dataset.train["labels"]), len(dataset.test["labels"])) == (2700, 300)
    for part, number in ((dataset.train, 45), (dataset.test, 5)):
        pairs = part["labels"] * 6 + part["speakers"]
        assert (np.bincount(pairs) == number).all()
    lengths = np.concatenate([dataset.train["lengths"], dataset.test["lengths"]])
    assert (lengths.min(), lengths.max(), lengths.sum()) == (1148, 18262, 10_498_424)
    quantiles = np.quantile(lengths / 8000, [0.5, 0.95, 0.99])
    np.testing.assert_allclose(quantiles, [0.42, 0.66, 0.92], atol=0.005)
    assert (lengths > 1.3 * 8000).sum() == 3


def test_a_label_out_of_range_is_refused():
    part = {"inputs": np.zeros((1, 4), np.int16), "labels": np.array([2])}
    with pytest.raises(ValueError, match=r"outside \[0, 2\)"):
        SpeechDataset("odd", part, part, ("a", "b"), ("amy",), 8000)


# Synthetic words


def test_tone_words_have_their_two_tones_in_order():
    dataset = tone_words(num_train=40, num_test=10)
    assert {part["inputs"].shape for part in (dataset.train, dataset.test)} == {
        (40, 1600),
        (10, 1600),
    }
    columns = ("inputs", "lengths", "labels", "speakers")
    for row, length, label, speaker in zip(*(dataset.train[c] for c in columns), strict=True):
        expected = [float(f) * (1 + 0.1 * speaker) for f in dataset.class_names[label].split()]
        half = length // 2
        for part, frequency in zip((row[:half], row[half:length]), expected, strict=True):
            spectrum = np.abs(np.fft.rfft(part.astype(float)))
            assert abs(spectrum.argmax() * 8000 / len(part) - frequency) < 8000 / len(part)
        assert not row[length:].any()


def test_tone_words_are_a_pure_function_of_the_seed_and_parts_differ():
    first, again, other = tone_words(), tone_words(), tone_words(seed=1)
    np.testing.assert_array_equal(first.train["inputs"], again.train["inputs"])
    assert (first.train["inputs"] != other.train["inputs"]).any()
    assert (first.train["inputs"][:50] != first.test["inputs"]).any()


# Strings

# 24 recordings, each of its own constant level, which identifies it in a string.
_LENGTHS = np.array([5 + index % 7 for index in range(24)], np.int32)
PART = {
    "inputs": np.where(
        np.arange(11)[None] < _LENGTHS[:, None], np.arange(1, 25)[:, None], 99
    ).astype(np.int16),
    "lengths": _LENGTHS,
    "labels": (np.arange(24) % 10).astype(np.int32),
    "speakers": (np.arange(24) // 8).astype(np.int32),
}
OPTIONS = {"max_gap_seconds": 0.5, "sample_rate": 8}  # gaps of up to 4 samples


def split_string(signal):
    """Return the recordings in a string, identified by level, and the silences before them.

    A run of one level is one recording, or several copies of it in a row.
    """
    recordings, gaps, gap = [], [], 0
    for level, run in itertools.groupby(signal.tolist()):
        size = len(list(run))
        if level == 0:
            gap = size
            continue
        length = PART["lengths"][level - 1]
        assert size % length == 0, "a recording was cut"
        recordings += [level - 1] * (size // length)
        gaps += [gap] + [0] * (size // length - 1)
        gap = 0
    return recordings, gaps


def test_strings_are_whole_recordings_of_one_speaker_with_silences_between():
    strings = digit_strings(PART, num_strings=600, seed=0, **OPTIONS)
    assert {name: array.dtype.name for name, array in strings.items()} == {
        "inputs": "int16",
        "lengths": "int32",
        "labels": "int32",
        "label_lengths": "int32",
    }
    all_gaps, used = [], set()
    for signal, length, labels, count in zip(*strings.values(), strict=True):
        assert not signal[length:].any()
        recordings, gaps = split_string(signal[:length])
        assert signal[0] != 0 and signal[length - 1] != 0
        assert len({PART["speakers"][index] for index in recordings}) == 1
        assert labels[:count].tolist() == [PART["labels"][i] + 1 for i in recordings]
        assert not labels[count:].any()
        all_gaps += gaps[1:]
        used.update(recordings)
    assert used == set(range(24))
    assert strings["inputs"].shape[1] == strings["lengths"].max()
    counts = np.bincount(strings["label_lengths"], minlength=8)
    assert not counts[:3].any() and len(counts) == 8
    assert np.abs(counts[3:] - 120).max() < 5 * np.sqrt(120)
    gaps = np.bincount(all_gaps)
    assert len(gaps) == 5 and np.abs(gaps / len(all_gaps) - 0.2).max() < 0.05


def test_speakers_are_equally_likely_for_any_number_of_recordings():
    part = {**PART, "speakers": np.array([0] * 2 + [1] * 22)}
    strings = digit_strings(part, num_strings=400, seed=0, **OPTIONS)
    first = (strings["inputs"][:, 0] <= 2).sum()
    assert abs(first - 200) < 5 * np.sqrt(100)


def test_strings_are_a_pure_function_of_the_seed():
    first, again, other = (digit_strings(PART, num_strings=5, seed=s, **OPTIONS) for s in (3, 3, 4))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert first["labels"].tolist() != other["labels"].tolist()
    more = digit_strings(PART, num_strings=9, seed=3, **OPTIONS)
    np.testing.assert_array_equal(more["labels"][:5], first["labels"])


def test_the_order_of_a_seed_is_pinned():
    strings = digit_strings(PART, num_strings=3, seed=0, **OPTIONS)
    assert strings["labels"].tolist() == [
        [3, 4, 5, 6, 4, 0, 0],
        [9, 2, 9, 0, 0, 0, 0],
        [9, 6, 10, 5, 1, 1, 1],
    ]


def test_strings_above_the_time_limit_are_redrawn():
    strings = digit_strings(PART, num_strings=200, seed=0, max_seconds=5.0, **OPTIONS)
    assert strings["inputs"].shape == (200, 40)
    assert strings["lengths"].max() <= 40
    for signal, length, count in zip(
        strings["inputs"], strings["lengths"], strings["label_lengths"], strict=True
    ):
        recordings, _ = split_string(signal[:length])
        assert len(recordings) == count


def test_batches_are_pure_functions_of_the_step_and_all_of_one_shape():
    source = digit_string_batches(PART, batch_size=4, seed=0, **OPTIONS)
    whole = list(itertools.islice(source(0), 5))
    resumed = list(itertools.islice(source(3), 2))
    for batch, again in zip(whole[3:], resumed, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
    assert len({batch["labels"].tobytes() for batch in whole}) == 5
    assert {batch["inputs"].shape for batch in whole} == {(4, 7 * 11 + 6 * 4)}
    other = next(digit_string_batches(PART, batch_size=4, seed=1, **OPTIONS)(0))
    assert other["labels"].tolist() != whole[0]["labels"].tolist()


def test_batches_and_fixed_strings_of_one_seed_differ():
    batch = next(digit_string_batches(PART, batch_size=9, seed=0, **OPTIONS)(0))
    strings = digit_strings(PART, num_strings=9, seed=0, **OPTIONS)
    assert batch["labels"].tolist() != strings["labels"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_strings": 0}, "0 strings"),
        ({"seed": -1}, "seed -1"),
        ({"min_digits": 0}, "strings of 0 to 7 digits"),
        ({"min_digits": 4, "max_digits": 3}, "strings of 4 to 3 digits"),
        ({"max_gap_seconds": -0.1}, "gaps of up to -0.1 s"),
        ({"sample_rate": 0}, "at 0 Hz"),
        ({"max_seconds": 1.0}, "none of 1000 strings of 3 to 7 digits fits into 8 samples"),
        ({"part": {"inputs": PART["inputs"]}}, "lacks .*'labels', 'lengths', 'speakers'"),
        ({"part": {**PART, "lengths": PART["lengths"] + 7}}, r"lengths .* \[1, 11\]"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    arguments = {"part": PART, "num_strings": 2, "seed": 0, **OPTIONS, **options}
    with pytest.raises(ValueError, match=message):
        digit_strings(arguments.pop("part"), **arguments)


def test_a_wrong_batch_size_or_step_is_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        digit_string_batches(PART, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="first step -1"):
        next(digit_string_batches(PART, batch_size=2, seed=0)(-1))
