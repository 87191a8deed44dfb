"""The features of Whisper against a loop in NumPy, and their independence of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import WhisperFeatures, mel_filterbank

FEATURES = WhisperFeatures(seconds=1)
COMPILED = jax.jit(FEATURES)


def sounds(*lengths, rate=16_000):
    """Return tones with noise, of the given numbers of samples."""
    rng = np.random.default_rng(0)
    time = np.arange(max(lengths)) / rate
    tones = [np.sin(2 * np.pi * 300 * (i + 1) * time) / 4 for i in range(len(lengths))]
    return (np.stack(tones) + 0.01 * rng.normal(size=(len(lengths), max(lengths)))).astype("f")


def by_hand(samples, num_mels, size=16_000, length=400, hop=160):
    padded = np.pad(np.float64(samples), (0, size - len(samples)))
    padded = np.pad(padded, length // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    frames = [padded[i * hop : i * hop + length] * window for i in range(size // hop)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    decades = np.log10(np.maximum(power @ mel_filterbank(num_mels, length // 2 + 1, size), 1e-10))
    return (np.maximum(decades, decades.max() - 8) + 4) / 4


@pytest.mark.parametrize("num_mels", [80, 128])
def test_features_equal_those_computed_by_hand(num_mels):
    (samples,) = sounds(9000)
    (found,) = WhisperFeatures(num_mels, seconds=1)(samples[None])
    assert found.shape == (100, num_mels)
    np.testing.assert_allclose(found, by_hand(samples, num_mels), atol=1e-4)


def test_samples_beyond_the_lengths_do_not_change_the_features():
    lengths = np.array([9000, 400, 0])
    samples = sounds(*lengths)
    padded = np.where(np.arange(9000)[None] < lengths[:, None], samples, np.nan)
    found = COMPILED(np.concatenate([padded, np.full((3, 500), np.nan, "f")], axis=1), lengths)
    for row, length in zip(range(2), lengths, strict=False):
        alone = FEATURES(samples[row : row + 1, :length])
        np.testing.assert_allclose(found[row], alone[0], atol=1e-4)
    np.testing.assert_allclose(found[2], (np.log10(1e-10) + 4) / 4, atol=1e-5)  # silence


def test_sixteen_bit_samples_are_those_of_the_same_sound():
    samples = np.round(sounds(5000) * 32768).astype(np.int16)
    np.testing.assert_allclose(
        COMPILED(samples), COMPILED(samples.astype(np.float32) / 32768), atol=1e-6
    )


def test_the_duration_is_30_seconds_by_default():
    shape = jax.eval_shape(WhisperFeatures(), jax.ShapeDtypeStruct((2, 70_000), jnp.float32)).shape
    assert shape == (2, 3000, 80)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FEATURES(np.zeros((1, 16_160), "f")), "16160 samples are 1.01 s .* than the 1 s"),
        (lambda: FEATURES(np.zeros(100, "f")), r"shape \(100,\)"),
        (lambda: FEATURES(np.zeros((1, 100), "f"), np.array([101])), r"length 101 is not in"),
        (lambda: FEATURES(np.zeros((1, 100), np.int32)), "int32"),
        (lambda: WhisperFeatures(seconds=0), "seconds=0"),
        (lambda: WhisperFeatures(sample_rate=8000), "8000"),
        (lambda: WhisperFeatures(num_mels=300), "too many"),
    ],
)
def test_a_wrong_sound_or_number_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
