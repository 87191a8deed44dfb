"""Spectra and filters against torch, torchaudio and librosa. Optional: run with `-m parity`."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.data import LogMel, WhisperFeatures, mel_filterbank, mfcc, stft

pytestmark = pytest.mark.parity

RATE, SIZE = 8000, 256
BANDS = [(0, 4000), (60, 3700)]


def speech_like():
    """Harmonics that glide and fade, with noise, within [-1, 1]."""
    rng = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    pitch = np.cumsum(120 + 40 * np.sin(5 * time)) / RATE
    voice = sum(np.sin(2 * np.pi * k * pitch) / k for k in range(1, 20))
    signal = voice * np.sin(np.pi * time) ** 2 / 4 + 0.01 * rng.normal(size=RATE)
    return signal.astype(np.float32)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed (extra: parity)")


@pytest.fixture
def torchaudio():
    return pytest.importorskip("torchaudio", reason="torchaudio is not installed")


@pytest.fixture
def librosa():
    return pytest.importorskip("librosa", reason="librosa is not installed")


@pytest.mark.parametrize("frame_length", [SIZE, 200])
@pytest.mark.parametrize("center", [True, False])
def test_the_transform_equals_torch(torch, frame_length, center):
    samples = speech_like()
    theirs = torch.stft(
        torch.from_numpy(samples),
        SIZE,
        hop_length=80,
        win_length=frame_length,
        window=torch.hann_window(frame_length),
        center=center,
        pad_mode="constant",
        return_complex=True,
    )
    ours = stft(
        jnp.array(samples), frame_length=frame_length, hop=80, fft_length=SIZE, center=center
    )
    np.testing.assert_allclose(ours, theirs.numpy().T, rtol=0, atol=5e-5)


@pytest.mark.parametrize("frame_length", [SIZE, 200])
@pytest.mark.parametrize("center", [True, False])
def test_the_transform_equals_librosa(librosa, frame_length, center):
    samples = speech_like()
    theirs = librosa.stft(
        samples,
        n_fft=SIZE,
        hop_length=80,
        win_length=frame_length,
        window="hann",
        center=center,
        pad_mode="constant",
    )
    ours = stft(
        jnp.array(samples), frame_length=frame_length, hop=80, fft_length=SIZE, center=center
    )
    np.testing.assert_allclose(ours, theirs.T, rtol=0, atol=5e-5)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_filters_equal_librosa(librosa, scale, norm, band):
    theirs = librosa.filters.mel(
        sr=RATE,
        n_fft=SIZE,
        n_mels=30,
        fmin=band[0],
        fmax=band[1],
        htk=scale == "htk",
        norm=norm,
        dtype=np.float64,
    )
    ours = mel_filterbank(30, SIZE // 2 + 1, RATE, *band, scale=scale, norm=norm)
    np.testing.assert_allclose(ours, theirs.T, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_filters_equal_torchaudio(torchaudio, scale, norm, band):
    """Theirs are computed in float32, hence the tolerance."""
    theirs = torchaudio.functional.melscale_fbanks(
        SIZE // 2 + 1, *map(float, band), 30, RATE, norm=norm, mel_scale=scale
    )
    ours = mel_filterbank(30, SIZE // 2 + 1, RATE, *band, scale=scale, norm=norm)
    scale_of_filters = 1 if norm is None else ours.max()
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-5 * scale_of_filters)


def test_log_mel_features_and_cepstra_equal_librosa(librosa):
    samples = speech_like()
    theirs = librosa.feature.melspectrogram(
        y=samples, sr=RATE, n_fft=SIZE, hop_length=80, win_length=200, n_mels=40
    )
    log_mels = LogMel(RATE)(jnp.array(samples)[None])
    expected = np.log(np.maximum(theirs, 1e-6))
    np.testing.assert_allclose(log_mels[0], expected.T, rtol=0, atol=1e-4)
    cepstra = librosa.feature.mfcc(S=expected, n_mfcc=13)
    np.testing.assert_allclose(mfcc(log_mels)[0], cepstra.T, rtol=0, atol=2e-4)


def test_log_mel_features_and_cepstra_equal_torchaudio(torch, torchaudio):
    samples = speech_like()
    options = {
        "n_fft": SIZE,
        "win_length": 200,
        "hop_length": 80,
        "n_mels": 20,
        "pad_mode": "constant",
        "mel_scale": "htk",
    }
    signal = torch.from_numpy(samples)
    mels = torchaudio.transforms.MelSpectrogram(RATE, **options)(signal).numpy()
    log_mels = LogMel(RATE, num_mels=20, scale="htk", norm=None)(jnp.array(samples)[None])
    np.testing.assert_allclose(log_mels[0], np.log(np.maximum(mels, 1e-6)).T, rtol=0, atol=5e-4)
    cepstra = torchaudio.transforms.MFCC(RATE, 13, log_mels=True, melkwargs=options)(signal)
    # Theirs adds 1e-6 where ours takes the larger, at most 1e-3 apart at these levels.
    assert mels.min() > 1e-3
    np.testing.assert_allclose(mfcc(log_mels)[0], cepstra.numpy().T, rtol=0, atol=2e-3)


@pytest.mark.parametrize("num_mels", [80, 128])
def test_the_features_of_whisper_equal_those_of_transformers(num_mels):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    extract = transformers.WhisperFeatureExtractor(feature_size=num_mels)
    voice = np.tile(speech_like(), 60)  # 30 s at 16 kHz
    sounds = [voice[: 16_000 * 7 + 123], voice, np.zeros(1000, np.float32)]
    theirs = extract(sounds, sampling_rate=16_000, return_tensors="np")["input_features"]
    lengths = np.array([len(sound) for sound in sounds])
    padded = np.stack([np.pad(sound, (0, lengths.max() - len(sound))) for sound in sounds])
    ours = WhisperFeatures(num_mels)(jnp.asarray(padded), jnp.asarray(lengths))
    np.testing.assert_allclose(ours, np.swapaxes(theirs, 1, 2), rtol=0, atol=1e-4)
