"""Reading and writing of WAV files, RIFF files of uncompressed samples."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxnets.storage import atomic_file

_PCM, _FLOAT, _EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
# An extensible header gives the format as a GUID: one of the codes above and these bytes.
_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")
# Other codes that occur in practice, for the error message only.
_COMPRESSED = {
    0x0002: "Microsoft ADPCM",
    0x0006: "A-law",
    0x0007: "mu-law",
    0x0011: "IMA ADPCM",
    0x0031: "GSM 6.10",
    0x0055: "MP3",
    0x00FF: "AAC",
}
_CONVERT = "convert it to 16-bit PCM, for example `ffmpeg -i in.wav -c:a pcm_s16le out.wav`"
_GET_ANEW = "get the file anew"


def read_wav(
    source: str | os.PathLike[str] | bytes, *, mono: bool = False, name: str | None = None
) -> tuple[np.ndarray, int]:
    """Read a WAV file of uncompressed samples.

    Integers of 8, 16, 24 and 32 bits are divided by their full scale; float32 and float64 are not
    scaled, so only they can exceed [-1, 1]. A truncated file is refused, even if only bytes after
    its last sample are missing. Corresponds to
    `soundfile.read(source, dtype="float32", always_2d=True)`.

    Args:
        source: a path, or the content of a file.
        mono: return the mean over the channels.
        name: of `source` in errors; by default the path, or "given content".

    Returns:
        Samples, float32 [time, channels] for every sample format, or [time] if `mono`; and the
        sample rate in hertz.

    Raises:
        ValueError: not a WAV file, truncated, damaged, compressed or of an unknown type, without
            samples, or with non-finite samples. The message names the file.
        OSError: the file cannot be opened.

    Example:
        >>> import io, wave
        >>> with wave.open(stream := io.BytesIO(), "wb") as file:
        ...     file.setparams((2, 2, 8000, 0, "NONE", ""))
        ...     file.writeframes(np.array([[16384, 0], [-32768, 0]], "<i2").tobytes())
        >>> read_wav(stream.getvalue(), mono=True)
        (array([ 0.25, -0.5 ], dtype=float32), 8000)

    References:
        IBM and Microsoft 1991, Multimedia Programming Interface and Data Specifications 1.0,
        section "WAVE"; RFC 2361 (the extensible header).
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    if name is None:
        name = "given content" if isinstance(source, bytes) else os.fspath(source)
    try:
        samples, sample_rate = _decode(content)
    except _WavError as error:
        raise ValueError(f"{name} {error}") from None
    if mono:  # in double precision, in which the sum of large floats is finite
        samples = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    return samples, sample_rate


def write_wav(path: str | os.PathLike[str], samples: np.ndarray, sample_rate: int) -> None:
    """Write samples as 16-bit PCM, atomically.

    Args:
        path: an existing file is replaced.
        samples: [time] or [time, channels]; floats in [-1, 1], rounded to the nearest of the
            65,536 levels, or int16, written unchanged.
        sample_rate: in hertz.

    Raises:
        ValueError: no samples, another shape or dtype, floats outside [-1, 1] or non-finite, a
            sample rate or a size that the format cannot represent.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "tone.wav")
        >>> write_wav(path, np.array([0.5, -0.25]), 8000)
        >>> read_wav(path, mono=True)[0].tolist()
        [0.5, -0.25]
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise ValueError(
            f"cannot write samples of shape {samples.shape} to {os.fspath(path)}; give at least "
            "one sample as [time] or [time, channels]"
        )
    if not 1 <= sample_rate < 1 << 32:
        raise ValueError(f"sample rate {sample_rate} is not in [1, 2**32); give it in hertz")
    if np.issubdtype(samples.dtype, np.floating):
        loudest = np.abs(samples).max()
        if not loudest <= 1:  # NaN too
            raise ValueError(
                f"the largest sample is {loudest}, beyond [-1, 1]; divide the samples by it"
            )
        samples = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
    if samples.dtype != np.int16:
        raise ValueError(f"samples have dtype {samples.dtype}; give int16 or floats in [-1, 1]")
    num_channels = 1 if samples.ndim == 1 else samples.shape[1]
    block = 2 * num_channels
    if block > 0xFFFF or samples.nbytes > 0xFFFF_FFFF - 36:
        raise ValueError(
            f"samples of shape {samples.shape} exceed the 4 GiB or 32,767 channels of a WAV file; "
            "write several files"
        )
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + samples.nbytes, b"WAVE", b"fmt ", 16, _PCM, num_channels),
        *(sample_rate, (sample_rate * block) & 0xFFFF_FFFF, block, 16, b"data", samples.nbytes),
    )
    with atomic_file(Path(path)) as stream:
        stream.write(header)
        stream.write(samples.astype("<i2").tobytes())


class _WavError(Exception):
    """The defect and its remedy; `read_wav` puts the name of the file before it."""


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    header: tuple[np.dtype, int, int] | None = None
    for identifier, chunk in _chunks(content):
        if identifier == b"fmt ":
            header = _read_header(chunk)
        elif identifier == b"data":
            if header is None:
                raise _WavError(f"has its samples before their description; {_GET_ANEW}")
            dtype, num_channels, sample_rate = header
            return _to_float(chunk, dtype, num_channels), sample_rate
    missing = "samples ('data' chunk)" if header else "description of its samples ('fmt ' chunk)"
    raise _WavError(f"has no {missing}; {_GET_ANEW}")


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Iterate over the chunks of a RIFF file: identifier and body."""
    if len(content) < 12 or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise _WavError(
            f"is not a WAV file: it holds {len(content)} bytes and starts with {content[:12]!r}; "
            f"give a RIFF WAVE file, or {_CONVERT}"
        )
    end = 8 + struct.unpack_from("<I", content, 4)[0]
    if end > len(content):
        raise _WavError(
            f"is cut short: its header announces {end} bytes and it holds {len(content)}; "
            f"{_GET_ANEW}"
        )
    body, start = memoryview(content), 12
    while start + 8 <= end:
        identifier, size = struct.unpack_from("<4sI", content, start)
        start += 8
        if start + size > end:
            raise _WavError(
                f"is cut short or damaged: its chunk {identifier!r} announces {size} bytes and "
                f"{end - start} are left; {_GET_ANEW}"
            )
        yield identifier, body[start : start + size]
        start += size + size % 2  # a chunk of odd size is followed by a byte of padding


def _read_header(chunk: memoryview) -> tuple[np.dtype, int, int]:
    """Return the dtype of a sample, the number of channels and the sample rate."""
    if len(chunk) < 16:
        raise _WavError(f"describes its samples in {len(chunk)} bytes instead of 16; {_GET_ANEW}")
    code, num_channels, sample_rate, _, block, bits = struct.unpack_from("<HHIIHH", chunk)
    if code == _EXTENSIBLE:
        if len(chunk) < 40:
            raise _WavError(f"has an extensible header of {len(chunk)} < 40 bytes; {_GET_ANEW}")
        if chunk[26:40] != _GUID_TAIL:
            raise _WavError(f"has samples of unknown type {chunk[24:40].hex()}; {_CONVERT}")
        code = struct.unpack_from("<H", chunk, 24)[0]
    dtype = {
        (_PCM, 8): "u1",
        (_PCM, 16): "<i2",
        (_PCM, 24): "V3",
        (_PCM, 32): "<i4",
        (_FLOAT, 32): "<f4",
        (_FLOAT, 64): "<f8",
    }.get((code, bits))
    if dtype is None:
        kinds = {_PCM: "integer", _FLOAT: "floating", **_COMPRESSED}
        kind = kinds.get(code, f"unknown type {code:#06x}")
        raise _WavError(f"has {bits}-bit samples of {kind} type, which are not read; {_CONVERT}")
    if num_channels == 0 or sample_rate == 0 or block != num_channels * bits // 8:
        raise _WavError(
            f"is damaged: its header says {num_channels} channels of {bits} bits in blocks of "
            f"{block} bytes at {sample_rate} Hz; {_GET_ANEW}"
        )
    return np.dtype(dtype), num_channels, sample_rate


def _to_float(chunk: memoryview, dtype: np.dtype, num_channels: int) -> np.ndarray:
    """Return float32 [time, channels]."""
    block = dtype.itemsize * num_channels
    if len(chunk) == 0:
        raise _WavError("holds no samples; record again or leave it out")
    if len(chunk) % block:
        raise _WavError(
            f"is cut short or damaged: {len(chunk)} bytes of samples are no whole number of "
            f"blocks of {block} bytes; {_GET_ANEW}"
        )
    if dtype.kind == "V":  # 24 bits become the upper 24 of 32
        padded = np.zeros((len(chunk) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(chunk, np.uint8).reshape(-1, 3)
        samples = padded.view("<i4")
    else:
        samples = np.frombuffer(chunk, dtype)
    samples = samples.reshape(-1, num_channels)
    if dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            floats = samples.astype(np.float32)
        if not np.isfinite(floats).all():
            raise _WavError(f"holds samples that are not finite float32 numbers; {_GET_ANEW}")
        return floats
    if dtype.kind == "u":  # 8-bit samples are unsigned with zero at 128
        return (samples.astype(np.float32) - 128) / 128
    return samples.astype(np.float32) / np.float32(2 ** (8 * samples.itemsize - 1))
