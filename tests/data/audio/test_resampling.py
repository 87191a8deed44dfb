"""Resampling against scipy with the same filter, and its effect on tones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from jaxnets.data import resample
from jaxnets.data.audio.resampling import resampling_filter


@pytest.mark.parametrize(
    ("from_rate", "to_rate"),
    [(16000, 8000), (8000, 16000), (44100, 16000), (3, 7), (8000, 11025), (5, 1)],
)
def test_it_equals_scipy_with_the_same_filter(from_rate, to_rate):
    random, times = np.random.default_rng(0), (1, 50, 1003)
    samples = [random.normal(size=(2, time)).astype(np.float32) for time in times]
    divisor = np.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor
    impulse = resampling_filter(up, down, num_zeros=8, attenuation=60)
    options = {"num_zeros": 8, "attenuation": 60}
    call = functools.partial(resample, from_rate=from_rate, to_rate=to_rate, **options)
    results = jax.jit(functools.partial(jax.tree.map, call))(samples)
    for x, found in zip(samples, results, strict=True):
        expected = signal.resample_poly(x.astype(np.float64), up, down, axis=1, window=impulse)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("up", "down"), [(1, 2), (2, 1), (160, 441)])
def test_the_filter_has_the_documented_pass_and_stop_band(up, down):
    """Against the frequency response of the filter at half a million frequencies."""
    impulse = resampling_filter(up, down)
    response = np.fft.rfft(impulse, 2**20)
    # Frequencies as fractions of the lower Nyquist frequency.
    frequencies = np.linspace(0, max(up, down), len(response))
    decibels = 20 * np.log10(np.maximum(np.abs(response), 1e-12))
    assert np.abs(decibels[frequencies <= 0.84]).max() < 0.01
    assert decibels[frequencies >= 1].max() < -79
    np.testing.assert_array_equal(impulse, impulse[::-1])


def test_a_tone_keeps_its_pitch_level_and_phase():
    def tone(rate):
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate)

    found = jax.jit(lambda x: resample(x, 44100, 16000))(tone(44100).astype(np.float32))
    middle = slice(1000, -1000)
    np.testing.assert_allclose(found[middle], tone(16000)[middle], atol=2e-4)


def test_frequencies_that_would_alias_are_removed():
    tone = np.sin(2 * np.pi * 5000 * np.arange(16000) / 16000)  # above the new Nyquist frequency
    found = np.asarray(jax.jit(lambda x: resample(x, 16000, 8000))(tone.astype(np.float32)))
    assert np.abs(found[500:-500]).max() < 2e-4


def test_equal_rates_and_empty_signals_change_nothing():
    samples = jnp.arange(4.0)
    np.testing.assert_array_equal(resample(samples, 8000, 8000), samples)
    assert resample(jnp.zeros((2, 0)), 8000, 4000).shape == (2, 0)


def test_leading_axes_are_signals_and_compiled_equals_eager():
    samples = jnp.array(np.random.default_rng(0).normal(size=(2, 3, 40)), jnp.float32)
    together = jax.jit(lambda x: resample(x, 4, 3))(samples)
    assert together.shape == (2, 3, 30)
    np.testing.assert_allclose(together[1, 2], resample(samples[1, 2], 4, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((jnp.zeros(3, jnp.int16), 1, 2), {}, "dtype int16"),
        ((jnp.zeros(()), 1, 2), {}, r"shape \(\)"),
        ((jnp.zeros(3), 0, 2), {}, "rates 0 and 2 must be positive integers"),
        ((jnp.zeros(3), 44100.0, 8000), {}, "rates 44100.0 and 8000 must be positive integers"),
        ((jnp.zeros(3), 44100, 44099), {}, "44099/44100 .* above 2048"),
        ((jnp.zeros(3), 1, 2), {"num_zeros": 5}, "num_zeros above 5.0"),
        ((jnp.zeros(3), 1, 2), {"num_zeros": 0}, "num_zeros 0"),
        ((jnp.zeros(3), 1, 2), {"attenuation": 20}, "at least 50 dB"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        resample(*arguments, **options)
