"""Resampling against scipy with the same filter, and by what it does to tones."""

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
@pytest.mark.parametrize("time", [1, 50, 1003])
def test_it_equals_scipy_with_the_same_filter(from_rate, to_rate, time):
    samples = np.random.default_rng(0).normal(size=(2, time)).astype(np.float32)
    divisor = np.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor
    taps = resampling_filter(up, down, num_zeros=8, attenuation=60)
    expected = signal.resample_poly(samples.astype(np.float64), up, down, axis=1, window=taps)
    found = resample(jnp.array(samples), from_rate, to_rate, num_zeros=8, attenuation=60)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("up", "down"), [(1, 2), (2, 1), (160, 441)])
def test_the_filter_has_the_documented_pass_and_stop_band(up, down):
    """Against the response of the filter at 20,000 frequencies."""
    taps = resampling_filter(up, down)
    slower = max(up, down)
    # Frequencies as parts of the lower Nyquist frequency.
    frequencies = np.concatenate([np.linspace(0, 0.84, 10_000), np.linspace(1, slower, 10_000)])
    _, response = signal.freqz(taps, worN=frequencies * np.pi / slower)
    decibels = 20 * np.log10(np.maximum(np.abs(response), 1e-12))
    assert np.abs(decibels[:10_000]).max() < 0.01
    assert decibels[10_000:].max() < -79
    np.testing.assert_array_equal(taps, taps[::-1])


def test_a_tone_keeps_its_pitch_level_and_phase():
    def tone(rate):
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate)

    found = resample(jnp.array(tone(44100), jnp.float32), 44100, 16000)
    middle = slice(1000, -1000)
    np.testing.assert_allclose(found[middle], tone(16000)[middle], atol=2e-4)


def test_what_would_be_aliased_is_removed():
    tone = np.sin(2 * np.pi * 5000 * np.arange(16000) / 16000)  # above the new Nyquist frequency
    found = resample(jnp.array(tone, jnp.float32), 16000, 8000)
    assert np.abs(found[500:-500]).max() < 2e-4


def test_equal_rates_and_empty_signals_change_nothing():
    samples = jnp.arange(4.0)
    np.testing.assert_array_equal(resample(samples, 8000, 8000), samples)
    assert resample(jnp.zeros((2, 0)), 8000, 4000).shape == (2, 0)


def test_leading_axes_are_signals_and_the_program_can_be_compiled():
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
