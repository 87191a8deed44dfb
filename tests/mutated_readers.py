"""Every reader of data, with small valid files for it; `mutations` damages them."""

from __future__ import annotations

import bz2
import contextlib
import copy
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import shutil
import struct
import tarfile
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict
from unittest import mock

import numpy as np
from mutations import OUTPUT, Reader, reader, written

from jaxnets import data
from jaxnets.data import driving
from jaxnets.data.datasets import cifar, images, speech, text
from jaxnets.data.files import DataFile, cached_array, read_verified
from jaxnets.storage import read_json, write_json


def _noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def _pinned(file: DataFile, content: bytes) -> DataFile:
    """Return the file with the digest and the size of another content."""
    digest = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(file, sha256=digest, max_bytes=len(content))


def _idx(shape: tuple[int, ...], values: bytes, code: int = 8) -> bytes:
    return struct.pack(f">4B{len(shape)}I", 0, 0, code, len(shape), *shape) + values


@reader
def idx() -> Iterator[Reader]:
    name = "values-idx"

    def check(value: np.ndarray, contents: dict[str, bytes]) -> None:
        swapped = value.astype(value.dtype.newbyteorder(">"))
        header = _idx(value.shape, b"", code=contents[name][2])
        assert header + swapped.tobytes() == contents[name]

    yield Reader(
        {name: _idx((3, 5, 2), _noise(60), code=0x0B)},
        lambda folder: images.decode_idx((folder / name).read_bytes(), name=str(folder / name)),
        check,
    )


@reader
def mnist() -> Iterator[Reader]:
    plain_contents = [
        _idx((3, 28, 28), _noise(3 * 784)),
        _idx((3,), bytes([1, 2, 3])),
        _idx((2, 28, 28), _noise(2 * 784, 1)),
        _idx((2,), bytes([4, 5])),
    ]
    files = tuple(map(_pinned, images.MNIST_FILES, plain_contents))
    contents = {
        file.name: gzip.compress(c, mtime=0) for file, c in zip(files, plain_contents, strict=True)
    }
    with mock.patch.object(images, "MNIST_FILES", files):
        yield Reader(contents, lambda folder: data.mnist(folder, download=False))


@reader
def pinned_gzip() -> Iterator[Reader]:
    content = b"the published content" * 50
    file = _pinned(DataFile("letters.gz", "", 0, folders=("words",)), content)
    yield Reader(
        {"letters.gz": gzip.compress(content, mtime=0)},
        lambda folder: read_verified(folder / "letters.gz", file),
    )


MEMBERS = {"one": _noise(1000), "folder/two": b"text " * 300, "folder/deep/three": b"", "x": b"1"}


def _tar(contents: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w", format=format) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _fix_tar(content: bytes) -> bytes:
    """Recompute the checksum of every block that may be a header."""
    fixed = bytearray(content)
    for start in range(0, len(fixed) - 511, 512):
        block = fixed[start : start + 512]
        if block[257:262] == b"ustar":
            checksum = 256 + sum(block[:148]) + sum(block[156:])
            fixed[start + 148 : start + 156] = b"%06o\0 " % checksum
    return bytes(fixed)


def _extract(folder: Path, name: str) -> dict[str, bytes]:
    target = data.safe_extract(folder / name, folder / OUTPUT, max_bytes=1 << 22)
    files = [path for path in target.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(target)): path.read_bytes() for path in files}


def _tar_reader(content: bytes) -> Reader:
    def check(value: dict[str, bytes], contents: dict[str, bytes]) -> None:
        (packed,) = contents.values()
        assert all(content in packed for content in value.values())

    return Reader(
        {"archive.tar": content},
        lambda folder: _extract(folder, "archive.tar"),
        check,
        lambda contents: {name: _fix_tar(content) for name, content in contents.items()},
    )


@reader
def tar() -> Iterator[Reader]:
    yield _tar_reader(_tar(MEMBERS))


@reader
def tar_with_extended_headers() -> Iterator[Reader]:
    long = {f"{'long ' * 30}{name}": content for name, content in MEMBERS.items()}
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        packed = _tar(long, format)
    yield _tar_reader(_tar(long, tarfile.PAX_FORMAT)[:-10240] + packed)


@reader
def compressed_tar() -> Iterator[Reader]:
    packers = {"gz": lambda c: gzip.compress(c, mtime=0), "bz2": bz2.compress, "xz": lzma.compress}
    contents = {f"archive.tar.{kind}": pack(_tar(MEMBERS)) for kind, pack in packers.items()}

    def read(folder: Path) -> list[dict[str, bytes]]:
        values = []
        for name in contents:
            values.append(_extract(folder, name))
            shutil.rmtree(folder / OUTPUT)
        return values

    yield Reader(contents, read)


@reader
def zip_archive() -> Iterator[Reader]:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number, (name, content) in enumerate(MEMBERS.items()):
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)

    def check(value: dict[str, bytes], contents: dict[str, bytes]) -> None:
        assert set(value.values()) <= set(MEMBERS.values())  # names have no checksum

    yield Reader({"archive.zip": stream.getvalue()}, lambda f: _extract(f, "archive.zip"), check)


def _cifar_binaries() -> dict[str, bytes]:
    return {
        file.name: b"".join(bytes([label]) + _noise(3072, label) for label in range(2))
        for file in cifar.BINARIES
    }


@reader
def cifar_records() -> Iterator[Reader]:
    def check(value: dict[str, np.ndarray], contents: dict[str, bytes]) -> None:
        planes = value["inputs"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        labels = value["labels"].astype(np.uint8)[:, None]
        assert np.concatenate([labels, planes], 1).tobytes() == contents["batch.bin"]

    yield Reader(
        {"batch.bin": next(iter(_cifar_binaries().values()))},
        lambda f: cifar.decode_records((f / "batch.bin").read_bytes(), name=str(f / "batch.bin")),
        check,
    )


@reader
def cifar10() -> Iterator[Reader]:
    contents = _cifar_binaries()
    files = tuple(_pinned(file, contents[file.name]) for file in cifar.BINARIES)
    layouts = (files[0], *cifar.LAYOUTS[1:])
    with mock.patch.multiple(cifar, BINARIES=files, LAYOUTS=layouts):
        yield Reader(contents, lambda folder: data.cifar10(folder, download=False))


@reader
def cifar10_archive() -> Iterator[Reader]:
    members = {f"cifar-10-batches-bin/{n}": c for n, c in _cifar_binaries().items()}
    content = gzip.compress(_tar(members), mtime=0)
    file = _pinned(cifar.ARCHIVE, content)
    with mock.patch.multiple(cifar, ARCHIVE=file, LAYOUTS=(cifar.LAYOUTS[0], file)):
        yield Reader({file.name: content}, lambda folder: data.cifar10(folder, download=False))


@reader
def cifar10_jpeg() -> Iterator[Reader]:
    arrays = {}
    for part in ("train", "test"):
        encoded = _jpeg()
        arrays |= {
            f"{part}_jpeg": np.frombuffer(encoded, np.uint8),
            f"{part}_offsets": np.array([0, len(encoded)]),
            f"{part}_labels": np.array([7], np.uint8),
        }
    np.savez(stream := io.BytesIO(), **arrays)
    file = _pinned(cifar.JPEG, stream.getvalue())
    with mock.patch.multiple(cifar, JPEG=file, LAYOUTS=(*cifar.LAYOUTS[:2], file)):
        yield Reader(
            {file.name: stream.getvalue()}, lambda folder: data.cifar10(folder, download=False)
        )


def _jpeg() -> bytes:
    from PIL import Image

    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (32, 32, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(stream := io.BytesIO(), "JPEG", quality=75)
    return stream.getvalue()


@reader
def cache() -> Iterator[Reader]:
    pixels = np.frombuffer(_noise(600), np.uint8).reshape(10, 60)
    np.save(stream := io.BytesIO(), pixels)
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    yield Reader(
        {"a.npy": stream.getvalue(), "a.npy.sha256": f"{digest}  a.npy\n".encode()},
        lambda folder: cached_array(folder / "a.npy", pixels.copy),
        never_fails=True,
    )


def _wav(width: int, channels: int, size: int = 200) -> bytes:
    with wave.open(stream := io.BytesIO(), "wb") as file:
        file.setparams((channels, width, 8000, 0, "NONE", ""))
        file.writeframes(_noise(size * width * channels))
    return stream.getvalue()


def _float_wav() -> bytes:
    samples = np.linspace(-1, 1, 200, dtype="<f4").tobytes()
    header = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 2, 8000, 64_000, 8, 32)
    body = b"WAVE" + header + struct.pack("<4sI", b"data", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


@reader
def wav() -> Iterator[Reader]:
    def check(value: list[Any], contents: dict[str, bytes]) -> None:
        pairs = zip(value[::2], value[1::2], contents.values(), strict=True)
        for (samples, rate), (mono, _), content in pairs:
            assert samples.dtype == mono.dtype == np.float32
            assert samples.ndim == 2 and mono.shape == samples.shape[:1] and rate > 0
            assert np.isfinite(samples).all() and np.isfinite(mono).all()
            assert samples.tobytes() == _independent_wav(content, samples).tobytes()

    def read(folder: Path) -> list[Any]:
        return [
            item
            for name in contents
            for item in (data.read_wav(folder / name), data.read_wav(folder / name, mono=True))
        ]

    contents = {
        "8.wav": _wav(1, 1),
        "16.wav": _wav(2, 2),
        "24.wav": _wav(3, 1),
        "32.wav": _wav(4, 1),
        "float.wav": _float_wav(),
    }
    yield Reader(contents, read, check)


def _independent_wav(content: bytes, default: np.ndarray) -> np.ndarray:
    """Return the samples by Python's own reader; `default` of files that it does not read."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return default
    raw = np.frombuffer(frames, np.uint8).reshape(-1, width)
    if width == 1:
        values = raw[:, 0].astype(np.int64) - 128
    else:
        padded = np.concatenate([np.zeros((len(raw), 8 - width), np.uint8), raw], 1)
        values = padded.view("<i8")[:, 0] >> (8 * (8 - width))
    return (values / 2.0 ** (8 * width - 1)).astype(np.float32).reshape(-1, channels)


_RECORDINGS = {
    f"recordings/{digit}_{speaker}_{number}.wav": _wav(2, 1, 30 + digit + number)
    for digit in (0, 7)
    for speaker in ("amy", "bob")
    for number in (0, 7)
}


@contextlib.contextmanager
def _pinned_recordings() -> Iterator[None]:
    names = {name.removeprefix("recordings/"): c for name, c in _RECORDINGS.items()}
    digest = speech.recordings_digest(names)
    archive, one = (
        dataclasses.replace(file, sha256=digest, max_bytes=1 << 20) for file in speech.LAYOUTS
    )
    one = dataclasses.replace(one, name="recordings/0_amy_0.wav")
    with mock.patch.multiple(speech, ARCHIVE=archive, LAYOUTS=(archive, one)):
        yield


@reader
def spoken_digits() -> Iterator[Reader]:
    with _pinned_recordings():
        yield Reader(_RECORDINGS, lambda folder: data.spoken_digits(folder, download=False))


@reader
def spoken_digits_archive() -> Iterator[Reader]:
    with _pinned_recordings():
        yield Reader(
            {"fsdd_recordings.tar.gz": gzip.compress(_tar(_RECORDINGS), mtime=0)},
            lambda folder: data.spoken_digits(folder, download=False),
        )


_SETTINGS = {"noise": 0.1, "seeds": [0, 20]}


def _drives() -> Iterator[driving.Drive]:
    for seed in range(10):
        draw, length = np.random.default_rng(seed), 3 + seed % 4
        arrays = {
            "frames": draw.integers(0, 256, (length, 4, 4, 3), np.uint8),
            "speeds": draw.normal(size=length).astype(np.float32),
            "decisions": np.arange(length, dtype=np.int32),
        }
        yield driving.Drive(seed, driving.Score(points=10.0 * seed), arrays)


def _write_drives(folder: Path) -> None:
    driving.write_recordings(folder, _drives(), _SETTINGS)


def _read_drives(folder: Path) -> dict[str, np.ndarray]:
    driving.read_points(folder)
    return driving.read_recordings(folder, _SETTINGS)


@reader
def recordings() -> Iterator[Reader]:
    yield Reader(written(_write_drives), _read_drives)


@reader
def recordings_whose_digests_fit() -> Iterator[Reader]:
    contents = written(_write_drives)
    index = json.loads(contents.pop("recordings.json"))
    del index["sha256"]

    def read(folder: Path) -> dict[str, np.ndarray]:
        fitting = copy.deepcopy(index)
        for shard in fitting["shards"]:
            content = (folder / shard["name"]).read_bytes()
            shard["sha256"] = hashlib.sha256(content).hexdigest()
        write_json(folder / "recordings.json", fitting)
        return driving.read_recordings(folder, _SETTINGS)

    def check(value: dict[str, np.ndarray], contents: dict[str, bytes]) -> None:
        assert set(value) == {"frames", "speeds", "decisions"}
        assert len({len(array) for array in value.values()}) == 1

    yield Reader(contents, read, check)


_SENTENCES = ["Ein Mann fährt mit dem Zug.", "A dog runs.", "Zwei Hunde laufen am Meer."]


@reader
def tokenizers() -> Iterator[Reader]:
    made = {
        "character.json": data.CharacterTokenizer.from_text("".join(_SENTENCES)),
        "byte.json": data.ByteTokenizer(),
        "word.json": data.WordTokenizer.train(_SENTENCES),
        "subword.json": data.SubwordTokenizer.train(_SENTENCES, vocabulary_size=280),
    }

    def save(folder: Path) -> None:
        for name, tokenizer in made.items():
            tokenizer.save(folder / name)

    def check(value: list[Any], contents: dict[str, bytes]) -> None:
        assert all(tokenizer in made.values() for tokenizer in value)  # one file may be another

    yield Reader(
        written(save), lambda folder: [data.load_tokenizer(folder / name) for name in made], check
    )


def _lines(content: bytes) -> list[bytes]:
    return [line.removesuffix(b"\r") for line in content.removesuffix(b"\n").split(b"\n")]


@reader
def parallel_text() -> Iterator[Reader]:
    def read(folder: Path) -> Any:
        paths = [folder / "a.de", folder / "a.en"]
        contents = [path.read_bytes() for path in paths]
        return text.decode_pairs(*contents, names=(str(paths[0]), str(paths[1])))

    def check(value: list[tuple[str, str]], contents: dict[str, bytes]) -> None:
        for side, content in enumerate(contents.values()):
            assert [pair[side].encode() for pair in value] == _lines(content)

    contents = {"a.de": "\n".join(_SENTENCES).encode(), "a.en": b"A man.\nA dog.\r\nTwo dogs.\n"}
    yield Reader(contents, read, check)


@reader
def labeled_text() -> Iterator[Reader]:
    def read(folder: Path) -> Any:
        path = folder / "a.tsv"
        return text.decode_labeled(path.read_bytes(), num_classes=2, name=str(path))

    def check(value: text.Sentences, contents: dict[str, bytes]) -> None:
        pairs = zip(value.texts, value.labels, strict=True)
        assert [f"{line}\t{label}".encode() for line, label in pairs] == _lines(contents["a.tsv"])

    lines = [f"{sentence}\t{number % 2}\n" for number, sentence in enumerate(_SENTENCES)]
    yield Reader({"a.tsv": "".join(lines).encode()}, read, check)


@reader
def pinned_text() -> Iterator[Reader]:
    content = "\n".join(_SENTENCES).encode()
    file = _pinned(text.TINY_SHAKESPEARE_FILE, content)
    with mock.patch.object(text, "TINY_SHAKESPEARE_FILE", file):
        yield Reader({file.name: content}, lambda f: data.tiny_shakespeare(f, download=False))


class _Config(TypedDict):
    name: str
    rates: list[float]
    options: dict[str, int | None]


@reader
def document() -> Iterator[Reader]:
    content = {"name": "mnist", "rates": [0.1, 1e-3], "options": {"seed": 3, "out": None}}

    def read(folder: Path) -> Any:
        document = read_json(folder / "config.json", what="a configuration", remedy="remove it")
        return document.check(_Config, closed=True)

    yield Reader(written(lambda folder: write_json(folder / "config.json", content)), read)
