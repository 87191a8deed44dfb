"""Spectra against NumPy loops, tones in known bins, and independence of padding."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dct

from jaxnets.data import LogMel, mel_filterbank, mfcc, standardize, stft, to_waveform
from jaxnets.data.audio.spectrogram import frame, num_valid_frames

LOG_MEL = LogMel(8000)
COMPILED = jax.jit(LOG_MEL)  # compiled once for each shape, mostly that of `signals`
LENGTHS = np.array([1000, 437, 0, 1], np.int32)


def signals(batch=4, time=1000, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, time)).astype(np.float32) / 10


def tone(hertz, rate=8000, time=8000):
    return np.sin(2 * np.pi * hertz * np.arange(time) / rate).astype(np.float32)


def frames_by_hand(samples, length, hop, center):
    """Every frame sample by sample."""
    if center:
        starts = [middle - length // 2 for middle in range(0, len(samples) + 1, hop)]
    else:
        starts = range(0, len(samples) - length + 1, hop)
    frames = [
        [samples[i] if 0 <= i < len(samples) else 0 for i in range(start, start + length)]
        for start in starts
    ]
    return np.array(frames if len(samples) else []).reshape(-1, length)


# Framing


CENTERS = (True, False)
SIZES = ((4, 2), (6, 4), (5, 5), (4, 7), (3, 1), (1, 1))
TIMES = (0, 1, 3, 12, 13, 20)


@functools.cache
def frames_of_all_cases():
    """Return the frames of every case, computed in one compiled program."""
    cases = list(itertools.product(TIMES, SIZES, CENTERS))

    @jax.jit
    def cut(signals):
        return [frame(signals[time], *size, center=center) for time, size, center in cases]

    return dict(zip(cases, cut({time: np.arange(1, time + 1) for time in TIMES}), strict=True))


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize(("length", "hop"), SIZES)
@pytest.mark.parametrize("time", TIMES)
def test_frames_equal_those_cut_by_hand(time, length, hop, center):
    samples = np.arange(1, time + 1)
    found = frames_of_all_cases()[time, (length, hop), center]
    expected = frames_by_hand(samples, length, hop, center)
    assert found.shape == (num_valid_frames(time, length, hop, center=center), length)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("length", "hop"), [(4, 2), (5, 5), (4, 7), (1, 1)])
def test_reflected_frames_equal_those_of_a_signal_padded_by_numpy(length, hop):
    for time in (6, 13):
        samples = np.arange(1, time + 1)
        padded = np.pad(samples, (length // 2, length - length // 2), mode="reflect")
        starts = range(0, time + 1, hop)
        expected = np.stack([padded[start : start + length] for start in starts])
        found = frame(jnp.asarray(samples), length, hop, pad_mode="reflect")
        np.testing.assert_array_equal(found, expected)


def test_frames_of_many_signals_are_counted_alike():
    lengths = np.arange(20)
    for center in (True, False):
        counts = num_valid_frames(lengths, 8, 3, center=center)
        cut = functools.partial(frame, frame_length=8, hop=3, center=center)
        singles = [
            jax.eval_shape(cut, jax.ShapeDtypeStruct((n,), jnp.float32)).shape[0] for n in lengths
        ]
        np.testing.assert_array_equal(counts, singles)
        assert counts.dtype == lengths.dtype


# Fourier transform


@pytest.mark.parametrize("frame_length", [16, 12, 11])
def test_the_transform_equals_its_formula_in_a_numpy_loop(frame_length):
    samples, size, hop = signals(1, 50)[0].astype(np.float64), 16, 5
    transform = functools.partial(stft, frame_length=frame_length, hop=hop, fft_length=16)
    found = np.asarray(jax.jit(transform)(samples.astype(np.float32)))
    start = (size - frame_length) // 2
    for t in range(found.shape[0]):
        for k in range(size // 2 + 1):
            total = 0
            for n in range(frame_length):
                window = 0.5 - 0.5 * np.cos(2 * np.pi * n / frame_length)
                index = t * hop + start + n - size // 2
                if 0 <= index < len(samples):
                    angle = -2j * np.pi * k * (start + n) / size
                    total += window * samples[index] * np.exp(angle)
            np.testing.assert_allclose(found[t, k], total, atol=1e-6)


def test_the_energy_of_a_frame_is_that_of_its_spectrum():
    """Parseval: sum |x|^2 = (1 / N) sum |X|^2, all bins but the first and last twice."""
    samples = signals(1, 256)[0]
    transform = jax.jit(functools.partial(stft, frame_length=256, hop=256, center=False))
    spectrum = np.asarray(transform(samples), np.complex128)[0]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    twice = np.full(129, 2.0)
    twice[[0, -1]] = 1
    energy = (twice * np.abs(spectrum) ** 2).sum() / 256
    np.testing.assert_allclose(energy, ((samples * window) ** 2).sum(), rtol=1e-5)


def test_the_amplitude_of_a_tone_on_a_bin_is_half_the_sum_of_the_window():
    """A sine of amplitude 1 gives N / 4 in its bin and half of it in the two neighbors."""
    transform = jax.jit(functools.partial(stft, frame_length=256, hop=128, center=False))
    spectrum = np.abs(transform(tone(1000)))
    np.testing.assert_allclose(spectrum[:, 32], 64, rtol=1e-4)
    np.testing.assert_allclose(spectrum[:, [31, 33]], 32, rtol=1e-3)
    assert np.delete(spectrum, [31, 32, 33], axis=1).max() < 0.02


# Mel filters


def hertz_by_hand(num_mels, low, high, scale):
    """Return the filter edges in hertz, from the two published formulas."""
    if scale == "htk":

        def to_mel(f):
            return 2595 * np.log10(1 + f / 700)

        def to_hertz(m):
            return 700 * (10 ** (m / 2595) - 1)
    else:

        def to_mel(f):
            return f * 3 / 200 if f < 1000 else 15 + 27 * np.log(f / 1000) / np.log(6.4)

        def to_hertz(m):
            return m * 200 / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27)

    step = (to_mel(high) - to_mel(low)) / (num_mels + 1)
    return [to_hertz(to_mel(low) + i * step) for i in range(num_mels + 2)]


@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("band", [(0, 4000), (100, 3500), (1200, 3800)])
def test_filters_equal_triangles_computed_by_hand(band, scale, norm):
    filters = mel_filterbank(10, 129, 8000, *band, scale=scale, norm=norm)
    edges, expected = hertz_by_hand(10, *band, scale), np.zeros((129, 10))
    for m in range(10):
        left, center, right = edges[m : m + 3]
        for k in range(129):
            f = k * 8000 / 256
            height = 0
            if left < f <= center:
                height = (f - left) / (center - left)
            elif center < f < right:
                height = (right - f) / (right - center)
            if norm == "slaney":
                height *= 2 / (right - left)
            expected[k, m] = height
    np.testing.assert_allclose(filters, expected, atol=1e-7, rtol=1e-5)


def test_filters_of_height_one_sum_to_one_between_the_outer_centers():
    filters = mel_filterbank(20, 513, 16000, scale="htk", norm=None)
    centers = hertz_by_hand(20, 0, 8000, "htk")[1:-1]
    frequencies = np.arange(513) * 16000 / 1024
    inner = (frequencies >= centers[0]) & (frequencies <= centers[-1])
    np.testing.assert_allclose(filters[inner].sum(axis=1), 1, rtol=1e-5)


# Log-mel features


@functools.cache
def features_of_tones():
    tones = (200, 1000, 2500, 3600)
    return dict(zip(tones, np.asarray(COMPILED(np.stack(list(map(tone, tones))))), strict=True))


@pytest.mark.parametrize("hertz", [200, 1000, 2500, 3600])
def test_a_tone_is_loudest_in_the_filter_that_contains_its_frequency(hertz):
    features = features_of_tones()[hertz][10:-10]
    edges = hertz_by_hand(40, 0, 4000, "slaney")
    # The tone leaks into the neighboring bins, so a filter with its edge within one bin may win.
    loudest = features.argmax(axis=1)
    assert len(set(loudest.tolist())) == 1
    assert edges[loudest[0]] - 32 < hertz < edges[loudest[0] + 2] + 32


def test_features_equal_the_formula():
    transform = jax.jit(functools.partial(stft, frame_length=200, hop=80, fft_length=256))
    spectrum = np.asarray(transform(signals()), np.complex128)
    mels = np.abs(spectrum) ** 2 @ mel_filterbank(40, 129, 8000).astype(np.float64)
    np.testing.assert_allclose(COMPILED(signals()), np.log(mels), rtol=0, atol=1e-4)


def test_features_of_a_louder_signal_are_higher_by_the_logarithm_of_its_power():
    difference = np.asarray(COMPILED(2 * signals())) - np.asarray(COMPILED(signals()))
    np.testing.assert_allclose(difference, np.log(4), atol=1e-4)


def test_silence_has_the_floor():
    np.testing.assert_allclose(COMPILED(0 * signals()), np.log(1e-6), rtol=1e-6)


def test_sixteen_bit_samples_are_scaled_to_the_unit_interval():
    levels = np.random.default_rng(0).integers(-(2**15), 2**15, (4, 1000)).astype(np.int16)
    np.testing.assert_array_equal(COMPILED(levels), COMPILED((levels / 32768).astype(np.float32)))


@pytest.mark.parametrize("center", [True, False])
def test_padding_changes_nothing(center):
    extractor = dataclasses.replace(LOG_MEL, center=center)
    compiled = COMPILED if center else jax.jit(extractor)

    @jax.jit
    def unpadded(x):
        return [extractor(x[row : row + 1, :length])[0] for row, length in enumerate(LENGTHS)]

    samples = signals()
    features = np.asarray(compiled(samples, LENGTHS))
    noisy = samples.copy()
    for row, length in zip(noisy, LENGTHS, strict=True):
        row[length:] = np.nan
    np.testing.assert_array_equal(compiled(noisy, LENGTHS), features)
    longer = np.pad(samples, ((0, 0), (0, 77)), constant_values=9)
    np.testing.assert_allclose(
        compiled(longer, LENGTHS)[:, : features.shape[1]], features, atol=1e-5
    )
    counts = extractor.frames(LENGTHS)
    for row, (single, valid) in enumerate(zip(unpadded(samples), counts, strict=True)):
        assert single.shape[0] == valid
        np.testing.assert_allclose(features[row, :valid], single, atol=1e-5)
        assert not features[row, valid:].any()


def test_compiled_features_equal_eager_ones_and_a_batch_its_examples():
    samples = jnp.array(signals())
    compiled = np.asarray(COMPILED(signals()))
    np.testing.assert_allclose(compiled, LOG_MEL(samples), atol=1e-5)
    np.testing.assert_allclose(compiled[2:3], COMPILED(signals()[2:3]), atol=1e-5)


def test_features_have_a_finite_gradient_even_of_silence():
    samples = signals(2, 400)
    samples[1] = 0
    gradient = jax.jit(jax.grad(lambda x: LOG_MEL(x, jnp.array([300, 400])).sum()))(samples)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all()
    assert np.any(gradient[0, :300]) and not np.any(gradient[0, 300:])


def test_defaults_are_25_and_10_milliseconds_at_every_rate():
    for rate, expected in ((8000, (1, 101, 40)), (16000, (1, 101, 40)), (44100, (1, 101, 40))):
        assert jax.eval_shape(LogMel(rate), jnp.zeros((1, rate))).shape == expected
    explicit = LogMel(8000, frame_length=200, hop=80, fft_length=256)
    np.testing.assert_array_equal(jax.jit(explicit)(signals()), COMPILED(signals()))


def test_float64_stays_float64(enable_x64):
    samples = jax.ShapeDtypeStruct((1, 400), jnp.float64)
    features = jax.eval_shape(LOG_MEL, samples)
    outputs = [features, *(jax.eval_shape(f, features) for f in (mfcc, standardize))]
    assert {output.dtype.name for output in outputs} == {"float64"}


@pytest.mark.parametrize("length", [-1, 1001])
def test_a_wrong_length_is_refused_or_makes_every_frame_nan(length):
    lengths = np.array([length, 500, 500, 500], np.int32)
    with pytest.raises(ValueError, match=f"length {length} is not in"):
        LOG_MEL(jnp.array(signals()), lengths)
    features = np.asarray(COMPILED(signals(), lengths))
    assert np.isnan(features[0]).all() and np.isfinite(features[1:]).all()


# Cepstra and standardizing


def test_cepstra_equal_the_orthonormal_cosine_transform():
    features = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    expected = dct(features.astype(np.float64), type=2, norm="ortho", axis=-1)
    all_coefficients, default = jax.jit(lambda x: (mfcc(x, 40), mfcc(x)))(features)
    np.testing.assert_allclose(all_coefficients, expected, atol=2e-6)
    np.testing.assert_allclose(default, expected[..., :13], atol=2e-6)


def test_standardized_features_have_mean_zero_and_variance_one_over_valid_frames():
    features = np.random.default_rng(0).normal(3, 5, (3, 20, 4)).astype(np.float32)
    lengths = np.array([20, 7, 0])
    found = np.asarray(jax.jit(standardize)(features, lengths))
    for row, length in enumerate(lengths[:2]):
        valid = features[row, :length].astype(np.float64)
        expected = (valid - valid.mean(0)) / valid.std(0)
        np.testing.assert_allclose(found[row, :length], expected, atol=1e-5)
        assert not found[row, length:].any()
    assert not found[2].any()


def test_standardized_features_do_not_depend_on_padding_or_loudness():
    features = np.random.default_rng(0).normal(size=(1, 9, 4)).astype(np.float32)
    padded = np.pad(features + 5, ((0, 0), (0, 6), (0, 0)), constant_values=np.nan)
    found = jax.jit(standardize)(padded, np.array([9]))
    np.testing.assert_allclose(found[:, :9], jax.jit(standardize)(features), atol=1e-5)


# Arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_waveform(jnp.zeros(3, jnp.int32)), "dtype int32"),
        (lambda: LOG_MEL(jnp.zeros(400)), r"shape \(400,\)"),
        (lambda: LOG_MEL(jnp.zeros((2, 400)), jnp.array([1])), "do not fit 2 rows"),
        (lambda: LOG_MEL(jnp.zeros((1, 400)), jnp.array([1.0])), "one integer for each"),
        (lambda: frame(jnp.zeros(9), 0, 1), "frame length 0"),
        (lambda: frame(jnp.zeros(9), 3, 0), "hop 0"),
        (lambda: stft(jnp.zeros(9), frame_length=5, hop=1), "must be even .* give for example 8"),
        (lambda: stft(jnp.zeros(9), frame_length=8, hop=1, fft_length=6), "FFT length 6"),
        (lambda: mel_filterbank(40, 129, 8000, 0, 4001), "from 0 to 4001 Hz"),
        (lambda: mel_filterbank(40, 129, 8000, 300, 300), "from 300 to 300 Hz"),
        (lambda: mel_filterbank(0, 129, 8000), "0 filters"),
        (lambda: mel_filterbank(200, 129, 8000), "covers no bin: 200 filters are too many"),
        (lambda: mel_filterbank(40, 129, 8000, scale="bark"), "scale 'bark'"),
        (lambda: mel_filterbank(40, 129, 8000, norm="l2"), "norm 'l2'"),
        (lambda: LogMel(8000, num_mels=200), "filters are too many"),
        (lambda: LogMel(8000, high=5000), "to 5000 Hz"),
        (lambda: LogMel(8000, fft_length=128), "FFT length 128"),
        (lambda: LogMel(8000, floor=0.0), "floor 0.0"),
        (lambda: mfcc(jnp.zeros((2, 13)), 14), "14 coefficients of 13"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint64"])
def test_frames_of_lengths_of_every_integer_type_are_those_of_int32(dtype):
    lengths = np.array([0, 7, 8, 127])
    for center in (True, False):
        expected = num_valid_frames(lengths, 300, 3, center=center)
        found = num_valid_frames(lengths.astype(dtype), 300, 3, center=center)
        np.testing.assert_array_equal(found, expected)
