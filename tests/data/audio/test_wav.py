"""WAV files: every format against bytes packed by hand, and invalid files."""

import io
import struct
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnets.data import read_wav, write_wav

GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")


def chunk(identifier, body, pad=b"\0"):
    return identifier + struct.pack("<I", len(body)) + body + pad * (len(body) % 2)


def header(bits, *, code=1, channels=1, rate=8000, block=None):
    block = channels * bits // 8 if block is None else block
    return chunk(b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * block, block, bits))


def extensible(bits, *, code=1, channels=1, rate=8000, tail=GUID_TAIL):
    block = channels * bits // 8
    body = struct.pack("<HHIIHH", 0xFFFE, channels, rate, rate * block, block, bits)
    return chunk(b"fmt ", body + struct.pack("<HHIH", 22, bits, 0, code) + tail)


def riff(*chunks):
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


# Sample format: bytes of the lowest, a middle and the highest value, and the values.
FORMATS = {
    "8 bits": (header(8), bytes([0, 192, 255]), [-1, 0.5, 127 / 128]),
    "16 bits": (header(16), struct.pack("<3h", -(2**15), 2**14, 2**15 - 1), [-1, 0.5, 1 - 2**-15]),
    "24 bits": (
        header(24),
        bytes.fromhex("000080 000040 ffff7f"),
        [-1, 0.5, 1 - 2**-23],
    ),
    "32 bits": (header(32), struct.pack("<3i", -(2**31), 2**30, 3 * 2**28), [-1, 0.5, 0.375]),
    "float32": (header(32, code=3), struct.pack("<3f", -1, 0.1, 1.5), [-1, 0.1, 1.5]),
    "float64": (header(64, code=3), struct.pack("<3d", -1, 0.1, 1.5), [-1, 0.1, 1.5]),
    "extensible 24 bits": (
        extensible(24),
        bytes.fromhex("000080 000040 ffff7f"),
        [-1, 0.5, 1 - 2**-23],
    ),
    "extensible float32": (
        extensible(32, code=3),
        struct.pack("<3f", -1, 0.1, 1.5),
        [-1, 0.1, 1.5],
    ),
}
GOOD = riff(header(16), chunk(b"data", struct.pack("<4h", 1, -2, 3, -4)))
every_format = pytest.mark.parametrize(("fmt", "data", "values"), FORMATS.values(), ids=FORMATS)


@every_format
def test_every_sample_format_is_read_at_its_scale(fmt, data, values):
    samples, rate = read_wav(riff(fmt, chunk(b"data", data)))
    assert (samples.dtype, samples.shape, rate) == (np.float32, (3, 1), 8000)
    np.testing.assert_array_equal(samples[:, 0], np.array(values, np.float32))


def test_channels_are_interleaved_and_mixed_down_on_request():
    frames = np.array([[16384, 0], [-32768, 16384], [0, 8192]], "<i2")
    content = riff(header(16, channels=2, rate=44100), chunk(b"data", frames.tobytes()))
    samples, rate = read_wav(content)
    assert rate == 44100
    np.testing.assert_array_equal(samples, frames / 32768)
    np.testing.assert_array_equal(read_wav(content, mono=True)[0], [0.25, -0.25, 0.125])


def test_the_rank_does_not_depend_on_the_number_of_channels():
    assert read_wav(GOOD)[0].shape == (4, 1)
    assert read_wav(GOOD, mono=True)[0].shape == (4,)


def test_the_mean_of_channels_of_the_largest_floats_is_finite():
    largest = np.finfo(np.float32).max
    data = np.array([[largest, largest], [-largest, largest]], "<f4").tobytes()
    content = riff(header(32, code=3, channels=2), chunk(b"data", data))
    assert read_wav(content, mono=True)[0].tolist() == [largest, 0]


def test_other_chunks_of_odd_size_are_skipped_with_their_padding():
    content = riff(
        chunk(b"LIST", b"odd"),
        header(16),
        chunk(b"fact", b"x"),
        chunk(b"data", struct.pack("<2h", 1, 2)),
        chunk(b"id3 ", b"tag"),
    )
    np.testing.assert_array_equal(read_wav(content, mono=True)[0], [1 / 32768, 2 / 32768])


def test_an_odd_data_chunk_may_end_the_file_without_padding():
    content = riff(header(8), chunk(b"data", bytes([128, 192, 64]), pad=b""))
    np.testing.assert_array_equal(read_wav(content, mono=True)[0], [0, 0.5, -0.5])


def test_bytes_after_the_announced_end_are_ignored():
    np.testing.assert_array_equal(read_wav(GOOD + b"more")[0], read_wav(GOOD)[0])


def test_the_standard_library_reads_what_we_write(tmp_path):
    levels = np.array([[-32768, 32767], [0, 1], [-1, 100]], np.int16)
    write_wav(tmp_path / "a.wav", levels, 22050)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:4] == (2, 2, 22050, 3)
        assert file.readframes(3) == levels.astype("<i2").tobytes()


def test_we_read_what_the_standard_library_writes():
    with wave.open(stream := io.BytesIO(), "wb") as file:
        file.setparams((1, 3, 16000, 0, "NONE", ""))
        file.writeframes(bytes.fromhex("010000 ffffff"))
    samples, rate = read_wav(stream.getvalue(), mono=True)
    assert rate == 16000
    np.testing.assert_array_equal(samples, np.array([2**-23, -(2**-23)], np.float32))


def test_samples_round_trip_within_half_a_level(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1 - 2**-15, 500)
    write_wav(tmp_path / "a.wav", samples, 8000)
    read, rate = read_wav(tmp_path / "a.wav", mono=True)
    assert rate == 8000
    np.testing.assert_allclose(read, samples, rtol=0, atol=2**-16 + 1e-9)


def test_the_extremes_are_written_without_wrapping_around(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([-1.0, 1.0]), 8000)
    read, _ = read_wav(tmp_path / "a.wav", mono=True)
    np.testing.assert_array_equal(read, np.array([-1, 1 - 2**-15], np.float32))


def data(values=(1, 2)):
    return chunk(b"data", struct.pack(f"<{len(values)}h", *values))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a WAV file: it holds 0 bytes"),
        (b"ID3\4" + bytes(40), "is not a WAV file"),
        (b"RF64" + GOOD[4:], "is not a WAV file"),
        (GOOD[:8] + b"AVI " + GOOD[12:], "is not a WAV file"),
        (GOOD[:-1], "is cut short: its header announces 52 bytes and it holds 51"),
        (riff(header(16), b"data" + struct.pack("<I", 9) + bytes(8)), "announces 9 bytes and 8"),
        (riff(header(16), b"data" + b"\xff" * 4 + bytes(8)), "announces 4294967295 bytes and 8"),
        (riff(header(16)), "has no samples"),
        (riff(chunk(b"LIST", b"")), "has no description"),
        (riff(data(), header(16)), "has its samples before their description"),
        (riff(header(16), data(())), "holds no samples"),
        (riff(header(16), chunk(b"data", b"123")), "no whole number of blocks of 2 bytes"),
        (riff(header(16, channels=0), data()), "0 channels of 16 bits"),
        (riff(header(16, rate=0), data()), "at 0 Hz"),
        (riff(header(16, block=3), data()), "in blocks of 3 bytes"),
        (riff(chunk(b"fmt ", bytes(14)), data()), "in 14 bytes instead of 16"),
        (riff(header(12, block=2), data()), "12-bit samples of integer type"),
        (riff(header(16, code=3), data()), "16-bit samples of floating type"),
        (riff(header(8, code=7), data()), "8-bit samples of mu-law type.*ffmpeg"),
        (riff(header(4, code=17, block=256), data()), "IMA ADPCM type.*ffmpeg"),
        (riff(header(16, code=0x1234), data()), "unknown type 0x1234"),
        (riff(extensible(16, code=0x55), data()), "16-bit samples of MP3 type"),
        (riff(extensible(16, tail=bytes(14)), data()), "unknown type 0100"),
        (riff(header(16, code=0xFFFE), data()), "extensible header of 16 < 40 bytes"),
        (riff(header(32, code=3), chunk(b"data", struct.pack("<f", np.nan))), "not finite"),
        (riff(header(64, code=3), chunk(b"data", struct.pack("<d", 1e300))), "not finite"),
    ],
)
def test_an_invalid_file_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "speech.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"speech.wav .*{message}"):
        read_wav(path)
    with pytest.raises(ValueError, match="member 7 "):
        read_wav(content, name="member 7")
    with pytest.raises(ValueError, match=f"^given content .*{message}"):
        read_wav(content)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_truncated_anywhere_is_refused(length):
    with pytest.raises(ValueError, match="given content "):
        read_wav(GOOD[:length])


def test_a_file_truncated_after_its_last_sample_is_refused():
    content = riff(header(16), data(), chunk(b"LIST", b"metadata"))
    with pytest.raises(ValueError, match="is cut short"):
        read_wav(content[:-3])


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_files_are_read_or_refused_and_never_crash(draw):
    fmt, body, _ = draw.draw(st.sampled_from(list(FORMATS.values())))
    content = bytearray(riff(chunk(b"LIST", b"odd"), fmt, chunk(b"data", body)))
    for _ in range(draw.draw(st.integers(0, 3))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(content)))
    try:
        samples, rate = read_wav(bytes(content[:cut]))
    except ValueError as error:
        assert str(error).startswith("given content ")
    else:
        assert samples.dtype == np.float32 and samples.ndim == 2 and samples.size > 0
        assert np.isfinite(samples).all() and rate > 0


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80))
def test_arbitrary_bytes_after_a_valid_start_never_crash(rest):
    try:
        read_wav(b"RIFF" + struct.pack("<I", 4 + len(rest)) + b"WAVE" + rest)
    except ValueError as error:
        assert str(error).startswith("given content ")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_wav(tmp_path / "absent.wav")


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(0), 8000, r"shape \(0,\)"),
        (np.zeros((2, 2, 2)), 8000, r"shape \(2, 2, 2\)"),
        (np.array([0.5, 1.5]), 8000, "largest sample is 1.5"),
        (np.array([0.5, np.nan]), 8000, "largest sample is nan"),
        (np.zeros(3, np.int32), 8000, "dtype int32"),
        (np.zeros(3), 0, "sample rate 0"),
        (np.zeros((1, 40000)), 8000, "exceed"),
    ],
)
def test_invalid_samples_are_refused_and_leave_no_file(samples, rate, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_wav(tmp_path / "a.wav", samples, rate)
    assert list(tmp_path.iterdir()) == []
